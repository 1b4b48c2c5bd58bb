"""Operations with special derivatives, such as fused attention and custom functions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.jacobian.closed_form_detect import ClosedFormDetector
from tests.integration.oracle import RTOL, assert_same_graph, check_against_finite_differences, randomize
from tests.integration.state_check import StateCheck

BACKWARDS, ONE_BY_ONE = "has no second derivative", "can only be differentiated for one vector at a time"


class Fused(nn.Module):
    """Causal fused attention."""

    def __init__(self, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1 if self.training else 0.0)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class MultiHead(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention, self.need_weights = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True), need_weights

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=self.need_weights)[0]


ATTENTION = {
    "scaled_dot_product_attention": Fused,
    "nn.MultiheadAttention": lambda: MultiHead(need_weights=False),
    "nn.MultiheadAttention with weights": lambda: MultiHead(need_weights=True),
    "nn.TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True),
    "nn.TransformerEncoderLayer, norm first": lambda: nn.TransformerEncoderLayer(
        4, 2, 6, batch_first=True, norm_first=True, activation="gelu"
    ),
    "nn.TransformerEncoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), 2, enable_nested_tensor=False
    ),
    "nn.TransformerDecoderLayer": lambda: SelfDecoder(),
}


class SelfDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(4, 2, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


@pytest.mark.parametrize("kind", ATTENTION)
def test_fused_attention(kind: str) -> None:
    model = randomize(nn.Sequential(nn.Linear(3, 4), ATTENTION[kind](), nn.Linear(4, 2)))
    x = torch.randn(12, 3, 3).double()
    found = StateCheck(model)
    graph = check_against_finite_differences(model, x, ["input", "0", "1", "output"])
    found.assert_same()
    assert graph.info["notes"] == [], "the plain kernels have second derivatives, and take several vectors"


def test_taps_inside_an_encoder_layer() -> None:
    model = randomize(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=True))
    check_against_finite_differences(model, torch.randn(12, 3, 4).double(), ["input", "norm2:input", "output"])


class Sine(torch.autograd.Function):
    """A sine with its derivative by formula."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.cos()


class SineOnce(Sine):
    """Declares that it is differentiable only once."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Sine.backward(ctx, grad)


class SineSetup(torch.autograd.Function):
    """The newer form with ``setup_context``, without support for vmap."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Sine.backward(ctx, grad)


class SineNumPy(torch.autograd.Function):
    """Computes in NumPy, without support for autograd or vmap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach().numpy().copy()
        return torch.from_numpy(np.sin(ctx.x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.from_numpy(grad.detach().numpy() * np.cos(ctx.x))


class SineBranching(Sine):
    """Branches on the values of the vector, which vmap does not allow; its second derivative at zero is wrong."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return Sine.backward(ctx, grad) if grad.abs().sum() > 0 else torch.zeros_like(grad)


