"""What each feature alone does to a score."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import Basis, InteractionGraph, compute_interaction_graph
from lib_lightning.ablation import accuracy, edge_ablation_curve, log_likelihood
from lib_lightning.distributed.process_group import ProcessGroup
from lib_lightning.errors import LIBError, NodeLayerError, NotFiniteError, SettingError
from lib_lightning.interventions import MEAN, Effect, edit_features, effects, feature_effects
from lib_lightning.model.batch import first_tensor, map_tensors
from lib_lightning.model.instrumented import InstrumentedModel
from recipes.ground_truth import FEATURES, network_of_features
from tests.cases import Case
from tests.interventions.test_edit import models


def square_of_output(output: Any, batch: Any) -> Tensor:
    y = first_tensor(output)
    assert y is not None
    return -y.flatten(1).square().mean(1)


@pytest.mark.parametrize("at_once", [True, False])
def test_equal_to_editing_one_feature_after_another(case: Case, at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not at_once:
        monkeypatch.setattr(effects, "_BYTES_CPU", 0)
        monkeypatch.setattr(effects, "_FEWEST_RECORDED", 1)
    graph = compute_interaction_graph(
        case.model, [case.data], case.node_layers, input_fn=case.input_fn, mask=case.mask, effort="exact"
    )
    found = feature_effects(
        case.model, case.batches(7, 9), graph, square_of_output, input_fn=case.input_fn, mask=case.mask
    )
    assert list(found) == [name for layer in graph.node_layers for name in graph.feature_ids(layer)]
    args, kwargs = ((), case.data) if isinstance(case.data, dict) else ((case.data,), {})
    if case.input_fn is not None:
        args, kwargs = case.input_fn(case.data), {}
    elif isinstance(case.data, tuple):
        args = case.data[:1]
    with torch.no_grad():
        before = square_of_output(case.model(*args, **kwargs), None)
        for name, effect in found.items():
            with edit_features(case.model, graph, {name: MEAN}, mask=case.mask):
                d = square_of_output(case.model(*args, **kwargs), None) - before
            assert effect.change == pytest.approx(float(d.mean()), abs=1e-12)
            assert effect.error == pytest.approx(float(d.std() / len(d) ** 0.5), abs=1e-9)


@pytest.mark.parametrize("name", models())
def test_equal_to_editing_on_kinds_of_models(name: str) -> None:
    make, data, layers, options = models()[name]
    model = make().double().eval()
    batch = map_tensors(data(), lambda t: t.double() if t.is_floating_point() else t)
    graph = compute_interaction_graph(model, [batch], layers, effort="exact", **options)
    found = feature_effects(model, [batch], graph, square_of_output)
    args = batch if isinstance(batch, tuple) else (batch,)
    with torch.no_grad():
        before = square_of_output(model(*args), None)
        for feature, effect in found.items():
            with edit_features(model, graph, {feature: MEAN}):
                d = square_of_output(model(*args), None) - before
            assert effect.change == pytest.approx(float(d.mean()), abs=1e-10)


def graph_of_planted(seed: int) -> tuple[Any, InteractionGraph, list[str]]:
    """A network with planted features, its own coordinates as features, and the ids of those that matter."""
    planted = network_of_features(seed, n=300)
    graph = compute_interaction_graph(planted.model, [planted.x], planted.node_layers, basis="neuron", effort="exact")
    important = []
    for l, (name, basis) in enumerate(list(graph.bases.items())):
        A = planted.mixing[l]
        graph.bases[name] = Basis(name, "lib", basis.mean, A.inverse().T, A.T, basis.importance)
        important += [f"{name}/{j}" for j in range(FEATURES[l][0])]
    return planted, graph, important


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("kind", ["distance", "divergence"])
def test_all_planted_features_are_found_and_no_others(seed: int, kind: str) -> None:
    planted, graph, important = graph_of_planted(seed)
    x = torch.randn(200, planted.x.shape[1]) @ torch.linalg.cholesky(planted.x.T.cov()).T
    with torch.no_grad():
        y = planted.model(x)
    batches = [(x[:120], y[:120]), (x[120:], y[120:])]

    def score(output: Tensor, batch: Any) -> Tensor:
        if kind == "distance":
            return -(output - batch[1]).square().mean(1)
        log_p, log_q = batch[1].log_softmax(1), output.log_softmax(1)
        return -(log_p.exp() * (log_p - log_q)).sum(1)

    found = feature_effects(planted.model, batches, graph, score)
    assert [name for name, effect in found.items() if effect.significant] == important
    assert all(found[name].change < 0 for name in important)
    # Those that lead nowhere do nothing but rounding.
    assert all(effect.p_value == 1 for name, effect in found.items() if name not in important)


def test_lib_features_of_planted_networks_all_matter() -> None:
    planted = network_of_features(0)
    graph = compute_interaction_graph(planted.model, [planted.x[:1000]], planted.node_layers)
    with torch.no_grad():
        batch = planted.x[1000:], planted.model(planted.x[1000:])
    found = feature_effects(planted.model, [batch], graph, lambda y, batch: -(y - batch[1]).square().mean(1))
    assert len(found) == sum(width[0] for width in FEATURES)
    assert all(effect.significant and effect.change < 0 for effect in found.values())


def tiny(seed: int) -> tuple[nn.Module, Tensor, InteractionGraph]:
    """A network and a graph of single neurons, without the computation of edges."""
    torch.manual_seed(seed)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(24, 4)
    with torch.no_grad():
        a = {"input": x, "1": model[:2](x), "output": model(x)}
    bases = {
        name: Basis(name, "neuron", t.mean(0).double(), torch.eye(t.shape[1]).double(), torch.eye(t.shape[1]).double(),
                    t.var(0).double())
        for name, t in a.items()
    }  # fmt: skip
    places = [{"name": name, "taps": [name], "positions": None, "feature_dim": None} for name in bases]
    return model, x, InteractionGraph(bases, {}, {"node_layers": places})


def test_at_most_one_network_in_twenty_without_effects_has_any() -> None:
    """No feature changes the score on average: its sign is random, with heavy tails, or the output is not used."""
    n_false = 0
    for seed in range(200):
        model, x, graph = tiny(seed)
        sign = torch.randint(0, 2, (len(x),)) * 2 - 1.0
        if seed % 4 == 1:
            sign = sign * torch.randn(len(x)).abs().reciprocal()
        if seed % 4 == 2:
            sign = sign * 0
        if seed % 4 == 3:  # changes of accuracy: few, and all of the same size
            found = feature_effects(
                model, [(x, sign)], graph, lambda y, batch: (y[:, 0] > 0).float() * batch[1], features=None
            )
        else:
            found = feature_effects(model, [(x, sign)], graph, lambda y, batch: (y[:, 0] - y[:, 1]) * batch[1])
        n_false += any(effect.significant for effect in found.values())
    assert n_false <= 10


def test_share_of_false_ones_among_many_true_ones() -> None:
    """Half of the outputs enter the score, the others with a random sign: at most one in twenty found is false."""
    shares, n_missed = [], 0
    for seed in range(200):
        torch.manual_seed(seed)
        model, x = nn.Linear(8, 8), torch.randn(60, 8)
        with torch.no_grad():
            y = model(x)
        eye = torch.eye(8).double()
        basis = Basis("output", "neuron", y.mean(0).double(), eye, eye, y.var(0).double())
        place = {"name": "output", "taps": ["output"], "positions": None, "feature_dim": None}
        graph = InteractionGraph({"output": basis}, {}, {"node_layers": [place]})
        sign = torch.randint(0, 2, (60, 4)) * 2 - 1.0

        def score(output: Tensor, batch: Any) -> Tensor:
            return -(output - batch[2])[:, :4].square().sum(1) + (output[:, 4:] * batch[1]).sum(1)

        found = feature_effects(model, [(x, sign, y)], graph, score)
        chosen = [j for j in range(8) if found[f"output/{j}"].significant]
        shares.append(sum(j >= 4 for j in chosen) / max(1, len(chosen)))
        n_missed += sum(j not in chosen for j in range(4))
    assert sum(shares) / len(shares) <= 0.05
    assert n_missed == 0


def test_several_features_at_once_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, graph = tiny(0)
    batch = x, torch.randint(0, 3, (24,))
    n_passes: list[int] = []
    run = InstrumentedModel.run
    monkeypatch.setattr(InstrumentedModel, "run", lambda self, batch: n_passes.append(1) or run(self, batch))
    together = feature_effects(model, [batch], graph, log_likelihood)
    few = len(n_passes)
    monkeypatch.setattr(effects, "_BYTES_CPU", 0)
    monkeypatch.setattr(effects, "_FEWEST_RECORDED", 1)
    n_passes.clear()
    recorded = feature_effects(model, [batch], graph, log_likelihood)
    few_more = len(n_passes)
    monkeypatch.setattr(effects, "_FEWEST_RECORDED", 100)
    n_passes.clear()
    single = feature_effects(model, [batch], graph, log_likelihood)
    assert few <= 8  # one for each node layer, and a few without edits
    assert few_more <= 13  # a recording for each node layer, and two passes to compare it with; and likewise
    assert len(n_passes) >= 13
    for name, effect in single.items():
        for other in (together, recorded):
            assert other[name].change == pytest.approx(effect.change, abs=1e-6)
            assert other[name].significant == effect.significant


STORED: dict[str, Tensor] = {}


class Telling(nn.Module):
    """A model that says its output in several ways."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.middle, self.head = kind, nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.head(self.middle(self.first(x).tanh()).relu())
        STORED["y"] = y.detach()
        more = {"array": STORED["y"].numpy, "list": STORED["y"].tolist, "object": lambda: SimpleNamespace(all=[y])}
        return {"logits": y, "more": more[self.kind]() if self.kind in more else None}


