"""Cutting live models: what is a cut, what is none, and that nothing of it stays behind."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import NodeLayer, compute_interaction_graph
from lib_lightning.compute import check_node_layers
from lib_lightning.core.cut import LiveModel
from lib_lightning.core.errors import ActivationError, NodeLayerError
from lib_lightning.core.layers import as_node_layers
from tests.cases import Case, ResidualMLP


def test_sections_join_to_the_whole_model(case: Case) -> None:
    live = LiveModel(case.model, as_node_layers(case.node_layers), case.input_fn)
    for cut, F, cut_after in zip(live.cut(case.data), case.sections, live.cut(case.data)[1:], strict=False):
        torch.testing.assert_close(F(cut.a), cut_after.a)


def test_replaced_activations_reach_everything_after(case: Case) -> None:
    live = LiveModel(case.model, as_node_layers(case.node_layers), case.input_fn)
    activations = live.activations(case.data)
    new = activations[1] + torch.randn_like(activations[1])
    expected = new
    for F in case.sections[1:]:
        expected = F(expected)
    with torch.no_grad():
        cuts = live.cut(case.data, [None, new, *[None] * (len(activations) - 2)])
    torch.testing.assert_close(cuts[-1].a, expected)
    assert torch.equal(cuts[1].a, activations[1]), "the end keeps what was computed"


def test_callers_batch_and_model_are_left_alone(case: Case) -> None:
    before = {name: t.clone() for name, t in case.model.state_dict().items()}
    tensors = (
        list(case.data.values()) if isinstance(case.data, dict) else [t for t in [case.data] if torch.is_tensor(t)]
    )
    values = [t.clone() for t in tensors]
    compute_interaction_graph(case.model, [case.data], case.node_layers, input_fn=case.input_fn)
    assert all(torch.equal(t, before[name]) for name, t in case.model.state_dict().items())
    assert not any(t.requires_grad for t in tensors)
    assert all(torch.equal(*pair) for pair in zip(tensors, values, strict=True))
    assert all(p.grad is None and p.requires_grad for p in case.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules())


def test_float32_model_computes_in_float64_on_the_side() -> None:
    class TiedWithBuffer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)
            self.down.weight = self.up.weight
            self.register_buffer("scale", torch.full((4,), 2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.tanh(self.up(x)) * self.scale)

    model, x = TiedWithBuffer(), torch.randn(50, 4)
    graph = compute_interaction_graph(model, [x], ["up", "down:input", "output"], dtype=torch.float64)
    assert model.up.weight.dtype == torch.float32
    assert model.down.weight is model.up.weight
    exact = compute_interaction_graph(model.double(), [x.double()], ["up", "down:input", "output"])
    for E, expected in zip(graph.edges.values(), exact.edges.values(), strict=True):
        torch.testing.assert_close(E, expected, rtol=1e-12, atol=0)


def test_bypass_is_named() -> None:
    model = ResidualMLP()
    with pytest.raises(
        NodeLayerError, match=r"'blocks.0.down' does not cut .* 'blocks.1' also depends on 'embed' past it"
    ):
        check_node_layers(model, torch.randn(3, 4), ["embed", "blocks.0.down", "blocks.1", "output"])


def test_bypass_through_positions_that_are_not_looked_at_is_found() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)).sum(1)

    with pytest.raises(NodeLayerError, match="at positions that are left out"):
        check_node_layers(Sum(), torch.randn(3, 4, 3), ["input", NodeLayer(["first"], positions=-1), "output"])


def test_proper_cuts_have_no_bypass(case: Case) -> None:
    check_node_layers(case.model, case.data, case.node_layers, input_fn=case.input_fn)


def test_what_stops_gradients_is_named() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).detach().round())

    with pytest.raises(NodeLayerError, match="'output' has no gradient with respect to 'first'"):
        check_node_layers(Detached().requires_grad_(False), torch.randn(2, 3), ["input", "first", "output"])


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        (
            ["body", "haed", "output"],
            NodeLayerError,
            r"has no module 'haed' \(node layer 'haed'\). Near matches: 'head'",
        ),
        (["body:input", "blody:input"], NodeLayerError, r"Near matches: 'body:input'"),
        (["head", "body", "output"], NodeLayerError, r"out of order: give them as they run, 'body', 'head', 'output'"),
        (["body", "unused", "output"], NodeLayerError, r"'unused' did not run"),
        (["body", "twice", "output"], NodeLayerError, r"'twice' runs more than once"),
        (["input", "body", "output"], ActivationError, r"'input' holds int64 numbers, which have no gradient"),
        (["body", "pair", "output"], ActivationError, r"'pair' holds no tensor, but str"),
    ],
)
def test_mistakes_are_explained(layers: list[str], error: type[Exception], message: str) -> None:
    class Text(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "text"

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.unused = nn.Embedding(5, 3), nn.Linear(3, 2), nn.Linear(3, 3)
            self.twice, self.pair = nn.ReLU(), Text()

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.twice(self.twice(self.body(tokens)))
            self.pair(x)
            return self.head(x)

    with pytest.raises(error, match=message):
        check_node_layers(Model(), torch.tensor([[1, 2], [3, 4]]), layers)


def test_tensors_of_the_model_are_never_cut_in_place() -> None:
    class Queries(nn.Module):
        """Feeds a parameter and a buffer straight into modules."""

        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 3))
            self.register_buffer("offset", torch.randn(1, 3))
            self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.first(self.query) + self.second(self.offset))

    model = Queries()
    live = LiveModel(model, as_node_layers(["first:input", "head:input"]))
    live.cut(torch.randn(1, 3))
    live = LiveModel(model, as_node_layers(["second:input", "head:input"]))
    live.cut(torch.randn(1, 3))
    assert model.query.requires_grad
    assert model.query.is_leaf
    assert not model.offset.requires_grad


class Named(NamedTuple):
    hidden: Tensor
    extra: str


class Output(OrderedDict[str, Any]):
    """An output class in the manner of model libraries: a dict with attributes."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


