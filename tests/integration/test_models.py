"""Models of other libraries, unmodified, against finite differences."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.demos.transformer import Transformer
from torch import Tensor, nn

from lib_lightning import NodeLayer, compute_interaction_graph
from tests.integration.models import bert, gpt2, gpt_neo, resnet, tokens, vit
from tests.integration.oracle import (
    RTOL,
    STEP,
    assert_exact,
    assert_same_graph,
    check_against_finite_differences,
    dense,
    randomize,
)

# GPT-Neo multiplies queries with keys in float32, whatever the dtype of its weights. With a longer step, finite
# differences are accurate to about 1e-6.
FLOAT32_STEP, FLOAT32_TOLERANCE = 5e-3, 1e-5


def test_boring_model() -> None:
    check_against_finite_differences(BoringModel().double(), torch.randn(40, 32).double(), ["layer:input", "output"])


def test_boring_model_in_its_own_precision() -> None:
    model, x = BoringModel(), torch.randn(40, 32)
    graph = compute_interaction_graph(model, [x], ["input", "output"])
    exact = compute_interaction_graph(model.double(), [x.double()], ["input", "output"])
    # Rounding errors of float32 are 6e-8.
    assert_same_graph(graph, exact, tolerance=1e-5)


def demo_transformer() -> tuple[nn.Module, dict[str, Tensor], list[str | NodeLayer]]:
    # Inputs and targets pass through the same modules. The output is flattened, so it does not cut.
    model = Transformer(vocab_size=7, ninp=4, nhead=2, nhid=6, nlayers=1)
    batch = {"inputs": torch.randint(0, 7, (12, 3)), "target": torch.randint(0, 7, (12, 3))}
    streams = [
        NodeLayer(["pos_encoder#0", "pos_encoder#1"], "embedded"),
        NodeLayer(["transformer.encoder", "pos_encoder#1"], "encoded"),
        "transformer",
        "decoder",
    ]
    return model, batch, streams


def test_demo_transformer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, streams = demo_transformer()
    graph = compute_interaction_graph(model, [batch], streams, dtype=torch.float64, rtol=RTOL)
    assert model.pos_encoder.pe is None, "what it keeps for the next call is not kept"
    assert model.src_mask is None
    torch.set_default_dtype(torch.float64)  # the model creates masks and positions itself
    try:
        assert_exact(graph, *dense(model.double(), batch, streams))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("make", "step", "tolerance"), [(gpt2, STEP, 1e-6), (gpt_neo, FLOAT32_STEP, FLOAT32_TOLERANCE)]
)
def test_gpt(make: Callable[[], nn.Module], step: float, tolerance: float) -> None:
    h = "transformer.h"
    layers = [f"{h}.0", f"{h}.1.ln_2:input", f"{h}.1", "transformer.ln_f", "output"]
    check_against_finite_differences(make(), {"input_ids": tokens(10, 3)}, layers, step, tolerance)


@pytest.mark.parametrize(
    ("make", "step", "tolerance"), [(gpt2, STEP, 1e-6), (gpt_neo, FLOAT32_STEP, FLOAT32_TOLERANCE)]
)
def test_gpt_after_norm_and_residual(make: Callable[[], nn.Module], step: float, tolerance: float) -> None:
    h = "transformer.h"
    layers = [f"{h}.0.ln_2:input", NodeLayer([f"{h}.1.ln_2", f"{h}.1.ln_2:input"], "both"), f"{h}.1"]
    check_against_finite_differences(make(), {"input_ids": tokens(10, 3)}, layers, step, tolerance)


def test_gpt2_in_float32_is_computed_in_float64() -> None:
    model, batch = gpt2(), {"input_ids": tokens(10, 3)}
    layers = ["transformer.h.0", "transformer.h.1.ln_2:input", "output"]
    expected = compute_interaction_graph(model.float().double(), [batch], layers)
    assert_same_graph(compute_interaction_graph(model.float(), [batch], layers, dtype=torch.float64), expected)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.dtype == torch.float32


def test_gpt2_with_labels_has_its_logits_as_output() -> None:
    batch = {"input_ids": tokens(10, 3)}
    model, layers = gpt2(), ["transformer.h.0", "output"]
    plain = compute_interaction_graph(model, [batch], layers)
    assert_same_graph(compute_interaction_graph(model, [batch | {"labels": batch["input_ids"]}], layers), plain)


def test_bert() -> None:
    layers = ["bert.embeddings", "bert.encoder.layer.0.attention", "bert.encoder.layer.1", "output"]
    check_against_finite_differences(bert(), {"input_ids": tokens(10, 3)}, layers)


def test_resnet() -> None:
    stages = "resnet.encoder.stages"
    layers = ["resnet.embedder", f"{stages}.0", f"{stages}.1.layers.0.activation:input", "output"]
    check_against_finite_differences(resnet(), {"pixel_values": torch.randn(15, 2, 8, 8).double()}, layers)


def test_vit() -> None:
    read_out = NodeLayer(["vit.layernorm"], "class token", positions=0)
    layers = ["vit.embeddings", "vit.layers.0.layernorm_after:input", "vit.layers.0", read_out, "output"]
    check_against_finite_differences(vit(), {"pixel_values": torch.randn(15, 2, 6, 6).double()}, layers)


class LanguageModel(nn.Module):
    """An embedding, two recurrent layers, and logits."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(5, 7)
        self.rnn = kind(4, 5, num_layers=2, batch_first=True, dropout=0.2)

    def forward(self, words: Tensor) -> Tensor:
        states, _ = self.rnn(self.embed(words))
        return self.head(states)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_language_model(kind: type[nn.RNNBase]) -> None:
    check_against_finite_differences(
        randomize(LanguageModel(kind)), torch.randint(0, 7, (12, 4)), ["embed", "rnn", "output"]
    )


def test_convolutional_network() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(), nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 3),
    )  # fmt: skip
    check_against_finite_differences(
        randomize(model), torch.randn(20, 2, 6, 6).double(), ["0", "3", "6", "10", "output"]
    )
