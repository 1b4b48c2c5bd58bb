"""Events against scalars of runs on disk: numbers that are known, the table, the command line, and the tab."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_lightning import align_events
from lib_lightning.alignment.offsets import KindOffsets, kind_of, offsets_of, sign_test, weighted_quantile
from lib_lightning.alignment.steepest import SteepestChange
from lib_lightning.errors import LIBError, SettingError
from lib_lightning.training.cli import main
from lib_lightning.viewer import Run
from lib_lightning.viewer.cache import Cache
from lib_lightning.viewer.run_view import RunView
from tests.viewer.node import evaluate, write_modules
from tests.viewer.saved_run import SavedRun


def write(logs: Path, centre: int, events: list[dict[str, Any]]) -> Path:
    """A run with four snapshots, given events, and an accuracy that rises around a step."""
    saved = SavedRun(snapshots=4, features=4)
    for one in (lineage for layer in saved.lineages for lineage in layer):
        one.birth, one.death = 0, saved.snapshots  # all births and deaths are the events given
    saved.write(logs / "lib")
    (logs / "lib" / "events.jsonl").write_text("".join(json.dumps(event | {"text": ""}) + "\n" for event in events))
    rows = [f"{step},{1 / (1 + math.exp((centre - step) / 20))}" for step in range(0, 2000, 5)]
    (logs / "probe.csv").write_text("\n".join(["step,accuracy", *rows]))
    return logs


def born(step: int, layer: str | None = "input", lineage: int | None = 0, kind: str = "born") -> dict[str, Any]:
    return {"step": step, "kind": kind, "layer": layer, "lineage": lineage}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Births 300, 100 and 400 steps before, deaths once at and once after the steepest rise."""
    folder = tmp_path_factory.mktemp("runs")
    metric = born(900, layer=None, lineage=None, kind="fell")
    return [
        write(folder / "a", 500, [born(150), born(200), born(450, lineage=2), metric]),
        write(folder / "b", 700, [born(600), born(701, kind="died")]),
        write(folder / "c", 900, [born(500), born(1300, kind="died"), metric]),
    ]


def test_offsets_over_runs(runs: list[Path]) -> None:
    found = align_events(runs, "probe/accuracy", weight="equal")
    assert [run.name for run in found.runs] == ["a/lib", "b/lib", "c/lib"]
    assert [run.change.step for run in found.runs] == pytest.approx([500, 700, 900], abs=2)
    assert not found.log
    kinds = {kind.kind: kind for kind in found.kinds}
    assert set(kinds) == {"born", "died", "metric fell"}
    births = kinds["born"]
    assert (births.num_events, births.num_runs) == (5, 3)
    assert births.offset == pytest.approx(-300, abs=2)
    assert births.quartiles == pytest.approx((-400, -100), abs=2)
    assert births.times == pytest.approx(500 / 900, abs=0.01)
    assert (births.before, births.within, births.after, births.p_value) == (3, 0, 0, 0.25)
    deaths = kinds["died"]
    assert (deaths.before, deaths.within, deaths.after) == (0, 1, 1)
    assert math.isnan(deaths.p_value)
    # Of 400 after in one run and none in the other.
    assert kinds["metric fell"].offset == pytest.approx(200, abs=2)


def test_an_event_counts_as_much_as_its_feature_matters(runs: list[Path]) -> None:
    described = json.loads(RunView(runs[0] / "lib", "a", Cache(1 << 20)).run())
    shares = [event["share"] for event in described["events"][:3]]
    expected = 450 if shares[2] > sum(shares[:2]) else 150 if shares[0] > sum(shares[1:]) else 200
    (births,) = align_events([Run(runs[0])], "probe/accuracy", ["born"]).kinds
    assert births.offset == pytest.approx(expected - 500, abs=2)
    # Of a single run, the spread is that over its events.
    assert align_events(runs[:1], "probe/accuracy", ["born"], weight="equal").kinds[0].quartiles == pytest.approx(
        (-350, -50), abs=2
    )


def test_metrics_of_graphs_and_runs_without_a_steepest_change(runs: list[Path], tmp_path: Path) -> None:
    assert "lib/features/total" in Run(runs[0]).scalars()
    few = align_events(runs, "features/total")
    assert {run.change.reason for run in few.runs} == {"has 4 points; 5 are needed"}
    assert few.kinds == []
    assert "No events to align." in few.table()
    flat = write(tmp_path / "flat", 500, [born(150)])
    (flat / "probe.csv").write_text("step,accuracy\n" + "".join(f"{step},0.5\n" for step in range(50)))
    unlogged = write(tmp_path / "unlogged", 500, [born(150)])
    (unlogged / "probe.csv").unlink()
    found = align_events([runs[0], flat, unlogged], "probe/accuracy")
    assert [run.change.reason for run in found.runs] == ["", "does not change", "was not logged"]
    assert [kind.num_runs for kind in found.kinds] == [1, 1]
    assert "flat/lib      probe/accuracy does not change" in found.table()


