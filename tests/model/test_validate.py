"""Validation of node layers: skip connections are found whatever the model's input is, and never passed in silence."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lib_lightning import NodeLayer, compute_interaction_graph, list_node_layers
from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.api import check_node_layers, graph_of
from lib_lightning.errors import NodeLayerError
from lib_lightning.model.batch import batch_size, tensors_in
from lib_lightning.model.batch_layout import BatchLayout
from lib_lightning.model.exchange import exchanges
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.node_layer import as_node_layers
from lib_lightning.model.validate import NOT_LOOKED, validate_node_layers

D = 4
VOCABULARY = 7


@dataclasses.dataclass
class Text:
    """A batch that is no tensor."""

    words: list[str]


class Skip(nn.Module):
    """``b(tanh(a(x)) + x)``, with ``x`` made from the model's input in many ways.

    Args:
        make: Makes ``x`` of shape ``(n, D)`` from this module and the input.
        skip: What is added to ``tanh(a(x))``, of the module and ``x``.
    """

    def __init__(
        self, make: Callable[[Skip, Any], Tensor], skip: Callable[[Skip, Tensor], Tensor | float] = lambda m, x: x
    ) -> None:
        super().__init__()
        self.make, self.skip = make, skip
        self.table = nn.Parameter(torch.randn(VOCABULARY, D))
        self.plain_table = torch.randn(VOCABULARY, D)
        self.register_buffer("fixed_table", torch.randn(VOCABULARY, D))
        self.embed, self.bag = nn.Embedding(VOCABULARY, D), nn.EmbeddingBag(VOCABULARY, D)
        self.a, self.b, self.scale = nn.Linear(D, D), nn.Linear(D, 2), nn.Parameter(torch.zeros(()))
        self.data: Any = None

    def forward(self, batch: Any) -> Tensor:
        x = self.make(self, batch)
        return self.b(torch.tanh(self.a(x)) + self.skip(self, x))


def one_hot(tokens: Tensor) -> Tensor:
    return F.one_hot(tokens, VOCABULARY).float()


def of_words(text: Text) -> Tensor:
    return torch.tensor([[float(ord(c)) / 100 for c in word] for word in text.words])


# How x is made from integers, one for each sample.
FROM_TOKENS: dict[str, Callable[[Skip, Any], Tensor]] = {
    "embedding": lambda m, t: m.embed(t),
    "index": lambda m, t: m.table[t],
    "index of a buffer": lambda m, t: m.fixed_table[t],
    "index of an attribute": lambda m, t: m.plain_table[t],
    "F.embedding": lambda m, t: F.embedding(t, m.table),
    "bag": lambda m, t: m.bag(t[:, None]),
    "one-hot product": lambda m, t: one_hot(t) @ m.table,
    "one-hot": lambda m, t: one_hot(t)[:, :D],
    "index_select": lambda m, t: torch.index_select(m.table, 0, t),
    "gather": lambda m, t: m.table.gather(0, t[:, None].expand(-1, D)),
    "conversion": lambda m, t: t.float()[:, None] * m.table[0],
    "division": lambda m, t: (t / 7)[:, None].expand(-1, D),
    "numpy": lambda m, t: torch.from_numpy(m.plain_table.numpy()[t.numpy()]),
    "list": lambda m, t: torch.tensor([[float(k), 1.0, k * k / 9, 2.0] for k in t.tolist()]),
    "factory and write": lambda m, t: torch.zeros(len(t), D).index_put((torch.arange(len(t)), t % D), torch.ones(())),
    "sine": lambda m, t: torch.stack([torch.sin(t * f) for f in (0.3, 0.7, 1.1, 1.9)], -1),
    "no_grad": lambda m, t: no_grad(lambda: m.embed(t)),
    "view": lambda m, t: m.embed(torch.stack([t, t], 1))[:, 0],
}  # fmt: skip
# How x is made from other inputs.
FROM_OTHERS: dict[str, tuple[Callable[[Skip, Any], Tensor], Callable[[int], Any]]] = {
    "float": (lambda m, x: x, lambda n: torch.randn(n, D)),
    "double": (lambda m, x: x.float(), lambda n: torch.randn(n, D).double()),
    "bool": (lambda m, x: x.float(), lambda n: (torch.arange(n * D) * 7 % 5 > 2).view(n, D)),
    "byte": (lambda m, x: x / 255, lambda n: (torch.arange(n * D) * 37 % 256).byte().view(n, D)),
    "column": (lambda m, x: x[..., 0], lambda n: torch.randn(n, D, 2)),
    "half": (lambda m, x: x.float(), lambda n: torch.randn(n, D).half()),
    "complex": (lambda m, x: x.real, lambda n: torch.randn(n, D, dtype=torch.complex64)),
}


def no_grad(run: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return run()


# Batches of the same samples in several forms.
FORMS: dict[str, Callable[[Any], list[Any]]] = {
    "one batch": lambda x: [x],
    "one sample each": lambda x: [x[i : i + 1] for i in range(len(x))],
    "equal rows first": lambda x: [torch.cat([x[:1]] * 4), x],
    "equal rows at the beginning": lambda x: [torch.cat([x[:1]] * 5 + [x])],
    "equal rows in each batch": lambda x: [torch.cat([x[i : i + 1]] * 3) for i in range(len(x))],
    "one batch of one sample": lambda x: [x[:1]],
}


def refused(model: nn.Module, batches: Sequence[Any], layers: Sequence[str] = ("a", "output")) -> bool:
    """Whether the node layers are refused; nothing that could not be looked at passes without a note."""
    instrumented = InstrumentedModel(model, as_node_layers(list(layers)))
    try:
        with model_session(instrumented):
            notes = validate_node_layers(instrumented, batches)
    except NodeLayerError as error:
        if re.search("'a' does not cut the computation: 'output' also depends on the model's input", str(error)):
            return True
        raise
    assert all("could not look" in note for note in notes)
    return bool(notes)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", FROM_TOKENS)
def test_a_skip_around_the_first_node_layer_is_refused_for_integers(make: str, form: str) -> None:
    batches = FORMS[form](torch.tensor([3, 1, 4, 6, 5]))
    assert refused(Skip(FROM_TOKENS[make]), batches)
    assert not refused(Skip(FROM_TOKENS[make], skip=lambda m, x: 0.0), batches) or form == "one batch of one sample"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", FROM_OTHERS)
def test_a_skip_around_the_first_node_layer_is_refused_for_other_inputs(make: str, form: str) -> None:
    convert, data = FROM_OTHERS[make]
    batches = FORMS[form](data(5))
    assert refused(Skip(convert), batches)
    assert not refused(Skip(convert, skip=lambda m, x: 0.0), batches)


SKIPS: dict[str, Callable[[Skip, Tensor], Tensor]] = {
    "itself": lambda m, x: x,
    "a part": lambda m, x: F.pad(x[:, :1], (0, D - 1)),
    "without gradient": lambda m, x: x.detach(),
    "comparison": lambda m, x: (x > 0.1).float(),
    "not yet": lambda m, x: m.scale * x,
    "maximum": lambda m, x: F.one_hot(x.argmax(-1), D).float(),
}


@settings(max_examples=60, deadline=None)
@given(
    make=st.sampled_from([*FROM_TOKENS, *(name for name in FROM_OTHERS if name != "complex")]),
    skip=st.sampled_from(sorted(SKIPS)),
    form=st.sampled_from([name for name in FORMS if name != "one batch of one sample"]),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_skip_of_any_input_is_refused(make: str, skip: str, form: str, seed: int) -> None:
    torch.manual_seed(seed)
    convert, data = FROM_OTHERS.get(make, (FROM_TOKENS.get(make), lambda n: (torch.arange(n) * 3 + seed) % VOCABULARY))
    assert convert is not None
    model, batch = Skip(convert, SKIPS[skip]), data(6)
    x = convert(model, batch)
    values = SKIPS[skip](model, x)
    # A comparison or maximum that is the same for all samples is no dependence on them that could be seen.
    if skip != "not yet" and bool((values == values[:1]).all()):
        return
    if skip in ("comparison", "maximum"):
        form = "one batch"
        differs = [i for i in range(1, 6) if not torch.equal(values[i], values[0])]
        batch = batch[torch.tensor([0, differs[0]])]
    assert refused(model, FORMS[form](batch))


def test_objects_and_data_of_the_module() -> None:
    texts = [Text(["abcd", "wxyz"]), Text(["efgh", "abcz"])]
    skip = Skip(lambda m, text: of_words(text))
    assert refused(skip, texts)
    assert not refused(Skip(lambda m, text: of_words(text), skip=lambda m, x: 0.0), texts)
    model = Skip(lambda m, i: m.data[i])
    model.data = torch.randn(9, D)
    assert refused(model, [torch.arange(4)])
    assert torch.equal(model.data, model.data.clone()), "and is still there"
    assert not model.data.requires_grad


def test_a_check_that_could_not_look_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model, tokens = Skip(lambda m, t: m.data), torch.tensor([2, 2, 2])
    model.data = torch.randn(3, D)
    with caplog.at_level(logging.WARNING):
        graph = compute_interaction_graph(model, [tokens, tokens], ["a", "output"], basis="pca", final_basis="neuron")
    (note,) = graph.info["notes"]
    assert "skip connections around the first node layer could not look" in note
    assert note in caplog.messages


class Lookup(nn.Module):
    """Rows of a parameter, and two residual blocks, without a module that makes the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(7, D))
        self.mlp, self.mlp_2 = (nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, D)) for _ in range(2))

    def forward(self, t: Tensor) -> Tensor:
        h = self.W[t]
        h = h + self.mlp(h)
        h = h + self.mlp_2(h)
        return h  # noqa: RET504


