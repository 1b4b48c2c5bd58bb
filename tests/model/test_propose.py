"""Discovery of cut points and proposals of node layers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.demos import Transformer as DemoTransformer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.nn import functional as F

from lib_lightning import compute_interaction_graph, list_node_layers
from lib_lightning.api import check_node_layers, propose_node_layers
from lib_lightning.errors import ActivationError, LIBError, NodeLayerError
from lib_lightning.model.discover import CutPoint
from lib_lightning.model.propose import propose
from tests.cases import Case, Repeated, ResidualBlock, ResidualMLP, Transformer, TwoInputs
from tests.tiny_training import Classifier

# Expected proposals of each case. The search does not know the case's own node layers.
PROPOSED = {
    "mlp_relu": ["input", "1", "3", "output"],
    "mlp_tanh": ["input", "1", "3", "output"],
    "mlp_gelu": ["input", "1", "3", "output"],
    "few_samples": ["input", "1", "output"],
    "linear_chain": ["input", "0", "1", "output"],
    "positions": ["input", "features:input", "head:input", "output"],
    "residual": ["input", "embed", "blocks.0", "blocks.1", "output"],
    "transformer": ["embed", "norm2:input", "norm3:input", "output"],
    "last_token": ["embed", "norm2:input", "norm3:input", "output"],
    "padded": ["embed", "norm2:input", "norm3:input", "output"],
    "conv": ["input", "2", "5", "output"],
    "returns_tuple": ["input", "body", "output"],
    "dict_input": ["head:input", "output"],
    "tied": ["embed", "unembed:input", "output"],
    "repeated": ["input", "embed", "block#0", "block#1", "block#2", "output"],
    "plain_residual": ["input", "0", "1", "output"],
    "before_activations": ["input", "second:input", "third:input", "output"],
    "norm_and_residual": ["input", "embed", "blocks.0", "blocks.1", "output"],
}


def names(cuts: list[CutPoint]) -> set[str]:
    return {name for cut in cuts for name in (cut.tap, *cut.aliases)}


def taps(model: nn.Module, batch: Any, input_fn: Callable[[Any], Any] | None = None) -> list[str]:
    """Taps of all cut points, validated one by one and together."""
    cuts = list_node_layers(model, batch, input_fn)
    for cut in cuts[:-1]:
        check_node_layers(model, batch, [cut.tap, cuts[-1].tap], input_fn=input_fn)
    check_node_layers(model, batch, [cut.tap for cut in cuts], input_fn=input_fn)
    assert propose_node_layers(model, batch, input_fn) == [cut.tap for cut in cuts if cut.proposed]
    return [cut.tap for cut in cuts]


def test_cut_points_are_valid_and_include_the_usual_node_layers(case: Case) -> None:
    cuts = list_node_layers(case.model, case.data, case.input_fn)
    assert {layer for layer in case.node_layers if isinstance(layer, str)} <= names(cuts)
    assert taps(case.model, case.data, case.input_fn)[-1] == "output"
    for cut in cuts:
        for alias in cut.aliases:
            if alias not in names([cuts[-1]]):
                check_node_layers(case.model, case.data, [alias, "output"], input_fn=case.input_fn)


def test_proposals(case: Case) -> None:
    assert propose_node_layers(case.model, case.data, case.input_fn) == PROPOSED[case.name]
    cuts = list_node_layers(case.model, case.data, case.input_fn)
    assert [cut.tap for cut in cuts if cut.proposed] == PROPOSED[case.name]


def test_attributes_of_a_cut_point() -> None:
    (cut,) = [cut for cut in list_node_layers(ResidualMLP(), torch.randn(4, 4)) if cut.tap == "blocks.0"]
    assert (cut.shape, cut.positions, cut.features, cut.module) == ((5,), 1, 5, "ResidualBlock")
    assert cut.aliases == ("blocks.1:input", "blocks.1.norm:input")
    image = list_node_layers(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8))[0]
    assert (image.shape, image.positions, image.features) == ((3, 8, 8), 64, 3)


def test_branches_of_blocks_are_not_listed() -> None:
    cuts = list_node_layers(ResidualMLP(), torch.randn(4, 4))
    assert [cut.tap for cut in cuts] == ["input", "embed", "blocks.0", "blocks.1", "output"]
    assert not {name for name in names(cuts) if "up" in name or "down" in name}
    batch = {"left": torch.randn(3, 4), "right": torch.randn(3, 2)}
    assert taps(TwoInputs(), batch) == ["head:input", "output"]


def test_the_model_is_not_modified() -> None:
    model = Classifier().train()
    model.net[0].weight.requires_grad_(False)
    model.net[2].eval()
    x = torch.randn(6, 5)
    values, state, random = x.clone(), {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    list_node_layers(model, (x, torch.zeros(6)))
    propose_node_layers(model, (x, torch.zeros(6)))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(x, values)
    assert not x.requires_grad
    assert [m.training for m in model.net] == [True, True, False, True, True]
    assert [p.requires_grad for p in model.parameters()] == [False, *[True] * 5]
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_hooks_are_removed_when_the_model_raises() -> None:
    model = ResidualMLP()
    with pytest.raises(LIBError, match=r"ResidualMLP cannot be run .*shapes cannot be multiplied"):
        list_node_layers(model, torch.randn(4, 3))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Detours(nn.Module):
    """A residual network with an additional path without gradients."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embed, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.blocks = nn.ModuleList(ResidualBlock(5) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for i, block in enumerate(self.blocks):
            before, h = h, block(h)
            if i == 1:
                early = h
            if self.kind == "every block":
                h = h + before.detach()
            elif self.kind == "middle" and i == 3:
                h = h + early.detach()
        return self.head(
            h + x.detach()[:, :1] if self.kind == "whole" else h * (x[:, :1] > 0) if self.kind == "mask" else h
        )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", ["input", "embed", *(f"blocks.{i}" for i in range(6)), "output"]),
        ("whole", ["input", "head:input", "output"]),
        ("mask", ["input", "head:input", "output"]),
        ("middle", ["input", "embed", "blocks.0", "blocks.1", "blocks.4:input", "blocks.4", "blocks.5", "output"]),
        ("every block", ["input", "embed", *(f"blocks.{i}:input" for i in range(1, 6)), "head:input", "output"]),
    ],
)
def test_paths_without_gradient_are_excluded(kind: str, expected: list[str]) -> None:
    assert taps(Detours(kind), torch.randn(5, 4)) == expected


