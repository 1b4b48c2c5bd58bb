"""Cutting models at node layers: valid and invalid node layers, and restored models."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import NodeLayer, compute_interaction_graph
from lib_lightning.api import check_node_layers
from lib_lightning.errors import ActivationError, NodeLayerError
from lib_lightning.jacobian.integrated_gradients import sections
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.node_layer import as_node_layers
from lib_lightning.model.preserve import preserve_model
from tests.cases import Case, ResidualMLP, TwoInputs


def test_sections_compose_to_the_whole_model(case: Case) -> None:
    instrumented = InstrumentedModel(case.model, as_node_layers(case.node_layers), ModelSpec(case.input_fn))
    for cut, F, cut_after in zip(
        instrumented.capture(case.data), case.sections, instrumented.capture(case.data)[1:], strict=False
    ):
        torch.testing.assert_close(F(cut.a), cut_after.a)


def test_replaced_activations_affect_all_later_layers(case: Case) -> None:
    instrumented = InstrumentedModel(case.model, as_node_layers(case.node_layers), ModelSpec(case.input_fn))
    activations = instrumented.activations(case.data)
    new = activations[1] + torch.randn_like(activations[1])
    expected = new
    for F in case.sections[1:]:
        expected = F(expected)
    with torch.no_grad():
        captured = instrumented.capture(case.data, [None, new, *[None] * (len(activations) - 2)])
    torch.testing.assert_close(captured[-1].a, expected)
    if len(captured[1].outputs) == 1:  # one of several taps may be computed from another one, which was replaced
        assert torch.equal(captured[1].a, activations[1]), "the output is the computed one"


def test_the_batch_and_the_model_are_not_modified(case: Case) -> None:
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


def test_float32_model_computed_in_float64() -> None:
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


def test_a_bypass_raises_an_error_with_its_name() -> None:
    model = ResidualMLP()
    with pytest.raises(
        NodeLayerError, match=r"'blocks.0.down' does not cut .* 'blocks.1' also depends on 'embed' past it"
    ):
        check_node_layers(model, torch.randn(3, 4), ["embed", "blocks.0.down", "blocks.1", "output"])


def test_a_bypass_through_excluded_positions_raises_an_error() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)).sum(1)

    with pytest.raises(NodeLayerError, match="at positions that are excluded"):
        check_node_layers(Sum(), torch.randn(3, 4, 3), ["input", NodeLayer(["first"], positions=-1), "output"])


def test_valid_node_layers_are_accepted(case: Case) -> None:
    check_node_layers(case.model, case.data, case.node_layers, input_fn=case.input_fn)


def test_sections_without_gradient_raise_an_error() -> None:
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
        (
            ["head", "body", "output"],
            NodeLayerError,
            r"list them in the order of the forward pass, 'body', 'head', 'output'",
        ),
        (["body", "unused", "output"], NodeLayerError, r"'unused' did not run"),
        (["body", "twice", "output"], NodeLayerError, r"'twice' runs more than once"),
        (["input", "body", "output"], ActivationError, r"'input' holds int64 numbers, which have no gradient"),
        (["body", "pair", "output"], ActivationError, r"'pair' holds no tensor, but str"),
    ],
)
def test_invalid_node_layers_raise_errors(layers: list[str], error: type[Exception], message: str) -> None:
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


def test_parameters_and_buffers_are_not_overwritten() -> None:
    class Queries(nn.Module):
        """A model that passes a parameter and a buffer to modules."""

        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(1, 3))
            self.register_buffer("offset", torch.randn(1, 3))
            self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x + self.first(self.query) + self.second(self.offset))

    model = Queries()
    instrumented = InstrumentedModel(model, as_node_layers(["first:input", "head:input"]))
    instrumented.capture(torch.randn(1, 3))
    instrumented = InstrumentedModel(model, as_node_layers(["second:input", "head:input"]))
    instrumented.capture(torch.randn(1, 3))
    assert model.query.requires_grad
    assert model.query.is_leaf
    assert not model.offset.requires_grad


class Named(NamedTuple):
    hidden: Tensor
    extra: str


class Output(OrderedDict[str, Any]):
    """An output class as in model libraries: a dict with attributes."""

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

    captured = InstrumentedModel(Outer(), as_node_layers(["input", "inner", "output"])).capture(torch.ones(1, 3))
    assert torch.equal(captured[2].a, torch.full((1, 1, 3), 4.0))


def test_user_hooks_remain_and_ours_are_removed_when_the_model_raises() -> None:
    seen: list[str] = []
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].register_forward_hook(lambda *_: seen.append("user"))

    def fail(*_: object) -> None:
        raise RuntimeError("from the model")

    handle = model[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="from the model"):
        InstrumentedModel(model, as_node_layers(["0", "output"])).capture(torch.ones(1, 3))
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


class Residual(nn.Module):
    """``x + f(x)`` with different kinds of addition."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.embed, self.f, self.head, self.in_place = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), in_place

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.in_place:
            x += self.f(x)
        else:
            x = x + self.f(x)
        return self.head(x)


