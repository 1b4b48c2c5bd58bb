"""Two processes that get SIGTERM in a snapshot, for `tests/training/test_distributed.py`: ``torchrun ... FOLDER``."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch import distributed as dist
from torch.utils.data import DataLoader

from lib_lightning import LIBCallback
from tests.tiny_training import trainer_of
from tests.two_processes import NODE_LAYERS, Model, samples

# Seconds from the beginning of the snapshot to the signal; processes are at different places then.
DELAYS = (0.5, 0.65)


class Slow(Model):
    """A forward pass of three seconds in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            for _ in range(300):
                time.sleep(0.01)
        return super().forward(x)

    def val_dataloader(self) -> Any:
        return DataLoader(samples(24), batch_size=6)


class Signal(pl.Callback):
    """Sends the signal after the beginning of training, and measures what comes after it."""

    sent = ended = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        delay = DELAYS[trainer.global_rank]
        self.sent = time.perf_counter() + delay
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGTERM)).start()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.ended = time.perf_counter()


def main(folder: Path) -> None:
    """Train until the signal."""
    torch.manual_seed(0)
    signaled, callback = Signal(), LIBCallback(NODE_LAYERS, at_steps=[0])
    options = {"devices": 2, "strategy": "ddp", "num_sanity_val_steps": 0, "max_epochs": 1}
    trainer = trainer_of(folder, signaled, callback, **options)
    model = Slow(None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kind = "none"
    try:
        trainer.fit(model)
    except BaseException as error:  # Lightning's exception for the signal is a SystemExit
        kind = type(error).__name__
    found = {
        "kind": kind,
        "seconds": signaled.ended - signaled.sent,
        "snapshots": callback.snapshots,
        "steps": trainer.global_step,
        "modes": [module.training for module in model.modules()],
        "same": all(torch.equal(value, before[name]) for name, value in model.state_dict().items()),
    }
    torch.save(found, folder / f"process-{os.environ['RANK']}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
