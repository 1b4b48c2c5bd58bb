"""Bases and edges compared with the transcription of the paper, with exact identities, and without shortcuts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.algorithm.build import build_graph
from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.algorithm.memory_plan import MemoryPlan
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.node_layer import as_node_layers
from lib_lightning.model.output_distribution import OutputDistribution
from tests.cases import Case
from tests.computing import assert_equal, built, built_of
from tests.conftest import CASES
from tests.reference import Reference, fisher_metric, jacobian, nonzero_eigh, transcribe

# Both sides are in float64 with numbers of order one, but with sums in a different order and different factorisations:
# 1e-8 allows for square roots of eigenvalues near the cutoff.
TOLERANCE = 1e-8
RTOL = 1e-11


def close(actual: Tensor, expected: Tensor, scale: Tensor | None = None) -> bool:
    size = (expected if scale is None else scale).abs().max().clamp(min=1e-12)
    return actual.shape == expected.shape and bool(((actual - expected).abs().max() / size) < TOLERANCE)


@functools.cache
def graph_of(case: Case, *sizes: int, **options: object) -> InteractionGraph:
    batches = case.batches(*(sizes or (10_000,)))
    return compute_interaction_graph(
        case.model, batches, case.node_layers, rtol=RTOL, input_fn=case.input_fn, mask=case.mask, **options
    )


@functools.cache
def reference_of(case: Case, **options: object) -> Reference:
    with torch.no_grad():
        a0 = case.first(case.data)
    return transcribe(a0, case.sections, rtol=RTOL, masks=case.masks, **options)


def assert_same(graph: InteractionGraph, reference: Reference) -> None:
    for l, basis in enumerate(graph.bases.values()):
        assert close(basis.mean, reference.mean[l])
        assert close(basis.importance, reference.Lambda[l])
        # Signs are arbitrary; they cancel in projections.
        assert close(basis.to_features @ basis.from_features, reference.C[l] @ reference.C_pinv[l])
        features, expected = (
            (reference.activations[l] - reference.mean[l]) @ C for C in (basis.to_features, reference.C[l])
        )
        assert close(features.abs(), expected.abs(), expected)
    for E, expected in zip(graph.edges.values(), reference.E, strict=True):
        assert E.dtype == torch.float64
        assert (E >= 0).all()
        assert close(E, expected)
    # Of one feature of each pair the sign is free, and with it that of neither product.
    for A, expected in zip(graph.attributions.values(), reference.A, strict=True):
        assert A.dtype == torch.float64
        assert close(A, expected)


@pytest.mark.parametrize("basis", ["lib", "pca", "neuron"])
def test_agrees_with_transcription(case: Case, basis: str) -> None:
    assert_same(graph_of(case, basis=basis, final_basis="neuron"), reference_of(case, basis=basis))


@pytest.mark.parametrize("final", ["pca", "centered"])
def test_final_basis_agrees_with_transcription(case: Case, final: str) -> None:
    assert_same(graph_of(case, final_basis=final), reference_of(case, final=final))


@pytest.mark.parametrize("basis", ["lib", "pca", "neuron"])
def test_final_fisher_agrees_with_transcription(case: Case, basis: str) -> None:
    graph = graph_of(case, basis=basis, final_metric="fisher")
    assert_same(graph, reference_of(case, basis=basis, final="fisher"))
    assert [b.kind for b in graph.bases.values()] == [*[basis] * len(case.sections), "lib"]


@pytest.mark.combinations
@pytest.mark.parametrize("steps", [1, 4])
def test_integrated_gradients_agree_with_transcription(case: Case, steps: int) -> None:
    assert_same(graph_of(case, final_basis="neuron", integration_steps=steps), reference_of(case, steps=steps))


@pytest.mark.combinations
@pytest.mark.parametrize("sizes", [(1,), (7, 2, 11)])
@pytest.mark.parametrize("stack_elements", [1, 200, 10**9])
def test_result_does_not_depend_on_batches_and_vectors_per_call(
    case: Case, sizes: tuple[int, ...], stack_elements: int
) -> None:
    instrumented = InstrumentedModel(case.model, as_node_layers(case.node_layers), ModelSpec(case.input_fn, case.mask))
    found = build_graph(
        instrumented,
        case.batches(*sizes),
        LIBConfig(rtol=RTOL, final_basis="neuron"),
        plan=MemoryPlan(stack_elements=stack_elements),
    )
    whole = graph_of(case, final_basis="neuron")
    assert found.n_samples == whole.info["n_samples"]
    for basis, expected in zip(found.bases, whole.bases.values(), strict=True):
        assert close(basis.importance, expected.importance)
    for E, expected_E in zip(found.edges, whole.edges.values(), strict=True):
        assert close(E, expected_E)
    for A, expected_A in zip(found.attributions, whole.attributions.values(), strict=True):
        assert close(A, expected_A)


@pytest.mark.combinations
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"final_metric": "fisher"},
        {"final_basis": "centered", "basis": "neuron"},
        {"final_basis": "pca", "basis": "pca"},
        {"integration_steps": 2},
        {"metric": "output"},
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "lib",
)
def test_plain_twins_give_the_same_result(case: Case, options: dict[str, Any]) -> None:
    options |= {"output": OutputDistribution("categorical")}
    assert_equal(built_of(case, **options), built_of(case, plain=True, **options))


@pytest.mark.parametrize("positions", [(), (2,)])
@pytest.mark.parametrize("n", [40, 700])  # fewer samples than features, and more
def test_plain_twins_give_the_same_result_for_wide_layers(n: int, positions: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(530, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 3)).double()
    batches = list(torch.randn(n, *positions, 530).double().split(250))
    fast, plain = (built(model, batches, ["input", "2", "output"], plain=plain) for plain in (False, True))
    assert_equal(fast, plain)


def test_plain_computation_takes_no_shortcut(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        pytest.fail("a shortcut was used")

    for path in (
        "algorithm.low_rank_gram.LowRankGram.__init__", "algorithm.section_cache.KeptSections.__init__",
        "algorithm.wide_layers.DualEigenproblem.__init__", "jacobian.closed_form_detect.ClosedFormDetector.__init__",
        "jacobian.section.Section.jvp",
    ):  # fmt: skip
        monkeypatch.setattr(f"lib_lightning.{path}", fail)
    model = nn.Sequential(nn.Linear(530, 12), nn.Tanh(), nn.LayerNorm(12), nn.Linear(12, 3)).double()
    batch = torch.randn(20, 4, 530).double()
    assert built(model, [batch], ["input", "2", "output"], plain=True).n_samples == 20
    with pytest.raises(pytest.fail.Exception):
        built(model, [batch], ["input", "2", "output"])


def test_features_are_centred_and_their_variance_is_their_importance(case: Case) -> None:
    graph, reference = graph_of(case), reference_of(case)
    for l, (a, basis) in enumerate(list(zip(reference.activations, graph.bases.values(), strict=True))[:-1]):
        features = basis.encode(a)[case.valid(a, l)]
        assert features.mean(0).abs().max() < TOLERANCE * basis.importance.max().sqrt()
        assert close(features.T @ features / len(features), basis.importance.diag())


def test_jacobians_are_orthonormal(case: Case) -> None:
    graph, reference = graph_of(case), reference_of(case)
    bases = list(graph.bases.values())
    for l, F in enumerate(case.sections):
        a, a_next = reference.activations[l : l + 2]
        valid, valid_next = case.valid(a, l), case.valid(a_next, l + 1)
        total = torch.zeros(bases[l].n_features, bases[l].n_features).double()
        for x, a_x in enumerate(a):
            J = torch.einsum("pi,tpsd,jd->tisj", bases[l + 1].to_features, jacobian(F, a_x), bases[l].from_features)
            J = J[valid_next[x]][:, :, valid[x]]
            total += torch.einsum("tisj,tisk->jk", J, J) / valid.sum()
        assert close(total, torch.eye(len(total)).double())


def logits_of(case: Case) -> Tensor:
    """Logits at valid positions, ``(m, d)``."""
    a = reference_of(case).activations[-1]
    return a[case.valid(a, len(case.sections))]


def test_fisher_features_span_what_softmax_depends_on(case: Case) -> None:
    z, basis = logits_of(case), list(graph_of(case, final_metric="fisher").bases.values())[-1]
    C, M = basis.to_features, fisher_metric(z)
    features = basis.encode(z)
    assert features.mean(0).abs().max() < TOLERANCE * basis.importance.max().sqrt()
    assert close(features.T @ features / len(z), basis.importance.diag())
    # The features measure steps as the metric does: C C^T = M on the span of the data.
    D, U = nonzero_eigh((z - z.mean(0)).T @ (z - z.mean(0)) / len(z), RTOL)
    assert close(U.T @ C @ C.T @ U, U.T @ M @ U)
    if len(D) == z.shape[1]:  # then it contains the step common to all logits, which no feature reads
        assert basis.n_features == len(D) - 1
        assert close(C.sum(0), torch.zeros(basis.n_features).double(), C)


def test_fisher_features_measure_the_divergence_of_predictions(case: Case) -> None:
    z, basis = logits_of(case), list(graph_of(case, final_metric="fisher").bases.values())[-1]
    log_p = z.log_softmax(-1)
    directions = z[:5] - basis.mean
    for v in directions:
        # KL is v^T (diag p - p p^T) v / 2 to second order. The mean over two opposite steps has no third order, so that
        # Richardson extrapolation from two step sizes removes the fourth.
        def divergence(t: float, v: Tensor = v) -> Tensor:
            kl = [(log_p.exp() * (log_p - (z + s * t * v).log_softmax(-1))).sum(-1).mean() for s in (-1, 1)]
            return (kl[0] + kl[1]) / 2 / t**2

        h = 1e-2 / float(v.norm())
        limit = (4 * divergence(h / 2) - divergence(h)) / 3  # without the fourth order
        change = (v @ basis.to_features).square().sum() / 2
        assert float(limit) == pytest.approx(float(change), rel=1e-6)


def test_shift_common_to_all_logits_does_not_change_the_graph() -> None:
    # Two models whose logits differ by a number common to all classes predict the same distribution.
    class Shifted(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 3 * x.square().sum(-1, keepdim=True)

    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    x = torch.randn(50, 4).double()
    for options in ({"final_basis": "centered"}, {"final_metric": "fisher"}):
        one, other = (
            compute_interaction_graph(model, [x], ["input", "output"], rtol=RTOL, **options)
            for model in (plain, Shifted(plain))
        )
        assert close(other.bases["input"].importance, one.bases["input"].importance)
        assert close(other.edges["input", "output"], one.edges["input", "output"])
    importance = [
        compute_interaction_graph(m, [x], ["input", "output"]).bases["input"].importance
        for m in (plain, Shifted(plain))
    ]
    assert not close(importance[1], importance[0]), "the neuron basis depends on it"


@pytest.mark.parametrize(
    "name", ["mlp_relu", "few_samples", "linear_chain", "positions", "residual", "dict_input", "tied"]
)
def test_edges_of_an_affine_section_sum_to_importance(name: str) -> None:
    case = CASES[name]
    graph = graph_of(case)
    for l in case.affine:
        E, basis = graph.edges[graph.node_layers[l], graph.node_layers[l + 1]], graph.bases[graph.node_layers[l]]
        assert close(E.sum(0), basis.importance)


def test_edges_of_a_linear_chain_are_diagonal() -> None:
    for E in list(graph_of(CASES["linear_chain"], final_basis="pca").edges.values())[:-1]:
        assert close(E, E.diagonal().diag())
