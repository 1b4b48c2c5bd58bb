"""Emergence in synthetic runs: planted changes are detected in time, and there are no other events."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lib_lightning.lineage.change_detection import Change
from lib_lightning.lineage.emergence import EmergenceDetector, _TwoTests
from lib_lightning.lineage.events import Event
from lib_lightning.training.schedule import Schedule

# Ten for each tenfold of steps, from 0 to 3,000.
STEPS = [step for cursor in [Schedule(log_spaced=10).start()] for step in range(3001) if cursor.due_at_step(step)]
N = len(STEPS)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(levels: Mapping[int, float]) -> tuple[Tensor, Tensor]:
    """Lineages and importances from log10 of importances; NaN for absent features."""
    there = {i: x for i, x in levels.items() if not math.isnan(x)}
    return torch.tensor(list(there), dtype=torch.int64), 10 ** torch.tensor(list(there.values()), dtype=torch.float64)


def watch(levels: Tensor, numbers: dict[str, Tensor] | None = None, **settings: Any) -> list[Event]:
    """All events of one layer "mlp" with levels ``(r, N)``, at the steps of the usual schedule."""
    detector, events = EmergenceDetector(**settings), []
    for t, step in enumerate(STEPS[: levels.shape[1]]):
        now = {name: float(x[t]) for name, x in (numbers or {}).items()}
        events += detector.update(step, {"mlp": layer(dict(enumerate(levels[:, t].tolist())))}, now)
    return events


def planted(changes: Mapping[int, Tensor], seed: int, scatter: float = 0.02) -> Tensor:
    """Twenty features that scatter about their levels, some of them about other ones."""
    levels = torch.linspace(0, -4, 20, dtype=torch.float64)[:, None].expand(20, N).clone()
    for i, level in changes.items():
        levels[i] = level
    return levels + scatter * normal(20, N, seed=seed)


def ramp(before: float, after: float, start: int, length: int) -> Tensor:
    return before + (after - before) * ((torch.arange(N) - start + 1).double() / length).clamp(0, 1)


@pytest.mark.parametrize("seed", range(10))
def test_nothing_is_made_up_where_shares_scatter(seed: int) -> None:
    noise = {f"m{i}": 100 * 10 ** (0.02 * x) for i, x in enumerate(normal(10, N, seed=seed + 100))}
    assert watch(planted({}, seed, scatter=0.1), noise) == []


def test_false_alarms_where_shares_wander_stay_within_the_bound() -> None:
    # Steps so large that most features change by more than a factor of 2 all the time.
    events = []
    for seed in range(20):
        walk = torch.linspace(0, -1.5, 20)[:, None] + 0.2 * normal(20, N, seed=seed).cumsum(1)
        numbers = {f"m{i}": 10 ** (0.1 * x.cumsum(0)) for i, x in enumerate(normal(10, N, seed=seed + 50))}
        events += watch(walk, numbers, false_alarms=0.2)
    assert len(events) <= 0.2 * N * 20


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [("emerged", -3.5, -0.5), ("faded", -0.5, -3.5), ("rose", -1.2, 0.2), ("fell", 0.2, -1.2)],
)
@pytest.mark.parametrize("seed", range(3))
def test_what_is_planted_is_found(kind: str, before: float, after: float, length: int, seed: int) -> None:
    start = 20
    levels = planted({7: ramp(before, after, start, length)}, seed)
    [event] = [event for event in watch(levels) if event.lineage == 7]
    assert (event.kind, event.layer, event.metric) == (kind, "mlp", None)
    # Two snapshots are the least; as a rule the change need not even be over.
    assert STEPS[start + 1] <= event.step <= STEPS[start + length + 1]
    assert event.onset in STEPS[start - 1 : start + length - 1]
    shares = 10**levels / (10**levels).sum(0)
    assert event.before == pytest.approx(float(shares[7, STEPS.index(event.onset)]), rel=1e-9)
    assert event.after == pytest.approx(float(shares[7, STEPS.index(event.step)]), rel=1e-9)
    assert event.evidence is not None
    # Twenty features, half of the false alarms: the threshold.
    assert event.evidence >= math.log10(1 / 0.025)
    assert event.abrupt


def test_shares_of_the_others_fall() -> None:
    # One feature gets nearly all of the importance: the shares of all others fall.
    events = watch(planted({19: ramp(-4.0, 1.0, 20, 1)}, seed=0))
    assert {e.lineage: e.kind for e in events if e.lineage == 19} == {19: "emerged"}
    assert {e.kind for e in events if e.lineage != 19} <= {"faded", "fell"}


def test_trends_small_changes_and_outliers_are_no_events() -> None:
    decay = torch.linspace(0.0, -2.0, N, dtype=torch.float64)
    spike = torch.where(torch.arange(N) == 20, 0.5, -3.0).double()
    doubled = ramp(-3.8, -3.2, 20, 1)  # from far too little to too little
    little = ramp(-0.5, -0.3, 20, 1)  # by a factor of 1.5
    assert watch(planted({1: decay, 2: spike, 3: doubled, 4: little}, seed=0)) == []
    assert [e.lineage for e in watch(planted({4: little}, seed=0, scatter=0.005), min_change=1.3)] == [4]
    assert [e.lineage for e in watch(planted({3: doubled}, seed=0), min_share=1e-4)] == [3]


def test_features_born_important_emerge_at_their_second_snapshot() -> None:
    levels = planted({}, seed=1)
    levels[5, :15] = math.nan  # born at 15, and stays
    levels[6, :25] = levels[6, 26:] = math.nan  # present at 25 only
    levels[7, :2] = math.nan  # born before there is any history
    levels[19, :15] = math.nan  # never important
    [event] = watch(levels)
    assert (event.kind, event.lineage, event.step, event.onset) == ("emerged", 5, STEPS[16], STEPS[14])
    assert event.before == 0.0
    assert event.abrupt
    assert ": its share of the layer's importance rose from nothing to " in event.text


@pytest.mark.parametrize("birth", [24, 23, 22, 17])
def test_features_born_unimportant_emerge_when_they_become_important(birth: int) -> None:
    levels = planted({5: ramp(-3.0, 0.0, 25, 1)}, seed=1)
    levels[5, :birth] = math.nan
    [event] = watch(levels)
    assert (event.kind, event.lineage, event.step, event.onset) == ("emerged", 5, STEPS[26], STEPS[24])
    # With more snapshots before, it has a history of its own.
    share = 0.0 if birth > 20 else float((10 ** levels[:, 24]).div((10 ** levels[:, 24]).sum())[5])
    assert event.before == pytest.approx(share, rel=1e-9)


def test_features_fade_after_three_snapshots_of_absence() -> None:
    levels = planted({}, seed=2)
    levels[2, 20:] = math.nan
    levels[3, 20] = math.nan  # missed once
    [event] = watch(levels)
    assert (event.kind, event.lineage, event.step, event.onset, event.after) == ("faded", 2, STEPS[22], STEPS[19], 0.0)


def test_absent_features_are_removed_and_may_come_back() -> None:
    levels = planted({}, seed=2)
    levels[2, 8:25] = math.nan
    detector, sizes, kinds = EmergenceDetector(), [], []
    for t, step in enumerate(STEPS):
        events = detector.update(step, {"mlp": layer(dict(enumerate(levels[:, t].tolist())))})
        kinds += [(e.kind, e.lineage, t) for e in events]
        sizes.append(len(detector.state_dict()["features"]["value"]))
    assert kinds == [("faded", 2, 10), ("emerged", 2, 26)]
    assert sizes == [21] * 17 + [20] * 8 + [21] * 8


def test_metrics() -> None:
    time = torch.arange(N)
    numbers = {
        "edges/total": torch.where(time < 20, 1989.0, 703.0) * 10 ** (0.003 * normal(N, seed=0)),
        "little": torch.where(time < 20, 100.0, 105.0).double(),
        "signed": torch.where(time < 20, -1.0, 2.0) + 0.01 * normal(N, seed=1),
        "holes": torch.where(time % 5 == 0, math.nan, torch.where(time < 20, 5.0, 9.0)).double(),
        "unknown": torch.full((N,), math.nan),
        "infinite": torch.full((N,), math.inf),
    }
    events = {e.metric: e for e in watch(planted({}, 0), numbers)}
    assert list(events) == ["edges/total", "signed", "holes"]
    assert (events["edges/total"].kind, events["edges/total"].step) == ("fell", STEPS[21])
    assert events["edges/total"].before == pytest.approx(float(numbers["edges/total"][19]), rel=1e-11)
    assert events["edges/total"].lineage is None
    assert (events["signed"].kind, events["signed"].after) == ("rose", float(numbers["signed"][21]))
    # Unknown at 20: the last known is 19, and 22 is the second snapshot at which it is seen.
    assert (events["holes"].step, events["holes"].onset, events["holes"].before) == (STEPS[22], STEPS[19], 5.0)


def test_layers_labels_and_order() -> None:
    detector, events = EmergenceDetector(), []
    for t, step in enumerate(STEPS):
        late = layer({4: 0.0, 9: -4.0 if t < 20 else 0.0})
        importances = {"b": late, "a": late, "dead": (torch.tensor([0]), torch.zeros(1))}
        if t == 12:
            del importances["a"]  # unknown at this snapshot
        events += detector.update(step, importances, {"m": 1.0 if t < 20 else 2.0}, {"b": ["", "k=3 a+b 90%"]})
    assert [(e.kind, e.subject, e.label) for e in events] == [
        ("emerged", "b/9", "k=3 a+b 90%"),
        ("emerged", "a/9", ""),
        ("rose", "m", ""),
    ]
    assert {e.step for e in events} == {STEPS[21]}


def test_state_survives_a_checkpoint() -> None:
    levels = planted({7: ramp(-3.5, -0.5, 20, 3), 8: ramp(-0.5, -2.5, 24, 1)}, seed=4)
    levels[3, :18] = math.nan
    levels[2, 18:] = math.nan
    numbers = [{"m": 3.0 if t < 21 else 5.0, "late": math.nan if t < 20 else -1.0} for t in range(N)]
    snapshots = [{"mlp": layer(dict(enumerate(x)))} for x in levels.T.tolist()]
    for stop in (1, 2, 19, 21):
        detector, resumed = EmergenceDetector(), EmergenceDetector()
        for t in range(stop):
            detector.update(STEPS[t], snapshots[t], numbers[t])
        file = io.BytesIO()
        torch.save(detector.state_dict(), file)
        file.seek(0)
        resumed.load_state_dict(torch.load(file, weights_only=True))
        for t in range(stop, N):
            expected = detector.update(STEPS[t], snapshots[t], numbers[t])
            assert resumed.update(STEPS[t], snapshots[t], numbers[t]) == expected
            if t == 21 and stop < 21:
                assert expected


@pytest.mark.parametrize("stop", [10, 20, 25])
def test_abruptness_survives_a_checkpoint(stop: int) -> None:
    # A jump out of scatter, a smooth growth, and a change of which the second test alone has been told.
    levels = planted({7: ramp(-3.5, -0.5, 24, 1)}, seed=4) + 0.1 * autocorrelated(20, 0.8, seed=8)
    snapshots = [{"mlp": layer(dict(enumerate(x)))} for x in levels.T.tolist()]
    detector, resumed = EmergenceDetector(0.9), EmergenceDetector(0.9)
    for t in range(stop):
        detector.update(STEPS[t], snapshots[t])
    file = io.BytesIO()
    torch.save(detector.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    later = [detector.update(STEPS[t], snapshots[t]) for t in range(stop, N)]
    assert [resumed.update(STEPS[t], snapshots[t]) for t in range(stop, N)] == later
    assert {event.abrupt for events in later for event in events} == {True, False}
    assert resumed.autocorrelation == detector.autocorrelation > 0


@pytest.mark.parametrize(("stop", "is_abrupt"), [(10, True), (18, False)])
def test_states_with_one_test_are_loaded(stop: int, is_abrupt: bool) -> None:
    # Ten snapshots later the second test knows enough; two snapshots later it does not.
    levels = planted({7: ramp(-3.5, -0.5, 20, 1)}, seed=4)
    snapshots = [{"mlp": layer(dict(enumerate(x)))} for x in levels.T.tolist()]
    detector, resumed = EmergenceDetector(), EmergenceDetector()
    for t in range(stop):
        detector.update(STEPS[t], snapshots[t], {"m": 1.0})
    state = detector.state_dict()
    for name in ("features", "metrics"):
        del state[name]["autocorrelated"]
    resumed.load_state_dict(state)
    [expected] = [e for t in range(stop, N) for e in detector.update(STEPS[t], snapshots[t], {"m": 1.0})]
    [event] = [e for t in range(stop, N) for e in resumed.update(STEPS[t], snapshots[t], {"m": 1.0})]
    assert expected.abrupt
    assert event == replace(expected, abrupt=is_abrupt)


def autocorrelated(m: int, phi: float, seed: int, n: int = N) -> Tensor:
    """Walks whose increments have variance 1 and an autocorrelation."""
    noise = normal(m, n, seed=seed)
    increments = [noise[:, 0]]
    for now in noise.T[1:]:
        increments.append(phi * increments[-1] + math.sqrt(1 - phi**2) * now)
    return torch.stack(increments, 1).cumsum(1)


def test_abrupt_events_stay_within_the_bound_where_curves_wander_smoothly() -> None:
    events = []
    for seed in range(5):
        levels = torch.linspace(0, -1.5, 20)[:, None] + 0.2 * autocorrelated(20, 0.7, seed)
        numbers = {f"m{i}": 10 ** (0.1 * x) for i, x in enumerate(autocorrelated(10, 0.7, seed + 50))}
        events += watch(levels, numbers, false_alarms=0.2)
    promised = 0.2 * N * 5
    assert len(events) > 1.5 * promised
    assert 0 < sum(event.abrupt is True for event in events) <= 0.5 * promised


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("is_abrupt", [False, True])
def test_smooth_growth_among_smooth_curves_is_an_event_that_is_not_abrupt(seed: int, is_abrupt: bool) -> None:
    # All features wander smoothly. One also grows by 2.5 decades, as a logistic curve, or at once.
    levels = torch.linspace(0, -1.0, 20, dtype=torch.float64)[:, None] + 0.03 * autocorrelated(20, 0.8, seed)
    time = torch.arange(N).double() - 22
    levels[7] += -2.5 + 2.5 * ((time >= 0).double() if is_abrupt else torch.sigmoid(time / 4))
    [event] = [event for event in watch(levels) if event.lineage == 7]
    assert (event.kind, event.abrupt) == ("emerged", is_abrupt)


def test_a_report_of_the_second_test_counts_for_one_event_after_whose_onset_it_was() -> None:
    tests = _TwoTests(false_alarms=0.01)
    tests.add(1)
    change = Change(0, 10, 0.0, 1.0, 3.0)

    def told(plain: list[Change], whitened: list[Change], snapshot: int) -> list[bool]:
        tests._plain.update = lambda *_: plain  # type: ignore[method-assign]
        tests._whitened.update = lambda *_: whitened  # type: ignore[method-assign]
        return [abrupt for _, abrupt in tests.update(snapshot, torch.zeros(1), 1.0)]

    assert told([], [change], 10) == []
    assert told([change], [], 11) == [False], "reported at the onset, not after it"
    assert told([], [change], 12) == []
    assert told([change], [], 13) == [True]
    assert told([change], [], 14) == [False], "used"
    assert told([change], [change], 15) == [True], "at the same snapshot"
    assert told([], [change], 16) == []
    tests.keep(torch.tensor([0, 0]))
    tests.keep(torch.tensor([1]))
    assert told([change], [], 17) == [True]
    assert told([change], [], 18) == [False]


def test_denser_snapshots_are_no_events() -> None:
    # A trend in a metric, and four times as many snapshots for a while.
    detector = EmergenceDetector()
    gaps = [1.0] * 15 + [0.25] * 24 + [1.0] * 10
    clock, events = 0.0, []
    for t, gap in enumerate(gaps):
        clock += gap
        level = 0.1 * clock + 0.002 * float(normal(1, seed=t))
        events += detector.update(t, {"mlp": layer({0: 0.0, 1: level - 3})}, {"m": 10**level}, relative_interval=gap)
    assert events == []


def test_settings_are_checked() -> None:
    for wrong in ({"false_alarms": 0.0}, {"min_change": 1.0}, {"min_metric_change": math.inf}, {"min_share": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EmergenceDetector(**wrong)


def test_a_metric_falls_to_zero() -> None:
    detector = EmergenceDetector()
    events = [
        event
        for t in range(30)
        for event in detector.update(10 * t, {}, {"m": 100 * (1 + 0.01 * math.sin(3 * t)) if t < 20 else 0.0})
    ]
    assert [(event.kind, event.step, event.after) for event in events] == [("fell", 210, 0.0)]


def test_a_metric_that_starts_at_zero_has_no_scale_yet() -> None:
    detector = EmergenceDetector()
    for t in range(25):
        assert detector.update(10 * t, {}, {"m": 0.0 if t < 3 else 1000 * (1 + 0.005 * math.sin(3 * t))}) == []
    assert detector.state_dict()["logarithmic"] == {"m": True}
