"""The graph that autograd records."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lib_lightning.model import autograd_graph as graph
from lib_lightning.model.autograd_graph import edge_of, saved_tensors_intact, shape_of, topological_order


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return x * w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (w,) = ctx.saved_tensors
        return grads[0] * w, None


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mul": lambda x, w: x * w,
    "mm": lambda x, w: x @ w,
    "custom": Scaled.apply,
    "early": lambda x, w: (x * w).tanh().sum(1).view(3, 1) @ torch.ones(1, 2),
    "norm": lambda x, w: F.layer_norm(x, (3,), w[0], w[1]),
    "in a list": lambda x, w: torch.index_put(x, (torch.arange(3), torch.arange(3)), w[0]) * w,
    "attention": lambda x, w: F.scaled_dot_product_attention(x[None], w[None], w[None]),
    "nothing saved": lambda x, w: x + w,
    "its own result": lambda x, w: (x + w).exp(),
}
UNHARMED = {"nothing saved", "its own result"}


@pytest.mark.parametrize("name", OPERATIONS)
def test_modified_saved_tensors_are_detected_without_a_backward_pass(name: str) -> None:
    x, w = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3)
    y = OPERATIONS[name](x, w)
    assert saved_tensors_intact(y)
    w.add_(1)
    assert saved_tensors_intact(y) == (name in UNHARMED)
    with nullcontext() if name in UNHARMED else pytest.raises(RuntimeError, match="modified by an inplace"):
        torch.autograd.grad(y, x, torch.zeros_like(y))


def test_an_operation_that_shows_no_saved_tensors_is_not_intact(monkeypatch: pytest.MonkeyPatch) -> None:
    y = torch.randn(3, requires_grad=True) + 1
    assert saved_tensors_intact(y)
    monkeypatch.setattr(graph, "_SHOWN", re.compile("of another kind"))
    monkeypatch.setattr(graph, "saved_names", lambda operation: [])
    assert not saved_tensors_intact(y)


def test_a_tensor_without_a_graph_is_intact() -> None:
    assert saved_tensors_intact(torch.ones(2))
    assert saved_tensors_intact(torch.ones(2, requires_grad=True))


def test_shapes_of_intermediate_results() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    one, other = (x.view(4, 2, 3) * 2).relu().split(1, dim=1)
    assert shape_of(edge_of(other)) == other.shape
    assert [tuple(shape_of(edge_of(y))) for y in (x, one)] == [(4, 6), (4, 1, 3)]
    assert edge_of(x).node == topological_order(edge_of(one).node)[0]
