"""Modules that change as they run, or that somebody else has had a hand in: right numbers, and all as it was found."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lib_lightning import compute_interaction_graph
from tests.wild.found import Found
from tests.wild.oracle import RTOL, assert_exact, assert_same_graph, dense, lively

LAYERS = ["input", "1", "2", "output"]


def mlp(middle: Callable[[nn.Linear], nn.Module] = lambda linear: linear) -> nn.Sequential:
    """Four inputs, three outputs, and something to be tried in between."""
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), middle(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3))


def frozen() -> nn.Module:
    return mlp(lambda linear: linear.requires_grad_(False))


def all_frozen() -> nn.Module:
    return mlp().requires_grad_(False)


class LowRank(nn.Module):
    """A frozen linear map, and a small one beside it that is trained."""

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
    """An autoencoder whose two halves share one weight."""

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
    """Writes into its buffers and attributes in every pass, in evaluation mode, too."""

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


class NormedInForward(nn.Linear):
    """Keeps its weights small, by putting new ones in their place whenever it runs."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.5)
        return super().forward(x)


def normed_in_forward() -> nn.Module:
    return mlp(lambda linear: NormedInForward(6, 5))


KINDS = [
    frozen, all_frozen, low_rank, tied, batch_norm_and_dropout, moving, new_spectral_norm, new_weight_norm,
    old_spectral_norm, old_weight_norm, normed_in_forward,
]  # fmt: skip
every_kind = pytest.mark.parametrize("make", KINDS)
pytestmark = pytest.mark.filterwarnings("ignore:.*nn.utils.weight_norm.*is deprecated:FutureWarning")


@every_kind
def test_numbers_and_all_as_found(make: Callable[[], nn.Module]) -> None:
    model, x = lively(make()), torch.randn(20, 4).double()
    model(x).sum().backward() if make is not all_frozen else model(x)
    found = Found(model)
    graph = compute_interaction_graph(model, [x], LAYERS, rtol=RTOL)
    found.assert_same()
    assert_exact(graph, *dense(model, x, LAYERS))


@every_kind
def test_training_goes_on_to_the_last_bit(make: Callable[[], nn.Module]) -> None:
    def trained(watched: bool) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model = make()
        optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True), *model.parameters()], lr=0.1)
        for _ in range(4):
            x = torch.randn(20, 4)
            loss = model(x).square().mean()
            if watched:  # before the backward pass of a loss that is there already: nothing of it is in our way
                compute_interaction_graph(model, [x], LAYERS)
            optimizer.zero_grad()
            if loss.requires_grad:
                loss.backward()
            optimizer.step()
        return model.state_dict()

    expected = trained(watched=False)
    assert all(torch.equal(t, expected[name]) for name, t in trained(watched=True).items())


def test_low_rank_adapter_is_its_merged_weight() -> None:
    model, x = lively(low_rank()), torch.randn(20, 4).double()
    merged = copy.deepcopy(model)
    adapter = merged[2]
    merged[2] = adapter.base
    with torch.no_grad():
        adapter.base.weight += 2.0 * adapter.up.weight @ adapter.down.weight
    expected = compute_interaction_graph(merged, [x], LAYERS)
    assert_same_graph(compute_interaction_graph(model, [x], LAYERS), expected)


def test_embedding_with_greatest_norm() -> None:
    # torch writes shorter vectors into the table as they are looked up, even in evaluation mode.
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4, max_norm=1.0), nn.Linear(4, 3)
            self.bag = nn.EmbeddingBag(7, 4, max_norm=0.5)

        def forward(self, words: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embed(words) + self.bag(words)[:, None]))

    model, words = lively(Words()), torch.randint(0, 7, (12, 3))
    layers = ["head:input", "output"]
    found = Found(model)
    graph = compute_interaction_graph(model, [words], layers, rtol=RTOL)
    found.assert_same()
    assert_exact(graph, *dense(model, words, layers))


class Log:
    """What hooks have seen, in order."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, list[float]]] = []

    def hook(self, name: str, scale: float | None = None) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            self.entries.append((name, output.flatten().tolist()))
            return None if scale is None else output * scale

        return hook


def test_hooks_of_the_user_work_in_their_order_with_values_as_before() -> None:
    x, log = torch.randn(20, 4).double(), Log()
    model = lively(mlp())
    model[0].register_forward_hook(log.hook("doubles", 2.0))
    model[0].register_forward_hook(log.hook("sees doubled"))
    model[0].register_forward_hook(log.hook("first"), prepend=True)
    model[2].register_forward_pre_hook(lambda _, args: (args[0] + 1,))
    model[2].register_forward_hook(log.hook("second"))
    with torch.no_grad():
        model(x)
    expected, log.entries = log.entries, []
    found = Found(model)
    graph = compute_interaction_graph(model, [x], ["input", "0", "2:input", "2", "output"], rtol=RTOL)
    found.assert_same()
    assert [name for name, _ in log.entries[:4]] == ["first", "doubles", "sees doubled", "second"]
    # The passes over the whole batch as it is (others hold the node layers to account, on three samples).
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
def test_backward_hooks_of_the_user_rest(scale: float | None) -> None:
    # They are about the gradients of training: ours are none of their business, nor may they change them. Around
    # modules that have them, torch hands on views, which cannot be cut in place.
    model, x, calls = lively(ResidualBlock()), torch.randn(20, 4).double(), []
    layers = ["input", "norm:input", "head:input", "output"]
    expected = compute_interaction_graph(model, [x], layers)

    def change(_: nn.Module, grads: tuple[Tensor, ...], *more: Any) -> Any:
        calls.append(1)
        return None if scale is None else tuple(scale * grad for grad in grads)

    for module in (model, model.embed, model.f):
        module.register_full_backward_hook(change)
        module.register_full_backward_pre_hook(change)
    found = Found(model)
    graph = compute_interaction_graph(model, [x], layers)
    found.assert_same()
    assert not calls
    assert_same_graph(graph, expected)
    model(x.requires_grad_()).sum().backward()
    assert len(calls) == 6
