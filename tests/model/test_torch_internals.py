"""Internals of torch: which of them this version lacks, and the same results without any one of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lib_lightning import compute_interaction_graph, list_node_layers
from lib_lightning.model import autograd_graph, torch_internals
from lib_lightning.model.autograd_graph import edge_of
from tests.integration.state_check import StateCheck

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0)).double()


class Blocks(nn.Module):
    """Residual blocks whose outputs are saved by their own activation function, with a table that it writes to."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.first, self.second = nn.Tanh(), nn.Tanh()
        self.register_buffer("n_calls", torch.zeros(1))
        self.table = torch.ones(6)

    def forward(self, x: Tensor) -> Tensor:
        self.n_calls = self.n_calls + 1
        self.table += 1
        x = self.first(self.up(x))
        return self.head(self.second(x + self.mix(x)))


class Checkpointed(nn.Module):
    """Blocks with activation checkpointing, called by its imported name."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.up, self.mix, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.use_reentrant = use_reentrant

    def block(self, x: Tensor) -> Tensor:
        return x + self.mix(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, self.up(x), use_reentrant=self.use_reentrant)
        return self.head(checkpoint(self.block, x, use_reentrant=self.use_reentrant))


class Square(torch.autograd.Function):
    """A function with a backward pass in Python."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grads[0]


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(x)


