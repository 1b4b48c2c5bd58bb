"""Features of a live model set to other values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lib_lightning import Basis, InteractionGraph, LIBCallback, NodeLayer, compute_interaction_graph
from lib_lightning.errors import LIBError, NodeLayerError, SettingError, SettingTypeError
from lib_lightning.interventions import MEAN, edit_features, scale
from lib_lightning.model.batch import first_tensor, map_tensors
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.model_spec import ModelSpec
from tests.cases import Case, all_cases
from tests.integration.oracle import randomize

TOLERANCE = 1e-12


def graph_of(model: nn.Module, batches: list[Any], layers: Any, **options: Any) -> InteractionGraph:
    return compute_interaction_graph(model, batches, layers, effort="exact", **options)


def by_hand(a: Tensor, basis: Basis, j: int, new: Callable[[Tensor], Tensor]) -> Tensor:
    """``a + (f_new - f_old) C^+_j``, feature by feature."""
    f = ((a - basis.mean.to(a)) * basis.to_features[:, j].to(a)).sum(-1)
    return a + (new(f) - f)[..., None] * basis.from_features[j].to(a)


EDITS: list[tuple[Any, Callable[[Tensor], Tensor]]] = [
    (1.5, lambda f: torch.full_like(f, 1.5)),
    (scale(-2.0), lambda f: -2 * f),
    (torch.relu, lambda f: f.clamp(min=0)),
]


def check_against_replacement(
    model: nn.Module, batch: Any, graph: InteractionGraph, input_fn: Any = None, mask: Any = None
) -> None:
    """Edits equal what the model makes of activations that are computed by hand and put in place."""
    instrumented = InstrumentedModel(model, graph.node_layer_specs(), ModelSpec(input_fn, mask))
    args, kwargs = instrumented.inputs(batch)
    for i, (name, basis) in enumerate(graph.bases.items()):
        edit, new = EDITS[i % len(EDITS)]
        j = basis.n_features - 1
        with model_session(instrumented), torch.no_grad():
            layer = instrumented.capture(batch)[i]
            a = by_hand(layer.a, basis, j, new)
            if layer.mask is not None:
                a = torch.where(layer.mask[..., None], a, layer.a)
            expected = first_tensor(instrumented.output(batch, {i: a}))
        model.eval()
        for grad in (True, False):
            with torch.set_grad_enabled(grad), edit_features(model, graph, {(name, j): edit}, mask):
                found = first_tensor(model(*args, **kwargs))
            assert found is not None
            assert expected is not None
            torch.testing.assert_close(found.detach(), expected, rtol=TOLERANCE, atol=TOLERANCE)
            unedited = first_tensor(model(*args, **kwargs))
            assert unedited is not None
            assert not torch.allclose(unedited, expected)


def test_equals_manual_computation(case: Case) -> None:
    graph = graph_of(case.model, [case.data], case.node_layers, input_fn=case.input_fn, mask=case.mask)
    check_against_replacement(case.model, case.data, graph, case.input_fn, case.mask)


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=7, n_positions=6, n_embd=4, n_layer=2, n_head=2, n_inner=6, bos_token_id=0, eos_token_id=0)  # fmt: skip  # noqa: E501
    return randomize(GPT2LMHeadModel(config))


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=7, hidden_size=4, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=6, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return randomize(LlamaForCausalLM(config))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": self.head(self.lstm(x)[0])}


class CNN(nn.Module):
    """Relies on the order of memory of its activations, and changes them in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act, self.head = (
            nn.Conv2d(2, 3, 2),
            nn.BatchNorm2d(3),
            nn.ReLU(True),
            nn.Linear(27, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.norm(self.conv(x)))
        return self.head(h.view(len(h), -1))


class Branches(nn.Module):
    """Two tensors whose features are one node layer, and a skip connection around what follows."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.up, self.head = nn.Linear(3, 2), nn.Linear(3, 4), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x).tanh() if x.shape[-1] == 2 else self.right(x)
        if left.shape[0] != right.shape[0] or not left.is_floating_point():
            raise ValueError
        h = torch.cat([left, right], -1)
        return self.head(h + torch.tanh(self.up(h)))


class Streams(nn.Module):
    """Two tensors whose positions are one node layer; one of them is used before the other is there."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode, self.head = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.encode(source).tanh()
        return self.head(torch.cat([memory, self.decode(target).sin()], 1))


def models() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], Any, dict[str, Any]]]:
    def tokens() -> Tensor:
        return torch.randint(1, 7, (20, 5))

    return {
        "mlp": (
            lambda: nn.Sequential(nn.Linear(3, 5), nn.Dropout(), nn.ReLU(), nn.Linear(5, 2)),
            lambda: torch.randn(20, 3), ["input", "1", "3:input", "output"], {},
        ),
        "cnn": (CNN, lambda: torch.randn(20, 2, 4, 4), ["conv", "act", "output"], {}),
        "one pixel": (
            CNN, lambda: torch.randn(20, 2, 4, 4),
            [NodeLayer("conv", skip_positions=[0, 4], feature_dim=1), "act", "output"], {},
        ),
        "gpt2": (gpt2, tokens, ["transformer.h.0", "transformer.h.1.ln_2:input", "lm_head:input"],
            {"skip_positions": 1}),
        "llama": (
            llama, tokens, ["model.layers.0", "model.layers.1.post_attention_layernorm:input", "model.norm"], {}
        ),
        "lstm": (Recurrent, lambda: torch.randn(20, 4, 3), ["lstm", "output"], {}),
        "two streams": (
            Streams, lambda: (torch.randn(20, 3, 4), torch.randn(20, 2, 4)),
            [NodeLayer(["encode", "decode"], "streams", join="positions"), "head:input", "output"],
            {"skip_positions": 1},
        ),
        "branches": (Branches, lambda: torch.randn(20, 3), ["input", "left+right", "output"], {}),
    }  # fmt: skip


