"""Compiled modules: the same graphs with the same names, and no recompilation afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lib_lightning import compute_interaction_graph
from tests.integration.models import gpt2, tokens
from tests.integration.oracle import RTOL, assert_same_graph, check_against_finite_differences, randomize
from tests.integration.state_check import StateCheck

# Warnings of the compiler.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:The .grad attribute of a Tensor:UserWarning"
)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.drop, self.down = nn.LayerNorm(4), nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(torch.tanh(self.up(self.norm(x)))))


def network() -> nn.Sequential:
    return randomize(nn.Sequential(nn.Linear(3, 4), Block(), Block(), nn.Linear(4, 2)))


def whole(model: nn.Sequential, backend: object) -> nn.Module:
    return torch.compile(model, backend=backend)


def in_place(model: nn.Sequential, backend: object) -> nn.Module:
    model.compile(backend=backend)
    return model


def blocks(model: nn.Sequential, backend: object) -> nn.Module:
    for index in (1, 2):
        model[index] = torch.compile(model[index], backend=backend)
    return model


def blocks_in_place(model: nn.Sequential, backend: object) -> nn.Module:
    for index in (1, 2):
        model[index].compile(backend=backend)
    return model


def forward_of_blocks(model: nn.Sequential, backend: object) -> nn.Module:
    for index in (1, 2):
        model[index].forward = torch.compile(model[index].forward, backend=backend)
    return model


LAYERS = ["input", "0", "1", "2", "output"]
ways = pytest.mark.parametrize("way", [whole, in_place, blocks, blocks_in_place, forward_of_blocks])


def step(model: nn.Module, x: Tensor) -> None:
    model.train()
    model(x).square().mean().backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@ways
def test_same_graph_without_recompilation(way: Callable[[nn.Sequential, object], nn.Module], backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    model, x = network(), torch.randn(20, 3).double()
    expected = check_against_finite_differences(copy.deepcopy(model), x, LAYERS)
    compiled = way(model, counter)
    step(compiled, x)
    graphs = counter.frame_count
    assert graphs > 0
    found = StateCheck(compiled)
    graph = compute_interaction_graph(compiled, [x], LAYERS, rtol=RTOL)
    found.assert_same()
    assert_same_graph(graph, expected)
    assert graph.node_layers == LAYERS
    step(compiled, x)
    assert counter.frame_count == graphs


@ways
def test_before_the_first_compilation(way: Callable[[nn.Sequential, object], nn.Module]) -> None:
    counter = CompileCounterWithBackend("eager")
    model, x = network(), torch.randn(20, 3).double()
    expected = compute_interaction_graph(model, [x], LAYERS)
    compiled = way(copy.deepcopy(model), counter)
    assert_same_graph(compute_interaction_graph(compiled, [x], LAYERS), expected)
    assert counter.frame_count == 0
    step(compiled, x)
    graphs = counter.frame_count
    assert graphs > 0
    step(compiled, x)
    assert counter.frame_count == graphs


def test_residual_stream_inside_a_compiled_block() -> None:
    model, x = network(), torch.randn(20, 3).double()
    layers = ["1.norm:input", "2.norm:input", "3:input"]
    expected = check_against_finite_differences(copy.deepcopy(model), x, layers)
    compiled = whole(blocks(model, "eager"), "eager")
    compiled(x)
    assert_same_graph(compute_interaction_graph(compiled, [x], layers, rtol=RTOL), expected)
    names = ["1._orig_mod.norm:input", "_orig_mod.2.norm:input", "_orig_mod.3:input"]
    assert_same_graph(compute_interaction_graph(compiled, [x], names, rtol=RTOL), expected)


def test_compiled_gpt2() -> None:
    model, batch = gpt2(), {"input_ids": tokens(10, 3)}
    layers = ["transformer.h.0.ln_2:input", "transformer.h.1", "output"]
    expected = compute_interaction_graph(model, [batch], layers)
    counter = CompileCounterWithBackend("eager")
    for block in model.transformer.h:
        block.compile(backend=counter)
    model.train()
    model(**batch).logits.sum().backward()
    graphs = counter.frame_count
    assert graphs > 0
    assert_same_graph(compute_interaction_graph(model, [batch], layers), expected)
    model(**batch).logits.sum().backward()
    assert counter.frame_count == graphs
