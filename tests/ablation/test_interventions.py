"""Ablations of tiny models compared with a literal transcription of the paper, in float64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.ablation.interventions import AblatedLayer, AblatedSection, top_k_mask
from lib_lightning.errors import NodeLayerError
from lib_lightning.model.batch import first_tensor
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.model_spec import ModelSpec
from tests import reference
from tests.cases import Case
from tests.computing import activations_of
from tests.conftest import CASES

TOLERANCE = 1e-9
BASES = ["lib", "pca", "neuron"]


def instrumented_of(case: Case, graph: InteractionGraph) -> InstrumentedModel:
    return InstrumentedModel(case.model, graph.node_layer_specs(), ModelSpec(case.input_fn, case.mask))


@functools.cache
def graph_of(case: Case, basis: str) -> InteractionGraph:
    return compute_interaction_graph(
        case.model, [case.data], case.node_layers, basis=basis, input_fn=case.input_fn, mask=case.mask,
        final_basis="neuron",
    )  # fmt: skip


def maps_of(graph: InteractionGraph) -> list[tuple[Tensor, Tensor, Tensor]]:
    return [(basis.mean, basis.to_features, basis.from_features) for basis in graph.bases.values()]


def counts_of(case: Case) -> list[Tensor]:
    return [case.valid(a, l) for l, a in enumerate(activations_of(case))]


def section_of(case: Case, instrumented: InstrumentedModel, graph: InteractionGraph, l: int) -> AblatedSection:
    return AblatedSection(instrumented, case.data, l, *list(graph.bases.values())[l : l + 2])


def last_of(instrumented: InstrumentedModel, output: Any) -> Tensor:
    """Activations of the last node layer, the model's output in every case."""
    found = first_tensor(output)
    assert found is not None
    return instrumented.layers[-1].read([found])


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < TOLERANCE * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("basis", BASES)
def test_node_ablation_agrees_with_transcription(case: Case, basis: str) -> None:
    graph, a = graph_of(case, basis), activations_of(case)
    instrumented = instrumented_of(case, graph)
    with model_session(instrumented), torch.no_grad():
        for l, one in enumerate(graph.bases.values()):
            layer = AblatedLayer(instrumented, case.data, l, one)
            order = one.importance.argsort(descending=True, stable=True).tolist()
            for m in sorted({0, 1, one.n_features // 2, one.n_features}):
                expected = reference.node_ablation(
                    a, case.sections, l, maps_of(graph)[l], order[:m], counts_of(case)[l]
                )
                assert_close(last_of(instrumented, layer.output(m)), expected)


@pytest.mark.parametrize("basis", BASES)
def test_edge_ablation_agrees_with_transcription(case: Case, basis: str) -> None:
    graph, a = graph_of(case, basis), activations_of(case)
    instrumented = instrumented_of(case, graph)
    with model_session(instrumented), torch.no_grad():
        for l, E in enumerate(graph.edges.values()):
            section = section_of(case, instrumented, graph, l)
            for k in sorted({0, 1, E.numel() // 5, E.numel() // 2, E.numel()}, reverse=True):
                mask = top_k_mask(E, k)
                expected = reference.edge_ablation(a, case.sections, l, maps_of(graph), mask, counts_of(case))
                assert_close(last_of(instrumented, section.output(mask)), expected)


def is_position_wise(case: Case, l: int) -> bool:
    """Whether each position of the next node layer is computed from the same one alone."""
    a, F = activations_of(case)[l], case.sections[l]
    J = reference.jacobian(F, a[0])
    S_out, _, S, _ = J.shape
    return S_out == S and not any(J[t, :, s].any() for t in range(S) for s in range(S) if t != s)


def test_only_affine_position_wise_sections_use_the_shortcut(case: Case) -> None:
    graph = graph_of(case, "pca")
    instrumented = instrumented_of(case, graph)
    with model_session(instrumented), torch.no_grad():
        for l in range(len(graph.edges)):
            shortcut = section_of(case, instrumented, graph, l).J is not None
            assert shortcut == (l in case.affine and is_position_wise(case, l)), graph.node_layers[l]


@pytest.mark.parametrize("basis", BASES)
def test_shortcut_equals_forward_passes(case: Case, basis: str) -> None:
    graph = graph_of(case, basis)
    instrumented = instrumented_of(case, graph)
    with model_session(instrumented), torch.no_grad():
        for l, E in enumerate(graph.edges.values()):
            section, plain = (section_of(case, instrumented, graph, l) for _ in range(2))
            plain.J = plain.shared = None
            for k in (E.numel() // 3, E.numel() // 2, 1):
                assert_close(section.features(top_k_mask(E, k)), plain.features(top_k_mask(E, k)))


class NearlyAffine(nn.Module):
    """Affine on the samples, at large multiples of them, or on all samples but one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear, self.head = kind, nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.linear(x)
        if self.kind == "always on":
            a = torch.relu(a + 20)
        elif self.kind == "weakly nonlinear":
            a = a + 1e-4 * torch.tanh(a)
        elif self.kind == "clamped":
            a = a.clamp(-40, 40)
        elif self.kind == "gated":
            a = a * (1 + 1e-6 * (x[:, :1] > 2.2))
        return self.head(a)


@pytest.mark.parametrize("kind", ["always on", "weakly nonlinear", "clamped", "gated"])
def test_sections_that_are_affine_only_on_the_samples_have_no_shortcut(kind: str) -> None:
    torch.manual_seed(3)
    model, x = NearlyAffine(kind).double(), torch.randn(40, 4).double()
    x[7, 0] = 2.5
    graph = compute_interaction_graph(model, [x], ["input", "output"], basis="pca")
    instrumented = InstrumentedModel(model, graph.node_layer_specs())
    with model_session(instrumented), torch.no_grad():
        assert AblatedSection(instrumented, x, 0, *graph.bases.values()).J is None


def random_masks(E: Tensor, n: int) -> list[Tensor]:
    masks = [top_k_mask(E, int(k)) for k in torch.randint(0, E.numel() + 1, (n,))]
    return [*masks, *(torch.rand(E.shape) < p for p in (0.1, 0.5, 0.9)), masks[0]]


@pytest.mark.parametrize("name", ["mlp_gelu", "transformer", "conv", "norm_and_residual", "padded", "linear_chain"])
def test_consecutive_masks_are_independent(name: str) -> None:
    case = CASES[name]
    graph = graph_of(case, "lib")
    instrumented = instrumented_of(case, graph)
    with model_session(instrumented), torch.no_grad():
        for l, E in enumerate(graph.edges.values()):
            section, masks = section_of(case, instrumented, graph, l), random_masks(E, 6)
            found = [section.features(mask) for mask in masks]
            for mask, features in zip(masks, found, strict=True):
                # Rows that change together are computed in one product, whose sums depend on their number.
                assert_close(features, section_of(case, instrumented, graph, l).features(mask))


def test_masks_may_be_modified_afterwards() -> None:
    case = CASES["mlp_tanh"]
    graph = graph_of(case, "lib")
    instrumented = instrumented_of(case, graph)
    with model_session(instrumented), torch.no_grad():
        section = section_of(case, instrumented, graph, 0)
        mask = top_k_mask(next(iter(graph.edges.values())), 10)
        expected = section.features(mask.clone())
        section.features(mask)
        mask[:] = True
        assert torch.equal(section.features(mask), section_of(case, instrumented, graph, 0).features(mask))
        assert not torch.equal(section.features(mask), expected)


@pytest.mark.parametrize("basis", ["pca", "neuron"])
def test_all_edges_of_a_full_basis_give_the_unablated_model(case: Case, basis: str) -> None:
    graph, a = graph_of(case, basis), activations_of(case)
    instrumented = instrumented_of(case, graph)
    with model_session(instrumented), torch.no_grad():
        for l, E in enumerate(graph.edges.values()):
            section = section_of(case, instrumented, graph, l)
            assert_close(last_of(instrumented, section.output(torch.ones_like(E, dtype=torch.bool))), a[-1])
        for l, one in enumerate(graph.bases.values()):
            assert_close(
                last_of(instrumented, AblatedLayer(instrumented, case.data, l, one).output(one.n_features)), a[-1]
            )


def test_without_features_activations_are_their_means() -> None:
    case = CASES["mlp_tanh"]
    graph = graph_of(case, "lib")
    instrumented = instrumented_of(case, graph)
    mean = graph.bases["2:input"].mean.expand(30, 1, -1)
    with model_session(instrumented), torch.no_grad():
        output = AblatedLayer(instrumented, case.data, 1, graph.bases["2:input"]).output(0)
    assert_close(output[:, None], reference.run_on(mean, case.sections[1:]))


def test_equal_edges_are_kept_in_row_major_order() -> None:
    E = torch.tensor([[1.0, 2.0, 1.0], [1.0, 2.0, 0.0]])
    assert top_k_mask(E, 0).sum() == 0
    assert top_k_mask(E, 3).tolist() == [[True, True, False], [False, True, False]]
    assert top_k_mask(E, 99).all()


def test_basis_of_a_different_width_is_refused() -> None:
    graph, other = graph_of(CASES["mlp_tanh"], "pca"), CASES["returns_tuple"]
    instrumented = instrumented_of(other, graph_of(other, "pca"))
    one = next(iter(graph.bases.values()))
    with model_session(instrumented), torch.no_grad():
        with pytest.raises(NodeLayerError, match="has width 5, but the model has 4 activations per position there"):
            AblatedLayer(instrumented, other.data, 0, one)
        with pytest.raises(NodeLayerError, match="the graph was computed on another model"):
            AblatedSection(instrumented, other.data, 0, one, one)
