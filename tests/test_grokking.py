"""The grokking recipe: docs/grokking.md shows its committed results, and a small run of it gives such results."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from lib_lightning import InteractionGraph
from lib_lightning.plots.image import render_png
from lib_lightning.viewer import Run
from recipes import grokking_events
from recipes.grokking import RESULTS, SEEDS, draw, halfway, measure, memorised, reached, report, train
from recipes.learning_coefficient import LOCALIZATION, learning_coefficient

ROOT = Path(__file__).parents[1]


def test_the_readme_shows_what_the_committed_results_say() -> None:
    results = json.loads(RESULTS.read_text())
    assert [int(seed) for seed in results] == list(SEEDS)
    assert report(results) in (ROOT / "docs" / "grokking.md").read_text()


def test_the_figure_is_drawn_from_the_committed_results() -> None:
    figure = draw(json.loads(RESULTS.read_text()))
    assert len(figure.axes) == 6 * len(SEEDS)
    assert {axes.get_xscale() for axes in figure.axes} == {"symlog"}
    assert render_png(figure).width > 1000


def test_when_a_series_is_halfway() -> None:
    steps = [0, 10, 20, 30, 40, 50, 60]
    falls = [9, 8, 6, 2, 2, 2, 2]
    assert halfway(steps, falls, start=10) == pytest.approx(22.5)  # from 8 to 2: 5
    assert halfway(steps, falls, start=15) == pytest.approx(25)  # from 6 to 2: 4
    assert halfway(steps, [9, 8, 2, 9, 2, 2, 2], start=10) == pytest.approx(15), "the first time"
    assert halfway(steps, [0, 0, 0, 1, 9, 1, 1], start=10) == pytest.approx(25), "one spike is not the end"
    assert math.isnan(halfway(steps, [5] * 7, start=10))


def test_when_a_level_is_reached() -> None:
    assert reached([1, 2, 3], [0.1, 0.6, 0.2], 0.5) == 2
    assert math.isnan(reached([1, 2, 3], [0.1, 0.4, 0.2], 0.5))
    assert memorised({"step": [10, 20, 30], "train": [0.5, 0.99, 0.9]}) == 20


@pytest.mark.recipe
def test_a_small_run_is_measured(tmp_path: Path) -> None:
    train(tmp_path, seed=3, modulus=11, steps=40, per_decade=3)
    found = measure(tmp_path)
    assert found["accuracy"]["step"] == [10, 20, 30, 40]
    assert found["lib"]["step"] == [0, 1, 2, 5, 10, 22, 40]
    graph = InteractionGraph.load(tmp_path / "lib" / "final.safetensors")
    importance = graph.bases["resid_post"].importance
    assert found["lib"]["features above 0.01"][-1] == (importance > 0.01 * importance[0]).sum()
    assert found["lib"]["Fourier-labelled features"][-1] == sum(label != "" for label in graph.labels["resid_post"])
    assert set(found["lib"]) == set(json.loads(RESULTS.read_text())["0"]["lib"])


@pytest.mark.recipe
def test_a_small_run_has_the_estimates_of_another_tool_and_is_aligned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(grokking_events, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(grokking_events, "SEEDS", (3,))
    monkeypatch.setattr(grokking_events.run, "__defaults__", (11, 40, 3))
    grokking_events.main(["--folder", str(tmp_path), "--figure", str(tmp_path / "align.png")])
    assert "When test accuracy rises (`accuracy/test`), most steeply at step" in capsys.readouterr().out
    scalars = Run(tmp_path / "seed-3").scalars()
    assert scalars["llc/mean"][0] == scalars["llc/weight_norm"][0] == Run(tmp_path / "seed-3").steps
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == list(grokking_events.SCALARS)
    assert results["accuracy/test"]["runs"][0]["events"]["born"][0] > 0
    # The other tool changes nothing in the training.
    train(tmp_path / "alone", seed=3, modulus=11, steps=40, per_decade=3)
    alone, beside = (Run(tmp_path / name).graph().info["weights_hash"] for name in ("alone", "seed-3"))
    assert alone == beside
    # What is there already is not trained again.
    monkeypatch.setattr(grokking_events, "run", lambda *_: pytest.fail("again"))
    grokking_events.main(["--folder", str(tmp_path)])


def test_the_learning_coefficient_of_a_regular_model_is_half_the_number_of_its_weights() -> None:
    """The logits are the weights themselves, where their likelihood is largest: of four directions one is flat."""
    n = 20_000
    inputs, targets = torch.ones(n, 1), torch.arange(4).repeat(n // 4)
    model = torch.nn.Linear(1, 4, bias=False)
    torch.nn.init.zeros_(model.weight)
    found = learning_coefficient(model, inputs, targets, length=3000, step_size=1e-4)
    # The loss has the curvature 1/4 along the three others, beside which the pull back to the weights is not nothing.
    curvature = n / math.log(n) / 4
    assert found == pytest.approx(3 / 2 * curvature / (curvature + LOCALIZATION), rel=0.15)
    assert learning_coefficient(model, inputs, targets, 50) == learning_coefficient(model, inputs, targets, 50)
    assert not model.weight.any()
