"""Encoder-decoders: cut along the encoder, and along the decoder together with the encoder's output."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lib_lightning import InteractionGraph, LIBCallback, NodeLayer, compute_interaction_graph, list_node_layers
from lib_lightning.api import propose_node_layers
from lib_lightning.errors import NodeLayerError
from lib_lightning.model.node_layer import as_node_layer, as_node_layers
from tests.integration.oracle import STEP, check_against_finite_differences, randomize

WIDTH, BLOCKS = 4, 3


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=9, d_model=WIDTH, d_kv=2, d_ff=6, num_layers=2, num_decoder_layers=BLOCKS, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=9, d_model=WIDTH, encoder_layers=2, decoder_layers=BLOCKS, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=6, decoder_ffn_dim=6, max_position_embeddings=16,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=9, num_mel_bins=3, d_model=WIDTH, encoder_layers=2, decoder_layers=BLOCKS, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=6, decoder_ffn_dim=6, max_source_positions=4, max_target_positions=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, suppress_tokens=[],
        begin_suppress_tokens=[],
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


class Translator(nn.Module):
    """``nn.Transformer`` between an embedding and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, 9)
        self.transformer = nn.Transformer(WIDTH, 2, 2, BLOCKS, 6, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.transformer(self.embed(source), self.embed(target)))


def words(n: int, length: int) -> Tensor:
    return torch.randint(3, 9, (n, length))


# Model, batch of n samples with a decoder's input of some length, names of the encoder, its blocks and the decoder's.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], dict[str, Any]], str, str, str]] = {
    "t5": (
        t5, lambda n, length: {"input_ids": words(n, 4), "decoder_input_ids": words(n, length)},
        "encoder", "encoder.block", "decoder.block",
    ),
    "bart": (
        bart, lambda n, length: {"input_ids": words(n, 4), "decoder_input_ids": words(n, length)},
        "model.encoder.layers.1", "model.encoder.layers", "model.decoder.layers",
    ),
    "whisper": (
        whisper, lambda n, length: {"input_features": torch.randn(n, 3, 8), "decoder_input_ids": words(n, length)},
        "model.encoder", "model.encoder.layers", "model.decoder.layers",
    ),
    "nn.Transformer": (
        Translator, lambda n, length: {"source": words(n, 4), "target": words(n, length)},
        "transformer.encoder", "transformer.encoder.layers", "transformer.decoder.layers",
    ),
}  # fmt: skip


@pytest.mark.combinations
@pytest.mark.parametrize("length", [3, 4])
@pytest.mark.parametrize("name", MODELS)
def test_proposals_follow_the_encoder_and_the_decoder(name: str, length: int, caplog: pytest.LogCaptureFixture) -> None:
    make, data, encoder, blocks, decoder = MODELS[name]
    model, batch = make().eval(), data(20, length)
    cuts = {cut.tap: cut for cut in list_node_layers(model, batch)}
    assert {f"{blocks}.0", f"{blocks}.1", f"{encoder}|{decoder}.0", f"{encoder}|{decoder}.1", "output"} <= set(cuts)
    pair = cuts[f"{encoder}|{decoder}.0"]
    assert (pair.positions, pair.features) == (4 + length, WIDTH)
    with caplog.at_level(logging.WARNING):
        graph = compute_interaction_graph(model, [batch], n_probes=2)
    proposed = propose_node_layers(model, batch)
    assert graph.node_layers == proposed
    assert proposed[1:3] == [f"{blocks}.0", f"{blocks}.1"]
    assert proposed[3:] == [f"{encoder}|{decoder}.0", f"{decoder}.{BLOCKS - 1}", "output"]
    assert all(basis.n_features for basis in graph.bases.values())
    assert f"{4 + length} x {WIDTH}, {length} x {WIDTH}, {length} x 9 (positions x features)" in caplog.text


