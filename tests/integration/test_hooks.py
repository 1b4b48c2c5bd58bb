"""Modules with hooks of the user."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import compute_interaction_graph
from tests.integration.oracle import RTOL, assert_exact, assert_same_graph, dense, randomize
from tests.integration.state_check import StateCheck
from tests.integration.test_stateful_models import mlp


class Log:
    """Values that hooks have received, in order, also those of copies of a model."""

    def __deepcopy__(self, memo: object) -> Log:
        return self

    def __init__(self) -> None:
        self.entries: list[tuple[str, list[float]]] = []

    def hook(self, name: str, scale: float | None = None) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            self.entries.append((name, output.flatten().tolist()))
            return None if scale is None else output * scale

        return hook


def test_user_hooks_run_in_order_with_the_same_values() -> None:
    x, log = torch.randn(20, 4).double(), Log()
    model = randomize(mlp())
    model[0].register_forward_hook(log.hook("doubles", 2.0))
    model[0].register_forward_hook(log.hook("sees doubled"))
    model[0].register_forward_hook(log.hook("first"), prepend=True)
    model[2].register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    model[2].register_forward_hook(log.hook("second"))
    with torch.no_grad():
        model(x)
    expected, log.entries = log.entries, []
    found = StateCheck(model)
    graph = compute_interaction_graph(model, [x], ["input", "0", "2:input", "2", "output"], rtol=RTOL)
    found.assert_same()
    assert [name for name, _ in log.entries[:4]] == ["first", "doubles", "sees doubled", "second"]
    # The forward passes over the whole batch (those that validate the node layers have three samples).
    whole = [entry for entry in log.entries if len(entry[1]) == len(expected[0][1]) or len(entry[1]) == 20 * 5]
    assert all(entry in expected for entry in whole)
    assert len(whole) >= 4
    log.entries.clear()
    with torch.no_grad():
        model(x)
    assert log.entries == expected
    assert_exact(graph, *dense(model, x, ["input", "0", "2:input", "2", "output"]))


class ResidualBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.f, self.head = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + torch.tanh(self.f(self.norm(x))))


@pytest.mark.parametrize("scale", [None, 3.0])
def test_user_backward_hooks_are_not_called(scale: float | None) -> None:
    # They are meant for training: they are not called with our gradients and cannot change them. Torch passes views to
    # modules with such hooks, and views cannot be overwritten in place.
    model, x, calls = randomize(ResidualBlock()), torch.randn(20, 4).double(), []
    layers = ["input", "norm:input", "head:input", "output"]
    expected = compute_interaction_graph(model, [x], layers)

    def change(_: nn.Module, grads: tuple[Tensor, ...], *more: Any) -> Any:
        calls.append(1)
        return None if scale is None else tuple(scale * grad for grad in grads)

    for module in (model, model.embed, model.f):
        module.register_full_backward_hook(change)
        module.register_full_backward_pre_hook(change)
    found = StateCheck(model)
    graph = compute_interaction_graph(model, [x], layers)
    found.assert_same()
    assert not calls
    assert_same_graph(graph, expected)
    model(x.requires_grad_()).sum().backward()
    assert len(calls) == 6
