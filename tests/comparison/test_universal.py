"""Features that many networks have, where it is known which these are."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import InteractionGraph, compare, compute_interaction_graph, universal_features
from lib_lightning.comparison import UniversalFeatures
from lib_lightning.comparison.universal import gathered
from lib_lightning.errors import LIBError, SettingError, SettingTypeError
from lib_lightning.io.universal_file import read_universal
from lib_lightning.lineage import reference_features
from lib_lightning.training.cli import main

LAYERS = ["input", "1", "output"]


def mlp(seed: int, width: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    # As many inputs as neurons: neurons of fewer inputs share directions, and are similar by chance.
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 5)).double()


def samples(count: int = 400) -> list[Tensor]:
    return [torch.randn(count, 16, generator=torch.Generator().manual_seed(7), dtype=torch.float64)]


def graph(model: nn.Module, **settings: object) -> InteractionGraph:
    return compute_interaction_graph(model, samples(), LAYERS, **settings)  # type: ignore[arg-type]


def found_in(models: list[nn.Module], **settings: object) -> UniversalFeatures:
    return universal_features([graph(model, **settings) for model in models], models, samples())


@pytest.mark.parametrize("basis", ["lib", "neuron"])
def test_copies_with_permuted_and_rescaled_hidden_units_have_all_features(basis: str) -> None:
    models: list[nn.Module] = [mlp(0)]
    for seed in (1, 2):
        b = copy.deepcopy(models[0])
        g = torch.Generator().manual_seed(seed)
        order, scale = torch.randperm(16, generator=g), (torch.rand(16, generator=g) + 0.5).double()
        with torch.no_grad():
            b[0].weight.copy_(b[0].weight[order] * scale.unsqueeze(1))  # type: ignore[index]
            b[0].bias.copy_(b[0].bias[order] * scale)  # type: ignore[index]
            b[2].weight.copy_(b[2].weight[:, order] / scale)  # type: ignore[index]
        models.append(b)
    found = found_in(models, basis=basis)
    for layer in found.layers:
        assert layer.counts == pytest.approx([0, 0, layer.num_features[0]])
        assert layer.importance == pytest.approx([0, 0, 1])
        assert all(len(feature.members) == 3 and feature.similarity > 0.999 for feature in layer.features)
    assert {feature.share for feature in found.universal} == {1.0}
    # Neurons were permuted, but the basis does not depend on the order of neurons.
    assert [layer.identical for layer in found.layers] == [True, basis == "lib", True]


def test_untrained_networks_have_no_feature_in_common_but_those_of_the_data() -> None:
    models = [mlp(seed, width=10 + seed) for seed in range(5)]
    found = found_in(models)
    assert not found.features
    assert [layer.counts[0] for layer in found.layers] == [
        sum(layer.num_features) / len(models) for layer in found.layers
    ]
    neurons = found_in(models[:3], basis="neuron")
    assert [layer.identical for layer in neurons.layers] == [True, False, False]
    assert {feature.layer for feature in neurons.features} == {"input"}
    assert "says nothing about training" in str(neurons)


def with_detector(model: nn.Sequential) -> nn.Sequential:
    """The network with a hidden unit that detects that the first two inputs are large."""
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 0.0, -2.0
        model[0].weight[3, :2] = 1.0
    return model


def test_a_feature_planted_into_some_networks_has_their_share() -> None:
    models: list[nn.Module] = [with_detector(mlp(seed)) if seed % 2 else mlp(seed) for seed in range(5)]
    (feature,) = [feature for feature in found_in(models, basis="neuron").features if feature.layer == "1"]
    assert feature.members == {"1": "1/3", "3": "1/3"}
    assert feature.share == 2 / 5
    assert feature.similarity == pytest.approx(1)
    assert feature.p_value < 0.05


def test_planted_features_of_the_local_interaction_basis_have_the_share_of_networks_that_compute_them() -> None:
    """Networks compute the first three, four or all of five functions of the input, in directions of their own."""

    class Model(nn.Module):
        def __init__(self, size: int) -> None:
            super().__init__()
            g = torch.Generator().manual_seed(size)
            self.mix = torch.linalg.qr(torch.randn(16, 16, generator=g, dtype=torch.float64)).Q
            self.size, self.hidden, self.last = size, nn.Identity(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            features = torch.stack(
                [x[:, 0] * x[:, 1], x[:, 1].square(), x[:, 2].tanh(), x[:, 0].cos(), x[:, 3] * x[:, 4]], 1
            )
            strengths = torch.tensor([8.0, 4.0, 3.0, 1.5, 0.7], dtype=torch.float64)
            features = features * strengths * (torch.arange(5) < self.size)
            hidden = self.hidden(nn.functional.pad(features, (0, 11)) @ self.mix)
            return self.last((hidden @ self.mix.T)[:, :5] * 1.0)

    sizes = [3, 4, 5, 5]
    models = [Model(size) for size in sizes]
    graphs = [compute_interaction_graph(model, samples(), ["hidden", "output"]) for model in models]
    found = universal_features(graphs, models, samples(), names=["a", "b", "c", "d"], layers=["hidden"])
    assert [(feature.share, "".join(feature.members)) for feature in found.features] == [
        (1.0, "abcd"), (1.0, "abcd"), (1.0, "abcd"), (0.75, "bcd"), (0.5, "cd"),
    ]  # fmt: skip
    (layer,) = found.layers
    assert layer.num_features == sizes
    assert layer.counts == pytest.approx([0, 2 / 4, 3 / 4, 3])
    weights = [graph.bases["hidden"].importance / graph.bases["hidden"].importance.sum() for graph in graphs]
    in_three = float(weights[1][3])
    in_two = float(weights[2][3:].sum() + weights[3][3:].sum())
    # The last two are in the other order in networks with both of them.
    assert layer.importance[3] == pytest.approx(sum(float(w[:3].sum()) for w in weights) / 4)
    assert sum(layer.importance[1:3]) == pytest.approx((in_two + in_three) / 4)
    assert found.find("d", "hidden/3") == layer.features[4]


def test_two_networks_share_what_compare_says_they_share() -> None:
    a, b = mlp(0), mlp(0)
    with torch.no_grad():
        b[2].weight[0] += 0.6 * torch.randn(16, generator=torch.Generator().manual_seed(2)).double()
    graphs = [graph(model) for model in (a, b)]
    pairs = {(x.a, x.b) for x in compare(*graphs, a, b, samples()).matches if x.kind == "shared"}
    found = universal_features(graphs, [a, b], samples())
    assert {(feature.members["0"], feature.members["1"]) for feature in found.features} == pairs
    assert pairs


def test_groups_have_one_feature_of_a_network_and_each_is_matched_with_the_central_one() -> None:
    g = torch.Generator().manual_seed(0)
    matches: dict[tuple[int, int], dict[tuple[int, int], tuple[float, float]]] = {}
    for i, j in itertools.combinations(range(6), 2):
        for a, b in enumerate(torch.randperm(8, generator=g).tolist()):
            if torch.rand((), generator=g) < 0.6:
                similarity = float(0.7 + 0.3 * torch.rand((), generator=g))
                matches.setdefault((i, a), {})[(j, b)] = similarity, 0.0
                matches.setdefault((j, b), {})[(i, a)] = similarity, 0.0
    groups = gathered(matches)
    members = [node for centre, others in groups for node in (centre, *others)]
    assert len(members) == len(set(members))
    left = set(matches)
    for centre, others in groups:
        assert len({i for i, _ in (centre, *others)}) == 1 + len(others)
        assert set(others) == set(matches[centre]) & left
        # No other feature has more counterparts, or as many that are more similar.
        similar = {node: [s for other, (s, _) in matches[node].items() if other in left] for node in left}
        scores = {node: (len(found), sum(s * s for s in found)) for node, found in similar.items()}
        assert scores[centre] == max(scores.values())
        left -= {centre, *others}
    assert not any(other in left for node in left for other in matches[node])


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one network, the same again, and another one, with a baseline beside the first."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed, basis in (("a/s0/lib", 0, "lib"), ("a/s1/lib", 0, "lib"), ("b/lib", 1, "lib"), ("b/pca", 1, "pca")):
        model = mlp(seed)
        saved = graph(model, basis=basis)
        saved.reference_features = reference_features(saved, model, samples())
        saved.info |= {"reference_samples": "the same", "step": 30}
        saved.labels = {"1": [f"label {k}" for k in range(len(saved.feature_ids("1")))]}
        saved.save(folder / name / "snapshots" / "step-00000030.safetensors")
    return folder


def test_a_folder_of_runs_is_enough_for_the_command(three_runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["universal", str(three_runs)])
    printed = capsys.readouterr().out
    assert "in all 3" in printed
    assert "2 of 3" in printed
    assert printed.splitlines()[-1] == str(three_runs / "universal.json")
    read = read_universal(three_runs / "universal.json")
    assert read is not None
    assert read["runs"] == ["a/s0/lib", "a/s1/lib", "b/lib"]
    assert read["steps"] == [30, 30, 30]
    hidden = read["layers"][1]
    assert {tuple(feature["members"]) for feature in hidden["features"]} == {
        (f"1/{k}", f"1/{k}", None) for k in range(hidden["num_features"][0])
    }
    assert {feature["label"] for feature in hidden["features"]} == {
        f"label {k}" for k in range(len(hidden["features"]))
    }
    main(["universal", str(three_runs / "a"), "-o", str(three_runs / "other.json")])
    assert [x["identical"] for x in json.loads((three_runs / "other.json").read_text())["layers"]] == [True] * 3
    assert "12.8 features" not in printed


def test_incomplete_files_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "universal.json"
    assert read_universal(path) is None
    layer = {"layer": "x", "counts": [1.0, 2.0], "importance": [0.5, 0.5], "num_features": [3, 3], "features": []}
    whole = {"format": 1, "names": ["a", "b"], "runs": ["a", "b"], "steps": [1, 2], "layers": [layer]}
    path.write_text(json.dumps(whole))
    assert read_universal(path) == whole
    for change in (
        {"format": 2},
        {"runs": ["a"]},
        {"runs": [1, 2]},
        {"layers": [layer | {"counts": [1.0]}]},
        {"names": 3},
    ):
        path.write_text(json.dumps(whole | change))
        assert read_universal(path) is None
    path.write_text(json.dumps(whole)[:-20])
    assert read_universal(path) is None


MODEL = mlp(0)
GRAPH = graph(MODEL)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: universal_features([GRAPH]), SettingError, "at least two graphs; got 1"),
        (lambda: universal_features([GRAPH, MODEL]), SettingTypeError, "graphs"),  # type: ignore[list-item]
        (lambda: universal_features([GRAPH] * 2), LIBError, "no values.*universal_features\\(graphs, models, batches"),
        (lambda: universal_features([GRAPH] * 2, [MODEL] * 2), SettingTypeError, "both models and samples"),
        (lambda: universal_features([GRAPH] * 2, [MODEL], samples()), SettingError, "2 graphs, but 1 models"),
        (lambda: universal_features([GRAPH] * 2, names=["a", "a"]), SettingError, "all different"),
        (lambda: universal_features([GRAPH] * 2, layers=["ouptut"]), SettingError, "Did you mean 'output'"),
        (lambda: universal_features([GRAPH] * 2, level=0), SettingError, "level"),
        (
            lambda: universal_features([GRAPH] * 2, [MODEL] * 2, samples()).find("2", "1/0"),
            SettingError,
            "no network '2'",
        ),
    ],
)
def test_errors_say_what_to_do(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call()
    assert len(str(caught.value)) < 400


def test_errors_of_the_command(three_runs: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="at least two runs; there is only one"):
        main(["universal", str(three_runs / "b")])
    with pytest.raises(SystemExit, match="No run in"):
        main(["universal", str(tmp_path)])
    with pytest.raises(SystemExit, match="no snapshot at step 7"):
        main(["universal", str(three_runs), "--step", "7"])


def test_examples_of_the_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "many_runs.md").read_text()
    names: dict[str, object] = {"__name__": "page"}
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(block, "docs/many_runs.md", "exec"), names)
    assert "in all 4" in capsys.readouterr().out
    found = names["found"]
    assert isinstance(found, UniversalFeatures)
    feature = found.find("a", "1/3")
    assert feature is not None
    assert feature.members == {"a": "1/3", "b": "1/3", "c": "1/3"}
    assert (tmp_path / "found.json").exists()
