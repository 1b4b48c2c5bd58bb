"""Metrics of a graph beside those of several draws of its controls, and the recipe that shows them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lib_lightning import compute_interaction_graph, measure_controls, reinitialized
from lib_lightning.algorithm.basis_kinds import ROTATED
from lib_lightning.controls import Draws
from lib_lightning.errors import SettingError
from recipes import controls as recipe

PAGE = (Path(__file__).parents[1] / "docs" / "controls.md").read_text()
LAYERS = ["0:input", "2:input", "output"]


def network() -> tuple[nn.Module, list[torch.Tensor]]:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double(), [torch.randn(120, 5).double()]


def test_each_draw_is_a_graph_of_its_seed() -> None:
    model, batches = network()
    found = measure_controls(model, batches, LAYERS, ["random", "neuron", "reinit"], draws=3, effort="exact")
    assert {kind: {len(x) for x in draws.values.values()} for kind, draws in found.items()} == {
        "lib": {1}, "random": {3}, "neuron": {1}, "reinit": {3},
    }  # fmt: skip
    key = "effective_edges/total"
    random = compute_interaction_graph(model, batches, LAYERS, "random", basis_seed=2).measure()[key]
    assert found["random"].values[key][2] == pytest.approx(random)
    fresh = compute_interaction_graph(reinitialized(model, 1), batches, LAYERS).measure()[key]
    assert found["reinit"].values[key][1] == pytest.approx(fresh)
    values = torch.tensor(found["random"].values[key], dtype=torch.float64)
    assert found["random"].mean[key] == pytest.approx(float(values.mean()))
    assert found["random"].std[key] == pytest.approx(float(values.std()))
    assert found["random"].std[key] > 0
    assert math.isnan(found["lib"].std[key])


def test_proposed_node_layers_and_another_basis() -> None:
    model, batches = network()
    found = measure_controls(model, batches, controls=["reinit", "lib"], draws=1, basis="pca")
    assert list(found) == ["pca", "reinit", "lib"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"controls": ["randm"]}, "each of controls must be one of .* Did you mean 'random'"),
        ({"controls": ["lib"]}, "controls are others than 'lib', each of them once"),
        ({"controls": ["pca", "pca"]}, "each of them once"),
        ({"draws": 0}, "draws must be at least 1"),
    ],
)
def test_wrong_settings(options: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        measure_controls(*network(), LAYERS, **options)  # type: ignore[arg-type]


def test_spread_of_draws_and_networks() -> None:
    assert Draws({"a": (1.0, 3.0)}).std["a"] == pytest.approx(2**0.5)
    values = {"lib": {m: [10.0] for m in recipe.METRICS}, "random": {m: [40.0, 44.0] for m in recipe.METRICS}}
    other = {"lib": {m: [12.0] for m in recipe.METRICS}, "random": {m: [50.0, 54.0] for m in recipe.METRICS}}
    text = recipe.tables([{"task": "digits", "seed": k, "values": v} for k, v in enumerate((values, other))])
    assert "| LIB | 11 (10 to 12)" in text
    assert "| random rotation | 47 ± 3 (42 to 52)" in text


def test_recipe_in_its_quick_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "DRAWS", {"random": 5, "reinit": 5})
    monkeypatch.setattr(recipe, "RESULTS", tmp_path / "results.json")
    (one,) = recipe.measure(tmp_path, quick=True)
    (lib,), random, reinit = (one["values"][kind]["effective_edges"] for kind in ("lib", "random", "reinit"))
    assert lib < min(random)
    assert lib < min(reinit)
    assert len(random) == len(reinit) == 2
    assert json.loads((tmp_path / "digits-0-random.json").read_text())["random"] == one["values"]["random"]


def test_page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(block, "docs/controls.md", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out.startswith("lib ")
    rows = re.findall(r'^\| `"(\w+)"` \|', PAGE, re.MULTILINE)
    assert rows == list(ROTATED)
    results = json.loads(recipe.RESULTS.read_text())
    assert f"<!-- controls -->\n{recipe.tables(results)}\n<!-- end of controls -->" in PAGE


def test_known_networks_are_sparser_than_their_controls() -> None:
    for one in json.loads(recipe.RESULTS.read_text()):
        (lib,) = one["values"]["lib"]["effective_edges"]
        for kind in ("random", "reinit", "ica", "dictionary", "pca", "neuron"):
            assert lib < min(one["values"][kind]["effective_edges"])
