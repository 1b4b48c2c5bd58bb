"""The recipe on false alarms: its committed results are what the page shows, and a small run gives such results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lib_lightning.lineage.change_detection import ChangeDetector
from recipes import false_alarms
from recipes.false_alarms import (
    NULLS,
    PROMISED,
    RESULTS,
    TASKS,
    Whitened,
    artificial,
    autoregressive,
    events_of,
    measure_plateaus,
    null_curves,
    planted_curves,
    power,
    report,
    train,
)

PAGE = Path(__file__).parents[1] / "docs" / "events.md"


def test_the_page_shows_what_the_committed_results_say() -> None:
    assert report(json.loads(RESULTS.read_text())) in PAGE.read_text()


def test_what_the_page_says_of_the_committed_results() -> None:
    found = json.loads(RESULTS.read_text())
    plateaus = found["plateaus"]
    assert set(plateaus) == set(TASKS)
    assert all(one["snapshots"] == 120 for one in plateaus.values())
    at_rest = {task: one for task, one in plateaus.items() if not sum(one["bursts"])}
    assert set(plateaus) - set(at_rest) == {"modular addition"}
    assert sum(len(one["as it is"]) for one in at_rest.values()) >= 20
    for one in at_rest.values():
        assert sum(one["as it is"]) <= 0.5 * PROMISED * one["snapshots"] * len(one["as it is"])
    # Each of these runs is thrown off at least once, and events are mostly the consequences.
    with_bursts = plateaus["modular addition"]
    assert min(with_bursts["bursts"]) >= 1
    assert sum(with_bursts["after bursts"]) > 0.7 * sum(with_bursts["as it is"])
    nulls, promised = found["nulls"], PROMISED * found["runs"] * found["snapshots"]
    holds = ["levels, AR(1), 0.5", "levels, AR(1), 0.9", "random walks"]
    assert all(nulls[name]["as it is"] <= promised for name in holds)
    assert nulls["walks, increments AR(1), 0.3"]["as it is"] <= 1.5 * promised
    for name in ("walks, increments AR(1), 0.7", "walks, increments AR(1), 0.9"):
        assert promised < nulls[name]["as it is"] <= 12 * promised
        assert nulls[name]["whitened"] < 0.5 * nulls[name]["as it is"]
    assert nulls["walks, increments Student's t(3)"]["as it is"] > promised
    assert all(one["as it is"]["others"] == 0 for one in found["planted"].values())
    for name in ("as it is", "whitened"):
        assert all(one[name]["found"] == one[name]["runs"] for one in found["planted"].values())
    assert set(found["forming"]) == set(TASKS)
    emerged = sum(one["as it is"]["emerged"] for one in found["forming"].values())
    assert sum(one["emerged in both"] for one in found["forming"].values()) < 0.1 * emerged


@pytest.mark.parametrize("phi", [0.0, 0.7])
def test_series_with_an_autocorrelation(phi: float) -> None:
    noise = torch.randn(200, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = autoregressive(noise, phi)
    assert float(x.square().mean()) == pytest.approx(1, abs=0.03)
    assert float((x[:, 1:] * x[:, :-1]).mean()) == pytest.approx(phi, abs=0.03)
    assert set(NULLS) >= {f"walks, increments AR(1), {phi}" for phi in (0.3, 0.7, 0.9)}


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.7])
def test_the_autocorrelation_is_estimated(phi: float) -> None:
    noise = torch.randn(30, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    detector = Whitened(1e-9)
    trend = torch.arange(60) * 0.5
    for t, values in enumerate((autoregressive(noise, phi).cumsum(1) + trend).T):
        detector.update(t, values)
    assert detector.phi == pytest.approx(phi, abs=0.06)


def test_without_autocorrelation_nothing_is_subtracted() -> None:
    walks = torch.randn(6, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64).cumsum(1)
    walks[3, 20:] += 30
    one, other = ChangeDetector(0.1), Whitened(0.1)
    found = []
    for t, values in enumerate(walks.T):
        other.phi = 0.0
        found.append((one.update(t, values), other.update(t, values)))
    assert all(a == b for a, b in found)
    assert any(a for a, _ in found)


def test_changes_are_where_they_are_said_to_be() -> None:
    (event,) = events_of(planted_curves("emerged", 1, 1))
    assert (event.kind, event.lineage, event.onset, event.step) == ("emerged", 7, 19, 21)
    assert power("born", 1, ChangeDetector, 3) == {"runs": 3, "found": 3, "delay": 1, "others": 0}
    assert [len(one["layers"]["1"][0]) for one in planted_curves("born", 1, 2)] == [19] * 20 + [20] * 12
    curves = artificial(torch.zeros(2, 2, 3), torch.ones(2, 1, 3))
    assert [one["scalars"] for one in curves] == [{"m0": 10.0, "m1": 10.0}] * 3


def test_runs_at_the_same_time_have_as_many_events_as_alone() -> None:
    curves = null_curves("walks, increments AR(1), 0.7", 2, 60)
    alone = [events_of([{**one, "layers": {run: one["layers"][run]}, "scalars": {}} for one in curves]) for run in "01"]
    both = events_of([{**one, "scalars": {}} for one in curves], runs=2)
    # Not the very same ones: there is one series more, that of an absent feature, alone as well as together.
    for run, of_run in enumerate(alone):
        assert sum(e.layer == str(run) for e in both) == pytest.approx(len(of_run), abs=2)
        assert len(of_run) > 5


@pytest.mark.recipe
def test_a_small_run_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(false_alarms, "SNAPSHOTS", 3)
    for task, make in TASKS.items():
        monkeypatch.setitem(TASKS, task, lambda seed, make=make: replace(make(seed), converged=3, every=2))
        train(task, 0, tmp_path / false_alarms._file(task, 0))
    found = measure_plateaus(tmp_path)
    assert {task: (one["snapshots"], one["as it is"]) for task, one in found["plateaus"].items()} == {
        task: (3, [0]) for task in TASKS
    }
    assert all(len(losses) == 2 for one in found["plateaus"].values() for losses in one["losses"])
    assert {task: one["as it is"] for task, one in found["forming"].items()} == {
        task: {"all": 0, "emerged": 0} for task in TASKS
    }
