"""Invalid node layers of models of other libraries raise errors that name the node layers."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import NodeLayer, compute_interaction_graph
from lib_lightning.errors import NodeLayerError
from tests.integration.models import bert, gpt2, resnet, tokens, vit
from tests.integration.oracle import RTOL, assert_same_graph, check_against_finite_differences, randomize


@pytest.mark.parametrize("part", ["mlp", "attn", "ln_2", "ln_1"])
@pytest.mark.parametrize("first", ["transformer.h.0", None])
def test_one_branch_of_a_gpt2_block_does_not_cut(part: str, first: str | None) -> None:
    layer = f"transformer.h.1.{part}"
    layers = [name for name in (first, layer, "transformer.ln_f", "output") if name]
    source = f"'{first}'" if first else "the model's input"
    message = f"Node layer '{layer}' does not cut the computation: 'transformer.ln_f' also depends on {source} past it"
    with pytest.raises(NodeLayerError, match=re.escape(message)):
        compute_interaction_graph(gpt2(), [{"input_ids": tokens(10, 3)}], layers)


def test_one_branch_of_a_gpt2_block_before_the_output_does_not_cut() -> None:
    with pytest.raises(NodeLayerError, match=r"'transformer.h.1.mlp' does not cut .* 'output' also depends on"):
        compute_interaction_graph(gpt2(), [{"input_ids": tokens(10, 3)}], ["transformer.h.1.mlp", "output"])


def test_last_token_before_attention_does_not_cut() -> None:
    last = NodeLayer(["transformer.h.0"], positions=-1)
    with pytest.raises(NodeLayerError, match=r"'transformer.h.1' also depends on it at positions that are excluded"):
        compute_interaction_graph(gpt2(), [{"input_ids": tokens(10, 3)}], [last, "transformer.h.1"])


@pytest.mark.parametrize(
    ("make", "batch", "layer", "after"),
    [
        (bert, "input_ids", "bert.encoder.layer.1.intermediate", "bert.encoder.layer.1"),
        (vit, "pixel_values", "vit.layers.1.attention", "vit.layers.1"),
        (resnet, "pixel_values", "resnet.encoder.stages.1.layers.0.layer.0", "resnet.encoder.stages.1"),
    ],
)
def test_node_layers_beside_a_skip_connection_do_not_cut(
    make: Callable[[], nn.Module], batch: str, layer: str, after: str
) -> None:
    values = tokens(10, 3) if batch == "input_ids" else torch.randn(10, 2, 6, 6).double()
    with pytest.raises(NodeLayerError, match=rf"'{layer}' does not cut .*'{after}' also depends on the model's input"):
        compute_interaction_graph(make(), [{batch: values}], [layer, after])


class Inside(nn.Module):
    """A model that differentiates a part of itself, or maps it over samples."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.head = kind, nn.Linear(3, 4), nn.Linear(4, 2)
        self.energy = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if self.kind == "torch.func.grad":
            return self.head(torch.func.vmap(torch.func.grad(lambda row: self.energy(row).sum()))(x))
        if self.kind == "torch.func.vmap":
            return self.head(torch.func.vmap(self.energy)(x))
        with torch.enable_grad():
            x = x if x.requires_grad else x.requires_grad_()
            (force,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        return self.head(force)


@pytest.mark.parametrize("kind", ["autograd.grad", "torch.func.grad", "torch.func.vmap"])
def test_derivatives_computed_by_the_model(kind: str) -> None:
    model, x = randomize(Inside(kind)), torch.randn(15, 3).double()
    check_against_finite_differences(model, x, ["input", "first", "head:input", "output"])
    with pytest.raises(NodeLayerError, match=r"inside code that the model itself differentiates or maps \("):
        compute_interaction_graph(model, [x], ["first", "energy.0", "output"])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript() -> None:
    model, x = randomize(Inside("autograd.grad")), torch.randn(15, 3).double()
    model = nn.Sequential(model.first, nn.Sequential(model.energy, nn.Tanh()), model.head)
    expected = check_against_finite_differences(model, x, ["input", "0", "1", "output"])
    model[1][0] = torch.jit.script(model[1][0])
    assert_same_graph(compute_interaction_graph(model, [x], ["input", "0", "1", "output"], rtol=RTOL), expected)
    with pytest.raises(NodeLayerError, match=r"'1.0' is a TorchScript module, which accepts no hooks\. Choose"):
        compute_interaction_graph(model, [x], ["input", "1.0", "output"])
    with pytest.raises(NodeLayerError, match="'output' is a TorchScript module"):
        compute_interaction_graph(torch.jit.script(model), [x], ["output", "0"])
    traced = torch.jit.trace(model, x)
    ends = ["input", "output"]
    expected = compute_interaction_graph(model, [x], ends)
    assert_same_graph(compute_interaction_graph(traced, [x], ends), expected)
