"""Node layers of a run are checked on samples that differ, wherever these are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lib_lightning import LIBCallback
from lib_lightning.errors import LIBError


class Skip(pl.LightningModule):
    """A skip connection around the first node layer."""

    def __init__(self, skip: float) -> None:
        super().__init__()
        self.skip, self.a, self.b = skip, nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) + self.skip * x)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(skip: float, data: Any, batch_size: int, folder: Path) -> None:
    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[LIBCallback(node_layers=["a", "output"], every_n_validations=1)], default_root_dir=folder,
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    loader = DataLoader(data, batch_size=batch_size)
    trainer.fit(Skip(skip), loader, loader)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_skip_is_refused_whatever_the_batches_are(batch_size: int, tmp_path: Path) -> None:
    row = torch.randn(1, 4)
    data = torch.cat([row, row, torch.randn(6, 4)])  # the first batch of two samples has equal rows
    with pytest.raises(LIBError, match=r"'a' does not cut .* 'output' also depends on the model's input"):
        fit(1.0, data, batch_size, tmp_path)