def test_in_place_addition_to_a_tapped_tensor() -> None:
    model, x = Residual(in_place=False), torch.randn(20, 3)
    graph = compute_interaction_graph(model, [x], ["input", "f:input", "head:input", "output"])
    model.in_place = True
    again = compute_interaction_graph(model, [x], ["input", "f:input", "head:input", "output"])
    assert all(torch.equal(E, graph.edges[pair]) for pair, E in again.edges.items())


@pytest.mark.parametrize("write", ["mul_", "data", "after"])
def test_models_that_write_to_their_input(write: str) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            if write == "mul_":
                x.mul_(2)
            elif write == "data":  # which does not increase autograd's version counter
                x.data.mul_(2)
            y = torch.tanh(self.up(x))
            if write == "after":
                x.zero_()
            return self.down(y)

    model, x = Writes().double(), torch.randn(20, 3).double()
    given = x.clone()
    plain = nn.Sequential(model.up, nn.Tanh(), model.down)
    graph = compute_interaction_graph(model, [x], ["up:input", "output"])
    assert torch.equal(x, given)
    expected = compute_interaction_graph(plain, [x if write == "after" else 2 * x], ["0:input", "output"])
    torch.testing.assert_close(graph.bases["up:input"].mean, expected.bases["0:input"].mean)
    torch.testing.assert_close(graph.edges["up:input", "output"], expected.edges["0:input", "output"])


