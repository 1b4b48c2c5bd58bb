"""Sections without the rest of the model give the same features and derivatives as the model, or are not used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import InteractionGraph, NodeLayer, compute_interaction_graph
from lib_lightning.ablation import model_part
from lib_lightning.ablation.interventions import AblatedSection
from lib_lightning.ablation.model_part import ModelPart
from lib_lightning.dictionaries import TopKSAE
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.recorded import RecordedFunction
from tests.ablation.test_interventions import graph_of, instrumented_of, section_of
from tests.cases import Case

# Sums in another order, of numbers of size 1.
TOLERANCE = 1e-10


def some_masks(E: Tensor) -> list[Tensor]:
    """Edges that are kept or dropped at random, edges that are scaled, few edges, and equal rows."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(E.shape, generator=generator) < 0.4
    scaled = torch.rand(E.shape, generator=generator).double() * (torch.rand(E.shape, generator=generator) < 0.7)
    few = torch.rand(E.shape, generator=generator) < 1 / E.shape[1]
    return [kept, scaled, few, kept[:1].expand_as(kept)]


def without_recording(section: AblatedSection) -> AblatedSection:
    section.shared = None
    return section


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("basis", ["lib", "neuron"])
def test_features_are_those_of_forward_passes(case: Case, basis: str) -> None:
    graph = graph_of(case, basis)
    instrumented = instrumented_of(case, graph)
    with model_session(instrumented), torch.no_grad():
        for l, E in enumerate(graph.edges.values()):
            section, plain = section_of(case, instrumented, graph, l), section_of(case, instrumented, graph, l)
            assert section.J is not None or section.shared is not None, f"{graph.node_layers[l]} is slow"
            plain.J = plain.shared = None
            for mask in some_masks(E):
                expected = plain.features(mask)
                assert_same(section.features(mask), expected)
                if section.shared is not None:
                    for rows_at_once in (1, 3):
                        for part in section.shared.parts:
                            part.rows_at_once = rows_at_once
                        rows = torch.arange(len(mask)).flip(0)
                        assert_same(section.shared.features(mask[rows], rows), expected[..., rows])


