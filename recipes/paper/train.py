"""Trains a modular-addition network of the paper's shape (arXiv 2405.10928): modulus 113, 30% of the pairs.

    python -m recipes.paper.train --seed 0

The paper takes 60,000 full-batch steps. Here the network first generalises, in 6,000 steps on quarters of the batch
with twice the learning rate and weight decay (with those of the paper, no network had generalised after 16,000 steps);
4,000 full-batch steps with the paper's settings follow. About seven minutes of one CPU core; an interrupted run
continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from recipes.modular_addition import AllPairs, ModularAddition, ModularAdditionTransformer

MODULUS = 113
TRAIN_FRACTION = 0.3
# Epochs of 1,000 steps: to find the general solution, and to settle in it.
FIND, SETTLE = 6, 4


class PaperModularAddition(ModularAddition):
    """`ModularAddition` in the paper's size, trained in two phases, with a faster computation of the same logits."""

    def __init__(self, modulus: int = MODULUS, find_steps: int = 1000 * FIND) -> None:
        super().__init__(modulus, d_model=128, n_heads=4, d_mlp=512, lr=1e-3, weight_decay=1.0)
        self.find_steps = find_steps

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of one batch."""
        tokens, answers = batch
        return F.cross_entropy(logits_of_pairs(self.transformer, tokens[:, 0], tokens[:, 1]), answers)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Double the weight decay in the first phase."""
        self.optimizers().param_groups[0]["weight_decay"] = 1.0 + self._finding(self.global_step)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with a linear warm-up, and twice the learning rate in the first phase."""
        configured = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(
            configured["optimizer"], lambda step: min(1.0, (step + 1) / 10) * (1 + self._finding(step))
        )
        return {**configured, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _finding(self, step: int) -> bool:
        return step < self.find_steps


class QuartersThenAll(AllPairs):
    """The pairs, in batches of a quarter at first, then all at once."""

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of one epoch."""
        if self.trainer is None or self.trainer.current_epoch >= FIND:
            return super().train_dataloader()
        n = self.n_train
        pairs = TensorDataset(self.tokens[:n], self.answers[:n])
        sampler = Shuffles(n, -(-n // 4), self.steps_per_epoch)
        return DataLoader(pairs, sampler=sampler, batch_size=None)


class Shuffles(torch.utils.data.Sampler[Tensor]):
    """Batches of indices from repeated random permutations.

    Args:
        n: Number of indices.
        size: Number of indices in a batch; the last one of a permutation may be smaller.
        batches: Number of batches.
    """

    def __init__(self, n: int, size: int, batches: int) -> None:
        self.n, self.size, self.batches = n, size, batches

    def __len__(self) -> int:
        """Number of batches."""
        return self.batches

    def __iter__(self) -> Any:
        """The batches."""
        given = 0
        while True:
            for batch in torch.randperm(self.n).split(self.size):
                if given == self.batches:
                    return
                given += 1
                yield batch


def logits_of_pairs(model: ModularAdditionTransformer, a: Tensor, b: Tensor) -> Tensor:
    """Compute the model's logits, with keys and values computed once per token instead of once per pair.

    Args:
        model: The transformer, with modulus ``p``.
        a: First numbers, shape ``(n,)``.
        b: Second numbers, shape ``(n,)``.

    Returns:
        Logits ``(n, p + 1)``, equal to ``model(tokens)`` up to rounding.
    """
    embed, attention = model.embed, model.attention
    tokens, positions = embed.tokens.weight, embed.positions
    equals = tokens[-1] + positions[2]
    x = torch.cat([tokens[:-1] + positions[0], tokens[:-1] + positions[1], equals[None]])
    q, k = (proj.unflatten(-1, (attention.n_heads, -1)) for proj in (attention.query(equals), attention.key(x)))
    v = attention.value(x)
    scores = (k * q).sum(-1) / q.shape[-1] ** 0.5
    places = torch.stack([a, b + len(tokens) - 1, torch.full_like(a, len(x) - 1)])
    pattern = F.embedding(places, scores).softmax(0).repeat_interleave(q.shape[-1], -1)
    mixed = (pattern[:2] * F.embedding(places[:2], v)).sum(0) + pattern[2] * v[-1]
    resid_mid = equals + attention.out(mixed)
    return model.unembed(resid_mid + model.mlp(resid_mid))


def train(seed: int, folder: Path, epochs: int = FIND + SETTLE, steps_per_epoch: int = 1000) -> Path:
    """Train one network, or continue its training.

    Args:
        seed: Seed of the split and of the weights.
        folder: Folder of the networks.
        epochs: Number of epochs.
        steps_per_epoch: Steps in one of them.

    Returns:
        The last checkpoint.
    """
    L.seed_everything(seed, verbose=False)
    module = PaperModularAddition(find_steps=FIND * steps_per_epoch)
    data = QuartersThenAll(MODULUS, TRAIN_FRACTION, steps_per_epoch, split_seed=seed)
    place = folder / f"modular_addition_seed{seed}"
    last = place / "last.ckpt"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(num_workers|log_every_n_steps|not empty).*")
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="auto",
            logger=False,
            callbacks=[ModelCheckpoint(place, filename="last", enable_version_counter=False)],
            enable_model_summary=False,
            enable_progress_bar=False,
            num_sanity_val_steps=0,
            reload_dataloaders_every_n_epochs=1,
        )
        trainer.fit(module, data, ckpt_path=last if last.exists() else None)
    return last


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/paper"))
    options = parser.parse_args(args)
    train(options.seed, options.folder)


if __name__ == "__main__":
    main()