@pytest.mark.parametrize("between", [nn.Identity(), nn.Dropout(), nn.ReLU(inplace=True)])
@pytest.mark.parametrize("taps", [["input", "0", "output"], ["input", "1:input", "output"], ["0:input", "0", "output"]])
def test_two_taps_of_the_same_input(between: nn.Module, taps: list[str]) -> None:
    model, x = nn.Sequential(between, nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval(), torch.rand(30, 3)
    batches = list(x.double().split(10))
    graph = compute_interaction_graph(model, batches, taps)  # positive, so that the nonlinearity is the identity
    first, second = graph.node_layers[:2]
    assert graph.bases[first].n_features == graph.bases[second].n_features > 0
    torch.testing.assert_close(graph.edges[first, second].sum(0), graph.bases[first].importance)


def test_an_input_fn_may_use_the_same_memory_again() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(40, 3).double()
    memory = torch.zeros(20, 3).double()
    graph = compute_interaction_graph(model, x.split(20), ["input", "1", "output"], input_fn=memory.copy_)
    expected = compute_interaction_graph(model, x.split(20), ["input", "1", "output"])
    for pair, E in expected.edges.items():
        torch.testing.assert_close(graph.edges[pair], E)


def test_activations_of_an_unmodified_input_share_the_batchs_memory() -> None:
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(20, 3)
    with preserve_model(model) as copy:
        (first, _) = InstrumentedModel(copy, as_node_layers(["0:input", "output"])).capture(x)
        (converted, _) = InstrumentedModel(
            copy, as_node_layers(["0:input", "output"]), ModelSpec(dtype=torch.float64)
        ).capture(x)
        with torch.inference_mode():
            made_there = x.clone()
        (copied, _) = InstrumentedModel(copy, as_node_layers(["0:input", "output"])).capture(made_there)
    assert first.a.data_ptr() == x.data_ptr(), "no copy of a large batch"
    assert converted.a.dtype == torch.float64
    assert torch.equal(copied.a[:, 0], x), "autograd takes no tensors of inference mode"
    assert not x.requires_grad


def test_in_place_activation_called_as_a_statement() -> None:
    class Statement(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(3, 8), nn.ReLU(inplace=True), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            self.act(h)
            return self.down(h)

    model, x = Statement(), torch.randn(40, 3)
    graph = compute_interaction_graph(model, [x], ["act:input", "output"])
    chain = nn.Sequential(model.up, nn.ReLU(), model.down)
    expected = compute_interaction_graph(chain, [x], ["1:input", "output"])
    torch.testing.assert_close(graph.edges["act:input", "output"], expected.edges["1:input", "output"])


@pytest.mark.parametrize("node_layers", [["f", "output"], ["f", "head:input", "output"]])
def test_a_bypass_of_the_first_node_layer_raises_an_error(node_layers: list[str]) -> None:
    with pytest.raises(NodeLayerError, match=r"'f' does not cut .* also depends on the model's input past it"):
        check_node_layers(Residual(in_place=False), torch.randn(3, 3), node_layers)

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.f, self.head = nn.Embedding(5, 4), nn.Tanh(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            return self.head(x + self.f(x))

    with pytest.raises(NodeLayerError, match=r"'f' does not cut .* also depends on the model's input past it"):
        check_node_layers(Tokens(), torch.arange(3), node_layers)
    check_node_layers(Tokens(), torch.arange(3), ["f:input", "output"])
    check_node_layers(Tokens(), torch.arange(3), ["embed", "head:input", "output"])


def test_interactions_between_samples_raise_an_error() -> None:
    gru = nn.GRU(4, 5)  # takes (time, batch, features)

    class SequenceFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.head = gru, nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.gru(x)[0])

    with pytest.raises(NodeLayerError, match=r"Samples influence each other .* batch_first=True"):
        check_node_layers(SequenceFirst(), torch.randn(6, 3, 4), ["input", "gru", "output"])
    with pytest.raises(NodeLayerError, match=r"differ in samples \(3 and 12\): axis 0 of each must be the batch"):
        check_node_layers(nn.Sequential(nn.Linear(2, 2), nn.Flatten(0, 1)), torch.randn(3, 4, 2), ["input", "output"])


def test_parallel_node_layers_raise_an_error() -> None:
    with pytest.raises(NodeLayerError, match=r"'right' does not cut .*'output' also depends on 'left' past it"):
        check_node_layers(
            TwoInputs(), {"left": torch.randn(3, 4), "right": torch.randn(3, 2)}, ["left", "right", "output"]
        )


def test_fused_attention_uses_the_math_backend() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v))

    instrumented = InstrumentedModel(Attention(), as_node_layers(["input", "output"]))
    with instrumented.session():
        (section,) = sections(instrumented, torch.randn(2, 5, 4), [], 0, 1)
        assert section.has_jvp()
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    graph = compute_interaction_graph(layer, [torch.randn(9, 5, 4)], ["norm1", "output"], final_basis="pca")
    assert graph.bases["norm1"].n_features > 0


