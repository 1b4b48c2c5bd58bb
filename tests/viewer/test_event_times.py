"""When events happened: before they were detected, at the snapshot at which half of the change was done."""

from __future__ import annotations

from typing import Any

import numpy as np

from lib_lightning.viewer.event_times import Measured, Shares, lifetimes, placed_events

STEPS = [0, 10, 20, 30, 40, 50]


def snapshots(shares: dict[int, list[float | None]], parents: dict[int, int] | None = None) -> dict[int, Measured]:
    """Snapshots at `STEPS` of a node layer ``fc``: shares by lineage, None where absent; and a metric."""
    found = {}
    for t, step in enumerate(STEPS):
        present = {i: of_lineage[t] for i, of_lineage in shares.items() if of_lineage[t] is not None}
        ids = np.array([*present], dtype=np.int64)
        parent = np.array([(parents or {}).get(i, -1) for i in present])
        layer = Shares(ids, np.array([*present.values()], dtype=np.float32), parent)
        found[step] = Measured({"fc": layer}, {"edges/total": None if t == 2 else 1000.0 / (1 + t)})
    return found


def event(kind: str, step: int, onset: int, before: float, after: float, **more: Any) -> dict[str, Any]:
    common = {"text": "...", "layer": "fc", "lineage": 1, "onset": onset}
    return {"kind": kind, "step": step, "before": before, "after": after} | common | more


def test_a_gradual_change_happened_when_half_of_it_was_done_for_good() -> None:
    # The geometric mean of 0.0001 and 0.04 is 0.002; at step 10 it is exceeded, but not for good.
    shares: list[float | None] = [0.0001, 0.003, 0.001, 0.0021, 0.01, 0.04]
    (found,) = placed_events([event("emerged", 50, 0, 0.0001, 0.04)], snapshots({1: shares}))
    assert (found["step"], found["at"], found["share"]) == (50, 30, 0.04)
    assert set(found) == {"step", "kind", "text", "layer", "lineage", "at", "share"}


def test_a_fall_to_nothing_and_absence() -> None:
    shares: list[float | None] = [0.2, 0.2, 0.1, None, None, None]
    (found,) = placed_events([event("faded", 50, 10, 0.2, 0.0)], snapshots({1: shares}))
    assert found["at"] == 30


def test_changes_of_metrics() -> None:
    fell = event("fell", 50, 0, 1000.0, 1000 / 6, layer=None, lineage=None, metric="lib/edges/total")
    (found,) = placed_events([fell], snapshots({}))
    # Below the geometric mean, 408, from step 20 on, where it was not measured.
    assert (found["at"], found["share"]) == (30, None)


def test_what_is_not_known_is_at_its_step() -> None:
    shares: dict[int, list[float | None]] = {1: [0.1] * 6}
    unknown = [
        event("emerged", 40, 10, 0.1, 0.1),
        {"step": 40, "kind": "emerged", "text": "...", "layer": "fc", "lineage": 1},
        event("emerged", 40, 10, 0.01, 0.1, layer="other"),
        event("emerged", 40, 10, 0.01, 0.1, lineage=[7]),
        event("born", 40, 10, 0.01, 0.1),
        {"step": 40},
    ]
    found = placed_events(unknown, snapshots(shares))
    assert [one["at"] for one in found] == [40] * 6
    assert [one["share"] for one in found] == [0.1, 0.1, None, None, 0.1, None]
    assert placed_events(unknown[:1], {})[0]["at"] == 40


def test_births_and_deaths_of_features_that_matter() -> None:
    shares: dict[int, list[float | None]] = {
        0: [0.5] * 6,
        1: [None, None, 0.0005, 0.01, 0.01, 0.01],
        2: [0.2, None, 0.2, 0.2, None, None],
        3: [None, 0.1, 0.1, 0.1, 0.1, 0.1],
        4: [None, None, 0.0005, 0.0005, None, None],
    }
    found = lifetimes([], snapshots(shares, parents={3: 0}))
    assert [(one["kind"], one["at"], one["lineage"], one["share"]) for one in found] == [
        ("split", 10, 3, 0.1),
        ("born", 20, 1, 0.01),
        ("died", 40, 2, 0.2),
    ]
    # Those that are among the events are not counted twice; of all others, there are no events.
    events = [event(kind, 20, 10, 0, 0, lineage=i) for kind, i in (("born", 1), ("merged", 2), ("died", 3))]
    others = lifetimes([*events, {"step": 3, "kind": "born", "lineage": [7]}], snapshots(shares, parents={3: 0}))
    assert [(one["kind"], one["lineage"]) for one in others] == [("split", 3)]
    assert lifetimes([], {}) == []
