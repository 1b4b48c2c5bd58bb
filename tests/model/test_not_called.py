"""Node layers at modules that the model does not call: the error names ones near by that work."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib_lightning import compute_interaction_graph
from lib_lightning.errors import NodeLayerError


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)
        self.spare = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attn(x, x, x, need_weights=False)[0])


def encoder() -> nn.Module:
    block = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(block, 2, enable_nested_tensor=False), nn.Linear(4, 3))


class Listed(nn.Module):
    """Modules in containers, and a block whose parts are called one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(9)])
        self.named = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Identity()})
        self.whole = nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.blocks, *self.named.values(), *self.whole):
            x = torch.tanh(block(x))
        return x


class Tied(nn.Module):
    """A head that is only a place for weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Linear(4, 4), nn.Module()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inner(self.embed(x)), self.embed.weight)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.fc.weight, self.fc.bias))


@pytest.mark.parametrize(
    ("make", "layer", "said", "instead"),
    [
        (Attention, "attn.out_proj", "MultiheadAttention 'attn' uses its weights without calling it", "attn"),
        (Attention, "attn.out_proj:input", "MultiheadAttention 'attn' uses its weights", "attn:input"),
        (encoder, "0.layers.1.self_attn.out_proj", "'0.layers.1.self_attn' uses its weights without", "0.layers.1"),
        (Listed, "blocks", "never called itself, as any ModuleList. What is inside it runs: 'blocks.0'", "blocks.0"),
        (Listed, "named:input", "never called itself, as any ModuleDict. What is inside it runs: 'named.a'", "named.a"),
        (Listed, "whole", "it is never called itself. What is inside it runs: 'whole.0', 'whole.1'", "whole.1"),
        (Tied, "inner.fc", "Inner 'inner' may use its weights without calling it", "inner"),
        (Attention, "spare", "Choose modules that forward() calls: 'attn', 'head'", "head:input"),
        (Attention, "head#3", "Linear is called less often than that. The first call is 'head#0'", "head#0:input"),
    ],
)
def test_the_error_names_node_layers_that_work(
    make: Callable[[], nn.Module], layer: str, said: str, instead: str
) -> None:
    model, x = make(), torch.randn(20, 5, 4)
    with pytest.raises(NodeLayerError, match=re.escape(said)) as error:
        compute_interaction_graph(model, [x], [layer, "output"])
    assert f"'{layer}' did not run in the model's forward pass" in str(error.value)
    assert len(str(error.value)) < 300
    compute_interaction_graph(model, [x], [instead, "output"])
