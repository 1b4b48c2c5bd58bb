"""Products with the Jacobian of a section, and models for which they once were wrong or failed."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lib_lightning import NodeLayer, compute_interaction_graph, list_node_layers
from lib_lightning.api import check_node_layers
from lib_lightning.errors import LIBError, NodeLayerError
from lib_lightning.jacobian.integrated_gradients import sections
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.node_layer import as_node_layers
from tests.cases import Case


@pytest.mark.parametrize("steps", [0, 3])
def test_forward_and_reverse_products_belong_to_one_jacobian(case: Case, steps: int) -> None:
    instrumented = InstrumentedModel(case.model, as_node_layers(case.node_layers), ModelSpec(case.input_fn))
    means = [a.mean((0, 1)) for a in instrumented.activations(case.data)]
    for section in sections(instrumented, case.data, means, steps, 10**6):
        for k in (1, 3):
            v = torch.randn(k, section.n, section.S_in, section.d_in).double()
            u = torch.randn(k, section.n, section.S_out, section.d_out).double()
            along, back = (u * section.jvp(v)).sum((1, 2, 3)), (section.vjp(u) * v).sum((1, 2, 3))
            torch.testing.assert_close(along, back, rtol=1e-10, atol=1e-10)


def test_custom_derivative_that_crashes_in_batched_calls() -> None:
    # In a separate process, because it once crashed.
    script = """
import torch
from torch import nn
from lib_lightning import compute_interaction_graph

class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x * 2
    @staticmethod
    def backward(ctx, grad): return grad.data * 2

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 6)
    def forward(self, x): return self.b(Twice.apply(self.a(x)))

graph = compute_interaction_graph(Model(), [torch.randn(10, 3)], ["input", "output"])
assert (graph.edges["input", "output"].sum(0) / graph.bases["input"].importance - 1).abs().max() < 1e-4
"""
    root = Path(__file__).parents[2]
    assert (
        subprocess.run([sys.executable, "-c", script], cwd=root, stderr=subprocess.DEVNULL, timeout=120).returncode == 0
    )


class Squares(torch.autograd.Function):
    """A custom derivative that is not differentiable itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad.detach()


class Hiding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Squares.apply(torch.relu(self.first(x))))


def test_first_batch_of_dead_units_does_not_choose_the_mode() -> None:
    model = Hiding().double()
    x = torch.randn(20, 4).double()
    with torch.no_grad():
        model.first.bias.zero_()
    dead = -torch.linalg.pinv(model.first.weight.detach()).sum(1).expand(5, 4)
    graphs = [compute_interaction_graph(model, batches, ["input", "output"]) for batches in ([dead, x], [x, dead])]
    one, other = (graph.edges["input", "output"] for graph in graphs)
    assert one.sum() > 0
    torch.testing.assert_close(one, other, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_detached_bypass_is_rejected_in_any_precision(dtype: torch.dtype) -> None:
    class Detour(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            return self.c(torch.tanh(self.b(h)) + 5 * h.detach())

    with pytest.raises(NodeLayerError, match="'b' does not cut the computation"):
        check_node_layers(Detour().to(dtype), torch.randn(8, 4).to(dtype), ["a", "b", "output"])


@pytest.mark.parametrize("positions", [2, 6])
@pytest.mark.parametrize("steps", [0, 2])
def test_masked_values_do_not_matter(positions: int, steps: int) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, mask = torch.randn(20, positions, 6).double(), torch.rand(20, positions) > 0.4
    layers = ["input", "1", "output"]
    graphs = [
        compute_interaction_graph(
            model, [(x.masked_fill(~mask[..., None], filler), mask)], layers, mask=1, integration_steps=steps
        )
        for filler in (0.0, torch.nan)
    ]
    for one, other in zip(*(graph.edges.values() for graph in graphs), strict=True):
        assert torch.equal(one, other)


def test_masks_of_sequences_of_length_one() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double(), torch.randn(20, 1, 4).double()
    mask = torch.arange(20)[:, None] < 8
    masked = compute_interaction_graph(model, [(x, mask)], ["input", "output"], mask=1)
    without = compute_interaction_graph(model, [x[:8]], ["input", "output"])
    torch.testing.assert_close(masked.edges["input", "output"], without.edges["input", "output"])


@pytest.mark.parametrize("limit", [2.0, 1e-5])
def test_entries_that_have_the_length_of_the_batch_by_chance(limit: float) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor, W: Tensor) -> Tensor:
            return self.head(torch.tanh(x @ W))

    torch.manual_seed(0)
    model, x, W = Mixed().double(), torch.randn(8, 8).double(), torch.randn(8, 8).double()
    graph = compute_interaction_graph(
        model, [(x, W)], ["head:input", "output"], input_fn=lambda batch: batch, memory_limit=limit
    )
    plain = compute_interaction_graph(model.head, [torch.tanh(x @ W)], ["input", "output"])
    torch.testing.assert_close(*(next(iter(g.edges.values())) for g in (graph, plain)))


@pytest.mark.parametrize("limit", [2.0, 1e-5])
def test_random_numbers_of_the_model_are_the_same_in_every_phase(limit: float) -> None:
    class Noisy(nn.Module):
        def __init__(self, noise: float) -> None:
            super().__init__()
            self.noise, self.a, self.b = noise, nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(torch.tanh(h + self.noise * torch.randn_like(h)))

    model, batches = Noisy(3.0).double(), [torch.randn(30, 4).double() for _ in range(3)]
    graphs = [
        compute_interaction_graph(model, batches, ["a", "b:input", "output"], memory_limit=limit) for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*(g.edges.values() for g in graphs), strict=True))
    # With the same noise in every phase, the variance of features is their importance.
    E, importance = graphs[0].edges["b:input", "output"], graphs[0].bases["b:input"].importance
    torch.testing.assert_close(E.sum(0), importance, rtol=1e-8, atol=0)


GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
    "torch": (lambda: torch.Generator().manual_seed(0), lambda g: float(torch.rand((), generator=g))),
    "numpy": (lambda: np.random.default_rng(0), lambda g: g.random()),
    "old numpy": (lambda: np.random.RandomState(0), lambda g: g.rand()),
    "python": (lambda: random.Random(0), lambda g: g.random()),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_generators_of_the_model_are_restored(kind: str) -> None:
    make, draw = GENERATORS[kind]

    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.generator, self.a = make(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + draw(self.generator)

    model = Drawing()
    compute_interaction_graph(model, [torch.randn(9, 4)], ["input", "output"])
    assert draw(model.generator) == draw(make())


def test_pending_seed_of_an_unused_accelerator_is_kept() -> None:
    torch.manual_seed(1234)
    compute_interaction_graph(nn.Linear(3, 2), [torch.randn(9, 3)], ["input", "output"])
    calls = getattr(torch.cuda, "_lazy_seed_tracker").get_calls()  # noqa: B009
    assert all("seed=0" not in str(call) for call in calls)


@pytest.mark.parametrize(
    ("mask", "batch", "message"),
    [
        ("attn", {"x": torch.zeros(4, 3)}, r"mask='attn' gives no mask for a batch of type dict: KeyError"),
        (3, (torch.zeros(4, 3),), r"mask=3 gives no mask for a batch of type tuple: IndexError"),
        (lambda batch: [1], (torch.zeros(4, 3),), r"gives list instead of a tensor"),
    ],
)
def test_invalid_mask(mask: Any, batch: Any, message: str) -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    with pytest.raises(LIBError, match=message):
        compute_interaction_graph(Named(), [batch], ["input", "output"], mask=mask)


@pytest.mark.parametrize("layers", [[0, "output"], [["input", 1], "output"], [None, "output"]])
def test_invalid_node_layers_are_rejected(layers: list[Any]) -> None:
    with pytest.raises(NodeLayerError, match="is not a node layer, which is a string"):
        compute_interaction_graph(nn.Linear(3, 2), [torch.randn(9, 3)], layers)
    assert NodeLayer("input") == NodeLayer(["input"])


def test_module_without_forward_is_rejected() -> None:
    class Bare(nn.Module):
        pass

    with pytest.raises(NodeLayerError, match=r"Bare has no forward\(\)"):
        list_node_layers(Bare(), torch.randn(9, 3))
