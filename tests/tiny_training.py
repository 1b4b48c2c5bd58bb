"""A training run small enough to repeat, with everything in it that a careless callback would disturb."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

NODE_LAYERS = ["net.0:input", "net.4:input", "output"]
STEPS_PER_EPOCH = 6


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Samples with noise drawn from the global random state each time they are read."""

    def __init__(self, n: int) -> None:
        generator = torch.Generator().manual_seed(n)
        self.x = torch.randn(n, 5, generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = random.random() + np.random.rand() + float(torch.rand(()))  # noqa: NPY002 (the global state is the point)
        return self.x[index] + 0.01 * noise, self.x[index].sum().gt(0).long()


class Classifier(pl.LightningModule):
    """Batch norm, dropout, data shuffled anew, losses remembered."""

    def __init__(self, workers: int = 0) -> None:
        super().__init__()
        self.workers = workers
        self.net = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.ReLU(inplace=True), nn.Linear(8, 2)
        )
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        self.log("val_loss", loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Noisy(48), batch_size=8, shuffle=True, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Noisy(20), batch_size=8, shuffle=True, num_workers=self.workers)


class Failing(Classifier):
    """A forward pass that works in training and validation and fails, after much disturbance, in a snapshot."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not self.training and len(x) > 3:
            torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
            self.train()
            self.net(x)
            raise RuntimeError("the model fails")
        return super().forward(x)


def trainer_of(folder: object, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    """A quiet trainer on the CPU for two epochs."""
    defaults: dict[str, Any] = {
        "default_root_dir": folder,
        "callbacks": list(callbacks),
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**(defaults | options))