@pytest.mark.parametrize("name", models())
def test_kinds_of_models(name: str) -> None:
    make, data, layers, options = models()[name]
    model, batch = make().double().eval(), data()
    batch = map_tensors(batch, lambda t: t.double() if t.is_floating_point() else t)
    check_against_replacement(model, batch, graph_of(model, [batch], layers, **options))


@functools.cache
def residual() -> tuple[Case, InteractionGraph]:
    (case,) = (case for case in all_cases() if case.name == "norm_and_residual")
    return case, graph_of(case.model, [case.data], case.node_layers)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 2)), max_size=8, unique_by=lambda x: x[:2])
)
def test_any_edits_of_all_node_layers_at_once(choices: list[tuple[int, int, int]]) -> None:
    """As in a model whose activations are replaced in one node layer after another."""
    case, graph = residual()
    chosen = [(i, j, k) for i, j, k in choices if j < graph.bases[graph.node_layers[i]].n_features]
    instrumented = InstrumentedModel(case.model, graph.node_layer_specs())
    replaced: dict[int, Tensor] = {}
    with model_session(instrumented), torch.no_grad():
        for i, basis in enumerate(graph.bases.values()):
            a = before = instrumented.capture(case.data, [replaced.get(l) for l in range(4)])[i].a
            for layer, j, k in chosen:
                if layer == i:
                    a = a + by_hand(before, basis, j, EDITS[k][1]) - before
            if a is not before:
                replaced[i] = a
        expected = instrumented.output(case.data, replaced)
    edits = {(graph.node_layers[i], j): EDITS[k][0] for i, j, k in chosen}
    with edit_features(case.model, graph, edits):
        torch.testing.assert_close(case.model(case.data), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_only_along_the_feature_and_several_at_once() -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double(), torch.randn(30, 6).double()
    graph = graph_of(model, [x], ["1", "output"])  # 2 features of 8 activations
    seen: list[Tensor] = []
    model[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    before, basis = torch.tanh(model[0](x)), graph.bases["1"]
    with edit_features(model, graph, {"1/0": 2.0, "1/1": scale(3.0)}):
        y = model(x)
    f_old, f_new = basis.encode(before), basis.encode(seen[-1])
    torch.testing.assert_close(f_new, torch.stack([torch.full_like(f_old[:, 0], 2.0), 3 * f_old[:, 1]], 1))
    left_out = before - basis.decode(f_old)
    torch.testing.assert_close(seen[-1] - basis.decode(f_new), left_out, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(y, model[2](seen[-1]))


@pytest.mark.parametrize("layer", ["input", "up", "block:input", "head:input", "output"])
@pytest.mark.parametrize("edit", [1.0, scale(0.5), torch.sin])
def test_gradients_through_the_edit_equal_finite_differences(layer: str, edit: Any) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.block, self.head = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.up(x))
            return self.head(h + self.block(h))

    model, x = Residual().double().train(), torch.randn(12, 3).double()
    graph = graph_of(model, [x], list(dict.fromkeys(["input", layer, "output"])))

    def run(x: Tensor, weight: Tensor) -> Tensor:
        with edit_features(model, graph, {(layer, 0): edit}):
            return torch.func.functional_call(model, {"up.weight": weight}, (x,))

    leaves = x[:4].clone().requires_grad_(), model.up.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(run, leaves)


def test_the_tensors_of_the_caller_and_their_gradients() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(9, 3).double()
    graph = graph_of(model, [x], ["input", "1", "output"])
    given = x.clone().requires_grad_()
    with edit_features(model, graph, {"input/0": 0, "1/0": 0, "output/0": 0}):
        model(given).sum().backward()
        with torch.inference_mode():
            inferred = model(x)
        with torch.no_grad():
            torch.testing.assert_close(model(given), inferred)
    assert torch.equal(given, x)
    assert given.grad is not None
    assert model[0].weight.grad is not None


def n_hooks(model: nn.Module) -> list[int]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
    return [len(getattr(m, name)) for m in model.modules() for name in names]


def test_what_was_there_before_comes_back() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(9, 3)
    graph = graph_of(model, [x], ["input", "1", "output"])
    model[1].register_forward_hook(lambda module, args, output: output + 1)
    before, hooks, state = model(x), n_hooks(model), {k: v.clone() for k, v in model.state_dict().items()}

    def check() -> None:
        assert n_hooks(model) == hooks
        assert torch.equal(model(x), before)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    with edit_features(model, graph, {"1/0": 3.0}):
        assert not torch.equal(model(x), before)
    check()
    with pytest.raises(ZeroDivisionError), edit_features(model, graph, {"1/0": 3.0, "input/0": 0}):
        _ = model(x) / (1 // 0)
    check()
    with pytest.raises(ZeroDivisionError), edit_features(model, graph, {"1/0": lambda f: f / (1 // 0)}):
        model(x)
    check()
    for wrong in ({"1/0": "high"}, {"1/0": True}, {"1/0": float("nan")}, {"1/0": None}):
        with pytest.raises(SettingTypeError, match="'1/0' becomes a finite number"), edit_features(model, graph, wrong):
            pass
        check()


def test_nested_blocks_edit_what_the_outer_ones_have_left() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(9, 3).double()
    graph = graph_of(model, [x], ["1", "output"])
    with edit_features(model, graph, {"1/0": 2.0}):
        once = model(x)
        with edit_features(model, graph, {"1/0": scale(3.0), "1/1": 0}):
            both = model(x)
        torch.testing.assert_close(model(x), once)
    with edit_features(model, graph, {"1/0": 6.0, "1/1": 0}):
        torch.testing.assert_close(model(x), both)


def test_a_graph_of_the_edited_model() -> None:
    torch.manual_seed(1)
    model, x = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double(), torch.randn(40, 5).double()
    graph = graph_of(model, [x], ["input", "1", "output"])
    with edit_features(model, graph, {"1/1": MEAN}):
        edited = graph_of(model, [x], ["input", "1", "output"])
    assert graph.bases["1"].n_features == 3
    # Its third feature is gone, the others can be rotated in their plane.
    remaining = edited.bases["1"].importance
    assert len(remaining) == 2 or remaining[2] < 1e-20 * remaining[0]
    assert graph_of(model, [x], ["input", "1", "output"]).bases["1"].n_features == 3


def test_a_value_that_is_learned() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double(), torch.randn(9, 3).double()
    graph = graph_of(model, [x], ["1", "output"])
    value = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    with edit_features(model, graph, {"1/0": value}):
        model(x)[:, 0].sum().backward()
    slope = model[2].weight[0].detach() @ graph.bases["1"].from_features[0]
    assert float(value.grad) == pytest.approx(9 * float(slope))
    for factor, error in (("2", SettingTypeError), (float("inf"), SettingError), (None, SettingTypeError)):
        with pytest.raises(error, match="factor must be a finite number"):
            scale(factor)


def test_masks_and_errors_of_functions() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

        def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.head(self.embed(tokens))

    model, tokens = Words().double(), torch.randint(0, 9, (20, 5))
    there = torch.arange(5) < torch.randint(1, 6, (20, 1))
    batch = {"tokens": tokens, "attention_mask": there.long()}
    graph = graph_of(model, [batch], ["embed", "output"], mask="attention_mask")
    expected = model(tokens)
    for mask, call in (
        ("attention_mask", lambda: model(**batch)),
        ("attention_mask", lambda: model(tokens, there)),
        (there, lambda: model(tokens)),
    ):
        with edit_features(model, graph, {"embed/0": 5.0}, mask=mask):
            y = call()
        assert torch.equal(y[~there], expected[~there])
        assert (y[there] != expected[there]).any(-1).all()
    with edit_features(model, graph, {"embed/0": 5.0}, mask="attention_mask"):
        assert (model(tokens) != expected).any(-1).all()  # not given: all positions
    with (
        pytest.raises(LIBError, match=r"mask='mask' is no argument of Words.forward, which has 'tokens'"),
        edit_features(model, graph, {"embed/0": 5.0}, mask="mask"),
    ):
        model(tokens)
    with (
        pytest.raises(LIBError, match=r"\(20, 5\); got shape \(3,\)"),
        edit_features(model, graph, {"embed/0": lambda f: f.new_zeros(3)}),
    ):
        model(tokens)
    with edit_features(model, graph, {"embed/0": lambda f: f.mean(1, keepdim=True)}):
        model(tokens)


def test_taps_that_are_no_modules_calls() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(9, 3)
    graph = graph_of(model, [x], ["1", "output"])
    with (
        pytest.raises(LIBError, match="ran without calling 'output' as a module"),
        edit_features(model, graph, {"1/0": 0, "output/0": 0}),
    ):
        model.forward(x)
    other = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    with (
        pytest.raises(NodeLayerError, match="has width 4, but the model has 6"),
        edit_features(other, graph, {"1/0": 0}),
    ):
        other(x)
    with (
        pytest.raises(SettingError, match="are the same feature"),
        edit_features(model, graph, {"1/0": 0, ("1", 0): 1}),
    ):
        pass


class Early(nn.Module):
    """Uses one tensor of a node layer before the other is there, draws random numbers, and keeps things."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(2, 2)
        self.norm, self.drop, self.n_calls = nn.BatchNorm1d(3), nn.Dropout(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.n_calls += 1
        x = self.drop(self.norm(x))
        left = self.left(x).tanh()
        return self.head(left * self.right(x))


def test_tensors_that_are_used_before_all_of_their_node_layer_are_known() -> None:
    torch.manual_seed(0)
    model, x = Early().double(), torch.randn(20, 3).double()
    graph = graph_of(model, [x], ["input", "left+right", "output"])
    basis = graph.bases["left+right"]

    def expected(x: Tensor) -> Tensor:
        h = model.drop(model.norm(x))
        a = by_hand(torch.cat([model.left(h), model.right(h)], -1), basis, 1, lambda f: 2 * f)
        return model.head(a[:, :2].tanh() * a[:, 2:])

    results = []
    for run in (expected, model):
        model.norm.reset_running_stats()
        model.n_calls = 0
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        with edit_features(model, graph, {"left+right/1": scale(2.0)}) if run is model else nullcontext():
            y = run(leaf)
        grads = torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()])
        results.append([y, *grads, *(t.clone() for t in model.buffers()), torch.get_rng_state().double()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)
    assert model.n_calls == 1
    assert torch.equal(x, leaf)
    with pytest.raises(NodeLayerError, match="call the model itself"), edit_features(model, graph, {"left+right/1": 0}):
        model.left(x)


def test_several_node_layers_that_concatenate_tensors() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = Early(), Early(), nn.Linear(2, 2)
            self.up = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.up(self.first(x).tanh())))

    model, x = Twice().double().eval(), torch.randn(30, 3).double()
    layers = ["input", "first.left+first.right", "second.left+second.right", "output"]
    graph = graph_of(model, [x], layers)

    def half(module: nn.Module, x: Tensor, name: str, j: int) -> Tensor:
        h = module.norm(x)
        a = by_hand(torch.cat([module.left(h), module.right(h)], -1), graph.bases[name], j, torch.sin)
        return module.head(a[:, :2].tanh() * a[:, 2:])

    expected = model.head(half(model.second, model.up(half(model.first, x, layers[1], 0).tanh()), layers[2], 1))
    with edit_features(model, graph, {(layers[1], 0): torch.sin, (layers[2], 1): torch.sin}):
        torch.testing.assert_close(model(x), expected, rtol=TOLERANCE, atol=TOLERANCE)
    with (
        edit_features(model, graph, {(layers[1], 0): torch.sin}),
        edit_features(model, graph, {(layers[2], 1): torch.sin}),
        pytest.raises(LIBError, match="Edit all of them in one block"),
    ):
        model(x)
    with edit_features(model, graph, {(layers[1], 0): torch.sin}), edit_features(model, graph, {"output/0": 1.0}):
        model(x)


def test_subclasses_of_tensors_stay_as_they_are() -> None:
    class Image(torch.Tensor):
        pass

    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(9, 3)
    graph = graph_of(model, [x], ["input", "output"])
    for own in (x.clone().as_subclass(Image), nn.Parameter(x.clone(), requires_grad=False), nn.Parameter(x.clone())):
        with edit_features(model, graph, {"input/0": 5.0}):
            y = model(own)
        assert torch.equal(own.as_subclass(Tensor), x)
        with edit_features(model, graph, {"input/0": 5.0}):
            torch.testing.assert_close(y.as_subclass(Tensor), model(x))


def test_half_precision_and_autocast() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(40, 3)
    graph = graph_of(model, [x], ["1", "output"])
    seen: list[Tensor] = []
    model[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16), edit_features(model, graph, {"1/0": 1.0}):
        model(x)
    assert seen[-1].dtype == torch.bfloat16
    f = graph.bases["1"].encode(seen[-1].double())[:, 0]
    size = graph.bases["1"].to_features[:, 0].abs().sum()
    assert (f - 1).abs().max() < 2**-8 * size  # rounding of activations up to 1 to 8 bits


def test_compiled_modules_and_generation() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(9, 3)
    graph = graph_of(model, [x], ["1", "output"])
    compiled = torch.compile(model, backend="eager")
    plain = compiled(x)
    with edit_features(compiled, graph, {"1/0": 5.0}):
        y = compiled(x)
    with edit_features(model, graph, {"1/0": 5.0}):
        torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(compiled(x), plain)
    assert not torch.allclose(y, plain)
    lm, tokens = gpt2().eval(), torch.randint(1, 7, (2, 3))
    graph = graph_of(lm, [torch.randint(1, 7, (20, 5))], ["transformer.h.0", "lm_head:input"])
    n_calls = []
    with edit_features(lm, graph, {"lm_head:input/0": lambda f: n_calls.append(f.shape) or f}):
        lm.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert len(n_calls) == 3


def test_parts_without_gradients_and_tensors_that_modules_keep() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.frozen, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            with torch.no_grad():
                left = self.frozen(h).tanh()
            return self.head(h + left)

    model, x = Frozen().double(), torch.randn(12, 3).double()
    basis = graph_of(nn.Sequential(model.up), [x], ["input", "output"], final_basis="pca").bases["output"]
    graph = InteractionGraph({"h": basis}, {}, {"node_layers": [{"name": "h", "taps": ["frozen:input"]}]})
    h = by_hand(model.up(x), basis, 0, torch.sin)
    expected = torch.autograd.grad(model.head(h + model.frozen(h.detach()).tanh()).square().sum(), model.up.weight)
    with edit_features(model, graph, {"h/0": torch.sin}):
        found = torch.autograd.grad(model(x).square().sum(), model.up.weight)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=TOLERANCE)

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.randn(12, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.table

    tables = nn.Sequential(Table(), nn.Linear(3, 2).double())
    table = tables[0].table
    before, plain = table.clone(), tables(x)
    basis = graph_of(nn.Sequential(nn.Linear(3, 2)), [x.float()], ["input", "output"]).bases["input"]
    constant = InteractionGraph({"0": basis}, {}, {"node_layers": [{"name": "0", "taps": ["0"]}]})
    with edit_features(tables, constant, {("0", 0): 9.0}), torch.no_grad():
        assert not torch.equal(tables(x), plain)
    assert tables[0].table is table
    assert torch.equal(table, before)


def test_a_step_that_calls_several_modules() -> None:
    class Autoencoder(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = nn.Linear(3, 2), nn.Linear(2, 3)

        def training_step(self, batch: Tensor, _: int = 0) -> Tensor:
            self.y = self.decoder(torch.tanh(self.encoder(batch)))
            return (self.y - batch).square().mean()

        validation_step = training_step

    model, x = Autoencoder().double(), torch.randn(20, 3).double()
    graph = graph_of(model, [x], ["input", "encoder", "output"])
    assert len(graph.model_call["calls"]) == 2
    h = by_hand(x, graph.bases["input"], 0, lambda f: 3 * f)
    y = by_hand(model.decoder(torch.tanh(model.encoder(h))), graph.bases["output"], 1, torch.zeros_like)
    kept = x.clone()
    for _ in range(2):
        with edit_features(model, graph, {"input/0": scale(3.0), "output/1": MEAN}):
            loss = model.training_step(x)
        torch.testing.assert_close(model.y, y, rtol=TOLERANCE, atol=TOLERANCE)
        torch.testing.assert_close(loss, (y - x).square().mean())
        assert torch.equal(x, kept)


class Checkpointed(nn.Module):
    """Residual blocks that run again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head, self.use_reentrant = nn.Linear(3, 5), nn.Linear(5, 2), None
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + (block(x) if self.use_reentrant is None else self.again(block, x))
        return self.head(x)

    def again(self, block: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return y


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    model, x = Checkpointed().double(), torch.randn(20, 3).double()
    graph = graph_of(model, [x], ["embed", "blocks.1:input", "output"])
    inner = graph_of(model.blocks[1], [torch.randn(20, 5).double()], ["0", "1", "output"])
    names = {"0": "blocks.1.0", "1": "blocks.1.1"}  # inside of what runs again, and no cut of the whole model
    inside = InteractionGraph(
        {names[name]: basis for name, basis in inner.bases.items() if name in names}, {},
        {"node_layers": [place | {"name": f"blocks.1.{place['name']}", "taps": [f"blocks.1.{place['name']}"]}
                         for place in inner.info["node_layers"] if place["name"] in names]},
    )  # fmt: skip
    grads = []
    for model.use_reentrant in (None, use_reentrant):
        model.zero_grad()
        with (
            edit_features(model, graph, {"blocks.1:input/0": 1.0, "embed/1": scale(2.0)}),
            edit_features(model, inside, {"blocks.1.0/0": torch.sin, "blocks.1.1/1": scale(0.5)}),
        ):
            model(x).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(list(model.parameters()))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=TOLERANCE)


class Regression:
    """A LightningModule of either package, whose steps call a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.graph: InteractionGraph | None = None
        self.seen: list[Tensor] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, y = batch
        before = x.clone()
        if self.graph is None:
            loss = (self.net(x) - y).square().mean()
        else:
            with edit_features(self, self.graph, {"net.1/0": MEAN, "input/0": 1.0}):
                self.seen.append(self.net(x))
                loss = (self.seen[-1] - y).square().mean()
            assert torch.equal(x, before)
        return loss

    validation_step = training_step

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class LightningRegression(Regression, pl.LightningModule):
    pass


class PytorchLightningRegression(Regression, pytorch_lightning.LightningModule):
    pass


@pytest.mark.parametrize(
    ("kind", "package"), [(LightningRegression, pl), (PytorchLightningRegression, pytorch_lightning)]
)
def test_a_lightning_module_in_training(kind: Any, package: Any, tmp_path: Any) -> None:
    module = kind()
    data = DataLoader([(x, x[:2] ** 2) for x in torch.randn(32, 3)], batch_size=8)
    batch = next(iter(data))
    module.graph = graph_of(module, [batch], ["input", "net.1", "output"])
    weight = module.net[0].weight.detach().clone()
    trainer = package.Trainer(
        max_epochs=2, default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[LIBCallback(node_layers=["net.0:input", "net.1", "output"], at_steps=[2], num_samples=8)],
    )  # fmt: skip
    trainer.fit(module, data, data)
    assert len(module.seen) >= 8
    assert not torch.equal(module.net[0].weight, weight)
    assert n_hooks(module) == [0] * len(n_hooks(module))


def test_a_whole_training_in_a_block(tmp_path: Any) -> None:
    """Optimizer, validation and snapshots all see the edited model."""
    torch.manual_seed(0)
    module, x = LightningRegression(), torch.randn(32, 3)
    graph = graph_of(module, [[x, x[:, :2]]], ["input", "net.1", "output"])
    callback = LIBCallback(node_layers=["input", "net.1", "output"], at_steps=[0, 4], num_samples=32)
    trainer = pl.Trainer(
        max_epochs=2, default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    data = DataLoader([(row, row[:2] ** 2) for row in x], batch_size=8)
    names = {("net.1", j): MEAN for j in range(1, graph.bases["net.1"].n_features)}
    with edit_features(module, graph, names):
        trainer.fit(module, data, data)
    files = sorted(tmp_path.rglob("step-*.safetensors"))
    assert len(files) == 3
    assert InteractionGraph.load(files[0]).bases["net.1"].n_features == 1
    assert n_hooks(module) == [0] * len(n_hooks(module))