def test_wrong_arguments(runs: list[Path]) -> None:
    with pytest.raises(LIBError, match=r"There is no scalar 'probe/acuracy' .* Did you mean 'probe/accuracy'\?"):
        align_events(runs, "probe/acuracy")
    with pytest.raises(SettingError, match=r"no events 'birth'\..*There are: born, metric fell, died\."):
        align_events(runs, "probe/accuracy", ["birth"])
    with pytest.raises(SettingError, match=r"axis must be one of auto, linear, log; got 'cubic'\."):
        align_events(runs, "probe/accuracy", axis="cubic")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"weight must be one of importance, equal; got 'none'\."):
        align_events(runs, "probe/accuracy", weight="none")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"at least one run"):
        align_events([], "probe/accuracy")


def test_the_command_line(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "found.json"
    words = ["align", *map(str, runs), "--scalar", "probe/accuracy", "--weight", "equal", "--kind", "born", "died"]
    main([*words, "-o", str(output)])
    printed = capsys.readouterr().out
    expected = align_events(runs, "probe/accuracy", ["born", "died"], weight="equal")
    assert expected.table() in printed
    lines = [line.split() for line in printed.splitlines() if line.startswith(("born", "died"))]
    assert [line[:3] for line in lines] == [["born", "5", "3"], ["died", "2", "2"]]
    assert lines[0][-4:] == ["3", "0", "0", "0.25"]
    saved = json.loads(output.read_text())
    assert saved == expected.to_dict()
    assert saved["kinds"][1]["p_value"] is None
    assert saved["runs"][0]["events"]["born"] == [[150, 1], [200, 1], [450, 1]]
    with pytest.raises(SystemExit, match=r"lib-lightning: There is no scalar 'x'"):
        main(["align", str(runs[0]), "--scalar", "x"])
    main([*words, "--between", "0", "1200", "--direction", "fall", "--axis", "log"])
    assert "does not fall by a quarter of its range" in capsys.readouterr().out


@given(
    st.lists(st.tuples(st.integers(-50, 50), st.integers(1, 4)), min_size=1, max_size=20), st.sampled_from([1, 2, 3])
)
def test_weights_are_repetitions(values: list[tuple[int, int]], quarters: int) -> None:
    repeated = np.repeat([value for value, _ in values], [weight for _, weight in values])
    expected = np.quantile(repeated, quarters / 4, method="averaged_inverted_cdf")
    assert weighted_quantile(values, quarters / 4) == pytest.approx(expected)
    assert weighted_quantile([(value, weight / 7) for value, weight in values], quarters / 4) == pytest.approx(expected)
    assert weighted_quantile([(value, 0) for value, _ in values], 0.5) == pytest.approx(
        np.median([value for value, _ in values])
    )


def test_the_sign_test_is_binomial() -> None:
    flips = np.random.default_rng(0).integers(0, 2, (200_000, 9)).sum(1)
    assert sign_test(7, 2) == pytest.approx(((flips >= 7) | (flips <= 2)).mean(), abs=0.003)
    assert sign_test(2, 7) == sign_test(7, 2)
    assert [math.isnan(sign_test(*pair)) for pair in ((0, 0), (1, 0), (1, 1))] == [True, True, False]


def test_the_tab_computes_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    changes = [SteepestChange(500, 450, 560), SteepestChange(900, 800, 1000), SteepestChange(reason="does not change")]
    kinds = [("born", "fc"), ("emerged", "fc"), ("rose", "fc"), ("rose", None)]
    runs = []
    for change in changes:
        events: list[dict[str, Any]] = []
        for kind, layer in kinds:
            for _ in range(rng.integers(0, 6)):
                share = None if layer is None else float(f"{rng.uniform():.4g}")
                events.append({"kind": kind, "layer": layer, "at": int(rng.integers(0, 2000)), "share": share})
        numbers = {"step": change.step, "first": change.first, "last": change.last}
        known = {key: None if math.isnan(value) else value for key, value in numbers.items()}
        runs.append({"change": known | {"reason": change.reason}, "events": events})
    found = evaluate(write_modules(tmp_path), {"alignment.js": "alignEvents"}, "alignEvents(data)", runs)
    named = sorted({kind_of(event) for run in runs[:2] for event in run["events"]})
    assert [kind["kind"] for kind in found] == named
    for kind in found:
        own = [
            [(e["at"], 1.0 if e["share"] is None else e["share"]) for e in run["events"] if kind_of(e) == kind["kind"]]
            for run in runs[:2]
        ]
        expected = offsets_of(kind["kind"], [*zip(changes[:2], own, strict=True)])
        assert isinstance(expected, KindOffsets)
        for key, value in kind.items():
            assert value == pytest.approx(getattr(expected, key)) if key != "kind" else value == expected.kind
    assert len(found) >= 3