class Cell(nn.Module):
    """A model with one nonlinear section, of a certain kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.head = kind, nn.Linear(4, 6), nn.Linear(6, 3)
        self.norm, self.experts = nn.BatchNorm1d(6), nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.recurrent = nn.LSTM(6, 6, batch_first=True)
        self.register_buffer("seen", torch.zeros(6))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(torch.tanh(self.first(x))))

    def middle(self, h: Tensor) -> Tensor:
        if self.kind == "batch norm":
            return torch.relu(self.norm(h))
        if self.kind == "recurrent":
            return self.recurrent(h[:, None])[0][:, 0]
        if self.kind == "noise before":
            return (h + torch.rand_like(self.seen)).sin()
        if self.kind == "noise":
            return h.sin() * (1 + torch.rand_like(h))
        if self.kind == "dropout in training mode":
            return nn.functional.dropout(h.sin(), 0.5)
        if self.kind == "numpy":
            return torch.from_numpy(abs(h.numpy())) if not h.requires_grad else h.abs()
        if self.kind == "list":
            return torch.tensor([[abs(v) for v in row] for row in h.tolist()]).to(h) if not h.requires_grad else h.abs()
        if self.kind == "branch":
            return h.relu() if bool(h[:, 0].sum() > 0) else h.sin()
        if self.kind == "experts":
            chosen = h[:, 0] > 0.1
            out = torch.empty_like(h)
            out[chosen], out[~chosen] = (e(h[c]) for e, c in zip(self.experts, (chosen, ~chosen), strict=True))
            return out
        if self.kind == "buffer":
            self.seen.copy_(h.detach().mean(0))
            self.seen[1:] += h.detach()[0, 1:]
            return h.sin() * self.seen
        if self.kind == "stored":
            before, self.last = self.last, h
            return h.sin() + (0 if before is None or len(before) != len(h) else before.cos())
        assert self.kind == "autograd function"
        return Cube.apply(h)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g * 3 * ctx.saved_tensors[0] ** 2


def cell(kind: str) -> nn.Module:
    torch.manual_seed(1)
    model = Cell(kind).double().eval()
    with torch.no_grad():
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    return model


# Whether each kind can be repeated without the model.
KINDS = {
    "batch norm": True, "recurrent": True, "noise before": True, "autograd function": True, "noise": False,
    "dropout in training mode": False, "numpy": False, "list": False, "branch": False, "experts": False,
    "buffer": True, "stored": None,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_any_section_gives_what_the_model_gives(kind: str) -> None:
    # Some of the kinds have no derivatives, so that the bases are those of another model.
    model, x = cell("batch norm"), torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).double()
    graph = compute_interaction_graph(model, [x], ["first", "head:input", "output"], basis="pca")
    model.kind = kind
    instrumented = InstrumentedModel(model, graph.node_layer_specs())
    with model_session(instrumented), torch.no_grad():
        bases = list(graph.bases.values())[:2]
        section, plain = AblatedSection(instrumented, x, 0, *bases), AblatedSection(instrumented, x, 0, *bases)
        plain.J = plain.shared = None
        if KINDS[kind] is not None:
            assert (section.shared is not None) == KINDS[kind]
        for mask in some_masks(next(iter(graph.edges.values()))):
            assert_same(section.features(mask), plain.features(mask))


def dictionary(d: int, n_latents: int, k: int) -> TopKSAE:
    W = nn.functional.normalize(torch.randn(n_latents, d, generator=torch.Generator().manual_seed(d)), dim=1).double()
    return TopKSAE(W.T, torch.zeros(n_latents).double(), W, torch.zeros(d).double(), k=k)


def cell_in_latents(
    x: Tensor, places: Sequence[str] = ("first", "head:input")
) -> tuple[InstrumentedModel, InteractionGraph]:
    """A model whose section can be recorded, and its graph, with dictionaries at some node layers."""
    model, saes = cell("batch norm"), {place: dictionary(6, 15, 3) for place in places}
    graph = compute_interaction_graph(model, [x], ["first", "head:input", "output"], "pca", dictionaries=saes)
    return InstrumentedModel(model, graph.node_layer_specs()), graph


@pytest.mark.parametrize("places", [("first",), ("head:input",), ("first", "head:input")])
@pytest.mark.parametrize("kind", KINDS)
def test_sections_of_latents_give_what_the_model_gives(
    kind: str, places: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)).double()
    instrumented, graph = cell_in_latents(x, places)
    instrumented.model.kind = kind
    with model_session(instrumented), torch.no_grad():
        bases = list(graph.bases.values())[:2]
        section = AblatedSection(instrumented, x, 0, *bases)
        with monkeypatch.context() as never:
            never.setattr(model_part, "is_recordable", lambda *_: False)
            plain = AblatedSection(instrumented, x, 0, *bases)
        assert section.section is not None
        assert plain.section is not None
        assert not plain.section.is_recorded
        if KINDS[kind] is not None:
            assert section.section.is_recorded == KINDS[kind]
        masks = some_masks(next(iter(graph.edges.values())))
        cotangent = torch.randn_like(plain.features(masks[0]))
        for rows_at_once in (model_part.STACK_ELEMENTS, 1):
            section.section._most_at_once = rows_at_once
            for mask in masks:
                assert_same(section.features(mask), plain.features(mask))
                if kind in ("batch norm", "recurrent", "autograd function"):
                    factors = mask.double()
                    assert_same(section._mask_gradient(factors, cotangent), plain._mask_gradient(factors, cotangent))


def test_latents_run_what_is_before_a_section_once() -> None:
    x = torch.randn(30, 4).double()
    instrumented, graph = cell_in_latents(x)
    with model_session(instrumented), torch.no_grad():
        calls = counting(instrumented.model)
        section = AblatedSection(instrumented, x, 0, *list(graph.bases.values())[:2])
        first = calls()
        for mask in some_masks(next(iter(graph.edges.values()))):
            section.features(mask)
            section._mask_gradient(mask.double(), torch.ones_like(section._at_mean))
        assert calls() == first
        # Several sets of kept edges at once, unless their tensors are large.
        assert section._rows_at_once > 1
        assert section.section is not None
        section.section._largest = model_part.STACK_ELEMENTS
        assert section._rows_at_once == 1


def test_operations_that_take_one_at_a_time_and_memory_that_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = cell("batch norm"), torch.randn(30, 4).double()
    instrumented = InstrumentedModel(model, [NodeLayer(["first"], name="a"), NodeLayer(["head:input"], name="b")])
    with model_session(instrumented), torch.no_grad():
        captured = instrumented.capture(x)
        known = [(captured[0].a, captured[1].a)]

        def following(a: Tensor) -> Tensor:
            return instrumented.next_activations(x, 0, a)

        part = ModelPart(instrumented, following, torch.zeros_like(captured[0].a), known, 2**31)
        a = torch.randn(5, *captured[0].a.shape).double()
        expected = torch.stack([following(one) for one in a])
        assert_same(part.each(a), expected)

        vmap = torch.vmap

        def fails(error: Exception, above: int) -> Callable[..., Any]:
            def of(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
                def called(x: Tensor) -> Any:
                    if len(x) > above:
                        raise error
                    return vmap(function)(x)

                return called

            return of

        monkeypatch.setattr(torch, "vmap", fails(torch.OutOfMemoryError("no memory"), 2))
        assert_same(part.each(a), expected)
        assert part.at_once() == 2
        monkeypatch.setattr(torch, "vmap", fails(RuntimeError("Batching rule not implemented"), 0))
        assert_same(part.each(a[:2]), expected[:2])
        assert part.at_once() == 1
        assert part.is_recorded


def test_gradients_where_an_operation_fails_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(30, 4).double()
    instrumented, graph = cell_in_latents(x)
    with model_session(instrumented), torch.no_grad():
        section = AblatedSection(instrumented, x, 0, *list(graph.bases.values())[:2])
        mask = some_masks(next(iter(graph.edges.values())))[1]
        cotangent = torch.randn_like(section._at_mean)
        expected = section._mask_gradient(mask, cotangent)
        assert section.section is not None
        assert section.section.is_recorded

        def fails(*_: Any, **__: Any) -> Any:
            raise torch.OutOfMemoryError("no memory")

        # Several at once do not fit, and one alone fails after some that did not.
        monkeypatch.setattr(torch, "vmap", fails)
        repeat, calls = RecordedFunction.__call__, [0]

        def sometimes(self: RecordedFunction, a: Tensor) -> Any:
            calls[0] += 1
            return fails() if calls[0] > 3 else repeat(self, a)

        monkeypatch.setattr(RecordedFunction, "__call__", sometimes)
        assert_same(section._mask_gradient(mask, cotangent), expected)
        assert not section.section.is_recorded


class Rounded(nn.Module):
    """A model that computes its middle in a lower precision."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        with torch.autocast("cpu", torch.bfloat16):
            h = self.middle(h).tanh()
        return self.head(h.float())