@pytest.mark.parametrize("kind", ["named", "output", "list", "nested"])
def test_containers_keep_their_class(kind: str) -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {
                "named": lambda: Named(x * 2, "extra"),
                "output": lambda: Output(hidden=x * 2, extra="extra"),
                "list": lambda: [x * 2, "extra"],
                "nested": lambda: ({"hidden": (x * 2,)}, "extra"),
            }[kind]()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            out = self.inner(x)
            if kind in ("named", "output"):
                return out.hidden * (2 if out.extra == "extra" else 0)
            return (out[0] if kind == "list" else out[0]["hidden"][0]) * (2 if out[1] == "extra" else 0)

    cuts = LiveModel(Outer(), as_node_layers(["input", "inner", "output"])).cut(torch.ones(1, 3))
    assert torch.equal(cuts[2].a, torch.full((1, 1, 3), 4.0))


def test_hooks_of_the_user_keep_working_and_ours_are_removed_when_the_model_raises() -> None:
    seen: list[str] = []
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].register_forward_hook(lambda *_: seen.append("user"))

    def fail(*_: object) -> None:
        raise RuntimeError("from the model")

    handle = model[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="from the model"):
        LiveModel(model, as_node_layers(["0", "output"])).cut(torch.ones(1, 3))
    handle.remove()
    assert seen == ["user"]
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 1


def test_keyword_arguments_can_be_tapped() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(hidden=torch.tanh(x))

    class Inner(nn.Module):
        def forward(self, *, hidden: Tensor) -> Tensor:
            return hidden * 3

    graph = compute_interaction_graph(Outer(), [torch.randn(20, 4)], ["input", "inner:input", "output"])
    assert graph.bases["inner:input"].n_features == 4