class Drifting(nn.Linear):
    """A layer whose weight depends on the batch: the same operations with another weight in each."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * x.detach().mean()).T + self.bias


def in_inference_mode(model: nn.Sequential) -> nn.Sequential:
    with torch.inference_mode():
        model[0].weight = nn.Parameter(model[0].weight.clone(), requires_grad=False)
        model[0].register_buffer("table", torch.ones(3))
    return model


def with_backward_hooks(model: nn.Sequential) -> nn.Sequential:
    for module in model:
        module.register_full_backward_hook(lambda *_: None)
        module.register_full_backward_pre_hook(lambda *_: None)
    return model


class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(5, 16), nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.up(x).view(-1, 2, 2, 4).permute(0, 3, 1, 2)).flatten(1)


def mlp(*activations: nn.Module) -> nn.Sequential:
    relu, tanh = activations or (nn.ReLU(), nn.Tanh())
    return nn.Sequential(nn.Linear(5, 6), relu, nn.Linear(6, 4), tanh, nn.Linear(4, 3))


SEQUENTIAL = ["input", "1", "3", "output"]
# Models, and where they are cut.
MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "residual": (Blocks, ["input", "first", "second", "output"]),
    "sequential": (mlp, SEQUENTIAL),
    "views": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Unflatten(1, (2, 3)), nn.Linear(3, 4)),
        ["input", "1", "output"],
    ),
    "custom function": (lambda: mlp(Squared(), nn.Tanh()), SEQUENTIAL),
    "weights of the batch": (
        lambda: nn.Sequential(Drifting(5, 4), nn.Tanh(), nn.Linear(4, 3)),
        ["input", "1", "output"],
    ),
    "inference tensors": (lambda: in_inference_mode(mlp()), SEQUENTIAL),
    "backward hooks": (lambda: with_backward_hooks(mlp()), SEQUENTIAL),
    "compiled": (lambda: nn.Sequential(torch.compile(mlp()[:2], backend="eager"), nn.Linear(6, 3)), ["0.0", "output"]),
    "checkpoint": (lambda: Checkpointed(False), ["up", "head:input", "output"]),
    "reentrant checkpoint": (lambda: Checkpointed(True), ["up", "head:input", "output"]),
    "channels last in memory": (ChannelsLast, ["up", "output"]),
}
# Each internal: the module that names it, the key of the name, the object that should have it, and what its absence
# costs. None of these is a snapshot or a digit.
INTERNALS: list[tuple[Any, str, Any, str]] = [
    (torch_internals, "children", nn.Module(), "time to find modules"),
    (torch_internals, "parameters", nn.Module(), "a call of __setattr__ to replace parameters made in inference mode"),
    (torch_internals, "buffers", nn.Module(), "a call of __setattr__ to restore buffers"),
    (torch_internals, "backward hooks", nn.Module(), "calls of backward hooks; node layers beside skip connections of "
     "modules with such hooks may be refused (no workaround)"),
    (torch_internals, "backward pre-hooks", nn.Module(), "as for backward hooks"),
    (torch_internals, "compiled module", torch.compile(nn.Identity(), backend="eager"), "nothing, unless the class of "
     "compiled modules has another name, too: then their paths need the name of the wrapper (no workaround)"),
    (torch_internals, "backward engine", torch.autograd.graph, "the difference between a model that cannot be run and "
     "one that cannot be differentiated, in a message"),
    (torch_internals, "no forward", torch.nn.modules.module, "an explanation of the error that torch raises"),
    (torch_internals, "storage", torch.ones(1).untyped_storage(), "nothing"),
    (torch_internals, "checkpoint", torch.utils.checkpoint, "a search through all modules; checkpointing that is "
     "called by other than a global name remains on (no workaround)"),
    (torch_internals, "reentrant checkpoint", torch.utils.checkpoint, "as for checkpoint"),
    (torch_internals, "dispatch modes", torch.utils, "the numbers of operations in a profile, which become 0; writes "
     "to parameters that are too large to copy are found after they have happened"),
    (torch_internals, "compiled call", nn.Module, "the cut of modules on which compile() was called (no workaround)"),
    (torch_internals, "compiled function", torch.compile(lambda x: x, backend="eager"), "the cut of modules inside "
     "functions that torch.compile has wrapped (no workaround)"),
    (torch_internals, "number of parametrize.cached", nn.utils.parametrize, "weights that the caller's "
     "parametrize.cached() has cached are used and extended"),
    (torch_internals, "cache of parametrize.cached", nn.utils.parametrize, "as for their number"),
    (torch_internals, "functorch", torch._C, "models that use torch.func: the check of node layers fails on them (no "
     "workaround)"),
    (autograd_graph, "version counter", torch.autograd, "time and memory for copies of tensors that autograd saves"),
    (autograd_graph, "input metadata", (X.clone().requires_grad_() * 2).grad_fn, "closed forms, so time"),
    (autograd_graph, "saved tensors", None, "backward passes to check graphs that are kept, so time"),
    (autograd_graph, "saved memory", None, "products with several vectors at once in sections with channels last in "
     "memory, so time"),
    (autograd_graph, "is view", X, "nothing"),
    (autograd_graph, "base", X, "nothing, unless 'is view' is missing, too: then all tapped tensors are treated as "
     "views, and node layers beside skip connections may be refused (no workaround)"),
    (autograd_graph, "custom function", torch.autograd.function, "products with several vectors at once, so time"),
]  # fmt: skip


def graph_of(name: str) -> dict[tuple[str, str], Tensor]:
    """Edges of one of the models, which has to be as before."""
    torch.manual_seed(0)
    make, layers = MODELS[name]
    torch.set_default_dtype(torch.float64)
    model = make()
    torch.set_default_dtype(torch.float32)
    before = StateCheck(model)
    graph = compute_interaction_graph(model, X.split(8), layers, rtol=1e-9)
    before.assert_same()
    return graph.edges


def test_this_version_of_torch_has_all_of_them() -> None:
    missing = []
    for module, key, owner, cost in INTERNALS:
        name = module.NAMES[key]
        if key in ("saved tensors", "saved memory"):
            owner, name = (X.clone().requires_grad_() * X).grad_fn, f"{name}self"
        if not hasattr(owner, name):
            missing.append(f"{type(owner).__name__} {name} is missing, which costs {cost}")
    assert not missing, "\n".join(missing)
    named = {(module, key) for module in (torch_internals, autograd_graph) for key in module.NAMES}
    assert named == {(module, key) for module, key, _, _ in INTERNALS}


def test_this_version_of_torch_names_operations_as_expected() -> None:
    x, w = X.clone().requires_grad_(), torch.ones(4, 5).double()
    cost = "without these names closed forms are not found, which costs time, and fewer node layers are proposed"
    kernel = torch.ones(2, 24, 3).double()
    names = {
        "_MIXING": [x @ w.T, nn.functional.linear(x, w, w[:, 0]), nn.functional.conv1d(x[None], kernel)],
        "_IDENTITY": [x.view(5, 24), x.clone(), x[None], x[:2]],
        "_LAYOUT": [x.T, x.permute(1, 0), x.reshape(5, 24), x[:, 0]],
        "_ADD": [x + x, x - x],
        "_FULLY_DESCRIBED": [x @ w.T, x.T, x + x],
        "_BUILT_IN": [x.relu(), x.tanh(), nn.functional.gelu(x)],
    }  # fmt: skip
    for pattern, results in names.items():
        for result in results:
            name = result.grad_fn.name()
            assert getattr(autograd_graph, pattern).search(name), f"{pattern} does not match {name}: {cost}"
    assert autograd_graph.has_custom_function([Square.apply(x)])
    assert not autograd_graph.has_custom_function([x.tanh()])


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """Edges of each model with all of them."""
    return {name: graph_of(name) for name in MODELS}


@pytest.mark.combinations
@pytest.mark.parametrize("internal", INTERNALS, ids=[key for _, key, _, _ in INTERNALS])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_graph_without_one_of_them(
    internal: tuple[Any, ...], name: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, key, _, _ = internal
    monkeypatch.setitem(module.NAMES, key, "_missing")
    found = graph_of(name)
    for section, E in expected[name].items():
        torch.testing.assert_close(found[section], E, rtol=1e-9, atol=1e-14 * float(E.max()), msg=str(section))


def test_the_same_graph_without_names_of_operations(expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for pattern in ("_MIXING", "_IDENTITY", "_LAYOUT", "_ADD", "_FULLY_DESCRIBED", "_BUILT_IN", "_SHOWN"):
        monkeypatch.setattr(autograd_graph, pattern, re.compile("no such name"))
    for name, edges in expected.items():
        torch.testing.assert_close(graph_of(name), edges, rtol=1e-9, atol=1e-14)
    cuts = list_node_layers(mlp().double(), X)
    assert [cut.tap for cut in cuts] == ["input", "0", "1", "2", "3", "output"]
    assert [cut.tap for cut in cuts if cut.proposed] == ["input", "output"]


@pytest.mark.parametrize("key", ["input metadata", "saved tensors"])
def test_closed_forms_are_checked_or_not_used(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = X.clone().requires_grad_()
    y = x @ torch.ones(5, 5).double()
    assert autograd_graph.saved_tensors_intact(y)
    monkeypatch.setitem(autograd_graph.NAMES, "custom function", "_missing")
    assert autograd_graph.has_custom_function([y]), "unknown"
    monkeypatch.setitem(autograd_graph.NAMES, key, "_missing")
    if key == "saved tensors":
        assert not autograd_graph.saved_tensors_intact(y)
        assert not autograd_graph.is_fully_described(edge_of(y).node)
    else:
        with pytest.raises(NotImplementedError, match="does not provide the shapes"):
            autograd_graph.shape_of(edge_of(y))