def test_several_at_once_are_those_of_one_at_a_time_or_not_used() -> None:
    torch.manual_seed(0)
    model, x = Rounded(), torch.randn(200, 4)
    sae = dictionary(6, 15, 3).float()
    graph = compute_interaction_graph(model, [x], ["first", "head:input", "output"], "pca", dictionaries={"first": sae})
    instrumented = InstrumentedModel(model, graph.node_layer_specs())
    with model_session(instrumented), torch.no_grad():
        section = AblatedSection(instrumented, x, 0, *list(graph.bases.values())[:2])
        assert section.section is not None
        a = torch.randn(4, *section.a.shape)
        assert torch.equal(section.section.each(a), torch.stack([section._next(one) for one in a]))


class Tokens(nn.Module):
    """Tokens with an embedding for each position, and a nonlinear function of all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(5, 6), nn.Linear(6, 8), nn.Linear(8, 3)
        self.positions = nn.Parameter(torch.randn(4, 6))
        self.stream = nn.Identity()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.stream(self.embed(tokens) + self.positions)
        return self.head((self.hidden(x).tanh() * self.hidden(x[:, -1:]).tanh()).sum(1))


def test_equal_rows_are_computed_once() -> None:
    torch.manual_seed(0)
    model, tokens = Tokens().double(), torch.randint(5, (60, 4))
    tokens[:, -1] = 0  # all rows of the last position are the same
    graph = compute_interaction_graph(model, [tokens], ["stream", "head:input", "output"], basis="pca")
    instrumented = InstrumentedModel(model, graph.node_layer_specs())
    with model_session(instrumented), torch.no_grad():
        bases = list(graph.bases.values())[:2]
        section, plain = (AblatedSection(instrumented, tokens, 0, *bases) for _ in range(2))
        plain.J = plain.shared = None
        assert section.shared is not None
        (part,) = section.shared.parts
        columns = {term.Phi_T.shape[1] for entry in part._entries.values() for term in entry.terms}
        assert max(columns) <= 5 * 4 < tokens.numel()
        masks = some_masks(next(iter(graph.edges.values())))
        for rows_at_once in (1, 8):
            part.rows_at_once = rows_at_once
            for mask in masks:
                assert_same(section.features(mask), plain.features(mask))
        cotangent = torch.randn_like(plain.features(masks[1]))
        assert_same(section._mask_gradient(masks[1], cotangent), plain._mask_gradient(masks[1], cotangent))


def test_weights_that_change_are_noticed() -> None:
    model, x = cell("batch norm"), torch.randn(30, 4).double()
    graph = compute_interaction_graph(model, [x], ["first", "head:input", "output"], basis="pca")
    instrumented = InstrumentedModel(model, graph.node_layer_specs())
    with model_session(instrumented), torch.no_grad():
        bases = list(graph.bases.values())[:2]
        section = AblatedSection(instrumented, x, 0, *bases)
        mask = some_masks(next(iter(graph.edges.values())))[0]
        before = section.features(mask).clone()
        instrumented.model.norm.weight.mul_(2)
        plain = without_recording(AblatedSection(instrumented, x, 0, *bases))
        section.features(torch.zeros_like(mask))
        assert_same(section.features(mask), plain.features(mask))
        assert not torch.allclose(section.features(mask), before)


def counting(model: nn.Module) -> Callable[[], int]:
    calls = [0]
    model.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return lambda: calls[0]


def test_the_model_runs_a_few_times_for_any_number_of_masks() -> None:
    model, x = cell("batch norm"), torch.randn(30, 4).double()
    graph = compute_interaction_graph(model, [x], ["first", "head:input", "output"], basis="pca")
    instrumented = InstrumentedModel(model, graph.node_layer_specs())
    with model_session(instrumented), torch.no_grad():
        calls = counting(instrumented.model)
        section = AblatedSection(instrumented, x, 0, *list(graph.bases.values())[:2])
        first = calls()
        for mask in some_masks(next(iter(graph.edges.values()))):
            section.features(mask)
        assert calls() == first
        without_recording(section).features(some_masks(next(iter(graph.edges.values())))[0])
        assert calls() > first