class NoSecondDerivative(torch.autograd.Function):
    """Doubles its input; its backward pass is not differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.detach() * 2


def test_operations_without_second_derivative() -> None:
    class Custom(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return NoSecondDerivative.apply(x)

    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    linear, x = nn.Linear(3, 4), torch.randn(4, 3)
    for head in (nn.Linear(4, 40), nn.Linear(4, 2)):  # forward mode for many outputs, reverse mode for few
        custom, plain = (
            compute_interaction_graph(nn.Sequential(linear, op, head), [x], ["0", "output"])
            for op in (Custom(), Plain())
        )
        torch.testing.assert_close(custom.edges["0", "output"], plain.edges["0", "output"])
        assert custom.edges["0", "output"].sum() > 0


def test_compiled_modules_run_uncompiled() -> None:
    body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(20, 3)
    expected = compute_interaction_graph(body, [x], ["1", "output"])
    compiled = torch.compile(body, backend="eager")
    compiled(x)
    graph = compute_interaction_graph(compiled, [x], ["_orig_mod.1", "output"])
    torch.testing.assert_close(graph.edges["_orig_mod.1", "output"], expected.edges["1", "output"])


def test_states_stored_on_a_module_are_detached() -> None:
    class KeepsState(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.f, self.head = torch.randn(1, 3), nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.f(self.start) + x)

    model = KeepsState()
    value = model.start.clone()
    with pytest.raises(ActivationError, match="are the same for all 3 samples"):
        compute_interaction_graph(model, [torch.randn(1, 3)] * 3, ["f:input", "f"])
    assert not model.start.requires_grad
    assert torch.equal(model.start, value)


@pytest.mark.parametrize("path", ["detach", "comparison", "no_grad", "argmax"])
def test_a_bypass_without_gradient_raises_an_error(path: str) -> None:
    class Sneaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.other, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.f(x))
            if path == "detach":
                h = h + x.detach()
            elif path == "comparison":
                h = h * (x > 0)
            elif path == "argmax":
                h = h + x.argmax(-1, keepdim=True)
            else:
                with torch.no_grad():
                    other = self.other(x) ** 2
                h = h + other
            return self.head(h)

    with pytest.raises(NodeLayerError, match=r"'f' does not cut .*'output' also depends .* on a path without gradient"):
        check_node_layers(Sneaky(), torch.randn(5, 4), ["f", "output"])
    check_node_layers(Sneaky(), torch.randn(5, 4), ["head:input", "output"])


class Accepted(nn.Module):
    """Valid models that resemble invalid ones."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.calls = kind, 0
        self.embed, self.bias = nn.Embedding(9, 4), nn.Embedding(3, 4)
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        self.calls += 1
        x = torch.tanh(self.first(self.embed(tokens)))
        if self.kind == "dropout":
            x = nn.functional.dropout(x, 0.5, training=True)
        if self.kind == "counts":
            x = x * self.calls
        if self.kind == "position":
            x = x + self.bias(torch.arange(3))
        if self.kind == "mask":
            x = x * mask[..., None]
        return self.head(torch.tanh(self.second(x)))


@pytest.mark.parametrize("kind", ["plain", "dropout", "counts", "position", "mask"])
def test_randomness_constants_and_context_are_accepted(kind: str) -> None:
    model, tokens = Accepted(kind), torch.randint(0, 9, (5, 3))
    batch = {"tokens": tokens, "mask": (tokens > 2).float()} if kind == "mask" else {"tokens": tokens}
    graph = compute_interaction_graph(model, [batch], ["first", "second:input", "output"])
    assert graph.bases["first"].n_features > 0
    assert model.calls == 0, "and the count of calls is as before"


def test_tensors_as_long_as_the_batch_that_are_not_per_sample() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.head(mask @ torch.tanh(self.f(x)))

    batch = {"x": torch.randn(6, 6, 4), "mask": torch.ones(6, 6).tril()}
    graph = compute_interaction_graph(Masked(), [batch], ["f", "output"])
    assert graph.info["n_samples"] == 6


def test_empty_batches_are_ignored() -> None:
    model, x = nn.Linear(3, 2), torch.randn(8, 3)
    graph = compute_interaction_graph(model, [x[:0], x, x[:0]], ["input", "output"])
    assert graph.info["n_samples"] == 8
