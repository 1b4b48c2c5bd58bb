"""A table of tiny models, each also written as a chain of plain functions.

`tests/reference.py` uses the chain, as the implementation of the paper's authors does; the library uses only the module
and the names of its node layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib_lightning import NodeLayer


@dataclass(frozen=True, eq=False)
class Case:
    """A model, its data, its node layers, and the functions between them.

    Attributes:
        name: Name of the case.
        model: The model, in float64.
        data: All samples in one batch.
        node_layers: Argument of `compute_interaction_graph`.
        first: Maps a batch to ``a^0``, shape ``(n, S, d)``.
        sections: Functions from ``a^l`` to ``a^{l+1}``, in batches.
        affine: Sections whose Jacobian is the same everywhere.
        input_fn: Argument of `compute_interaction_graph`.
        mask: Argument of `compute_interaction_graph`.
        masks: True at valid positions of each node layer, ``(n, S)``; empty if all are valid.
    """

    name: str
    model: nn.Module
    data: Any
    node_layers: Sequence[str | NodeLayer]
    first: Callable[[Any], Tensor]
    sections: Sequence[Callable[[Tensor], Tensor]]
    affine: frozenset[int] = frozenset()
    input_fn: Callable[[Any], Any] | None = None
    mask: str | None = None
    masks: Sequence[Tensor] = ()

    def valid(self, a: Tensor, l: int) -> Tensor:
        """True at valid positions of activations ``a`` of node layer ``l``, ``(n, S)``."""
        return self.masks[l] if self.masks else torch.ones(a.shape[:2], dtype=torch.bool)

    def batches(self, *sizes: int) -> list[Any]:
        """The data in batches whose sizes cycle through some sizes."""
        tensors = self.data if isinstance(self.data, (tuple, dict)) else (self.data,)
        values = list(tensors.values()) if isinstance(tensors, dict) else list(tensors)
        parts = list(zip(*(split_cyclically(v, sizes) for v in values), strict=True))
        if isinstance(self.data, dict):
            return [dict(zip(self.data, part, strict=True)) for part in parts]
        return parts if isinstance(self.data, tuple) else [part[0] for part in parts]


def split_cyclically(tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Split a tensor into parts whose sizes cycle through some sizes."""
    parts, start = [], 0
    for size in itertools.cycle(sizes):
        if start >= len(tensor):
            break
        parts.append(tensor[start : start + size])
        start += size
    return parts


N = 30


def mlp(name: str, act: type[nn.Module]) -> Case:
    model = nn.Sequential(nn.Linear(5, 7), act(), nn.Linear(7, 6), act(), nn.Linear(6, 3)).double()
    return Case(
        name,
        model,
        (torch.randn(N, 5).double(), torch.zeros(N)),
        ["input", "2:input", "4:input", "output"],
        lambda batch: batch[0][:, None],
        [lambda a: model[1](model[0](a)), lambda a: model[3](model[2](a)), model[4]],
        affine=frozenset({2}),
    )


def few_samples() -> Case:
    # Fewer samples than features: the covariance has a null space, which no map may read.
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    return Case(
        "few_samples",
        model,
        torch.randn(9, 20).double(),
        ["input", "1", "output"],
        lambda x: x[:, None],
        [lambda a: model[1](model[0](a)), model[2]],
        affine=frozenset({1}),
    )


def linear_chain() -> Case:
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 3)).double()
    return Case(
        "linear_chain", model, torch.randn(N, 5).double(), ["0:input", "0", "1", "2"], lambda x: x[:, None],
        list(model), affine=frozenset({0, 1, 2}),
    )  # fmt: skip