@pytest.mark.parametrize("form", FORMS)
def test_residual_blocks_of_a_lookup(form: str) -> None:
    """Their inputs are cuts, their outputs are not."""
    torch.manual_seed(0)
    model, batches = Lookup(), FORMS[form](torch.tensor([[3, 1], [4, 6], [5, 2], [0, 1], [3, 3]]))
    stream = ["mlp:input", "mlp_2:input", "output"]
    for layers, skipped, source in (
        (["mlp", "output"], "mlp", "the model's input"),
        (["mlp", "mlp_2:input", "output"], "mlp", "the model's input"),
        (["mlp:input", "mlp_2", "output"], "mlp_2", "'mlp:input'"),
        (["mlp:input", "mlp.0", "mlp_2:input"], "mlp.0", "'mlp:input'"),
    ):
        with pytest.raises(NodeLayerError, match=f"'{skipped}' does not cut .*also depends on {source} past it"):
            notes_on(model, batches, layers)
    assert set(notes_on(model, batches, stream)) <= {NOT_LOOKED}
    assert stream[1] in [name for cut in list_node_layers(model, batches[0]) for name in (cut.tap, *cut.aliases)]


def notes_on(model: nn.Module, batches: Sequence[Any], layers: Sequence[str]) -> list[str]:
    instrumented = InstrumentedModel(model, as_node_layers(list(layers)))
    with model_session(instrumented):
        return validate_node_layers(instrumented, batches)


