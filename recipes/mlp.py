"""Multi-layer perceptron and labelled images, shared by the CIFAR-10 and the digits recipe."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset


class MLP(L.LightningModule):
    """Linear layers with ReLU between them, trained with Adam on cross entropy.

    The layers are called ``layers.0``, ``layers.2``, ``layers.4`` and so on; ``layers.2:input`` is the input of the
    second linear layer, after the ReLU.

    Args:
        sizes: Width of the input, of each hidden layer, and number of classes.
        lr: Learning rate.
    """

    def __init__(self, sizes: Sequence[int] = (64, 32, 32, 10), lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])  # no ReLU on the logits

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, classes)`` of vectors ``(n, width)``."""
        return self.layers(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy of one batch."""
        x, labels = batch
        loss = F.cross_entropy(self(x), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Loss and accuracy on the training and the test examples."""
        x, labels = batch
        logits, split = self(x), ("train", "test")[dataloader_idx]
        accuracy = (logits.argmax(-1) == labels).float().mean()
        options: dict[str, Any] = {"add_dataloader_idx": False, "batch_size": len(x)}
        self.log(f"accuracy/{split}", accuracy, prog_bar=True, **options)
        self.log(f"loss/{split}", F.cross_entropy(logits, labels), **options)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), self.hparams.lr)


class Labelled(Dataset[Any]):
    """Labelled images in memory, as flat vectors with values from 0 to 1.

    Args:
        images: Images of shape ``(n, ...)`` with values from 0 to ``largest``.
        labels: Class indices, shape ``(n,)``.
        largest: Value that becomes 1.
    """

    def __init__(self, images: Tensor, labels: Tensor, largest: int) -> None:
        self.images, self.labels, self.largest = images.flatten(1), labels.long(), largest

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """One image and its label."""
        return self.images[index].float() / self.largest, self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A batch in one indexing operation, much faster than stacking single images."""
        return self.images[indices].float() / self.largest, self.labels[indices]


class LabelledData(L.LightningDataModule):
    """Training and test examples in memory, which a subclass reads in `read`.

    Args:
        batch_size: Examples in a training batch.
    """

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def read(self) -> tuple[Labelled, Labelled]:
        """Training and test examples."""
        raise NotImplementedError(f"{type(self).__name__} does not implement read().")

    def setup(self, stage: str) -> None:
        """Read the examples. Not at construction, so that the command line prints an error in one line."""
        self.train, self.test = self.read()

    def train_dataloader(self) -> DataLoader[Any]:
        """The training examples, shuffled."""
        return DataLoader(self.train, self.batch_size, shuffle=True, collate_fn=identity)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """The training examples, from which LIBCallback takes its samples, and the test examples."""
        return [DataLoader(split, 1000, collate_fn=identity) for split in (self.train, self.test)]


def identity(batch: Any) -> Any:
    """Return the batch, which `Labelled` has collated already."""
    return batch
