"""When a feature starts, or ceases, to matter, and when a metric leaves its trend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lib_lightning._deprecated import renamed_arguments
from lib_lightning.lineage.change_detection import Change, ChangeDetector
from lib_lightning.lineage.events import Event, Kind

# Shares below it are as none: those of features that are not there.
FLOOR = 1e-6
# The least that is told from 0 of a metric that is followed by its logarithm.
_NOTHING = 1e-12
# Snapshots after which a feature that is not there any more is forgotten.
_FORGET_AFTER = 10
# Standard deviations of an increment, in log10, that are no surprise: 5% of a share, 2% of a metric.
_RESOLUTION_OF_SHARES = 0.02
_RESOLUTION_OF_NUMBERS = 0.01
# Snapshots within which a newborn feature that comes to matter came from nothing; later it has a history of its own.
_CHILDHOOD = 3
# The series of a feature that is not there.
_NOT_THERE = 0


class EmergenceDetector:
    """Finds, snapshot by snapshot, the features that emerge or fade and the metrics that rise or fall.

    A feature is followed by its share of its layer's importance, a metric by its value, both as logarithms (a metric
    whose first value other than 0 is negative: as it is). An event is a change that

    - is no chance, given how the series went so far: a steady trend is no event, nor is what scatters about it;
    - is large: a factor of ``min_change`` for features, ``min_metric_change`` for metrics;
    - matters: the share is at least ``min_share`` before or after it;
    - lasts: it is there at two snapshots in a row. Every event is therefore seen one snapshot late at least, and says
      since when, as its ``onset``.

    A feature *emerges* where its share passes ``min_share`` and *fades* where it falls below; above, it *rises* and
    *falls*. One that is born later than the first few snapshots has had no share until then: if it matters within three
    snapshots, it emerges once it has been seen to stay. One that dies fades once it has been gone for three snapshots.
    Each of these follows a birth or a death, and says that it mattered; births and deaths themselves are for others to
    report.

    Args:
        false_alarms: False events per snapshot, a bound: in ``N`` snapshots at most so many times ``N`` events are
            expected where nothing changes, half of them of features and half of metrics.
        min_change: Least factor by which a share changes.
        min_metric_change: Least factor by which a metric changes; its log10 is the least change of one that is followed
            as it is.
        min_share: Share of the layer's importance from which on a feature matters.

    Raises:
        ValueError: If a setting is outside its range.

    Note:
        The bound assumes that, where nothing changes, the increments of each logarithm from snapshot to snapshot are
        independent and normal, with a mean and variance of their own (see `ChangeDetector`); features and metrics may
        depend on each other in any way. Measured on series that wander far enough for every change to be large: 0.04 of
        the bound. Training is not like that all the time: curves that bend smoothly have increments that resemble their
        neighbours, and a bend is an event if it is large enough. With increments of autocorrelation 0.7 the same series
        had twice as many events as the bound allows. Births and deaths are taken at their word: a feature that is taken
        for another one, for two snapshots in a row, may well emerge.

    Example:
        >>> detector = EmergenceDetector()
        >>> for step in range(0, 1000, 50):
        ...     importance = torch.tensor([0.7, 0.3, 0.0001 if step < 500 else 0.1])
        ...     for event in detector.update(step, {"mlp": (torch.tensor([0, 1, 2]), importance)}):
        ...         print(event.text)
        feature mlp/2 emerged at step 550: its share of the layer's importance rose from 0.01% to 9.1% since step 450
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
                raise ValueError(f"{name} is a factor above 1; got {factor}.")
        if not FLOOR < min_share < 1:
            raise ValueError(f"min_share is a share of a layer's importance, between {FLOOR} and 1; got {min_share}.")
        self.min_share = min_share
        self._features = ChangeDetector(
            false_alarms / 2,
            min_change=math.log10(min_change),
            min_level=math.log10(min_share),
            resolution=_RESOLUTION_OF_SHARES,
            persistence=2,
        )
        self._metrics = ChangeDetector(
            false_alarms / 2,
            min_change=math.log10(min_metric_change),
            resolution=_RESOLUTION_OF_NUMBERS,
            persistence=2,
        )
        # Of each lineage, in the order of its series, the number of snapshots in a row at which it was not there.
        self._absent: dict[tuple[str, int], int] = {}
        # Of each newborn lineage that does not matter yet, and has no series, the number of its snapshots.
        self._small: dict[tuple[str, int], int] = {}
        # Of each metric, in the order of its series, whether it is followed by its logarithm; None for not known yet.
        self._logarithmic: dict[str, bool | None] = {}

    @renamed_arguments(numbers="scalars", gap="relative_interval")
    def update(
        self,
        step: int,
        importances: Mapping[str, tuple[Tensor, Tensor]],
        numbers: Mapping[str, float] | None = None,
        labels: Mapping[str, Sequence[str]] | None = None,
        gap: float = 1.0,
    ) -> list[Event]:
        """Take in one snapshot.

        Args:
            step: Its training step.
            importances: For each node layer the lineages of its features, shape ``(r,)``, int64, and their importances,
                shape ``(r,)``. A layer that is left out, or has no importance at all, is unknown at this snapshot.
            numbers: Metrics by name; NaN, infinity and what is left out are unknown.
            labels: For each node layer that has any, a name for each feature; "" for none.
            gap: Distance from the snapshot before, in regular distances; see `ChangeDetector.update`.

        Returns:
            The events seen at this snapshot: features in the order of layers and lineages, then metrics.
        """
        events = self._update_features(step, importances, labels or {}, gap)
        return events + self._update_metrics(step, numbers or {}, gap)

    def _update_features(
        self,
        step: int,
        importances: Mapping[str, tuple[Tensor, Tensor]],
        labels: Mapping[str, Sequence[str]],
        gap: float,
    ) -> list[Event]:
        shares = _shares(importances)
        known = {layer for layer, _ in shares}
        self._take_on({lineage: share for lineage, share in shares.items() if lineage not in self._absent}, known)
        values = [math.log10(FLOOR)]
        for lineage, absent in self._absent.items():
            if lineage[0] in known:
                self._absent[lineage] = 0 if lineage in shares else absent + 1
            # Missed once, it may be back at the next snapshot.
            share = shares.get(lineage, FLOOR if self._absent[lineage] > 1 else math.nan)
            values.append(math.nan if math.isnan(share) else math.log10(max(share, FLOOR)))
        changes = self._features.update(step, torch.tensor(values, dtype=torch.float64), gap)

        lineages = list(self._absent)
        names = {
            (layer, int(i)): name
            for layer, of_layer in labels.items()
            if layer in importances
            for i, name in zip(importances[layer][0].tolist(), of_layer, strict=True)
        }
        found = [(lineages[c.series - 1], c) for c in changes if c.series != _NOT_THERE]
        self._forget()
        return [self._feature_event(step, lineage, change, names.get(lineage, "")) for lineage, change in found]

    def _take_on(self, new: dict[tuple[str, int], float], known: set[str]) -> None:
        if not len(self._features):
            self._features.add(1)
        # Who is born while nobody has a history yet has none either.
        late = self._features.known(_NOT_THERE) >= self._features.min_before
        gone = [lineage for lineage in self._small if lineage not in new and lineage[0] in known]
        for lineage in gone:
            del self._small[lineage]
        for lineage in new:
            self._small[lineage] = self._small.get(lineage, 0) + 1
        large = [lineage for lineage, share in new.items() if share >= self.min_share or not late]
        grown = [lineage for lineage, n in self._small.items() if lineage not in large and n > _CHILDHOOD]
        self._features.add(len(large), like=_NOT_THERE if late else None)
        self._features.add(len(grown))
        for lineage in (*large, *grown):
            self._absent[lineage] = 0
            del self._small[lineage]

    def _forget(self) -> None:
        staying = [i for i, absent in enumerate(self._absent.values(), 1) if absent < _FORGET_AFTER]
        self._features.keep(torch.tensor([_NOT_THERE, *staying]))
        self._absent = {lineage: n for lineage, n in self._absent.items() if n < _FORGET_AFTER}

    def _feature_event(self, step: int, lineage: tuple[str, int], change: Change, label: str) -> Event:
        before, after = (0.0 if x <= math.log10(FLOOR) else _power(x) for x in (change.before, change.after))
        mattered, matters = before >= self.min_share, after >= self.min_share
        kind: Kind = (
            ("rose" if after > before else "fell") if mattered == matters else "emerged" if matters else "faded"
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

    def _update_metrics(self, step: int, numbers: Mapping[str, float], gap: float) -> list[Event]:
        for name, number in numbers.items():
            if self._logarithmic.get(name) is None:
                self._logarithmic[name] = number > 0 if math.isfinite(number) and number != 0 else None
        values = [_level(numbers.get(name, math.nan), bool(log)) for name, log in self._logarithmic.items()]
        changes = self._metrics.update(step, torch.tensor(values, dtype=torch.float64), gap)
        metrics = list(self._logarithmic.items())
        return [_metric_event(step, *metrics[change.series], change) for change in changes]

    def state_dict(self) -> dict[str, Any]:
        """State to go on from, of numbers, strings and tensors."""
        return {
            "features": self._features.state_dict(),
            "metrics": self._metrics.state_dict(),
            "absent": [[layer, number, absent] for (layer, number), absent in self._absent.items()],
            "small": [[layer, number, n] for (layer, number), n in self._small.items()],
            "logarithmic": dict(self._logarithmic),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; settings are this detector's own."""
        self._features.load_state_dict(state["features"])
        self._metrics.load_state_dict(state["metrics"])
        self._absent = {(layer, number): absent for layer, number, absent in state["absent"]}
        self._small = {(layer, number): n for layer, number, n in state["small"]}
        self._logarithmic = dict(state["logarithmic"])


def _shares(importances: Mapping[str, tuple[Tensor, Tensor]]) -> dict[tuple[str, int], float]:
    """Share of its layer's importance, of each lineage of all layers that have any."""
    shares: dict[tuple[str, int], float] = {}
    for layer, (ids, importance) in importances.items():
        whole = importance.double().sum()
        if whole > 0 and whole.isfinite():
            share = (importance.double() / whole).tolist()
            shares |= {(layer, i): x for i, x in zip(ids.tolist(), share, strict=True)}
    return shares


def _level(number: float, logarithmic: bool) -> float:
    if not logarithmic:
        return number
    # One that was positive and is no more has fallen below everything.
    return math.log10(max(number, _NOTHING)) if number < math.inf else math.nan


def _power(level: float) -> float:
    # To more digits than the logarithm has are only rounding.
    return float(f"{10**level:.12g}")


def _value(level: float) -> float:
    return 0.0 if level <= math.log10(_NOTHING) else _power(level)


def _metric_event(step: int, name: str, logarithmic: bool | None, change: Change) -> Event:
    before, after = (_value(x) if logarithmic else x for x in (change.before, change.after))
    return Event(
        "rose" if after > before else "fell",
        step,
        metric=name,
        before=before,
        after=after,
        evidence=change.evidence,
        onset=change.onset,
    )
