"""Layouts of activations: positions, feature axes, padding, repeated calls, containers of inputs and outputs."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from lib_lightning import InteractionGraph, NodeLayer, compute_interaction_graph
from tests.integration.models import bert, gpt2, tokens
from tests.integration.oracle import (
    RTOL,
    assert_exact,
    assert_same_graph,
    check_against_finite_differences,
    dense,
    randomize,
)


def test_last_token() -> None:
    last = [NodeLayer([tap], tap, positions=-1) for tap in ("transformer.h.1", "output")]
    check_against_finite_differences(gpt2(), {"input_ids": tokens(12, 3)}, ["transformer.h.0.ln_2:input", *last])


def test_some_pixels_of_images() -> None:
    # A dilated filter uses only the corners of the image.
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Tanh(), nn.Conv2d(4, 3, 2, dilation=3), nn.Flatten(), nn.Linear(3, 2))
    corners = NodeLayer(["1"], "corners", positions=[0, 3, -4, 15])
    check_against_finite_differences(
        randomize(model), torch.randn(15, 2, 4, 4).double(), ["input", "0", corners, "2", "output"]
    )


class ChannelsFirst(nn.Module):
    """Sequences with the features before the positions, then images with the features last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear, self.head = nn.Conv1d(2, 4, 2), nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x))
        x = torch.tanh(self.linear(x.transpose(1, 2).unflatten(1, (2, 2))))
        return self.head(x.mean((1, 2)))


def test_feature_dim() -> None:
    sequence = [NodeLayer([tap], feature_dim=1) for tap in ("input", "conv")]
    image = [NodeLayer(["linear:input"], feature_dim=-1), NodeLayer(["linear"], feature_dim=3)]
    check_against_finite_differences(
        randomize(ChannelsFirst()), torch.randn(15, 2, 5).double(), [*sequence, *image, "head:input", "output"]
    )


class Branches(nn.Module):
    """Two parallel paths of different widths, with a gate from one to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.mix = nn.Linear(3, 4), nn.Linear(3, 2), nn.Linear(4, 2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        left = torch.tanh(self.left(x))
        right = torch.sigmoid(self.mix(left)) * self.right(x)
        return self.head(torch.cat([left, right], -1))


def test_several_parallel_taps() -> None:
    model, x = randomize(Branches()), torch.randn(20, 3).double()
    check_against_finite_differences(
        model, x, ["input", NodeLayer(["left", "right"], "branches"), "head:input", "output"]
    )
    check_against_finite_differences(
        model, x, ["input", NodeLayer(["right", "mix:input"], "late", positions=0), "output"]
    )


class Recurrent(nn.Module):
    """One block that is called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)
        self.block = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(3):
            x = x + self.block(self.norm(x))
        return self.head(self.norm(x))


def test_several_calls_of_one_module() -> None:
    model, x = randomize(Recurrent()), torch.randn(15, 3).double()
    check_against_finite_differences(model, x, ["embed", "norm#1:input", "norm#2:input", "norm#3", "output"])
    both = NodeLayer(["block#1", "norm#1:input"], "update and stream")
    check_against_finite_differences(model, x, ["norm#0:input", both, "norm#3:input"])


@pytest.mark.parametrize("make", [gpt2, bert])
def test_padding_has_no_effect(make: Callable[[], nn.Module]) -> None:
    # Padded sequences of length two to four, compared with separate batches without padding.
    model, lengths = make(), [2, 3, 4]
    words = {length: tokens(8, length) for length in lengths}
    ids = torch.cat([nn.functional.pad(words[length], (0, 4 - length)) for length in lengths])
    mask = (torch.arange(4) < torch.tensor(lengths).repeat_interleave(8)[:, None]).long()
    order = torch.randperm(len(ids))
    padded = {"input_ids": ids[order], "attention_mask": mask[order]}
    if make is gpt2:
        layers = ["transformer.h.0", "transformer.h.1.ln_2:input", "transformer.ln_f", "output"]
    else:
        layers = ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1.attention", "output"]
    plain = [{"input_ids": x, "attention_mask": torch.ones_like(x)} for x in words.values()]
    expected = compute_interaction_graph(model, plain, layers, rtol=RTOL)
    graph = compute_interaction_graph(model, [padded], layers, mask="attention_mask", rtol=RTOL)
    assert_same_graph(graph, expected, tolerance=1e-6)  # features down to 1e-8 of the largest variance
    assert_exact(graph, *dense(model, padded, layers), masks=[padded["attention_mask"] > 0] * len(layers))
    unmasked = compute_interaction_graph(model, [padded], layers, rtol=RTOL)
    assert (unmasked.bases[layers[0]].mean - graph.bases[layers[0]].mean).abs().max() > 1e-3


