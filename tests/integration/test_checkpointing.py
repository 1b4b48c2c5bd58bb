"""Activation checkpointing, which is disabled during a snapshot, and lazy modules, which raise an error."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from lib_lightning import compute_interaction_graph
from lib_lightning.errors import LIBError
from tests.integration.models import gpt2, tokens
from tests.integration.oracle import (
    RTOL,
    assert_exact,
    assert_same_graph,
    check_against_finite_differences,
    dense,
    randomize,
)
from tests.integration.state_check import StateCheck

# Warnings because the oracle runs without gradients, and of a renaming in transformers.
pytestmark = pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad=True:UserWarning",
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning",
)

Way = Callable[..., Any]


def plain(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


WAYS: dict[str, Way] = {
    "reentrant": partial(checkpoint, use_reentrant=True),
    "not reentrant": partial(checkpoint, use_reentrant=False),
    "by its full name": lambda *args: torch.utils.checkpoint.checkpoint(*args, use_reentrant=False),
    "random numbers as they come": partial(checkpoint, use_reentrant=False, preserve_rng_state=False),
    "one in the other": lambda function, x: checkpoint(
        partial(checkpoint, function, use_reentrant=False), x, use_reentrant=False
    ),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.drop, self.down = nn.LayerNorm(4), nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 4)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x + self.down(self.drop(torch.tanh(self.up(self.norm(x)))))


class Checkpointed(nn.Module):
    def __init__(self, way: Way) -> None:
        super().__init__()
        self.embed, self.head, self.way = nn.Linear(3, 4), nn.Linear(4, 2), way
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = self.way(block, x)
        return self.head(x)


OUTSIDE = ["embed", "blocks.0", "head:input", "output"]
INSIDE = ["blocks.0.norm:input", "blocks.1.norm:input", "output"]


@pytest.mark.parametrize("layers", [OUTSIDE, INSIDE], ids=["outside", "inside"])
@pytest.mark.parametrize("way", WAYS)
def test_taps_inside_and_outside_checkpointed_blocks(way: str, layers: list[str]) -> None:
    model, x = randomize(Checkpointed(WAYS[way])), torch.randn(20, 3).double()
    model(x).sum().backward()
    assert [block.runs for block in model.blocks] == [2, 2] if way != "one in the other" else [3, 3]
    found = StateCheck(model)
    graph = compute_interaction_graph(model, [x], layers, rtol=RTOL)
    found.assert_same()
    assert_exact(graph, *dense(model, x, layers))
    runs = [block.runs for block in model.blocks]
    model(x).sum().backward()  # checkpointing is on again in the backward pass of training
    assert all(block.runs >= before + 2 for block, before in zip(model.blocks, runs, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_integrated_gradients(way: str) -> None:
    # Activations are replaced along the path: recomputation from those of the forward pass would be wrong.
    model, x = randomize(Checkpointed(plain)), torch.randn(20, 3).double()
    expected = compute_interaction_graph(model, [x], INSIDE, integration_steps=3)
    model.way = WAYS[way]
    assert_same_graph(compute_interaction_graph(model, [x], INSIDE, integration_steps=3), expected)


@pytest.mark.parametrize("kind", CheckpointImpl)
def test_wrapped_blocks(kind: CheckpointImpl) -> None:
    model, x = randomize(Checkpointed(plain)), torch.randn(20, 3).double()
    expected = compute_interaction_graph(model, [x], ["embed", "blocks.1.norm:input", "output"])
    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block, checkpoint_impl=kind)
    layers = ["embed", "blocks.1._checkpoint_wrapped_module.norm:input", "output"]
    assert_same_graph(compute_interaction_graph(model, [x], layers), expected)


def test_checkpoint_sequential() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.layers = (
                nn.Linear(3, 4),
                nn.Sequential(Block(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)),
            )

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint_sequential(self.layers, 2, self.embed(x), use_reentrant=False)

    check_against_finite_differences(
        randomize(Sequence()), torch.randn(20, 3).double(), ["embed", "layers.0.norm:input", "layers.2", "output"]
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_gpt2_with_checkpointing_enabled(reentrant: bool) -> None:
    model, batch = gpt2(), {"input_ids": tokens(10, 3)}
    layers = ["transformer.h.0", "transformer.h.1.ln_2:input", "output"]
    expected = compute_interaction_graph(model, [batch], layers)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    assert_same_graph(compute_interaction_graph(model, [batch], layers), expected)
    assert model.is_gradient_checkpointing
    model(**batch).logits.sum().backward()
    assert model.transformer.h[0].attn.c_attn.weight.grad.abs().sum() > 0


def test_checkpointing_is_enabled_again_after_an_error() -> None:
    """The error of a forward pass is the cause of a `LIBError`, which says how the model was called."""

    def fail(*_: object) -> None:
        raise RuntimeError("from the model")

    model, x = Checkpointed(WAYS["reentrant"]), torch.randn(20, 3)
    found = StateCheck(model)
    handle = model.head.register_forward_hook(fail)
    with pytest.raises(LIBError, match="RuntimeError: from the model") as error:
        compute_interaction_graph(model, [x], ["embed", "output"])
    assert type(error.value.__cause__) is RuntimeError
    assert str(error.value.__cause__) == "from the model"
    handle.remove()
    found.assert_same()


@pytest.mark.parametrize(
    ("lazy", "missing"),
    [
        (lambda: nn.LazyLinear(4), "'1.weight', '1.bias'"),
        (lambda: nn.LazyBatchNorm1d(), "'1.running_mean', '1.running_var'"),
    ],
)
def test_lazy_modules_raise_an_error_until_they_have_shapes(lazy: Callable[[], nn.Module], missing: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), lazy(), nn.Linear(4, 2)).double()
    x = torch.randn(20, 3).double()
    with pytest.raises(LIBError, match=re.escape(missing) + r".* have no shape yet: .* Run the model once before"):
        compute_interaction_graph(model, [x], ["0", "1", "output"])
    assert torch.nn.parameter.is_lazy(model[1].weight), "and it is still to take its shape"
    model(x)
    check_against_finite_differences(model, x, ["0", "1", "output"])