class SineInPlace(Sine):
    """Writes to the vector in place."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        result = torch.empty_like(x)
        torch.mul(grad.detach(), x.detach().cos(), out=result)
        return result


class Apply(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


class PlainSine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


def with_sine(sine: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), sine, nn.Linear(4, 4), nn.Tanh()).double()


# Edges towards a few outputs are cheaper by reverse mode; towards many, by forward mode, with a second derivative.
@pytest.mark.parametrize("positions", [1, 5])
@pytest.mark.parametrize(
    ("function", "backwards", "one_by_one"),
    [
        (Sine, False, True),
        (SineSetup, False, True),
        (SineOnce, True, True),
        (SineNumPy, True, True),
        (SineBranching, True, True),
        (SineInPlace, True, True),
    ],
)
def test_custom_functions(
    function: type[torch.autograd.Function],
    backwards: bool,
    one_by_one: bool,
    positions: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, layers = torch.randn(15, positions, 3).double(), ["0", "2", "output"]
    expected = compute_interaction_graph(with_sine(PlainSine()), [x[:8], x[8:]], layers, rtol=RTOL)
    assert expected.info["notes"] == []
    graph = compute_interaction_graph(with_sine(Apply(function)), [x[:8], x[8:]], layers, rtol=RTOL)
    assert_same_graph(graph, expected)
    assert graph.info["notes"] == []
    # A closed form calls the custom derivative once. Without it, and without a metric whose Jacobian is reused:
    monkeypatch.setattr(ClosedFormDetector, "fit", lambda self, section: None)
    expected = compute_interaction_graph(with_sine(PlainSine()), [x[:8], x[8:]], layers, basis="neuron")
    with caplog.at_level(logging.WARNING):
        graph = compute_interaction_graph(with_sine(Apply(function)), [x[:8], x[8:]], layers, basis="neuron")
    assert_same_graph(graph, expected)
    signs = [BACKWARDS] * (backwards and positions > 1) + [ONE_BY_ONE] * one_by_one
    assert_notes(graph, signs, caplog)


def assert_notes(graph: InteractionGraph, signs: list[str], caplog: pytest.LogCaptureFixture) -> None:
    """Each note names the node layers and is logged once."""
    notes = graph.info["notes"]
    assert sorted(sign for note in notes for sign in (BACKWARDS, ONE_BY_ONE) if sign in note) == sorted(signs)
    assert len(notes) == len(signs)
    assert all(note.startswith("Between '0' and '2' an operation ") for note in notes)
    assert [record.getMessage() for record in caplog.records] == notes


def test_sampled_metric_with_a_custom_function_in_numpy() -> None:
    x, layers = torch.randn(15, 3).double(), ["0", "2", "output"]
    graphs = (
        compute_interaction_graph(with_sine(sine), [x], layers, n_probes=5) for sine in (Apply(SineNumPy), PlainSine())
    )
    assert_same_graph(*graphs)


class Distances(nn.Module):
    """Distances to five points, of which torch before 2.15 has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(5, 2)
        self.points = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cdist(torch.tanh(self.first(x)), self.points))


def test_distances() -> None:
    model, x, layers = randomize(Distances()), torch.randn(12, 6, 3).double(), ["first", "head:input", "output"]
    graph = check_against_finite_differences(model, x, layers)
    assert graph.info["notes"] == []  # the metric's Jacobian is reused for the edges
    sampled = compute_interaction_graph(model, [x], layers, n_probes=4)
    # torch 2.15 has the second derivative, so that products with it need not go backwards.
    assert [BACKWARDS in note for note in sampled.info["notes"]] == [True] * (not twice_differentiable(torch.cdist))


def twice_differentiable(function: Callable[..., Tensor]) -> bool:
    a, b = torch.randn(2, 4, 3, requires_grad=True).unbind()
    (gradient,) = torch.autograd.grad(function(a, b).square().sum(), a, create_graph=True)
    try:
        torch.autograd.grad(gradient.sum(), a)
    except RuntimeError:
        return False
    return True


class Experts(nn.Module):
    """A router selects two of three experts for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.router, self.head = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        shares, chosen = self.router(x).softmax(-1).topk(2, -1)
        mixed = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            *where, rank = (chosen == index).nonzero(as_tuple=True)
            mixed.index_put_(tuple(where), shares[(*where, rank)][:, None] * expert(x[tuple(where)]), accumulate=True)
        return self.head(x + mixed)


def test_mixture_of_experts() -> None:
    check_against_finite_differences(
        randomize(Experts()), torch.randn(12, 4, 3).double(), ["first", "head:input", "output"]
    )


class Spectrum(nn.Module):
    """A filter over positions in the frequency domain."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.filter = nn.Parameter(torch.randn(3, 4, dtype=torch.cdouble))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.fft.rfft(torch.tanh(self.first(x)), dim=1) * self.filter
        return self.head(torch.fft.irfft(h, n=x.shape[1], dim=1))


def test_complex_intermediate_values() -> None:
    check_against_finite_differences(
        Spectrum().double(), torch.randn(12, 4, 3).double(), ["input", "first", "head:input", "output"]
    )
