"""The recipe on false alarms: its committed results are what the page shows, and a small run gives such results."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy import stats

from recipes import false_alarms
from recipes.false_alarms import (
    NOISES,
    NULLS,
    PROMISED,
    RESULTS,
    TASKS,
    artificial,
    autoregressive,
    detector_of,
    events_of,
    measure_plateaus,
    null_curves,
    planted_curves,
    poisson_interval,
    power,
    power_among,
    report,
    to_json,
    train,
    with_change,
)

PAGE = Path(__file__).parents[1] / "docs" / "events.md"


def test_the_page_shows_what_the_committed_results_say() -> None:
    assert report(json.loads(RESULTS.read_text())) in PAGE.read_text()


def test_what_the_page_says_of_the_committed_results() -> None:
    found = json.loads(RESULTS.read_text())
    assert RESULTS.read_text() == to_json(found)
    plateaus = found["plateaus"]
    assert set(plateaus) == set(TASKS)
    assert all(one["snapshots"] == 120 for one in plateaus.values())
    at_rest = {task: one for task, one in plateaus.items() if not any(one["bursts"])}
    assert set(plateaus) - set(at_rest) == {"modular addition"}
    assert sum(len(one["events"]) for one in at_rest.values()) >= 20
    for one in at_rest.values():
        assert sum(one["events"]) <= 0.5 * PROMISED * one["snapshots"] * len(one["events"])
    # Each of these runs is thrown off at least once, and events are mostly the consequences.
    with_bursts = plateaus["modular addition"]
    assert all(with_bursts["bursts"])
    assert min(times for of_run in with_bursts["bursts"] for times in of_run) > 10
    assert sum(with_bursts["after bursts"]) > 0.7 * sum(with_bursts["events"])
    nulls, promised = found["nulls"], PROMISED * found["runs"] * found["snapshots"]
    holds = ["levels, AR(1), 0.5", "levels, AR(1), 0.9", "random walks"]
    assert all(nulls[name]["events"] <= promised for name in holds)
    assert nulls["walks, increments AR(1), 0.3"]["events"] <= 1.5 * promised
    for name in ("walks, increments AR(1), 0.7", "walks, increments AR(1), 0.9"):
        assert promised < nulls[name]["events"] <= 12 * promised
    heavy_tailed = nulls["walks, increments Student's t(3)"]
    assert min(heavy_tailed["events"], heavy_tailed["abrupt"]) > promised
    # The promise for abrupt events holds for all nulls but that with heavy tails.
    assert all(one["abrupt"] <= promised for one in nulls.values() if one is not heavy_tailed)
    assert all(one["abrupt"] <= one["events"] for one in nulls.values())
    # Planted changes are found on plateaus of real trainings, and mostly lost among curves that wander smoothly.
    assert sum(one["changes"] for one in at_rest.values()) == 315
    assert min(one["planted abrupt"] / one["changes"] for one in at_rest.values()) > 0.95
    by_name = [nulls[f"walks, increments AR(1), {phi}"]["planted found"] for phi in (0.3, 0.7, 0.9)]
    assert 100 > nulls["random walks"]["planted found"] > by_name[0] > by_name[1] > by_name[2]
    for by_noise in found["planted"].values():
        assert set(by_noise) == {str(noise) for noise in NOISES}
        assert by_noise["0.02"]["others"] == 0
        assert by_noise["0.02"]["found"] == by_noise["0.02"]["abrupt"] == found["runs"]
    assert set(found["forming"]) == set(TASKS)
    emerged = sum(one["emerged"] for one in found["forming"].values())
    assert sum(one["emerged abruptly"] for one in found["forming"].values()) < 0.1 * emerged


@pytest.mark.parametrize("phi", [0.0, 0.7])
def test_series_with_an_autocorrelation(phi: float) -> None:
    noise = torch.randn(200, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = autoregressive(noise, phi)
    assert float(x.square().mean()) == pytest.approx(1, abs=0.03)
    assert float((x[:, 1:] * x[:, :-1]).mean()) == pytest.approx(phi, abs=0.03)
    assert set(NULLS) >= {f"walks, increments AR(1), {phi}" for phi in (0.3, 0.7, 0.9)}


def test_changes_are_where_they_are_said_to_be() -> None:
    (event,) = events_of(planted_curves("emerged", 1, 1))
    assert (event.kind, event.lineage, event.onset, event.step) == ("emerged", 7, 19, 21)
    assert event.abrupt
    assert power("born", 1, 0.02, 3) == {"found": 3, "delay": 1, "abrupt": 3, "others": 0}
    loud, quiet = (torch.tensor([x["layers"]["0"][1] for x in planted_curves("rose", 1, 1, y)]) for y in (0.2, 0.02))
    assert float(loud.log10()[:20].std(0).mean()) == pytest.approx(10 * float(quiet.log10()[:20].std(0).mean()))
    assert [len(one["layers"]["1"][0]) for one in planted_curves("born", 1, 2)] == [19] * 20 + [20] * 12
    curves = artificial(torch.zeros(2, 2, 3), torch.ones(2, 1, 3))
    assert [one["scalars"] for one in curves] == [{"m0": 10.0, "m1": 10.0}] * 3


def test_changes_in_curves_of_a_training() -> None:
    curves = null_curves("random walks", 2, 20)
    same = torch.tensor([one["layers"]["0"][1] for one in curves], dtype=torch.float64).log10()
    for kind, length, (before, after) in (("rose", 3, (0, 1.4)), ("fell", 1, (0, -1.4)), ("emerged", 2, (-3, 0))):
        changed = with_change(curves, "0", 7, kind, length, 12)
        levels = torch.tensor([one["layers"]["0"][1] for one in changed], dtype=torch.float64).log10()
        shift = levels - same
        assert float((shift[:12, 7] - before).abs().max()) < 1e-9
        assert shift[12, 7] == pytest.approx(before + (after - before) / length, abs=1e-9)
        assert float((shift[11 + length :, 7] - after).abs().max()) < 1e-9
        assert shift[:, [*range(7), *range(8, 20)]].abs().max() < 1e-9
        assert [one["layers"]["1"] for one in changed] == [one["layers"]["1"] for one in curves]
    born = with_change(curves, "1", 7, "born", 1, 12)
    assert [7 in one["layers"]["1"][0] for one in born] == [False] * 12 + [True] * 8
    assert curves == null_curves("random walks", 2, 20), "not modified"


def test_power_among_curves_that_scatter_or_wander() -> None:
    quiet = planted_curves("rose", 1, 2, 0.02)
    still = [{**one, "layers": {run: [ids, quiet[0]["layers"][run][1]] for run, (ids, _) in one["layers"].items()}}
             for one in quiet]  # fmt: skip
    found = power_among(still, [("0", 3), ("1", 5)], 2)
    assert found["changes"] == 2 * 15
    assert found["planted found"] >= 28
    wandering = null_curves("walks, increments AR(1), 0.9", 2, 32)
    assert power_among(wandering, [("0", 3), ("1", 5)], 2)["planted abrupt"] <= found["planted abrupt"]


def test_runs_at_the_same_time_have_as_many_events_as_alone() -> None:
    curves = null_curves("walks, increments AR(1), 0.7", 2, 60)
    alone = [events_of([{**one, "layers": {run: one["layers"][run]}, "scalars": {}} for one in curves]) for run in "01"]
    both = events_of([{**one, "scalars": {}} for one in curves], detector_of(2))
    # Not the very same ones: there is one series more, that of an absent feature, alone as well as together.
    for run, of_run in enumerate(alone):
        assert sum(e.layer == str(run) for e in both) == pytest.approx(len(of_run), abs=2)
        assert len(of_run) > 5


def test_intervals_of_counts() -> None:
    for count in (1, 5, 40):
        low, high = poisson_interval(count)
        assert stats.poisson.sf(count - 1, low) == pytest.approx(0.025)
        assert stats.poisson.cdf(count, high) == pytest.approx(0.025)
    assert poisson_interval(0) == (0.0, pytest.approx(math.log(40)))


@pytest.mark.recipe
def test_a_small_run_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(false_alarms, "SNAPSHOTS", 3)
    for task, make in TASKS.items():
        monkeypatch.setitem(TASKS, task, lambda seed, make=make: replace(make(seed), converged=3, every=2))
        train(task, 0, tmp_path / false_alarms._file(task, 0))
    found = measure_plateaus(tmp_path)
    assert {task: (one["snapshots"], one["events"], one["abrupt"]) for task, one in found["plateaus"].items()} == {
        task: (3, [0], [0]) for task in TASKS
    }
    assert all(len(losses) == 2 for one in found["plateaus"].values() for losses in one["losses"])
    for one in found["forming"].values():
        assert 0 <= one.pop("autocorrelation") < 1
        assert one == {"events": 0, "abrupt": 0, "emerged": 0, "emerged abruptly": 0}
    assert set(found["forming"]) == set(TASKS)
