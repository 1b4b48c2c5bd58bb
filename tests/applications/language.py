"""Language models: LitGPT, peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from tests.applications.running import application, trainer_options

VOCABULARY = 31


def tokens() -> DataLoader[Any]:
    x = torch.randint(0, VOCABULARY, (32, 7))
    return DataLoader(TensorDataset(x[:, :-1], x[:, 1:]), 8)


def litgpt(callback: Any, folder: Path, **config: Any) -> None:
    import lightning.pytorch as pl
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    class LitModel(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = GPT(
                Config(block_size=16, n_layer=2, n_head=2, n_embd=8, padded_vocab_size=VOCABULARY, **config)
            )

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return chunked_cross_entropy(self.model(batch[0]), batch[1], chunk_size=0)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=0.01)

    pl.Trainer(**trainer_options(folder, callback)).fit(LitModel(), tokens(), tokens())


@application("litgpt GPT-NeoX shape", "litgpt")
def pythia(callback: Any, folder: Path) -> None:
    litgpt(callback, folder)


@application("litgpt Llama shape", "litgpt")
def llama(callback: Any, folder: Path) -> None:
    litgpt(
        callback, folder, rotary_percentage=1.0, parallel_residual=False, bias=False, norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP", intermediate_size=16,
    )  # fmt: skip


@application("peft LoRA of Llama", "others", "peft", "transformers")
def lora(callback: Any, folder: Path) -> None:
    import lightning.pytorch as pl
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16,
    )  # fmt: skip

    class Tuned(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(input_ids=batch[0], labels=batch[0]).loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=0.01)

    pl.Trainer(**trainer_options(folder, callback)).fit(Tuned(), tokens(), tokens())
