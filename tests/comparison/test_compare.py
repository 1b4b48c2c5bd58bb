"""Comparisons whose answer is known."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import InteractionGraph, compare, compute_interaction_graph
from lib_lightning.comparison import Comparison
from lib_lightning.comparison.layers import Names, compare_layers
from lib_lightning.comparison.paired_values import PairedValues
from lib_lightning.errors import LIBError, NotFiniteError, SettingError, SettingTypeError
from lib_lightning.lineage import reference_features

LAYERS = ["input", "1", "3", "output"]


def mlp(seed: int, width: int = 24) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(12, width), nn.ReLU(), nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 5)
    ).double()  # fmt: skip


def samples(count: int = 1000) -> list[Tensor]:
    return list(torch.randn(count, 12, generator=torch.Generator().manual_seed(7), dtype=torch.float64).split(300))


def graph(model: nn.Module, **settings: object) -> InteractionGraph:
    return compute_interaction_graph(model, samples(), LAYERS, **settings)  # type: ignore[arg-type]


def compared(a: nn.Module, b: nn.Module, **settings: object) -> Comparison:
    return compare(graph(a, **settings), graph(b, **settings), a, b, samples())


@pytest.mark.parametrize("basis", ["lib", "neuron"])
def test_permuted_and_rescaled_hidden_units_are_all_matched(basis: str) -> None:
    a = mlp(0)
    b = copy.deepcopy(a)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for first, second in ((0, 2), (2, 4)):
            order = torch.randperm(len(a[first].bias), generator=g)
            scale = (torch.rand(len(order), generator=g) + 0.5).double()
            b[first].weight.copy_(b[first].weight[order] * scale.unsqueeze(1))
            b[first].bias.copy_(b[first].bias[order] * scale)
            b[second].weight.copy_(b[second].weight[:, order] / scale)
    torch.testing.assert_close(a(samples()[0]), b(samples()[0]))
    found = compared(a, b, basis=basis, rtol=0)
    assert not found.lost
    assert not found.new
    assert len(found.matches) == sum(len(layer.a.ids) - layer.a.kinds.count("constant") for layer in found.layers)
    assert all(match.kind == "shared" and match.similarity > 0.999 for match in found.matches)
    assert all(p <= found.level for p in found.p_values.values())
    assert [layer.overlap for layer in found.layers] == pytest.approx([1.0] * 4, abs=1e-6)
    if basis == "lib":  # strengths of neurons depend on their scale
        assert not found.changed_edges
        assert [section.correlation for section in found.sections] == pytest.approx([1.0] * 3, abs=1e-3)
        assert all(section.p_value <= 0.01 for section in found.sections)


def planted(seed: int) -> tuple[nn.Sequential, nn.Sequential]:
    """A network with an unused hidden unit, and the same after that has learned to detect something."""
    before = mlp(seed)
    with torch.no_grad():
        before[0].weight[5] = before[0].bias[5] = 0.0
        before[2].weight[:, 5] = 0.0
        after = copy.deepcopy(before)
        after[0].weight[5, :2], after[0].bias[5] = 1.0, -2.0
        after[2].weight[7, 5] = 0.1
    return before, after


@pytest.mark.parametrize("seed", [3, 4])
def test_fine_tuning_with_a_planted_feature_reports_it_and_its_edges_and_no_other(seed: int) -> None:
    found = compared(*planted(seed), basis="neuron")
    assert found.new == ["1/5"]
    assert not found.lost
    assert found.changed_edges
    assert {change.kind for change in found.changed_edges} == {"new"}
    assert all(change.b is not None and "1/5" in change.b for change in found.changed_edges)
    assert {("input/0", "1/5"), ("input/1", "1/5")} <= {change.b for change in found.changed_edges}


def test_a_planted_feature_is_found_in_the_local_interaction_basis() -> None:
    """Each output reads one feature of its own; fine-tuning adds a feature, and the output that reads it."""

    class Model(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            g = torch.Generator().manual_seed(0)
            self.mix = torch.linalg.qr(torch.randn(12, 12, generator=g, dtype=torch.float64)).Q
            self.size, self.hidden, self.last = size, nn.Identity(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            features = torch.stack([x[:, 0] * x[:, 1], x[:, 1].square(), x[:, 2].tanh(), x[:, 0].cos()], 1)
            strengths = torch.tensor([4.0, 3.0, 2.0, 1.5], dtype=torch.float64)
            features = features * strengths * (torch.arange(4) < self.size)
            hidden = self.hidden(nn.functional.pad(features, (0, 8)) @ self.mix)
            return self.last((hidden @ self.mix.T)[:, :4] * 1.0)

    models = Model(3), Model(4)
    batches = samples()
    graphs = [compute_interaction_graph(model, batches, ["hidden", "output"]) for model in models]
    found = compare(*graphs, *models, batches)
    assert found.new == ["hidden/3", "output/3"]
    assert not found.lost
    assert [change.b for change in found.changed_edges] == [("hidden/3", "output/3")]


def test_untrained_networks_match_no_more_than_the_null() -> None:
    """Both are functions of the same samples, whose features correlate; none of them is the same feature."""
    false, batches = 0, samples(400)
    for seed in range(100, 116, 2):
        models = mlp(seed), mlp(seed + 1)
        graphs = [compute_interaction_graph(model, batches, ["input", "1", "output"]) for model in models]
        found = compare(*graphs, *models, batches)
        false += bool(found.matches)
        assert found.layers[0].overlap > 0.99  # all of them read the same inputs
    # Each comparison may have a match with a probability of the false discovery rate: 3 of 8 with one of 0.6%.
    assert false <= 2


@pytest.mark.parametrize("basis", ["lib", "pca"])
def test_p_values_of_networks_that_have_nothing_in_common_are_uniform(basis: str) -> None:
    """On a network of other inputs, samples permuted within one network are what they are anyway."""
    a, b, g = mlp(0), mlp(0), torch.Generator().manual_seed(8)

    class OtherHalf(nn.Module):
        def __init__(self, model: nn.Module, half: int) -> None:
            super().__init__()
            self.model, self.half = model, half

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x[:, self.half])

    layers = ["model.1", "model.3", "model"]
    batches = [torch.stack([batch, torch.randn(batch.shape, generator=g, dtype=batch.dtype)], 1) for batch in samples()]
    models = OtherHalf(a, 0), OtherHalf(b, 1)
    graphs = [compute_interaction_graph(model, batches, layers, basis=basis) for model in models]  # type: ignore[arg-type]
    found = compare(*graphs, *models, batches)
    assert not found.matches
    assert all(kind == "lost" for layer in found.layers for kind in layer.a.kinds)
    assert all(layer.overlap < 0.1 and layer.overlap_p_value > 0.01 for layer in found.layers)
    same = compare(graphs[0], graphs[0], models[0], models[0], batches)
    assert not same.lost
    assert not same.new


def test_positions_of_a_sample_are_permuted_together() -> None:
    """A feature that is constant over the positions of a sample has one value per sample, however many rows it has."""
    g = torch.Generator().manual_seed(0)
    names = (Names("layer", ["layer/0"], torch.ones(1)),) * 2
    p_values = {1: [], 100: []}
    for _ in range(20):
        a, b = torch.randn(2, 12, 1, generator=g).double().repeat_interleave(100, 1)
        for block, found in p_values.items():
            (layer,) = compare_layers([PairedValues(a, b, block)], [names], level=0.05)
            found.append(layer.overlap_p_value)
    assert sum(p <= 0.05 for p in p_values[100]) <= 4
    assert sum(p <= 0.05 for p in p_values[1]) >= 15  # row by row, any correlation of 12 numbers is one of 1,200


def test_models_and_random_states_are_left_as_they_were() -> None:
    models = [nn.Sequential(mlp(seed), nn.Dropout(0.5), nn.BatchNorm1d(5).double()).train() for seed in (0, 1)]
    graphs = [compute_interaction_graph(model, samples(), ["input", "output"]) for model in models]
    states = [{name: t.clone() for name, t in model.state_dict().items()} for model in models]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    compare(*graphs, *models, samples())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    for model, state in zip(models, states, strict=True):
        assert model.training
        torch.testing.assert_close(model.state_dict(), state)


def test_other_widths_and_node_layers(tmp_path: Path) -> None:
    """A wider network that repeats each unit has no other features; a node layer is found again in another place."""
    a = mlp(2)
    wide = mlp(2, width=48)
    with torch.no_grad():
        for place, source in ((0, a[0]), (2, a[2])):
            wide[place].bias.copy_(source.bias.repeat(2) if place == 0 else source.bias)
        wide[0].weight.copy_(a[0].weight.repeat(2, 1))
        wide[2].weight.copy_(a[2].weight.repeat(1, 2) / 2)
        wide[4].load_state_dict(a[4].state_dict())
    found = compared(a, wide)
    assert all(layer.b.shared_importance > 0.999 for layer in found.layers)
    single = graph(a)
    elsewhere = compare(single, single, a, a, samples(), layers={"1": "1", "3": "output"})
    assert elsewhere.layers[1].b.explained_importance > 0.95  # outputs are linear in the last hidden layer
    assert [section.b for section in elsewhere.sections] == []


def test_results_as_text_json_picture_and_page(tmp_path: Path) -> None:
    found = compared(*planted(3), basis="neuron")
    text = str(found)
    assert "only in B" in text
    assert "1/5" in text
    assert max(map(len, text.splitlines())) <= 140
    found.save(tmp_path / "c.json")
    read = json.loads((tmp_path / "c.json").read_text())
    assert read == json.loads(json.dumps(found.to_dict()))
    assert [x["id"] for layer in read["layers"] for x in layer["b"]["features"] if x["kind"] == "new"] == found.new
    page = found.view(tmp_path / "c.html").read_text()
    assert "http:" not in page
    assert "https:" not in page
    assert "1/5: new" in page
    # Shared features have the same height in both graphs.
    assert found.plot().axes[0].get_ylim() == found.plot().axes[1].get_ylim()
    from lib_lightning.comparison.scene import pictures_of

    a, b = pictures_of(found.graphs, found.layers, found.sections)
    of_match = {match.a: match.b for match in found.matches}
    places = [{dot.feature: (dot.x, dot.y, dot.color) for dot in picture.dots} for picture in (a, b)]
    assert all(places[0][x] == places[1][y] for x, y in of_match.items())


def test_graphs_of_sequences_alone_suffice_too() -> None:
    """Files do not say which rows are of the same sample: rows are shifted instead of permuted."""
    models = mlp(0), mlp(1)
    batches = [torch.randn(100, 6, 12, generator=torch.Generator().manual_seed(k)).double() for k in range(3)]
    graphs = [compute_interaction_graph(model, batches, ["input", "1"]) for model in models]
    for one, model in zip(graphs, models, strict=True):
        one.reference_features = reference_features(one, model, batches)
        one.info["reference_samples"] = "the same"
    same, other = compare(graphs[0], graphs[0]), compare(*graphs)
    assert not same.lost
    assert len(same.matches) == len(same.layers[0].a.ids) + len(same.layers[1].a.ids)
    assert not other.matches
    assert other.layers[0].overlap > 0.99
    del graphs[1].examples["1"]
    with pytest.raises(LIBError, match="different positions"):
        compare(*graphs)


def test_graphs_alone_suffice_if_their_values_are_on_the_same_samples() -> None:
    a, b = mlp(0), mlp(0, width=24)
    graphs = [graph(model) for model in (a, b)]
    for one, model in zip(graphs, (a, b), strict=True):
        one.reference_features = reference_features(one, model, samples())
        one.info["reference_samples"] = "the same"
    found = compare(*graphs)
    assert [len(layer.matches) for layer in found.layers] == [len(layer.a.ids) for layer in found.layers]
    assert found.layers[0].num_values == 1000
    graphs[1].info["reference_samples"] = "other ones"
    with pytest.raises(LIBError, match=r"different samples.*compare\(graph_a, graph_b, model_a, model_b, batches\)"):
        compare(*graphs)


def test_swapped_models_are_refused_and_changed_ones_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    models, batches = (mlp(0), mlp(1)), samples(200)
    graphs = [compute_interaction_graph(model, batches, ["input", "1"]) for model in models]
    with pytest.raises(LIBError, match=r"swapped: the first model has the weights of the second graph\. Give them in"):
        compare(*graphs, models[1], models[0], batches)
    trained = copy.deepcopy(models[0])
    with torch.no_grad():
        trained[0].bias += 0.1
    with pytest.raises(LIBError, match="swapped: the second model has the weights of the first graph"):
        compare(*graphs, trained, models[0], batches)
    compare(*graphs, *models, batches)
    compare(*graphs, *(nn.DataParallel(model) for model in models), batches)
    assert not caplog.records
    # Another precision, more training, or the bases of two moments on the same model: it may be meant.
    for changed in (copy.deepcopy(models[0]).float(), trained, models[1]):
        caplog.clear()
        compare(*graphs, changed, models[1], batches, dtype=torch.float64)
        (said,) = caplog.records
        assert "The first model has other weights than its graph" in said.getMessage()
    caplog.clear()
    for graph in graphs:  # of an earlier version
        del graph.info["weights_hash"]
    compare(*graphs, models[1], models[0], batches)
    assert not caplog.records


MODEL = mlp(0)
GRAPH = graph(MODEL)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: compare(GRAPH, GRAPH, MODEL, MODEL), SettingTypeError, "both models and the samples"),
        (lambda: compare(GRAPH, GRAPH, MODEL, MODEL, samples()[0]), SettingTypeError, "write \\[batch\\]"),
        (lambda: compare(GRAPH, MODEL), SettingTypeError, "two graphs first.*got Sequential"),  # type: ignore[arg-type]
        (lambda: compare(GRAPH, GRAPH, MODEL, mlp(0, 30), samples()), LIBError, "at '1' it has 24 .* the model 30"),
        (lambda: compare(GRAPH, GRAPH, MODEL, MODEL, []), LIBError, "no samples"),
        (lambda: compare(GRAPH, GRAPH, MODEL, MODEL, [samples()[0][:1]]), LIBError, "only one sample"),
        (lambda: compare(GRAPH, GRAPH, MODEL, MODEL, samples(), level=2), SettingError, "level"),
        (lambda: compare(GRAPH, GRAPH, layers={"inptu": "input"}), SettingError, "Did you mean 'input'"),
        (lambda: compare(GRAPH, GRAPH), LIBError, "no values of the features"),
        (lambda: compare(GRAPH, GRAPH, MODEL, MODEL, [samples()[0] * math.nan]), NotFiniteError, "NaN"),
        (lambda: compare(GRAPH, GRAPH, MODEL, MODEL, samples(), names=("a",)), SettingError, "two networks"),  # type: ignore[arg-type]
    ],
)
def test_errors_say_what_to_do(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert len(str(caught.value)) < 400