class Noisy(nn.Module):
    """Draws random numbers, from a generator that nobody can seed or from torch's."""

    def __init__(self, seedable: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.seedable = nn.Linear(D, D), nn.Linear(D, 2), seedable

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(()) if self.seedable else torch.tensor(np.random.default_rng().standard_normal())
        return self.last(torch.tanh(self.first(x) + noise.to(x)))


def test_a_model_that_does_not_repeat_itself_is_noted() -> None:
    """Nothing can be compared then; paths with gradients are still found."""
    x = torch.randn(6, D)
    (note,) = notes_on(Noisy(), [x], ["first", "last:input", "output"])
    assert note == (
        "The check for paths without gradient around node layers could not look: two passes over the same batch give "
        "different activations."
    )
    assert notes_on(Noisy(seedable=True), [x], ["first", "last:input", "output"]) == []

    class Skipping(Noisy):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x[:, :2]

    with pytest.raises(NodeLayerError, match=r"'first' does not cut .* also depends on the model's input"):
        notes_on(Skipping(), [x], ["first", "output"])


def noise_of(origin: str, like: Tensor) -> Tensor:
    """Numbers that no seed reaches."""
    if origin == "generator":
        generator = torch.Generator()
        generator.seed()
        return torch.randn(like.shape, generator=generator)
    if origin == "clock":
        return torch.full(like.shape, time.perf_counter() % 1)
    if origin == "system":
        return torch.tensor(list(os.urandom(like.numel())), dtype=like.dtype).view(like.shape) / 255
    return torch.from_numpy(np.random.default_rng().normal(size=like.shape)).to(like)


@settings(max_examples=40, deadline=None)
@given(
    origin=st.sampled_from(["generator", "clock", "system", "numpy"]),
    size=st.sampled_from([0.0, 1e-12, 1e-5, 0.5]),
    skips=st.booleans(),
    seed=st.integers(0, 99),
)
def test_numbers_that_no_seed_reaches_are_no_input(origin: str, size: float, skips: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model = Skip(lambda m, x: x, lambda m, x: (x if skips else 0) + size * noise_of(origin, x))
    batch = torch.randn(12, D)
    if skips:
        with pytest.raises(NodeLayerError, match=r"'a' does not cut .* depends on the model's input past it"):
            check_node_layers(model, [batch], ["a", "output"])
    else:
        check_node_layers(model, [batch], ["a", "output"])
    proposed = {cut.tap for cut in list_node_layers(model, batch)}
    assert {"input", "b:input", "output"} <= proposed
    assert ("a" in proposed) == (not skips)


@pytest.mark.parametrize("skips", [True, False])
def test_the_check_is_repeated_when_there_are_samples_that_differ(skips: bool) -> None:
    """At a snapshot, of which the first batches had nothing to look at."""
    torch.manual_seed(0)
    model = Lookup()
    same, other = torch.full((4, 2), 3), torch.tensor([[3, 1], [4, 6], [5, 2], [0, 1]])
    instrumented = InstrumentedModel(model, as_node_layers(["mlp" if skips else "mlp:input", "output"]))
    with model_session(instrumented):
        instrumented.notes = validate_node_layers(instrumented, [same])
    assert instrumented.notes == [NOT_LOOKED]
    if skips:
        with pytest.raises(NodeLayerError, match="'mlp' does not cut"):
            graph_of(instrumented, [same, other], LIBConfig())
        return
    graph = graph_of(instrumented, [same, other], LIBConfig())
    assert NOT_LOOKED not in graph.info["notes"]
    assert instrumented.notes == []


class Column(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        t = x[..., 0]
        return t - self.block(t)


def test_a_view_of_the_models_input_is_a_proper_cut() -> None:
    model, x = Column().double(), torch.randn(20, 4, 2).double()
    before = x.clone()
    graph = compute_interaction_graph(model, [x], ["block:input", "output"])
    plain = Column().double()
    plain.load_state_dict(model.state_dict())
    plain.forward = lambda t: t - plain.block(t)  # type: ignore[method-assign]
    expected = compute_interaction_graph(plain, [x[..., 0].clone()], ["input", "output"])
    torch.testing.assert_close(graph.bases["block:input"].importance, expected.bases["input"].importance)
    assert torch.equal(x, before)


class Masked(nn.Module):
    """Two layers that both see a mask or the lengths of the samples."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.embed = kind, nn.Embedding(VOCABULARY, D)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(D, 2, 8, batch_first=True) for _ in range(2))
        self.head = nn.Linear(D, 2)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        if self.kind == "computed":
            padding = tokens == 0
        elif self.kind == "lengths":
            assert lengths is not None
            padding = torch.arange(tokens.shape[1]) >= lengths[:, None]
        else:
            assert mask is not None
            padding = mask == 0
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        return self.head(x)


@pytest.mark.parametrize("kind", ["computed", "lengths", "mask", "integer mask"])
def test_masks_and_lengths_are_constants_and_this_is_said(kind: str) -> None:
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [4, 3, 2, 0], [1, 1, 5, 6]])
    batch: dict[str, Tensor] = {"tokens": tokens}
    if kind == "lengths":
        batch["lengths"] = (tokens > 0).sum(1)
    elif kind != "computed":
        batch["mask"] = (tokens > 0) if kind == "mask" else (tokens > 0).long()
    instrumented = InstrumentedModel(Masked(kind), as_node_layers(["layers.0", "layers.1", "output"]))
    with model_session(instrumented):
        (note,) = validate_node_layers(instrumented, [batch])
    what = {"computed": "a mask that the model computes from its input", "lengths": "'lengths' of the batch"}
    assert note == (
        f"Node layers after 'layers.0' also depend on {what.get(kind, repr('mask') + ' of the batch')}, which is "
        "treated as a constant."
    )
    assert "layers.0" in [cut.tap for cut in list_node_layers(Masked(kind), batch)]
    # The tokens themselves are none.
    with pytest.raises(NodeLayerError, match=r"'layers.0.linear1' does not cut .* also depends on the model's input"):
        check_node_layers(Masked(kind), batch, ["layers.0.linear1", "output"])


class Norms(nn.Module):
    """Samples that influence each other."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (1 + x.std(0, unbiased=False))


@pytest.mark.parametrize("form", ["one batch", "one sample each", "equal rows first", "equal rows in each batch"])
def test_samples_that_influence_each_other_are_found_across_batches(form: str) -> None:
    model = nn.Sequential(nn.Linear(D, D), Norms(), nn.Linear(D, 2))
    with pytest.raises(NodeLayerError, match="Samples influence each other"):
        compute_interaction_graph(model, FORMS[form](torch.randn(5, D)), ["0", "output"])


@settings(max_examples=40, deadline=None)
@given(depth=st.integers(2, 9), data=st.data())
def test_every_bypass_between_node_layers_is_found(depth: int, data: st.DataObject) -> None:
    """A chain of layers with one extra path, without gradient, from any layer to any later one."""
    source = data.draw(st.integers(0, depth - 2))
    target = data.draw(st.integers(source + 1, depth - 1))

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(depth))

        def forward(self, x: Tensor) -> Tensor:
            states = [x]
            for i, layer in enumerate(self.layers):
                states.append(torch.tanh(layer(states[-1])))
                if i == target:
                    states[-1] = states[-1] + states[source].detach()
            return states[-1]

    model, x = Chain(), torch.randn(4, 3)
    layers = ["input", *(f"layers.{i}:input" for i in range(1, depth)), "output"]
    blamed = ["'input'", *(f"'layers.{i}:input'" for i in range(1, depth))][source]
    with pytest.raises(NodeLayerError, match=f"also depends on {blamed} past it, on a path without gradient"):
        check_node_layers(model, x, layers)
    without = [name for i, name in enumerate(layers) if not source < i <= target]
    check_node_layers(model, x, without)


def test_exchanged_samples_differ_and_are_few() -> None:
    x, labels = torch.randn(50, 3), torch.arange(50)
    for batch in ((x, labels), {"x": x, "y": labels}, x, Text(["a", "b"])):
        for found in itertools.islice(exchanges([batch], BatchLayout(), 3), 5):
            assert batch_size(found.batch) <= 3
            assert any(
                not torch.equal(a, b) for a, b in zip(tensors_in(found.batch), tensors_in(found.other), strict=True)
            )
    assert not list(exchanges([torch.ones(1, dtype=torch.long)], BatchLayout(), 3))
    assert list(exchanges([torch.ones(1)], BatchLayout(), 3)), "real numbers can always be changed"


def test_excluded_positions_are_a_bypass() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    with pytest.raises(NodeLayerError, match="positions that are excluded"):
        check_node_layers(model, torch.randn(4, 5, 3), [NodeLayer(["0"], positions=-1), "output"])