def told(output: Any, batch: Any) -> Tensor:
    more = output["more"]
    y = (
        STORED["y"]
        if more is None
        else torch.as_tensor(more.all[0] if isinstance(more, SimpleNamespace) else more, dtype=torch.float64)
    )
    return -y.double().square().sum(1)


@pytest.mark.parametrize("kind", ["array", "list", "object", "stored"])
def test_scores_that_read_more_than_tensors(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Telling(kind).double(), torch.randn(30, 4).double()
    layers = ["first", "head:input"]
    graph = compute_interaction_graph(model, [x], layers, "neuron", output_distribution="none")

    def plain(output: Any, batch: Any) -> Tensor:
        y: Tensor = output["logits"]
        return -y.square().sum(1)

    monkeypatch.setattr(effects, "_BYTES_CPU", 0)
    monkeypatch.setattr(effects, "_FEWEST_RECORDED", 1)
    found, expected = (feature_effects(model, [x], graph, score) for score in (told, plain))
    assert len({effect.change for effect in expected.values()}) > 8
    for name, effect in found.items():
        assert effect.change == pytest.approx(expected[name].change, abs=1e-12)
    # So it is in edge ablations.
    curves = [
        edge_ablation_curve(model, [x], graph, score, ("first", "head:input"), [1, 9, 30]) for score in (told, plain)
    ]
    assert curves[0] == pytest.approx(curves[1], abs=1e-12)
    assert len({*curves[1].values()}) == 3


def test_scores_that_know_their_samples_and_models_that_draw_random_numbers() -> None:
    model, x, graph = tiny(0)
    y = model(x).detach()
    found = feature_effects(model, [x], graph, lambda output, batch: -(output - y).square().sum(1))
    assert all(effect.change < 0 for effect in found.values())

    class Noisy(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = super().forward(x)
            return y + 100 * torch.randn_like(y[:, :1])

    noisy = feature_effects(Noisy(*model), [x], graph, lambda output, batch: -(output - output[:, :1]).square().sum(1))
    plain = feature_effects(model, [x], graph, lambda output, batch: -(output - output[:, :1]).square().sum(1))
    for name, effect in plain.items():
        if not name.startswith("output"):
            assert noisy[name].change == pytest.approx(effect.change, rel=1e-2, abs=1e-3)  # 100 in float32


def test_small_effects_need_double_precision() -> None:
    model, x, graph = tiny(0)
    y = model(x).detach()

    def score(output: Tensor, batch: Tensor) -> Tensor:
        return 1 - 1e-6 * (output[:, 0] - y[: len(output), 0].to(output)).square()

    for dtype, is_visible in ((None, False), (torch.float64, True)):
        found = feature_effects(model, [x], graph, score, dtype=dtype)
        assert found["output/0"].significant == is_visible
        assert found["output/0"].change == pytest.approx(-1e-6 * float(y[:, 0].var(correction=0)), abs=2e-7)
        assert found["output/1"].p_value == 1


def test_memory_that_runs_out_and_untouched_models(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, graph = tiny(0)
    model.train()
    expected = feature_effects(model, [x], graph, lambda y, batch: y[:, 0])

    def small_memory(y: Tensor, batch: Tensor) -> Tensor:
        if len(batch) > 60:
            raise MemoryError
        return y[:, 0]

    found = feature_effects(model, [x], graph, small_memory)
    assert {name: e.significant for name, e in found.items()} == {name: e.significant for name, e in expected.items()}
    assert model.training
    assert not model._forward_hooks


class Two(ProcessGroup):
    """Process 0 of two with the same samples."""

    size = 2

    def sum(self, tensors: Any) -> list[Tensor]:
        return [2 * t for t in tensors]


def test_effects_over_processes() -> None:
    model, x, graph = tiny(0)
    both = feature_effects(model, [x], graph, square_of_output, process_group=Two())
    twice = feature_effects(model, [x, x], graph, square_of_output)
    for name, effect in twice.items():
        assert both[name].change == pytest.approx(effect.change)
        assert both[name].p_value == pytest.approx(effect.p_value)


def test_few_features_and_few_samples(caplog: pytest.LogCaptureFixture) -> None:
    model, x, graph = tiny(0)
    chosen = feature_effects(model, [x], graph, square_of_output, features=["output/1", ("input", 0)])
    assert list(chosen) == ["input/0", "output/1"]
    assert feature_effects(model, [x], graph, square_of_output, features=[]) == {}
    with caplog.at_level(logging.WARNING):
        found = feature_effects(model, [x[:2]], graph, square_of_output)
    assert "With 2 samples no one of 13 features alone can be told from chance at level 0.05: use 11" in caplog.text
    assert not any(effect.significant for effect in found.values())
    alone = feature_effects(model, [x[:1]], graph, square_of_output, features=["input/0"])["input/0"]
    assert alone.error != alone.error
    assert isinstance(alone, Effect)
    assert feature_effects(model, [(x, x[:, 0] > 0)], graph, lambda y, b: b[1].float())["output/0"] == Effect(
        0, 0, 1, False
    )


@pytest.mark.parametrize(
    ("score", "options", "error", "match"),
    [
        (lambda y, batch: y.sum(), {}, LIBError, "one number for each of the 24 samples"),
        (lambda y, batch: y[:, 0] / 0, {}, NotFiniteError, "NaN or infinite"),
        (accuracy, {}, LIBError, "do not fit"),
        (square_of_output, {"level": 2}, SettingError, "level must be between 0 and 1"),
    ],
)
def test_errors(score: Any, options: dict[str, Any], error: type[Exception], match: str) -> None:
    model, x, graph = tiny(0)
    with pytest.raises(error, match=match):
        feature_effects(model, [x], graph, score, **options)


def test_no_samples_and_other_models() -> None:
    model, x, graph = tiny(0)
    with pytest.raises(LIBError, match="no samples to score"):
        feature_effects(model, [], graph, square_of_output)
    other = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with pytest.raises(NodeLayerError, match="has width 6, but the model has 5"):
        feature_effects(other, [x], graph, square_of_output)