def test_calls_of_shared_modules_are_numbered() -> None:
    assert taps(Repeated(), torch.randn(5, 4)) == ["input", "embed", "block#0", "block#1", "block#2", "output"]


def test_modules_registered_twice_have_two_names() -> None:
    linear = nn.Linear(4, 4)
    cuts = list_node_layers(nn.Sequential(linear, nn.Tanh(), linear, nn.Tanh()), torch.randn(5, 4))
    assert [cut.tap for cut in cuts] == ["input", "0#0", "1", "0#1", "output"]
    assert "2#0" in cuts[1].aliases


class InPlace(nn.Module):
    """In-place addition and nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.f, self.act, self.head = nn.Linear(3, 4), nn.Tanh(), nn.ReLU(inplace=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h += self.f(h)
        self.act(h)
        return self.head(h)


class Views(nn.Module):
    """The residual stream is a view, which the norm and the skip connection share."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.f, self.head = nn.Linear(3, 8), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).view(-1, 2, 4)
        h = h + self.f(self.norm(h))
        return self.head(h.flatten(1))


class LateName(nn.Module):
    """The output of ``body`` is used before it is returned, so the last module inside has to be tapped."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.pool = nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.f(x)
            return h, self.pool(h)

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = LateName.Body(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[1])


class UsedBefore(nn.Module):
    """A tensor is used before it becomes a module's input, so its first name has to be used."""

    def __init__(self, by_module: bool) -> None:
        super().__init__()
        self.by_module = by_module
        self.embed, self.skip, self.norm, self.head = nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.embed(x))
        skip = self.skip(h) if self.by_module else torch.tanh(h)
        return self.head(skip * self.norm(h))


class GivesViews(nn.Module):
    """Slices and reshapes that change nothing are not separate cut points."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        return self.head(h.view(-1, 2, 2).view(h.shape)[:, 0:])


class ByIndex(nn.Module):
    """An embedding that is not an ``nn.Embedding``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.block, self.head = nn.Parameter(torch.randn(9, 5)), ResidualBlock(5), nn.Linear(5, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.block(self.weight[tokens]))


class Frozen(nn.Module):
    """A trained head on a part without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.body(x)
        return self.head(h)


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.f(x))).pow(2).mean()


class Similarities(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.f(x)
        return h @ h.T


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0])


class TimeStep(nn.Module):
    """A model with a time step as an additional input of every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.f, self.head = nn.Linear(1, 4), nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.head(torch.tanh(self.f(x) + self.time(t))) * t


class Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f, self.head = torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.Tanh())), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.f(x))


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("model", "batch", "expected"),
    [
        (InPlace, X, ["input", "embed", "act:input", "act", "output"]),
        (Views, X, ["input", "embed", "norm:input", "head:input", "output"]),
        (LateName, X, ["input", "body.f", "body.pool", "output"]),
        (lambda: UsedBefore(by_module=True), X, ["input", "embed", "skip:input", "head:input", "output"]),
        (lambda: UsedBefore(by_module=False), X, ["input", "embed", "head:input", "output"]),
        (GivesViews, X, ["input", "f", "output"]),
        (ByIndex, torch.arange(6).view(3, 2), ["block:input", "block", "output"]),
        (Frozen, X, ["head:input", "head.0", "head.1", "output"]),
        (Loss, X, ["input", "f", "head:input", "head"]),
        (Similarities, X, ["input", "f"]),
        (TimeFirst, torch.randn(5, 4, 3), ["gru", "output"]),
        (lambda: nn.GRU(3, 5, batch_first=True), torch.randn(5, 4, 3), ["input", "output"]),
        (BoringModel, torch.randn(4, 32), ["input", "output"]),
        (nn.Identity, X, None),
        (lambda: nn.Embedding(9, 3), torch.arange(4), None),
    ],
)  # fmt: skip
def test_cut_points_of_various_models(
    model: Callable[[], nn.Module], batch: Tensor, expected: list[str] | None
) -> None:
    if expected is None:
        with pytest.raises(
            NodeLayerError, match="At least two node layers are needed, and of the inputs and outputs of modules"
        ):
            list_node_layers(model(), batch)
    else:
        assert taps(model(), batch) == expected


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_modules_inside_torchscript_are_skipped() -> None:
    model = Scripted()
    assert propose_node_layers(model, X) == ["input", "head:input", "output"]


def test_smaller_inputs_are_context_if_there_is_no_other_cut() -> None:
    batch = (X, torch.rand(5, 1))
    cuts = list_node_layers(TimeStep(), batch, lambda b: b)
    # Validated together only: the first node layer determines which inputs are context.
    assert [cut.tap for cut in cuts] == ["input", "f", "head:input", "head", "output"]
    check_node_layers(TimeStep(), batch, propose_node_layers(TimeStep(), batch, lambda b: b), input_fn=lambda b: b)


def test_a_single_sample_is_enough() -> None:
    assert taps(ResidualMLP(), torch.randn(1, 4)) == ["input", "embed", "blocks.0", "blocks.1", "output"]
    assert taps(Transformer(), torch.tensor([[1, 2, 3, 4]])) == [
        "embed",
        "norm2:input",
        "norm3:input",
        "norm3",
        "output",
    ]


def test_paths_of_compiled_modules_omit_the_wrapper() -> None:
    model = nn.Sequential(torch.compile(ResidualMLP(), backend="eager"), nn.Linear(3, 2))
    assert taps(model, torch.randn(4, 4)) == ["input", "0.embed", "0.blocks.0", "0.blocks.1", "0", "output"]


def test_nan_activations_raise_an_error() -> None:
    with pytest.raises(ActivationError, match="Node layer 'input' has NaN activations"):
        list_node_layers(ResidualMLP(), torch.full((3, 4), torch.nan))


def test_demo_transformer_is_cut_along_the_encoder_and_the_decoder() -> None:
    model, tokens = DemoTransformer(vocab_size=11, ninp=8, nhead=2, nhid=16), torch.randint(0, 11, (4, 6))
    found = taps(model, (tokens, tokens), lambda batch: batch)
    assert found[-1] == "decoder", "its output has lost the batch axis"
    assert propose_node_layers(model, (tokens, tokens), lambda batch: batch) == [
        "pos_encoder#0", "transformer.encoder.layers.0", "transformer.encoder.layers.1",
        "transformer.encoder|transformer.decoder.layers.0", "transformer.decoder.layers.1", "decoder",
    ]  # fmt: skip


# Model libraries: output classes, keyword arguments, masks, caches.


def test_gpt2() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    options = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(n_layer=12, **options))
    batch = {"input_ids": torch.randint(0, 50, (4, 7)), "attention_mask": torch.ones(4, 7, dtype=torch.long)}
    batch["attention_mask"][0, 4:] = 0
    blocks = [name for i in range(12) for name in (f"transformer.h.{i}.ln_2:input", f"transformer.h.{i}")]
    assert taps(model, batch) == ["transformer.wte", "transformer.h.0:input", *blocks, "transformer", "output"]
    assert propose_node_layers(model, batch) == [
        "transformer.h.0:input", *(f"transformer.h.{i}" for i in (2, 5, 8, 11)), "output",
    ]  # fmt: skip
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, **options))
    small = ["transformer.h.0:input", *blocks[:4], "output"]
    assert propose_node_layers(model, batch) == small
    graph = compute_interaction_graph(model, [batch], mask="attention_mask")
    assert graph.node_layers == small


