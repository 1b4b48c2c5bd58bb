"""What is no cut of a model that nobody here wrote is refused, in words that name the node layers."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lib_lightning import NodeLayer, compute_interaction_graph
from lib_lightning.core.errors import NodeLayerError
from tests.wild.models import bert, gpt2, resnet, tokens, vit


@pytest.mark.parametrize("part", ["mlp", "attn", "ln_2", "ln_1"])
@pytest.mark.parametrize("first", ["transformer.h.0", None])
def test_part_of_a_gpt2_block_alone(part: str, first: str | None) -> None:
    layer = f"transformer.h.1.{part}"
    layers = [name for name in (first, layer, "transformer.ln_f", "output") if name]
    source = f"'{first}'" if first else "the model's input"
    message = f"Node layer '{layer}' does not cut the computation: 'transformer.ln_f' also depends on {source} past it"
    with pytest.raises(NodeLayerError, match=re.escape(message)):
        compute_interaction_graph(gpt2(), [{"input_ids": tokens(10, 3)}], layers)


def test_part_of_a_gpt2_block_before_the_output_alone() -> None:
    with pytest.raises(NodeLayerError, match=r"'transformer.h.1.mlp' does not cut .* 'output' also depends on"):
        compute_interaction_graph(gpt2(), [{"input_ids": tokens(10, 3)}], ["transformer.h.1.mlp", "output"])


def test_last_token_before_attention() -> None:
    last = NodeLayer(["transformer.h.0"], positions=-1)
    with pytest.raises(NodeLayerError, match=r"'transformer.h.1' also depends on it at positions that are left out"):
        compute_interaction_graph(gpt2(), [{"input_ids": tokens(10, 3)}], [last, "transformer.h.1"])


@pytest.mark.parametrize(
    ("make", "batch", "layer", "after"),
    [
        (bert, "input_ids", "bert.encoder.layer.1.intermediate", "bert.encoder.layer.1"),
        (vit, "pixel_values", "vit.layers.1.attention", "vit.layers.1"),
        (resnet, "pixel_values", "resnet.encoder.stages.1.layers.0.layer.0", "resnet.encoder.stages.1"),
    ],
)
def test_beside_a_skip_connection(make: Callable[[], nn.Module], batch: str, layer: str, after: str) -> None:
    values = tokens(10, 3) if batch == "input_ids" else torch.randn(10, 2, 6, 6).double()
    with pytest.raises(NodeLayerError, match=rf"'{layer}' does not cut .*'{after}' also depends on the model's input"):
        compute_interaction_graph(make(), [{batch: values}], [layer, after])