class Mixer(nn.Module):
    """Mixes positions, then features."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.features, self.head = nn.Linear(4, 3), nn.Linear(5, 6), nn.Linear(6, 2)

    def mix_tokens(self, x: Tensor) -> Tensor:
        return torch.tanh(self.tokens(x.transpose(1, 2)).transpose(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.features(self.mix_tokens(x))))


def positions() -> Case:
    model = Mixer().double()
    return Case(
        "positions",
        model,
        torch.randn(N, 4, 5).double(),
        ["input", "features:input", "head:input", "output"],
        lambda x: x,
        [model.mix_tokens, lambda a: torch.relu(model.features(a)), model.head],
        affine=frozenset({2}),
    )


class ResidualBlock(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class ResidualMLP(nn.Module):
    """Node layers are at the inputs of the norms, where the residual connection has the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.blocks = nn.ModuleList(ResidualBlock(5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def residual() -> Case:
    model = ResidualMLP().double()
    return Case(
        "residual",
        model,
        torch.randn(N, 4).double(),
        ["blocks.0.norm:input", "blocks.1.norm:input", "head:input", "output"],
        lambda x: model.embed(x)[:, None],
        [*model.blocks, model.head],
        affine=frozenset({2}),
    )


class Transformer(nn.Module):
    """One block with layer norms and causal attention."""

    def __init__(self, d: int = 6, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.qkv, self.out = nn.Embedding(7, d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.unembed = nn.Linear(d, 7)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        future = torch.ones(scores.shape[-2:]).triu(1).bool()
        pattern = scores.masked_fill(future, -torch.inf).softmax(-1)
        return x + self.out((pattern @ v).transpose(1, 2).flatten(2))

    def feed(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm2(x))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembed(self.norm3(self.feed(self.attend(self.embed(tokens)))))


def transformer() -> Case:
    model = Transformer().double()
    return Case(
        "transformer",
        model,
        torch.randint(0, 7, (N, 4)),
        ["embed", "norm2:input", "norm3:input", "output"],
        model.embed,
        [model.attend, model.feed, lambda a: model.unembed(model.norm3(a))],
    )


def last_token() -> Case:
    model = Transformer().double()
    last = [NodeLayer(["norm2:input"], "mid", positions=-1), NodeLayer(["norm3:input"], "post", positions=[-1])]
    return Case(
        "last_token",
        model,
        torch.randint(0, 7, (N, 4)),
        ["embed", *last, NodeLayer(["output"], "logits", positions=-1)],
        model.embed,
        [lambda a: model.attend(a)[:, -1:], model.feed, lambda a: model.unembed(model.norm3(a))],
    )


def conv() -> Case:
    # An in-place ReLU overwrites a tapped tensor, channels are features, and flattening returns a view.
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace=True), nn.AvgPool2d(2), nn.Conv2d(3, 5, 2),
        nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(5, 3),
    ).double()  # fmt: skip
    with torch.no_grad():  # every channel is active on most images
        for bias in (model[0].bias, model[3].bias):
            bias += 0.5

    def image(a: Tensor, side: int) -> Tensor:
        return a.transpose(1, 2).unflatten(-1, (side, side))

    def rows(x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)

    return Case(
        "conv",
        model,
        (torch.randn(N, 2, 4, 4).double(), torch.zeros(N)),
        ["input", "0", "3:input", "4", "output"],
        lambda batch: rows(batch[0]),
        [
            lambda a: rows(model[0](image(a, 4))),
            lambda a: rows(model[2](torch.relu(image(a, 4)))),
            lambda a: rows(torch.relu(model[3](image(a, 2)))),
            lambda a: model[6](a.transpose(1, 2).flatten(1))[:, None],
        ],
        affine=frozenset({0, 3}),
    )


class TupleModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        h = torch.tanh(self.linear(x))
        return h, {"norm": h.norm()}


class ReturnsTuple(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = TupleModule(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h, _ = self.body(x)
        logits = torch.sigmoid(self.head(h))
        return {"loss": logits.mean(), "logits": logits}


def returns_tuple() -> Case:
    model = ReturnsTuple().double()
    return Case(
        "returns_tuple", model, torch.randn(N, 4).double(), ["body:input", "body", "output"], lambda x: x[:, None],
        [lambda a: torch.tanh(model.body.linear(a)), lambda a: torch.sigmoid(model.head(a))],
    )  # fmt: skip


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 3), nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(torch.tanh(self.left(left)) * torch.tanh(self.right(right)))


def dict_input() -> Case:
    # A node layer of two parallel taps; the batch is a dict of keyword arguments.
    model = TwoInputs().double()

    def product(a: Tensor) -> Tensor:
        return torch.tanh(a[..., :3]) * torch.tanh(a[..., 3:])

    return Case(
        "dict_input",
        model,
        {"left": torch.randn(N, 4).double(), "right": torch.randn(N, 2).double()},
        [NodeLayer(["left", "right"], "branches"), "head:input", "output"],
        lambda batch: torch.cat([model.left(batch["left"]), model.right(batch["right"])], dim=-1)[:, None],
        [product, model.head],
        affine=frozenset({1}),
    )


class Tied(nn.Module):
    """An autoencoder with tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.unembed = nn.Embedding(6, 4), nn.Linear(4, 6)
        self.unembed.weight = self.embed.weight
        self.middle = nn.Linear(4, 4)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.unembed(F.silu(self.middle(self.embed(batch["tokens"]))))


def tied() -> Case:
    model = Tied().double()
    return Case(
        "tied",
        model,
        {"tokens": torch.randint(0, 6, (N, 3))},
        ["embed", "unembed:input", "output"],
        lambda batch: model.embed(batch["tokens"]),
        [lambda a: F.silu(model.middle(a)), model.unembed],
        affine=frozenset({1}),
        input_fn=lambda batch: (batch,),
    )


class Repeated(nn.Module):
    """One block that is run three times."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Linear(4, 5), ResidualBlock(5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for _ in range(3):
            x = self.block(x)
        return self.head(x)


def repeated() -> Case:
    model = Repeated().double()
    return Case(
        "repeated",
        model,
        torch.randn(N, 4).double(),
        ["embed", "block#0", "block#2:input", "head:input", "output"],
        lambda x: model.embed(x)[:, None],
        [model.block, model.block, model.block, model.head],
        affine=frozenset({3}),
    )


def norm_and_residual() -> Case:
    # The output of a norm and its input in one node layer: one tap is computed from the other, in either order.
    model = ResidualMLP().double()
    first, second = model.blocks
    both = NodeLayer(["blocks.0.norm", "blocks.0.norm:input"], "both")
    again = NodeLayer(["blocks.1.norm:input", "blocks.1.norm"], "again")

    def finish(block: ResidualBlock, normed: Tensor, x: Tensor) -> Tensor:
        return x + block.down(F.gelu(block.up(normed)))

    def from_both(a: Tensor) -> Tensor:
        x = finish(first, *a.split(5, -1))
        return torch.cat([x, second.norm(x)], -1)

    def from_again(a: Tensor) -> Tensor:
        x, normed = a.split(5, -1)
        return finish(second, normed, x)

    def embed(x: Tensor) -> Tensor:
        x = model.embed(x)[:, None]
        return torch.cat([first.norm(x), x], -1)

    return Case(
        "norm_and_residual", model, torch.randn(N, 4).double(), [both, again, "head:input", "output"], embed,
        [from_both, from_again, model.head], affine=frozenset({2}),
    )  # fmt: skip


class Padded(Transformer):
    """Sequences of different lengths, padded at the end."""

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return super().forward(tokens)


def padded() -> Case:
    model = Padded().double()
    lengths = torch.randint(1, 5, (N, 1))
    mask = torch.arange(4) < lengths
    return Case(
        "padded",
        model,
        {"tokens": torch.randint(0, 7, (N, 4)), "lengths": mask},
        ["embed", "norm2:input", "norm3:input", "output"],
        lambda batch: model.embed(batch["tokens"]),
        [model.attend, model.feed, lambda a: model.unembed(model.norm3(a))],
        mask="lengths",
        masks=[mask] * 4,
    )


class PlainBlock(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x)))


def plain_residual() -> Case:
    # Residual blocks without norms: every section has a closed form, at the last of several positions.
    model = nn.Sequential(PlainBlock(4), PlainBlock(4), nn.Linear(4, 3, bias=False)).double()
    layers = [NodeLayer([tap], positions=-1) for tap in ("input", "0", "1", "output")]
    return Case(
        "plain_residual", model, torch.randn(N, 3, 4).double(), layers, lambda x: x[:, -1:], list(model),
        affine=frozenset({2}),
    )  # fmt: skip


class BeforeActivations(nn.Module):
    """Node layers before the activation functions, the last of which is composed of several operations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(5, 6), nn.Linear(6, 4, bias=False), nn.Linear(4, 3)

    def gelu(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.gelu(self.second(F.elu(self.first(x)))))


def before_activations() -> Case:
    model = BeforeActivations().double()
    return Case(
        "before_activations",
        model,
        torch.randn(N, 2, 5).double(),
        ["first", "second", "output"],
        model.first,
        [lambda a: model.second(F.elu(a)), lambda a: model.third(model.gelu(a))],
    )


def all_cases() -> list[Case]:
    """All cases, always with the same random numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [
            mlp("mlp_relu", nn.ReLU), mlp("mlp_tanh", nn.Tanh), mlp("mlp_gelu", nn.GELU), few_samples(), linear_chain(),
            positions(), residual(), transformer(), last_token(), conv(), returns_tuple(), dict_input(), tied(),
            repeated(), norm_and_residual(), padded(), plain_residual(), before_activations(),
        ]  # fmt: skip
