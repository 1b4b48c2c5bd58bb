"""Effects on the output in a training: in every snapshot if they take little, and else in the last one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lib_lightning import InteractionGraph, LIBCallback
from tests.training.test_causal import files


class LanguageModel(pl.LightningModule):
    """A GPT-2 whose vocabulary is much larger than its width."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=600, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0)
        self.gpt2 = GPT2LMHeadModel(config)
        self.tokens = torch.randint(600, (32, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.gpt2(tokens).logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.01)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.tokens, batch_size=8)  # type: ignore[arg-type]

    val_dataloader = train_dataloader


def train(folder: Path, *callbacks: pl.Callback) -> dict[str, Tensor]:
    model = LanguageModel()
    pl.Trainer(
        max_epochs=2, accelerator="cpu", default_root_dir=folder, callbacks=list(callbacks), logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    ).fit(model)  # fmt: skip
    return {name: t.clone() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("share", [0.0, 1e9])
def test_of_all_features_in_the_last_snapshot_or_in_each(
    tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lib_lightning.algorithm.effort._EFFECT_OPERATIONS", 0)
    monkeypatch.setattr("lib_lightning.algorithm.effort._SHARE_IN_RUN", share)
    callback = LIBCallback(["gpt2.transformer.wte", "gpt2.transformer.h.0"])
    with caplog.at_level(logging.INFO):
        weights = train(tmp_path / "with", callback)
    for name, t in train(tmp_path / "without").items():
        assert torch.equal(weights[name], t), "the training is untouched"
    graphs = files(tmp_path / "with")
    *earlier, last = graphs.values()
    assert len(earlier) > 1
    for graph in earlier:
        assert bool(graph.output_effects) == (share > 0)
    final = InteractionGraph.load(tmp_path / "with" / "lib" / "final.safetensors")
    for graph in (last, final):
        assert graph.info["effects_by"] == "derivatives"
        assert graph.info["effect_samples"] >= 4
        for layer, basis in graph.bases.items():
            assert (graph.output_effects[layer].outputs >= 0).any(1).sum() == basis.n_features
    (plan,) = [line for line in caplog.text.splitlines() if "each with" in line]
    assert "at the end for effects of features" in plan
    # Of a language model, few features are tried.
    (matter,) = [line for line in caplog.text.splitlines() if "features whose absence" in line]
    tried = {layer: int(effects.changes.isfinite().sum()) for layer, effects in last.effects.items()}
    for layer, count in tried.items():
        assert f"of the {count} tried in {layer}" in matter or count == last.bases[layer].n_features
