"""Detects when features become, or cease to be, important, and when metrics depart from their trend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lib_lightning._deprecated import renamed_arguments
from lib_lightning.errors import SettingError
from lib_lightning.lineage.change_detection import Change, ChangeDetector
from lib_lightning.lineage.events import Event, Kind

# Smaller shares are treated as this one, which is also the share of absent features.
FLOOR = 1e-6
# Smallest value that a metric on a logarithmic scale can have.
_MIN_METRIC = 1e-12
# Absent features are removed after this number of snapshots.
_FORGET_AFTER = 10
# Standard deviations of increments, in log10, that never count as evidence: 5% of a share, 2% of a metric.
_SHARE_RESOLUTION = 0.02
_METRIC_RESOLUTION = 0.01
# A new feature that becomes important within this number of snapshots has the history of an absent one, and later its
# own.
_NEWBORN_SNAPSHOTS = 3
# Index of the series of an absent feature.
_ABSENT = 0


class EmergenceDetector:
    """Detects, snapshot by snapshot, features that emerge or fade and metrics that rise or fall.

    The series of a feature is its share of the importance of its node layer, that of a metric its value, both in
    logarithms (unless the first non-zero value of a metric is negative). An event is a change that

    - is significant, given the series so far: a steady trend or scatter about it is not an event;
    - is large: a factor of ``min_change`` for features, ``min_metric_change`` for metrics;
    - is important: the share is at least ``min_share`` before or after it;
    - lasts for two snapshots in a row. Every event is therefore detected at least one snapshot late, and states when
      the change began, as its ``onset``.

    A feature *emerges* when its share rises above ``min_share`` and *fades* when it falls below; otherwise it *rises*
    or *falls*. A feature born after the first few snapshots had no share before: if it becomes important within three
    snapshots, it emerges at its second important one. A feature that dies fades after three snapshots. These events
    accompany the births and deaths of important features, which `FeatureTracker` reports for all features.

    Every series is tested twice: with increments that are taken to be independent, and with ones that may be
    autocorrelated, as those of smooth curves (``autocorrelated`` of `ChangeDetector`). Events are those of the first
    test. One is *abrupt* if the second has found a change of the same series as well, at a snapshot after its onset and
    not later than the event; each change is counted once. Other events are bends of smooth curves, or too small to be
    told from them.

    Args:
        false_alarms: Bound on the expected number of false events per snapshot if nothing changes, half of them for
            features and half for metrics. It is the bound on false abrupt events as well.
        min_change: Smallest factor by which a share changes.
        min_metric_change: Smallest factor by which a metric changes; its log10 is the smallest change of a metric that
            is not on a logarithmic scale.
        min_share: Share of the layer's importance from which a feature is important.

    Raises:
        SettingError: If a setting is outside its range.

    Note:
        The bound assumes that, if nothing changes, the increments of each logarithm from snapshot to snapshot are
        independent and normal with one mean and variance (see `ChangeDetector`); features and metrics may depend on
        each other in any way. On random walks with changes large enough to count, 0.03 times as many events as the
        bound allows were measured. Real training curves deviate from the assumption: increments of smooth curves
        resemble their neighbours, and a bend of the curve is an event if it is large enough. With an autocorrelation of
        0.7, the same random walks had six times as many events as the bound allows.

        For *abrupt* events the increments may be autocorrelated (autoregressive of first order, with the same
        correlation in all series). There are at most as many as changes that the second test reports, so what bounds
        its false alarms bounds false abrupt events; on those random walks there were 0.07 times as many as the bound
        allows. Neither bound holds for increments with heavy tails. A feature that grows as smoothly as all curves of
        its network move is not abrupt, however certain it is that it has grown.

        Births and deaths are not tested: a feature that is mistaken for a new one at two snapshots in a row may emerge.

    Example:
        >>> detector = EmergenceDetector()
        >>> for step in range(0, 1000, 50):
        ...     importance = torch.tensor([0.7, 0.3, 0.0001 if step < 500 else 0.1])
        ...     for event in detector.update(step, {"mlp": (torch.tensor([0, 1, 2]), importance)}):
        ...         print(event.text)
        feature mlp/2 emerged abruptly at step 550: its share of the layer's importance rose from 0.01% to 9.1% since
        step 450
    """

    def __init__(
        self,
        false_alarms: float = 0.05,
        min_change: float = 2.0,
        min_metric_change: float = 1.1,
        min_share: float = 0.01,
    ) -> None:
        for name, factor in {"min_change": min_change, "min_metric_change": min_metric_change}.items():
            if not 1 < factor < math.inf:
                raise SettingError(f"{name} must be a factor above 1; got {factor}.")
        if not FLOOR < min_share < 1:
            raise SettingError(f"min_share must be between {FLOOR} and 1; got {min_share}.")
        self.min_share = min_share
        self._features = _TwoTests(
            false_alarms=false_alarms / 2,
            min_change=math.log10(min_change),
            min_level=math.log10(min_share),
            resolution=_SHARE_RESOLUTION,
            persistence=2,
        )
        self._metrics = _TwoTests(
            false_alarms=false_alarms / 2,
            min_change=math.log10(min_metric_change),
            resolution=_METRIC_RESOLUTION,
            persistence=2,
        )
        # For each lineage, in the order of the series: the number of consecutive snapshots without it.
        self._absent: dict[tuple[str, int], int] = {}
        # For each new lineage that is not important yet, and has no series: the number of its snapshots.
        self._unimportant: dict[tuple[str, int], int] = {}
        # For each metric, in the order of the series: whether it is on a logarithmic scale; None if unknown yet.
        self._logarithmic: dict[str, bool | None] = {}

    @property
    def autocorrelation(self) -> float:
        """Autocorrelation of the increments of features so far, which abrupt events take into account."""
        return self._features.autocorrelation

    @renamed_arguments(numbers="scalars", gap="relative_interval")
    def update(
        self,
        step: int,
        importances: Mapping[str, tuple[Tensor, Tensor]],
        scalars: Mapping[str, float] | None = None,
        labels: Mapping[str, Sequence[str]] | None = None,
        relative_interval: float = 1.0,
    ) -> list[Event]:
        """Add one snapshot.

        Args:
            step: Its training step.
            importances: For each node layer the lineages of its features, shape ``(r,)``, int64, and their importances,
                shape ``(r,)``. Missing layers, and those without any importance, are unknown at this snapshot.
            scalars: Metrics by name; missing, NaN and infinite ones are unknown.
            labels: For each node layer that has any, a name for each feature; "" for none.
            relative_interval: Interval from the previous snapshot, divided by the regular one; see
                `ChangeDetector.update`.

        Returns:
            The events detected at this snapshot: features in the order of layers and lineages, then metrics.
        """
        events = self._update_features(step, importances, labels or {}, relative_interval)
        return events + self._update_metrics(step, scalars or {}, relative_interval)

    def _update_features(
        self,
        step: int,
        importances: Mapping[str, tuple[Tensor, Tensor]],
        labels: Mapping[str, Sequence[str]],
        relative_interval: float,
    ) -> list[Event]:
        shares = _shares(importances)
        known = {layer for layer, _ in shares}
        self._add_features({lineage: share for lineage, share in shares.items() if lineage not in self._absent}, known)
        values = [math.log10(FLOOR)]
        for lineage, absent in self._absent.items():
            if lineage[0] in known:
                self._absent[lineage] = 0 if lineage in shares else absent + 1
            # A single missing snapshot may be a failed match.
            share = shares.get(lineage, FLOOR if self._absent[lineage] > 1 else math.nan)
            values.append(math.nan if math.isnan(share) else math.log10(max(share, FLOOR)))
        changes = self._features.update(
            step, torch.tensor(values, dtype=torch.float64, device="cpu"), relative_interval
        )

        lineages = list(self._absent)
        names = {
            (layer, int(i)): name
            for layer, of_layer in labels.items()
            if layer in importances
            for i, name in zip(importances[layer][0].tolist(), of_layer, strict=True)
        }
        found = [
            (lineages[change.series - 1], change, abrupt) for change, abrupt in changes if change.series != _ABSENT
        ]
        self._forget()
        return [
            replace(self._feature_event(step, lineage, change, names.get(lineage, "")), abrupt=abrupt)
            for lineage, change, abrupt in found
        ]

    def _add_features(self, new: dict[tuple[str, int], float], known: set[str]) -> None:
        if not len(self._features):
            self._features.add(1)
        # Features present at the start have no prior history.
        late = self._features.num_increments(_ABSENT) >= self._features.min_before
        gone = [lineage for lineage in self._unimportant if lineage not in new and lineage[0] in known]
        for lineage in gone:
            del self._unimportant[lineage]
        for lineage in new:
            self._unimportant[lineage] = self._unimportant.get(lineage, 0) + 1
        large = [lineage for lineage, share in new.items() if share >= self.min_share or not late]
        grown = [lineage for lineage, n in self._unimportant.items() if lineage not in large and n > _NEWBORN_SNAPSHOTS]
        self._features.add(len(large), copy_of=_ABSENT if late else None)
        self._features.add(len(grown))
        for lineage in (*large, *grown):
            self._absent[lineage] = 0
            del self._unimportant[lineage]

    def _forget(self) -> None:
        staying = [i for i, absent in enumerate(self._absent.values(), 1) if absent < _FORGET_AFTER]
        self._features.keep(torch.tensor([_ABSENT, *staying], device="cpu"))
        self._absent = {lineage: n for lineage, n in self._absent.items() if n < _FORGET_AFTER}

    def _feature_event(self, step: int, lineage: tuple[str, int], change: Change, label: str) -> Event:
        before, after = (0.0 if x <= math.log10(FLOOR) else _power(x) for x in (change.before, change.after))
        was_important, is_important = before >= self.min_share, after >= self.min_share
        kind: Kind = (
            ("rose" if after > before else "fell")
            if was_important == is_important
            else "emerged"
            if is_important
            else "faded"
        )
        layer, number = lineage
        return Event(
            kind,
            step,
            layer,
            number,
            before=before,
            after=after,
            evidence=change.evidence,
            onset=change.onset,
            label=label,
        )

    def _update_metrics(self, step: int, scalars: Mapping[str, float], relative_interval: float) -> list[Event]:
        for name, value in scalars.items():
            if self._logarithmic.get(name) is None:
                self._logarithmic[name] = value > 0 if math.isfinite(value) and value != 0 else None
        values = [_to_level(scalars.get(name, math.nan), bool(log)) for name, log in self._logarithmic.items()]
        changes = self._metrics.update(step, torch.tensor(values, dtype=torch.float64, device="cpu"), relative_interval)
        metrics = list(self._logarithmic.items())
        return [
            replace(_metric_event(step, *metrics[change.series], change), abrupt=abrupt) for change, abrupt in changes
        ]

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and tensors from which `load_state_dict` restores the detector."""
        return {
            "features": self._features.state_dict(),
            "metrics": self._metrics.state_dict(),
            "absent": [[layer, number, absent] for (layer, number), absent in self._absent.items()],
            "small": [[layer, number, n] for (layer, number), n in self._unimportant.items()],
            "logarithmic": dict(self._logarithmic),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state; the settings stay those of this detector.

        If the state is of a version that did not test twice, the second test starts anew: events are not abrupt until
        it has seen a few snapshots.
        """
        self._features.load_state_dict(state["features"])
        self._metrics.load_state_dict(state["metrics"])
        self._absent = {(layer, number): absent for layer, number, absent in state["absent"]}
        self._unimportant = {(layer, number): n for layer, number, n in state["small"]}
        self._logarithmic = dict(state["logarithmic"])


class _TwoTests:
    """Tests the same series with independent and with autocorrelated increments.

    Args:
        settings: Settings of both detectors, as for `ChangeDetector`.
    """

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._plain = ChangeDetector(**settings)
        self._whitened = ChangeDetector(**settings, autocorrelated=True)
        # For each series: the latest snapshot at which the second one has reported a change that no event has used.
        self._reported: list[int | None] = []

    def __len__(self) -> int:
        return len(self._plain)

    @property
    def min_before(self) -> int:
        return self._plain.min_before

    @property
    def autocorrelation(self) -> float:
        return self._whitened.autocorrelation

    def num_increments(self, series: int) -> int:
        return self._plain.num_increments(series)

    def add(self, count: int, copy_of: int | None = None) -> None:
        self._plain.add(count, copy_of)
        self._whitened.add(count, copy_of)
        self._reported += [None] * count

    def keep(self, which: Tensor) -> None:
        self._plain.keep(which)
        self._whitened.keep(which)
        self._reported = [self._reported[i] for i in which.tolist()]

    def update(self, snapshot: int, values: Tensor, relative_interval: float) -> list[tuple[Change, bool]]:
        """Changes that the first one detects at a snapshot, each with whether the second one has detected it, too."""
        self.add(len(values) - len(self))
        for change in self._whitened.update(snapshot, values, relative_interval):
            self._reported[change.series] = snapshot
        found = []
        for change in self._plain.update(snapshot, values, relative_interval):
            reported = self._reported[change.series]
            abrupt = reported is not None and reported > change.onset
            if abrupt:
                self._reported[change.series] = None
            found.append((change, abrupt))
        return found

    def state_dict(self) -> dict[str, Any]:
        second = {"detector": self._whitened.state_dict(), "reported": list(self._reported)}
        return self._plain.state_dict() | {"autocorrelated": second}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._plain.load_state_dict(state)
        # States of versions that had one detector have no second one.
        second = state.get("autocorrelated")
        if second is None:
            self._whitened = ChangeDetector(**self._settings, autocorrelated=True)
            self._whitened.add(len(self))
            self._reported = [None] * len(self)
        else:
            self._whitened.load_state_dict(second["detector"])
            self._reported = list(second["reported"])


def _shares(importances: Mapping[str, tuple[Tensor, Tensor]]) -> dict[tuple[str, int], float]:
    """Each lineage's share of the importance of its layer, for layers with any importance."""
    shares: dict[tuple[str, int], float] = {}
    for layer, (ids, importance) in importances.items():
        total = importance.double().sum()
        if total > 0 and total.isfinite():
            share = (importance.double() / total).tolist()
            shares |= {(layer, i): x for i, x in zip(ids.tolist(), share, strict=True)}
    return shares


def _to_level(value: float, logarithmic: bool) -> float:
    if not logarithmic:
        return value
    # A metric that was positive before may reach 0, which has no logarithm.
    return math.log10(max(value, _MIN_METRIC)) if value < math.inf else math.nan


def _from_level(level: float) -> float:
    return 0.0 if level <= math.log10(_MIN_METRIC) else _power(level)


def _power(level: float) -> float:
    # Rounded to the digits that survive the logarithm.
    return float(f"{10**level:.12g}")


def _metric_event(step: int, name: str, logarithmic: bool | None, change: Change) -> Event:
    before, after = (_from_level(x) if logarithmic else x for x in (change.before, change.after))
    return Event(
        "rose" if after > before else "fell",
        step,
        metric=name,
        before=before,
        after=after,
        evidence=change.evidence,
        onset=change.onset,
    )