def test_padding_on_the_left() -> None:
    model, short, long = gpt2(), tokens(10, 2), tokens(10, 4)
    ids = torch.cat([nn.functional.pad(short, (2, 0)), long])
    mask = torch.cat([torch.tensor([[0, 0, 1, 1]]).repeat(10, 1), torch.ones(10, 4).long()])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    padded = {"input_ids": ids, "attention_mask": mask, "position_ids": places}
    layers = ["transformer.h.0", "transformer.h.1.ln_2:input", "output"]
    plain = [{"input_ids": x} for x in (short, long)]
    graph = compute_interaction_graph(model, [padded], layers, mask="attention_mask", rtol=RTOL)
    assert_same_graph(graph, compute_interaction_graph(model, plain, layers, rtol=RTOL), tolerance=1e-6)


class Pair(NamedTuple):
    hidden: Tensor
    label: str


@dataclasses.dataclass
class Record:
    hidden: Tensor
    label: str


class Attributes(OrderedDict[str, Any]):
    def __getattr__(self, name: str) -> Any:
        return self[name]


WRAP: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda h: (h, "label"), lambda out: out[0]),
    "list after a number": (lambda h: [h.mean(), h], lambda out: out[1]),
    "dict": (lambda h: {"label": "label", "hidden": h}, lambda out: out["hidden"]),
    "named tuple": (lambda h: Pair(h, "label"), lambda out: out.hidden),
    "dataclass": (lambda h: Record(h, "label"), lambda out: out.hidden),
    "dict with attributes": (lambda h: Attributes(hidden=h, label="label"), lambda out: out.hidden),
    "output class": (lambda h: BaseModelOutput(last_hidden_state=h), lambda out: out.last_hidden_state),
    "output class as tuple": (lambda h: BaseModelOutput(last_hidden_state=h), lambda out: out[0]),
    "nested": (lambda h: ({"a": ("label", {"b": h})}, None), lambda out: out[0]["a"][1]["b"]),
}


class Wrapping(nn.Module):
    def __init__(self, kind: str, view: bool) -> None:
        super().__init__()
        self.linear, self.kind, self.view = nn.Linear(3, 8), kind, view

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.linear(x))
        return WRAP[self.kind][0](h.chunk(2, -1)[0] if self.view else h[:, :4].clone())


class Unwrapping(nn.Module):
    def __init__(self, kind: str, view: bool) -> None:
        super().__init__()
        self.inner, self.head, self.kind = Wrapping(kind, view), nn.Linear(4, 2), kind

    def forward(self, x: Tensor) -> Any:
        return {"logits": torch.tanh(self.head(WRAP[self.kind][1](self.inner(x)))), "extra": (x, 1)}


@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("kind", WRAP)
def test_outputs_in_containers(kind: str, view: bool) -> None:
    model, x = randomize(Unwrapping(kind, view)), torch.randn(15, 3).double()
    plain = nn.Sequential(model.inner.linear, nn.Tanh(), Half(), model.head, nn.Tanh())
    expected = compute_interaction_graph(plain, [x], ["input", "2", "output"], rtol=RTOL)
    assert_same_graph(compute_interaction_graph(model, [x], ["input", "inner", "output"], rtol=RTOL), expected)


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :4].clone()


class Picky(nn.Module):
    """A model with nested inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(3, 4), nn.Embedding(5, 4), nn.Linear(4, 2)

    def forward(self, features: tuple[dict[str, Any], ...], scale: Tensor, names: list[str]) -> Tensor:
        first, second = features
        x = torch.tanh(self.left(first["x"]) + self.right(second["words"][0])) * scale
        return self.head(x * len(names))


def nested_batch(n: int) -> dict[str, Any]:
    features = ({"x": torch.randn(n, 3).double()}, {"words": [torch.randint(0, 5, (n,))], "unused": None})
    return {"features": features, "scale": torch.tensor(0.7).double(), "names": ["a", "b"]}


def test_nested_batches() -> None:
    model, layers = randomize(Picky()), [NodeLayer(["left", "right"], "both"), "head:input", "output"]
    batch = nested_batch(20)
    graph = check_against_finite_differences(model, batch, layers)

    def in_chunks_of(size: int) -> InteractionGraph:
        (a, b), rest = batch["features"], {key: batch[key] for key in ("scale", "names")}
        cut = [slice(i, i + size) for i in range(0, 20, size)]
        batches = [{"features": ({"x": a["x"][i]}, {"words": [b["words"][0][i]], "unused": None}), **rest} for i in cut]
        return compute_interaction_graph(model, batches, layers, rtol=RTOL)

    assert_same_graph(in_chunks_of(7), graph)
    # With a memory limit of 16 KiB the batch is split.
    assert_same_graph(compute_interaction_graph(model, [batch], layers, rtol=RTOL, memory_limit=2.0**-16), graph)


def test_input_fn_for_batches_of_any_form() -> None:
    model, layers = randomize(Picky()), [NodeLayer(["left", "right"], "both"), "output"]
    batch = nested_batch(20)
    expected = compute_interaction_graph(model, [batch], layers)
    pair = (batch["features"], {"meta": (batch["scale"], batch["names"])})
    positional = compute_interaction_graph(model, [pair], layers, input_fn=lambda b: (b[0], *b[1]["meta"]))
    assert_same_graph(positional, expected)
