"""A training run to be killed and resumed: ``python -m tests.resumable_run FOLDER [NUMBER OF FILE TO DIE AT]``."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lib_lightning import LIBCallback
from tests.tiny_training import trainer_of

NODE_LAYERS = ["net.0:input", "net.2:input", "output"]
STEPS_PER_EPOCH, EPOCHS = 10, 4
SCHEDULE = {"every_n_steps": 4}


class Steady(pl.LightningModule):
    """A model that does not depend on random states, which Lightning's checkpoints do not contain."""

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__()
        self.pause = pause
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        time.sleep(self.pause)
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.03)

    def _data(self, n: int) -> DataLoader[Any]:
        x = torch.randn(n, 5, generator=torch.Generator().manual_seed(n))
        return DataLoader(TensorDataset(x, x.sum(1).gt(0).long()), batch_size=8)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._data(8 * STEPS_PER_EPOCH)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._data(30)


def die_at_file(number: int) -> None:
    """Kill this process before the n-th file is renamed from its temporary name."""
    replace, count = Path.replace, 0

    def last_words(self: Path, target: Any) -> Path:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = last_words  # type: ignore[method-assign]


def main(folder: Path, die_at: int | None = None) -> None:
    if die_at is not None:
        die_at_file(die_at)
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    checkpoints = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=3, save_top_k=-1, filename="{step:04d}")
    callback = LIBCallback(NODE_LAYERS, **SCHEDULE)
    trainer = trainer_of(
        folder, callback, checkpoints, max_epochs=EPOCHS, enable_checkpointing=True,
        logger=TensorBoardLogger(folder, name="", version="run"),
    )  # fmt: skip
    newest = max((folder / "checkpoints").glob("*.ckpt"), default=None)
    print("from", newest, flush=True)
    trainer.fit(Steady(pause=0.03), ckpt_path=newest, weights_only=True if newest else None)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