def test_bert() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )  # fmt: skip
    batch = {"input_ids": torch.randint(0, 50, (4, 7))}
    found = taps(BertForSequenceClassification(config), batch)
    assert "bert.encoder.layer.0.attention" in found
    assert "bert.encoder.layer.1" in found
    assert not [tap for tap in found if "intermediate" in tap]


def test_resnet() -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8, 8, 8], depths=[2, 1, 1, 1], layer_type="basic")
    model, batch = ResNetForImageClassification(config), {"pixel_values": torch.randn(4, 3, 32, 32)}
    found = taps(model, batch)
    assert found[:2] == ["input", "resnet.embedder.embedder.convolution"]
    assert found[-3:] == ["resnet.pooler", "classifier.0", "output"]
    assert {"resnet.encoder.stages.0.layers.0", "resnet.encoder.stages.0", "resnet.encoder.stages.3"} <= set(found)
    assert propose_node_layers(model, batch) == ["input", *(f"resnet.encoder.stages.{i}" for i in range(4)), "output"]


# Proposals.


class Deep(nn.Module):
    """Pixels, flattened inside the model, and linear layers with nonlinearities."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width if i == 0 else 6, 6) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(1)
        for layer in self.layers[:-1]:
            h = F.gelu(layer(h))
        return self.layers[-1](h)


def test_inputs_of_linear_layers_at_even_distances() -> None:
    images = torch.randn(4, 1, 5, 5)
    assert propose_node_layers(Deep(25, 3), images) == [
        "layers.0:input", "layers.1:input", "layers.2:input", "output",
    ]  # fmt: skip
    assert propose_node_layers(Deep(25, 10), images) == [
        "layers.0:input", "layers.2:input", "layers.4:input", "layers.6:input", "layers.8:input", "output",
    ]  # fmt: skip


def test_wide_layers_and_large_inputs_only_as_a_last_resort() -> None:
    model = nn.Sequential(nn.Linear(3, 5000), nn.ReLU(), nn.Linear(5000, 4), nn.ReLU(), nn.Linear(4, 2))
    assert propose_node_layers(model, X) == ["input", "3", "output"]
    assert propose_node_layers(model[:2], X) == ["input", "output"]
    vocabulary = nn.Sequential(nn.Embedding(9, 4), ResidualBlock(4), nn.LayerNorm(4), nn.Linear(4, 5000))
    assert propose_node_layers(vocabulary, torch.arange(4)) == ["0", "1"]
    photograph = nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(3136, 2))
    assert propose_node_layers(photograph, torch.randn(2, 3, 224, 224)) == ["2", "output"]


def test_outputs_of_blocks_are_preferred_if_there_are_too_many() -> None:
    def cut(tap: str, mixing_depth: int, block_depth: int = -1) -> CutPoint:
        return CutPoint(tap, (4,), 1, 4, (), "Module", mixing_depth=mixing_depth, block_depth=block_depth)

    row = [cut(f"b.{i}", 2 * i + 2, 1) for i in range(8)]
    middles = [cut(f"b.{i}.norm:input", 2 * i + 1) for i in range(8)]
    cuts = sorted([cut("input", 0), *row, *middles, cut("output", 99)], key=lambda cut: cut.mixing_depth)
    assert propose(cuts) == ["input", "b.1", "b.3", "b.5", "b.7", "output"]
    assert propose(cuts, limit=3) == ["input", "b.7", "output"]
    assert propose(cuts, limit=2) == ["input", "output"]
    assert propose(cuts[:-1], limit=3) == ["input", "b.3", "b.7"], "the last one is one of the row"
    assert propose(cuts[:4], limit=9) == ["input", "b.0.norm:input", "b.0", "b.1.norm:input"]
    with pytest.raises(ValueError, match="at least 2; got"):
        propose(cuts, limit=1)
    with pytest.raises(NodeLayerError, match=r"At least two node layers are needed, .* only 'input' is on every path"):
        propose(cuts[:1])


def test_proposed_node_layers_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with caplog.at_level(logging.WARNING):
        graph = compute_interaction_graph(model, [X[:0], X])
    assert graph.node_layers == ["input", "1", "output"]
    assert (
        "No node layers were given; Sequential is cut at node_layers=['input', '1', 'output'], of 1 x 3, 1 x 4, 1 x 2 "
        "(positions x features)."
    ) in caplog.messages
    with pytest.raises(ActivationError, match="There are no samples to choose node layers with"):
        compute_interaction_graph(model, [])
