"""Modular addition, the first experiment of the paper (arXiv 2405.10928, section 4.1): a task that groks.

A one-layer transformer reads ``a b =`` and predicts ``(a + b) mod p``. It first memorises the training pairs and
generalises much later: the transition to observe with `lib_lightning.LIBCallback`.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lib_lightning.features import Sample, TokenRenderer


class Embedding(nn.Module):
    """Token embedding plus learned position embedding."""

    def __init__(self, n_tokens: int, n_positions: int, d_model: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(n_tokens, d_model)
        self.positions = nn.Parameter(torch.randn(n_positions, d_model) / d_model**0.5)
        nn.init.normal_(self.tokens.weight, std=d_model**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed tokens ``(n, S)`` as ``(n, S, d_model)``."""
        return self.tokens(tokens) + self.positions


class LastTokenAttention(nn.Module):
    """Self-attention of the last token over all tokens; the answer is predicted there only."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query, self.key, self.value, self.out = (nn.Linear(d_model, d_model) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Output ``(n, d_model)`` at the last position, for the residual stream ``(n, S, d_model)``."""
        q = self.query(x[:, -1]).unflatten(-1, (1, self.n_heads, -1))
        k, v = (proj(x).unflatten(-1, (self.n_heads, -1)) for proj in (self.key, self.value))
        # Elementwise products and sums take half of the time of matrix products with a single column.
        pattern = ((q * k).sum(-1, keepdim=True) / q.shape[-1] ** 0.5).softmax(1)
        return self.out((pattern * v).sum(1).flatten(1))


class ModularAdditionTransformer(nn.Module):
    """One layer, no layer norm, ReLU: embedding, attention, MLP, each adding to the residual stream."""

    def __init__(self, modulus: int, d_model: int = 128, n_heads: int = 4, d_mlp: int = 512) -> None:
        super().__init__()
        self.embed = Embedding(modulus + 1, 3, d_model)
        self.attention = LastTokenAttention(d_model, n_heads)
        self.mlp = nn.Sequential(nn.Linear(d_model, d_mlp), nn.ReLU(), nn.Linear(d_mlp, d_model))
        self.unembed = nn.Linear(d_model, modulus + 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(n, modulus + 1)`` of the answer to tokens ``(n, 3)``."""
        resid_pre = self.embed(tokens)
        resid_mid = resid_pre[:, -1] + self.attention(resid_pre)
        resid_post = resid_mid + self.mlp(resid_mid)
        return self.unembed(resid_post)


class AllPairs(L.LightningDataModule):
    """All pairs ``(a, b)`` with their sum, split at random into training and test pairs.

    Training is full batch. An epoch repeats the batch ``steps_per_epoch`` times, so that a progress bar shows more
    than single steps.

    Args:
        modulus: The modulus ``p``; there are ``p * p`` pairs.
        train_fraction: Share of the pairs to train on.
        steps_per_epoch: Full-batch steps in an epoch.
        split_seed: Seed of the split.
    """

    def __init__(
        self, modulus: int = 59, train_fraction: float = 0.5, steps_per_epoch: int = 1000, split_seed: int = 0
    ) -> None:
        super().__init__()
        order = torch.randperm(modulus**2, generator=torch.Generator().manual_seed(split_seed))
        a, b = order // modulus, order % modulus
        self.tokens = torch.stack([a, b, torch.full_like(a, modulus)], dim=1)
        self.answers = (a + b) % modulus
        self.n_train = int(train_fraction * modulus**2)
        self.steps_per_epoch = steps_per_epoch

    def train_dataloader(self) -> DataLoader[Any]:
        """The training split as one batch, ``steps_per_epoch`` times."""
        batch = (self.tokens[: self.n_train], self.answers[: self.n_train])
        return DataLoader(Repeated(batch, self.steps_per_epoch), batch_size=None)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """The training split and the test split."""
        splits = (slice(None, self.n_train), slice(self.n_train, None))
        return [DataLoader(Repeated((self.tokens[s], self.answers[s]), 1), batch_size=None) for s in splits]


class Repeated(Dataset[Any]):
    """One batch, ``times`` times."""

    def __init__(self, batch: tuple[Tensor, Tensor], times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        """Number of repetitions."""
        return self.times

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The batch, for every index."""
        if index >= self.times:
            raise IndexError(index)
        return self.batch


class ModularAddition(L.LightningModule):
    """Trains the transformer on modular addition with AdamW and strong weight decay.

    Args:
        modulus: The modulus ``p``.
        d_model: Width of the residual stream.
        n_heads: Attention heads.
        d_mlp: Width of the MLP.
        lr: Learning rate after warm-up.
        weight_decay: Decoupled weight decay, without which the model does not generalise.
        betas: Momentum parameters of AdamW.
        warmup_steps: Steps over which the learning rate rises linearly.
    """

    def __init__(
        self,
        modulus: int = 59,
        d_model: int = 64,
        n_heads: int = 4,
        d_mlp: int = 256,
        lr: float = 2e-3,
        weight_decay: float = 2.0,
        betas: tuple[float, float] = (0.9, 0.98),
        warmup_steps: int = 10,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.transformer = ModularAdditionTransformer(modulus, d_model, n_heads, d_mlp)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(n, modulus + 1)`` of the answer to tokens ``(n, 3)``."""
        return self.transformer(tokens)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of one full batch."""
        tokens, answers = batch
        loss = F.cross_entropy(self(tokens), answers)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss and accuracy on the training and the test pairs."""
        tokens, answers = batch
        logits, split = self(tokens), ("train", "test")[dataloader_idx]
        accuracy = (logits.argmax(-1) == answers).float().mean()
        options: dict[str, Any] = {"add_dataloader_idx": False, "batch_size": len(tokens)}
        self.log(f"accuracy/{split}", accuracy, prog_bar=True, **options)
        self.log(f"loss/{split}", F.cross_entropy(logits, answers), **options)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with a linear warm-up."""
        optimizer = torch.optim.AdamW(
            self.parameters(), self.hparams.lr, betas=self.hparams.betas, weight_decay=self.hparams.weight_decay
        )
        warmup = self.hparams.warmup_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Sums(TokenRenderer):
    """Shows the tokens of a sample as a sum, and names the model's outputs by its numbers.

    Args:
        modulus: The modulus ``p``.

    Example:
        >>> Sums(59)(Sample(None, {"tokens": torch.tensor([17, 50, 59])}))["tokens"]
        ['17', ' + 50', ' =']
    """

    def __init__(self, modulus: int = 59) -> None:
        super().__init__([*map(str, range(modulus)), "="])

    def __call__(self, sample: Sample, /) -> dict[str, Any]:
        """Render a sample."""
        a, b, equals = super().__call__(sample)["tokens"]
        return {"kind": "tokens", "tokens": [a, f" + {b}", f" {equals}"]}
