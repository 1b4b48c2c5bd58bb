"""When events of a run happened, and how important their features become."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

# Detected when a change has lasted, and with the step of the last snapshot before it.
_CHANGES = ("emerged", "faded", "rose", "fell")
_BEGINNINGS, _ENDS = ("born", "split"), ("died", "merged")
_KEYS = ("step", "kind", "text", "layer", "lineage")
# Shares below are as good as none: as in the detection of changes.
_FLOOR = 1e-6
# Features that never have this share of their layer's importance do not matter, and often mix from sample to sample.
_IMPORTANT = 1e-3


class Shares(NamedTuple):
    """The features of a node layer in a snapshot.

    Attributes:
        ids: Lineage ids, shape ``(r,)``.
        share: Shares of the layer's importance, shape ``(r,)``.
        parents: Lineages that they have split from, -1 for none, shape ``(r,)``.
    """

    ids: np.ndarray
    share: np.ndarray
    parents: np.ndarray


@dataclass(frozen=True)
class Measured:
    """What a snapshot measures of features and of its graph.

    Attributes:
        shares: Its features, by node layer.
        metrics: Values of its metrics, by name.
    """

    shares: Mapping[str, Shares]
    metrics: Mapping[str, float | None]


class _Layer(NamedTuple):
    """Shares of a node layer over all ``T`` snapshots."""

    column: dict[int, int]
    share: np.ndarray  # (T, number of lineages), 0 where absent
    is_present: np.ndarray
    parents: np.ndarray  # at the first snapshot of each lineage


def placed_events(events: Sequence[Mapping[str, Any]], snapshots: Mapping[int, Measured]) -> list[dict[str, Any]]:
    """Describe events for the viewer.

    Args:
        events: Events as in the file of a run.
        snapshots: What all snapshots of the run measure, by step in increasing order.

    Returns:
        For each event ``step``, ``kind``, ``text``, ``layer`` and ``lineage`` as in the file; ``at``, the step of the
        first snapshot at which half of a change (of its logarithm, as it is detected) was done for good, since changes
        are detected when they have lasted, and gradual ones long after they began; ``step`` for other events; and
        ``share``, the largest share of its layer's importance that the feature has in any snapshot, None for metrics
        and features that are in none.

    Example:
        >>> event = {"step": 30, "kind": "emerged", "text": "...", "layer": "fc", "lineage": 1, "onset": 0}
        >>> event |= {"before": 0.0001, "after": 0.1}
        >>> shares = {0: 0.0001, 10: 0.0002, 20: 0.05, 30: 0.1}
        >>> nothing = np.array([-1, -1])
        >>> snapshots = {
        ...     step: Measured({"fc": Shares(np.array([0, 1]), np.array([1 - share, share]), nothing)}, {})
        ...     for step, share in shares.items()
        ... }
        >>> found = placed_events([event], snapshots)[0]
        >>> found["at"], found["share"]
        (20, 0.1)
    """
    steps, layers = [*snapshots], _layers(snapshots)
    found = []
    for event in events:
        series, share = _series(event, snapshots, layers)
        at = _halfway(event, steps, series) if event.get("kind") in _CHANGES else int(event["step"])
        found.append({key: event.get(key) for key in _KEYS} | {"at": at, "share": share})
    return found


def lifetimes(events: Sequence[Mapping[str, Any]], snapshots: Mapping[int, Measured]) -> list[dict[str, Any]]:
    """Births and deaths of features that are not among the events, from the snapshots that have the features.

    The events of a run have those of features that are important at their birth or death. Most are not: they grow
    later, or have faded before.

    Args:
        events: Events as in the file of the run.
        snapshots: What all snapshots of the run measure, by step in increasing order.

    Returns:
        Events with ``kind`` (``"born"``, ``"split"`` or ``"died"``), ``at``, ``layer``, ``lineage`` and ``share`` as
        `placed_events`: the first snapshot that has a feature, and the first after its last one, of features that ever
        have a thousandth of their layer's importance. One that merged into another has died.
    """
    known = [
        {(str(event.get("layer")), str(event.get("lineage"))) for event in events if event.get("kind") in kinds}
        for kinds in (_BEGINNINGS, _ENDS)
    ]
    steps, found = [*snapshots], []
    for name, layer in _layers(snapshots).items():
        peak = layer.share.max(0)
        first = layer.is_present.argmax(0)
        last = len(steps) - 1 - layer.is_present[::-1].argmax(0)
        for lineage, i in layer.column.items():
            if peak[i] < _IMPORTANT:
                continue
            feature, key = {"layer": name, "lineage": lineage, "share": _rounded(peak[i])}, (name, str(lineage))
            if first[i] > 0 and key not in known[0]:
                kind = "split" if layer.parents[i] >= 0 else "born"
                found.append({"kind": kind, "at": steps[first[i]], **feature})
            if last[i] < len(steps) - 1 and key not in known[1]:
                found.append({"kind": "died", "at": steps[last[i] + 1], **feature})
    return sorted(found, key=lambda event: event["at"])


def _layers(snapshots: Mapping[int, Measured]) -> dict[str, _Layer]:
    found = {}
    for name in dict.fromkeys(layer for one in snapshots.values() for layer in one.shares):
        rows = [(t, one.shares[name]) for t, one in enumerate(snapshots.values()) if name in one.shares]
        ids = np.unique(np.concatenate([row.ids for _, row in rows]))
        share = np.zeros((len(snapshots), len(ids)))
        is_present = np.zeros(share.shape, dtype=bool)
        parents = np.full(len(ids), -1)
        for t, row in reversed(rows):
            columns = np.searchsorted(ids, row.ids)
            share[t, columns] = np.nan_to_num(row.share)
            is_present[t, columns] = True
            parents[columns] = row.parents
        found[name] = _Layer({i: column for column, i in enumerate(ids.tolist())}, share, is_present, parents)
    return found


def _series(
    event: Mapping[str, Any], snapshots: Mapping[int, Measured], layers: Mapping[str, _Layer]
) -> tuple[list[float | None] | None, float | None]:
    """What changes in an event, at each snapshot, and the largest share of its feature; None if that is unknown."""
    layer, lineage, metric = event.get("layer"), event.get("lineage"), event.get("metric")
    if isinstance(metric, str):
        names = {metric, metric.partition("/")[2]}
        name = next((one for snapshot in snapshots.values() for one in snapshot.metrics if one in names), None)
        return (None if name is None else [one.metrics.get(name) for one in snapshots.values()]), None
    of_layer = layers.get(layer) if isinstance(layer, str) else None
    if of_layer is None or not isinstance(lineage, int) or lineage not in of_layer.column:
        return None, None
    share = of_layer.share[:, of_layer.column[lineage]]
    return np.maximum(share, _FLOOR).tolist(), _rounded(share.max())


def _halfway(event: Mapping[str, Any], steps: Sequence[int], series: Sequence[float | None] | None) -> int:
    at = step = int(event["step"])
    numbers = [event.get(key) for key in ("onset", "before", "after")]
    if series is None or not all(isinstance(value, (int, float)) for value in numbers):
        return step
    onset, before, after = (float(value or 0) for value in numbers)
    if event.get("layer") is not None:
        before, after = max(before, _FLOOR), max(after, _FLOOR)
    # Metrics that are not positive are not on a logarithmic scale.
    half = math.sqrt(before * after) if before > 0 and after > 0 else (before + after) / 2
    for time, value in reversed([*zip(steps, series, strict=True)]):
        if onset < time <= step and value is not None:
            if before == after or (value < half if after > before else value > half):
                break
            at = time
    return at


def _rounded(share: float) -> float:
    """To the digits that the viewer gets."""
    return float(f"{share:.4g}")
