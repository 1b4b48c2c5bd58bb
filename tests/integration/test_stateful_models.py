"""Modules that change in their forward pass, or were modified by other tools: correct graphs and restored state."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from lib_lightning import compute_interaction_graph
from tests.integration.oracle import (
    RTOL,
    assert_exact,
    assert_same_graph,
    check_against_finite_differences,
    dense,
    randomize,
)
from tests.integration.state_check import StateCheck

LAYERS = ["input", "1", "2", "output"]


def mlp(middle: Callable[[nn.Linear], nn.Module] = lambda linear: linear) -> nn.Sequential:
    """Four inputs, three outputs, and a module to test in between."""
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), middle(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3))


def frozen() -> nn.Module:
    return mlp(lambda linear: linear.requires_grad_(False))


def all_frozen() -> nn.Module:
    return mlp().requires_grad_(False)


class LowRank(nn.Module):
    """A frozen linear map with a low-rank adapter."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base, self.dropout = base.requires_grad_(False), nn.Dropout(0.5)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(self.dropout(x)))


def low_rank() -> nn.Module:
    return mlp(LowRank)


class Tied(nn.Module):
    """An autoencoder with tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))
        self.there, self.back = nn.Linear(6, 5, bias=False), nn.Linear(6, 5, bias=False)
        self.there.weight = self.back.weight = self.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.back(torch.tanh(self.there(x) @ self.weight))


def tied() -> nn.Module:
    return mlp(lambda linear: Tied())


def batch_norm_and_dropout() -> nn.Module:
    return mlp(lambda linear: nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5), linear))


class Moving(nn.Module):
    """Writes to its buffers and attributes in every forward pass, also in evaluation mode."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.calls, self.history = linear, 0, []
        self.register_buffer("total", torch.zeros(6))
        self.register_buffer("last", torch.zeros(1, 6))
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.total += x.detach().sum(0)
        self.last = x.detach()[-1:]
        self.calls += 1
        self.history.append(self.calls)
        self.table = torch.linspace(0.5, 1.5, 6).to(x)
        return self.linear(x * self.table)


def moving() -> nn.Module:
    return mlp(Moving)


def new_spectral_norm() -> nn.Module:
    return mlp(parametrizations.spectral_norm)


def new_weight_norm() -> nn.Module:
    return mlp(parametrizations.weight_norm)


def old_spectral_norm() -> nn.Module:
    return mlp(nn.utils.spectral_norm)


def old_weight_norm() -> nn.Module:
    return mlp(nn.utils.weight_norm)


def pruned() -> nn.Module:
    return mlp(lambda linear: prune.random_unstructured(linear, "weight", amount=0.3))


class Keeping(nn.Module):
    """Stores values in many types of containers and generators."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.recent, self.count = linear, deque([1, 2], maxlen=2), Counter(a=1)
        self.by_name, self.ordered = defaultdict(list), OrderedDict(a=1, b=2)
        self.array, self.kinds, self.growing = np.zeros(2), {1}, torch.zeros(2)
        self.states: tuple[Any, ...] = ([torch.zeros(2)], {"inner": [torch.zeros(1), [1]]})
        self.itself = [self.states]
        self.itself.append(self.itself)

    def forward(self, x: Tensor) -> Tensor:
        self.recent.append(3)
        self.count["a"] += 1
        self.by_name["new"].append(x)
        self.ordered.move_to_end("a")
        self.array += 1
        self.kinds.add(2)
        self.growing.data = torch.cat([self.growing, torch.ones(1)])
        self.states[0][0] += 1
        self.states[1]["inner"][0].add_(1)
        self.states[1]["inner"][1].append(2)
        self.itself.append(x)
        return self.linear(x)


def keeping() -> nn.Module:
    return mlp(Keeping)


class NormedInForward(nn.Linear):
    """Replaces its weight by a normalized one in every forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)
        return super().forward(x)


def normed_in_forward() -> nn.Module:
    return mlp(lambda linear: NormedInForward(6, 5))


KINDS = [
    frozen, all_frozen, low_rank, tied, batch_norm_and_dropout, moving, new_spectral_norm, new_weight_norm,
    old_spectral_norm, old_weight_norm, pruned, keeping, normed_in_forward,
]  # fmt: skip
every_kind = pytest.mark.parametrize("make", KINDS)
pytestmark = pytest.mark.filterwarnings("ignore:.*nn.utils.weight_norm.*is deprecated:FutureWarning")