@pytest.mark.combinations
@pytest.mark.parametrize("proposed", [True, False], ids=["proposed", "by hand"])
@pytest.mark.parametrize("name", MODELS)
def test_sections_of_a_decoder_are_exact(name: str, proposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # T5's norm sums squares in float32, which has too few digits for finite differences.
    monkeypatch.setattr("transformers.models.t5.modeling_t5.T5LayerNorm.forward", rms_norm)
    make, data, encoder, blocks, decoder = MODELS[name]
    layers: list[str | NodeLayer] = [
        f"{blocks}.0",
        encoder if encoder != f"{blocks}.0" else f"{blocks}.1",
        *(NodeLayer([encoder, f"{decoder}.{i}"], join="positions") for i in range(BLOCKS - 1)),
        f"{decoder}.{BLOCKS - 1}",
        "output",
    ]
    model, batch = randomize(make().eval()), to_double(data(12, 3))
    if proposed:
        layers = [as_node_layer(name) for name in propose_node_layers(model, batch)]
        if name == "whisper":  # its input is (n, mel bins, times), which the oracle has to be told
            layers[0] = NodeLayer("input", feature_dim=1)
        assert any(isinstance(layer, NodeLayer) and layer.join == "positions" for layer in layers)
    check_against_finite_differences(model, batch, layers, STEP, 1e-6)


def rms_norm(self: Any, x: Tensor) -> Tensor:
    """The same formula as that of ``T5LayerNorm``, in the model's type."""
    return nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)


def to_double(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: t.double() if t.is_floating_point() else t for key, t in batch.items()}


def test_a_decoder_block_alone_does_not_cut() -> None:
    make, data, _, _, decoder = MODELS["bart"]
    with pytest.raises(NodeLayerError, match=r"does not cut the computation: .* also depends on the model's input"):
        compute_interaction_graph(make().eval(), [data(6, 3)], [f"{decoder}.0", f"{decoder}.1", "output"])


def test_names_of_joined_node_layers() -> None:
    pair = as_node_layer("encoder|decoder.0")
    assert pair == NodeLayer(["encoder", "decoder.0"], join="positions")
    assert pair.name == "encoder|decoder.0"
    assert as_node_layer("left+right") == NodeLayer(["left", "right"])
    a, b = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    read = pair.read([a, b])
    assert torch.equal(read, torch.cat([a, b], 1))
    assert all(map(torch.equal, pair.write(read, [torch.zeros_like(a), torch.zeros_like(b)]), [a, b]))
    mask = torch.ones(2, 8)
    assert pair.masks(mask, [a, b]) == (mask, mask)
    with pytest.raises(NodeLayerError, match="differ in samples or features and cannot be joined"):
        pair.read([a, b[..., :2]])
    with pytest.raises(NodeLayerError, match="join is 'features', or 'positions' together with all positions"):
        NodeLayer(["a", "b"], positions=0, join="positions")


class Trained(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Translator()

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.net(source, target)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch["source"], batch["target"]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch["source"], batch["target"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_proposals_survive_a_resumed_run(tmp_path: Path) -> None:
    source, target = words(16, 4), words(16, 3)
    data = [{"source": s, "target": t} for s, t in zip(source, target, strict=True)]
    loader = DataLoader(data, batch_size=8)  # type: ignore[arg-type]

    def fit(epochs: int, checkpoint: Path | None) -> tuple[list[str], Path]:
        trainer = pl.Trainer(
            max_epochs=epochs, callbacks=[LIBCallback(every_n_validations=1)], default_root_dir=tmp_path,
            accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(Trained(), loader, loader, ckpt_path=checkpoint)
        path = tmp_path / f"{epochs}.ckpt"
        trainer.save_checkpoint(path)
        (callback,) = [c for c in trainer.callbacks if isinstance(c, LIBCallback)]  # type: ignore[attr-defined]
        return callback.resolver.names, path

    names, checkpoint = fit(1, None)
    assert "net.transformer.encoder|net.transformer.decoder.layers.0" in names
    again, _ = fit(2, checkpoint)
    assert again == names
    files = sorted(tmp_path.rglob("final.safetensors"))
    assert files
    for file in files:
        graph = InteractionGraph.load(file)
        assert graph.node_layers == names
        assert [layer.name for layer in as_node_layers(graph.node_layers)] == names
        joined = [entry for entry in graph.info["node_layers"] if entry.get("join") == "positions"]
        assert [entry["name"] for entry in joined] == [name for name in names if "|" in name]
