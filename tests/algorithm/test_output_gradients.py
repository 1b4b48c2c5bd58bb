"""Metric and importances by the model's output: against dense Jacobians, real ablations, and in expectation."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import InteractionGraph, NodeLayer, compute_interaction_graph, list_node_layers
from lib_lightning.algorithm.build import BuildResult, build_graph
from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.algorithm.gradient_metric import GradientMetric
from lib_lightning.algorithm.jackknife import group_slices
from lib_lightning.algorithm.low_rank_gram import LowRankGram
from lib_lightning.algorithm.memory_plan import MemoryPlan
from lib_lightning.algorithm.output_gradients import (
    OutputGradients,
    importance_vectors,
    output_importances,
    output_metrics,
)
from lib_lightning.api import propose_node_layers
from lib_lightning.errors import ActivationError, SettingError
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.node_layer import as_node_layers
from lib_lightning.model.output_distribution import OutputDistribution
from tests.algorithm.test_build import assert_same, close, reference_of
from tests.cases import Case
from tests.reference import Reference, output_importance

KINDS = ["categorical", "bernoulli", "gaussian"]


@functools.cache
def graph_of(case: Case, **options: Any) -> InteractionGraph:
    return compute_interaction_graph(
        case.model, case.batches(7, 2, 11), case.node_layers, rtol=1e-11, input_fn=case.input_fn, mask=case.mask,
        final_basis="neuron", **options,
    )  # fmt: skip


@pytest.mark.combinations
@pytest.mark.parametrize("kind", KINDS)
def test_metric_of_the_output_agrees_with_transcription(case: Case, kind: str) -> None:
    graph = graph_of(case, metric="output", output_distribution=kind)
    assert_same(graph, reference_of(case, output=kind))
    assert [basis.kind for basis in graph.bases.values()] == [*["lib"] * len(case.sections), "neuron"]


def expected_importances(case: Case, r: Reference, kind: str, graph: InteractionGraph) -> list[Tensor]:
    valid = list(case.masks) or [torch.ones(x.shape[:2], dtype=torch.bool) for x in r.activations]
    last = r.activations[-1]
    return [
        output_importance(
            case.sections[l:], a, last, valid[l], valid[-1], kind, basis.encode(a), basis.from_features
        )
        for l, (a, basis) in enumerate(zip(r.activations, graph.bases.values(), strict=True))
    ]  # fmt: skip


@pytest.mark.combinations
@pytest.mark.parametrize(
    ("kind", "basis"), [*((kind, "lib") for kind in KINDS), ("categorical", "pca"), ("categorical", "neuron")]
)
def test_importance_for_the_output_agrees_with_transcription(case: Case, kind: str, basis: str) -> None:
    # As many probes as the output has numbers, which makes the sum exact.
    graph = graph_of(case, basis=basis, output_distribution=kind)
    outputs = graph.info["settings"]["output_distribution"]
    assert outputs == kind
    expected = expected_importances(case, reference_of(case, basis=basis), kind, graph)
    first = reference_of(case).activations[0]
    rows = int(case.valid(first, 0).sum())
    for found, o in zip(graph.bases.values(), expected, strict=True):
        assert found.output_importance is not None
        if n_outputs(case) <= importance_vectors(LIBConfig(), rows):
            assert close(found.output_importance, o)
        else:
            # An estimate, with a standard error of its own beside that of the samples.
            assert found.output_importance_error is not None
            assert ((found.output_importance - o).abs() <= 4 * found.output_importance_error + 1e-12 * o.max()).all()


def n_outputs(case: Case) -> int:
    a = reference_of(case).activations[-1]
    return a.shape[1] * a.shape[2]


def metrics_of(
    model: nn.Module, batches: Any, layers: Any, n_probes: int | None, seed: int = 0
) -> list[GradientMetric]:
    instrumented = InstrumentedModel(model, as_node_layers(layers))
    groups = [[(0, slice(None))] for _ in batches]
    with model_session(instrumented):
        widths = [a.shape[-1] for a in instrumented.activations(batches[0])]
        gradients = OutputGradients(
            instrumented, batches, OutputDistribution("categorical"), groups, MemoryPlan().stack_elements, seed
        )
        found = output_metrics(gradients, range(len(layers)), widths, n_probes, 1, LowRankGram)
    return list(found.values())


def test_estimates_have_the_metric_in_expectation_and_know_their_error() -> None:
    model, tokens = Tokens().double(), [torch.randint(0, 64, (8, 5)) for _ in range(2)]
    exact = metrics_of(model, tokens, LAYERS, None)
    several = [metrics_of(model, tokens, LAYERS, 8, seed) for seed in range(40)]
    for l, metric in enumerate(exact):
        assert metric.relative_error == 0
        errors = torch.stack([one[l].M - metric.M for one in several]) / metric.M.norm()
        typical = float(errors.norm(dim=(1, 2)).square().mean().sqrt())
        # 40 estimates with a mean of zero: their mean is 6 times smaller, within three of its standard errors.
        assert errors.mean(0).norm() < 3 * typical / 40**0.5
        said = sum(one[l].relative_error or 0 for one in several) / 40
        assert said == pytest.approx(typical, rel=0.3)
        assert typical < 0.5


def test_random_signs_have_less_variance_than_drawn_labels() -> None:
    model, tokens = Tokens().double(), torch.randint(0, 64, (16, 5))
    model.head.weight.data *= 30  # predictions that are nearly certain, as those of a trained model
    _, exact = metrics_of(model, [tokens], LAYERS[1:], None)
    signs = [metrics_of(model, [tokens], LAYERS[1:], 4, seed)[-1].M for seed in range(60)]
    labels = [metric_of_drawn_labels(model, tokens, 4) for _ in range(60)]
    error = [float(torch.stack(found).sub(exact.M).norm(dim=(1, 2)).square().mean()) for found in (signs, labels)]
    mean = torch.stack(labels).mean(0)
    assert (mean - exact.M).norm() < 3 * (error[1] / 60) ** 0.5  # the same in expectation
    assert error[0] < 0.7 * error[1]


def metric_of_drawn_labels(model: Tokens, tokens: Tensor, draws: int) -> Tensor:
    """``M_out`` of the last block, from gradients of the log-likelihood of labels drawn from the prediction."""
    M, n = torch.zeros(12, 12).double(), tokens.numel() * draws
    for _ in range(draws):
        leaf = None

        def cut(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            nonlocal leaf
            leaf = output.detach().requires_grad_()
            return leaf

        handle = model.blocks[-1].register_forward_hook(cut)
        log_p = model.eval()(tokens).log_softmax(-1)
        handle.remove()
        y = torch.distributions.Categorical(logits=log_p.detach()).sample()
        (g,) = torch.autograd.grad(log_p.gather(-1, y[..., None]).sum(), leaf)
        M += torch.einsum("nsd,nse->de", g, g) / n
    return M


@pytest.mark.combinations
@pytest.mark.parametrize("kind", KINDS)
def test_identities(case: Case, kind: str) -> None:
    graph = graph_of(case, metric="output", output_distribution=kind)
    r = reference_of(case, output=kind)
    for l, basis in enumerate(graph.bases.values()):
        a = r.activations[l][case.valid(r.activations[l], l)]
        features = basis.encode(a)
        assert close(features.T @ features / len(features), basis.importance.diag()) or basis.kind == "neuron"


def test_last_node_layer_that_is_the_output_under_another_name() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(50, 4).double()
    named, output = (
        compute_interaction_graph(model, [x], ["input", "1", last], final_metric="fisher") for last in ("2", "output")
    )
    for a, b in zip(named.bases.values(), output.bases.values(), strict=True):
        torch.testing.assert_close(a.importance, b.importance, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(a.output_importance, b.output_importance, rtol=1e-9, atol=1e-12)


def test_rotation_of_the_fisher_metric_through_an_affine_head() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(50, 4).double()
    hidden = compute_interaction_graph(model, [x], ["input", "1"], final_metric="fisher").bases["1"]
    logits = compute_interaction_graph(model, [x], ["input", "output"], final_metric="fisher").bases["output"]
    # The spectrum is the same: Sigma and M are carried through the head.
    torch.testing.assert_close(hidden.importance, logits.importance, rtol=1e-9, atol=1e-12)


class Tokens(nn.Module):
    """A language model: embedding, two mixing blocks, a head with many tokens."""

    def __init__(self, vocabulary: int = 64, d: int = 12) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(d, 2, 24, 0.0, batch_first=True) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))


LAYERS = ["embed", "blocks.0", "blocks.1"]


def estimate(model: nn.Module, batches: Any, seed: int = 0, **options: Any) -> BuildResult:
    instrumented = InstrumentedModel(model, as_node_layers(LAYERS))
    with model_session(instrumented):
        return build_graph(
            instrumented, batches, LIBConfig(basis="lib", n_pushed=4, **options), MemoryPlan(),
            output=OutputDistribution("categorical"),
        )  # fmt: skip


def importances_of(model: nn.Module, batch: Tensor, bases: Any, n_vectors: int | None, seed: int = 0) -> Any:
    instrumented = InstrumentedModel(model, as_node_layers(LAYERS))
    groups = [list(group_slices(0, len(batch), len(batch), 8))]
    with model_session(instrumented):
        gradients = OutputGradients(
            instrumented, [batch], OutputDistribution("categorical"), groups, MemoryPlan().stack_elements, seed
        )
        return output_importances(gradients, bases, n_vectors, 8)


def test_errors_of_importances_are_those_found() -> None:
    model, tokens = Tokens(16).double(), torch.randint(0, 16, (640, 5))
    bases = estimate(model, [tokens[:64]]).bases
    expected = torch.cat([one.value for one in importances_of(model, tokens, bases, None)])
    inside = []
    for seed, part in enumerate(tokens.split(32)):
        found = importances_of(model, part, bases, 4, seed)
        value, error = (torch.cat([getattr(one, name) for one in found]) for name in ("value", "error"))
        inside.append((value - expected).abs() < error)
    assert 0.6 < torch.stack(inside).double().mean() < 0.75


@pytest.mark.parametrize("layer", range(3))
def test_small_steps_change_the_prediction_by_the_metric(layer: int) -> None:
    model, tokens = Tokens().double(), torch.randint(0, 64, (32, 6))
    result = estimate(model, [tokens], metric="output", n_probes=512)
    basis = result.bases[layer]
    instrumented = InstrumentedModel(model, as_node_layers(LAYERS))
    distribution = OutputDistribution("categorical")
    with model_session(instrumented), torch.no_grad():
        a = instrumented.activations(tokens)[layer]
        before = instrumented.output(tokens, {})
        ratios = []
        for j in range(3):
            step = 1e-3 * basis.from_features[j]
            total = 0.0
            for s in range(6):
                moved = a.clone()
                moved[:, s] += step
                total += float(distribution.divergence(before, instrumented.output(tokens, {layer: moved})).sum())
            # In units of the basis, every feature moves the prediction by 1/2 nat per squared unit.
            ratios.append(total / (32 * 6) / (0.5 * 1e-6))
    assert torch.tensor(ratios).sub(1).abs().max() < 0.15


def test_settings_that_exclude_each_other() -> None:
    with pytest.raises(SettingError, match="metric='output' is the metric of basis='lib'"):
        LIBConfig(basis="pca", metric="output")
    with pytest.raises(SettingError, match="Remove output_distribution='none'"):
        LIBConfig(metric="output", output_distribution="none")
    with pytest.raises(SettingError, match="metric must be one of 'next', 'output'"):
        LIBConfig(metric="outputs")  # type: ignore[arg-type]


def test_many_outputs_are_sampled_and_said_so() -> None:
    graph = compute_interaction_graph(Tokens(900), [torch.randint(0, 900, (8, 6))], LAYERS, final_metric="fisher")
    assert any("64 random vectors per sample" in note for note in graph.info["notes"])
    assert 0 < graph.info["metric_errors"]["blocks.1"] < 1


def test_without_importances() -> None:
    graph = compute_interaction_graph(Tokens(), [torch.randint(0, 64, (8, 6))], LAYERS, output_distribution="none")
    assert all(basis.output_importance is None for basis in graph.bases.values())


def test_proposals_end_before_many_logits_which_measure_the_last_node_layer() -> None:
    model, tokens = Tokens(900), torch.randint(0, 900, (8, 6))
    layers = propose_node_layers(model, tokens)
    assert layers[-1] == "blocks.1"
    graph = compute_interaction_graph(model, [tokens], layers)
    assert graph.bases["blocks.1"].kind == "lib"
    assert graph.info["settings"]["final_metric"] == "fisher"
    assert any(cut.tap == "blocks.1" and cut.proposed for cut in list_node_layers(model, tokens))
    # What is asked for is kept, and exact sums are those of the paper.
    for options in ({"final_basis": "pca"}, {"effort": "exact", "n_probes": 2, "n_pushed": 2}):
        assert compute_interaction_graph(model, [tokens], layers, **options).bases["blocks.1"].kind == "pca"


def test_few_logits_and_other_outputs_stay_node_layers() -> None:
    tokens = torch.randint(0, 60, (8, 6))
    assert propose_node_layers(Tokens(60), tokens)[-1] == "output"
    autoencoder = nn.Sequential(nn.Linear(600, 20), nn.ReLU(), nn.Linear(20, 600))
    x = torch.rand(16, 600)
    assert propose_node_layers(autoencoder, x)[-1] == "output"
    assert propose_node_layers(autoencoder, (x, torch.zeros(16, dtype=torch.int64)))[-1] == "1"


def test_refused_width_of_logits_says_what_to_do() -> None:
    model, tokens = Tokens(20_000), torch.randint(0, 900, (8, 6))
    with pytest.raises(ActivationError, match="without them, they measure the node layer before"):
        compute_interaction_graph(model, [tokens], ["embed", "blocks.1", "output"])


def test_example_on_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "output.md").read_text()
    blocks, names = re.findall(r"```python\n(.*?)```", page, re.DOTALL), {"__name__": "page"}
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/output.md", "exec"), names)


def test_classes_of_a_segmentation_are_on_the_axis_of_channels() -> None:
    model = nn.Sequential(nn.Conv1d(2, 5, 3, padding=1), nn.ReLU(), nn.Conv1d(5, 3, 1)).double()
    x, y = torch.randn(12, 2, 7).double(), torch.randint(0, 3, (12, 7))
    graph = compute_interaction_graph(model, [(x, y)], ["0", "1"])
    expected = compute_interaction_graph(model, [(x, y)], ["0", "1", NodeLayer("2", feature_dim=1)])
    assert graph.info["output_distribution"]["kind"] == "categorical"
    C_pinv, mean = graph.bases["1"].from_features, graph.bases["1"].mean
    a = model[1](model[0](x)).detach().mT  # (n, S, d)
    features, p = (a - mean) @ graph.bases["1"].to_features, model(x).detach().mT.softmax(-1)
    W = model[2].weight.detach()[..., 0]
    F_x = torch.diag_embed(p) - p[..., :, None] * p[..., None, :]
    moved = features[..., None] * (C_pinv @ W.T)  # (n, S, r, classes)
    o = torch.einsum("nsri,nsij,nsrj->r", moved, F_x, moved) / 2 / (12 * 7)
    error = graph.bases["1"].output_importance_error
    assert graph.bases["1"].output_importance is not None
    assert error is not None
    assert ((graph.bases["1"].output_importance - o).abs() <= 4 * error + 1e-12).all()
    assert len(expected.bases["2"].mean) == 3