@every_kind
def test_graph_and_restored_state(make: Callable[[], nn.Module]) -> None:
    model, x = randomize(make()), torch.randn(20, 4).double()
    model(x).sum().backward() if make is not all_frozen else model(x)
    found = StateCheck(model)
    graph = compute_interaction_graph(model, [x], LAYERS, rtol=RTOL)
    found.assert_same()
    assert_exact(graph, *dense(model, x, LAYERS))


@every_kind
def test_training_continues_bit_for_bit(make: Callable[[], nn.Module]) -> None:
    def trained(watched: bool) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = make()
        optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True), *model.parameters()], lr=0.1)
        for _ in range(4):
            x = torch.randn(20, 4)
            loss = model(x).square().mean()
            if watched:  # a snapshot between the forward and the backward pass of training
                compute_interaction_graph(model, [x], LAYERS)
            optimizer.zero_grad()
            if loss.requires_grad:
                loss.backward()
            optimizer.step()
        return model.state_dict()

    expected = trained(watched=False)
    assert all(torch.equal(t, expected[name]) for name, t in trained(watched=True).items())


def test_low_rank_adapter_equals_its_merged_weight() -> None:
    model, x = randomize(low_rank()), torch.randn(20, 4).double()
    merged = copy.deepcopy(model)
    adapter = merged[2]
    merged[2] = adapter.base
    with torch.no_grad():
        adapter.base.weight += 2.0 * adapter.up.weight @ adapter.down.weight
    expected = compute_interaction_graph(merged, [x], LAYERS)
    assert_same_graph(compute_interaction_graph(model, [x], LAYERS), expected)


def test_embedding_with_max_norm() -> None:
    # torch shortens vectors in the table when they are looked up, also in evaluation mode.
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4, max_norm=1.0), nn.Linear(4, 3)
            self.bag = nn.EmbeddingBag(7, 4, max_norm=0.5)

        def forward(self, words: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embed(words) + self.bag(words)[:, None]))

    model, words = randomize(Words()), torch.randint(0, 7, (12, 3))
    layers = ["head:input", "output"]
    found = StateCheck(model)
    graph = compute_interaction_graph(model, [words], layers, rtol=RTOL)
    found.assert_same()
    assert_exact(graph, *dense(model, words, layers))


class Neighbours(nn.Module):
    """Mixes positions with a sparse matrix, which cannot be compared by value."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        adjacency = (torch.eye(4) + torch.eye(4).roll(1, 0)).double()
        self.register_buffer("adjacency", adjacency.to_sparse(layout=layout))
        self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)).transpose(0, 1)
        return self.head((self.adjacency @ h.flatten(1)).view_as(h).transpose(0, 1))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta state:UserWarning")
def test_sparse_buffers(layout: torch.layout) -> None:
    model, x = randomize(Neighbours(layout)), torch.randn(12, 4, 3).double()
    before = model.adjacency.to_dense()
    check_against_finite_differences(model, x, ["input", "first", "head:input", "output"])
    assert model.adjacency.layout == layout
    assert torch.equal(model.adjacency.to_dense(), before)


class Table(nn.Module):
    """Creates a table in the first call, and stores it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.table = nn.Linear(3, 4), nn.Linear(4, 2), None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(1, 2, 4).to(x)
        return self.head(torch.tanh(self.first(x)) * self.table)


def test_table_computed_in_inference_mode() -> None:
    model, x = randomize(Table()), torch.randn(12, 3).double()
    with torch.inference_mode():
        model(x)
    table = model.table
    check_against_finite_differences(model, x, ["input", "first", "head:input", "output"])
    assert model.table is table
    assert table.is_inference()


def test_model_created_in_inference_mode() -> None:
    with torch.inference_mode():
        model = randomize(
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4))
        )
        model[4].weight = model[3].weight
    x = torch.randn(12, 3).double()
    found = StateCheck(model)
    graph = compute_interaction_graph(model, [x], ["input", "2", "output"], rtol=RTOL)
    found.assert_same()
    with torch.inference_mode():
        assert_exact(graph, *dense(model, x, ["input", "2", "output"]))
