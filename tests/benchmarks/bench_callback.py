"""Overhead of `LIBCallback` and `SAETrainer` at their defaults: trainings with and without, alternating; medians.

On a shared machine, two identical trainings of a minute differ by more than 3%. Therefore the overhead that the
callback measures itself (`lib/overhead`, `sae/overhead`) is reported beside the differences of wall time and CPU time.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import pytest
import torch

from lib_lightning import LIBCallback, SAETrainer
from recipes.mlp import MLP, Labelled, LabelledData
from recipes.modular_addition import AllPairs, ModularAddition
from tests.benchmarks.subjects import PIXELS, labelled_images

PAIRS = int(os.environ.get("BENCH_PAIRS", 3))
# Length of a training: 1 is about a minute without the callback.
LENGTH = float(os.environ.get("BENCH_LENGTH", 1))


class Images(LabelledData):
    """As many random images as CIFAR-10 has."""

    def __init__(self, train: int = 50_000, test: int = 10_000) -> None:
        super().__init__(batch_size=64)
        self.sizes = train, test

    def read(self) -> tuple[Labelled, Labelled]:
        images, labels = labelled_images(sum(self.sizes))
        n = self.sizes[0]
        return Labelled(images[:n], labels[:n], 255), Labelled(images[n:], labels[n:], 255)


def modular_addition() -> tuple[pl.LightningModule, pl.LightningDataModule, dict[str, Any]]:
    """The recipe: modulus 59, a validation every 50 steps."""
    steps = max(100, round(3000 * LENGTH))
    return ModularAddition(), AllPairs(steps_per_epoch=steps), {"max_epochs": 1, "val_check_interval": 50}


def cifar10() -> tuple[pl.LightningModule, pl.LightningDataModule, dict[str, Any]]:
    """The recipe on random images: a validation after every epoch."""
    return MLP([PIXELS, 100, 100, 10]), Images(), {"max_epochs": max(1, round(12 * LENGTH))}


LAYERS = {
    modular_addition: ["transformer.embed", "transformer.mlp:input", "transformer.unembed:input", "output"],
    cifar10: ["layers.0:input", "layers.2:input", "layers.4:input", "output"],
}


class Training(NamedTuple):
    """Wall time and CPU time of a training in seconds, and the trained model."""

    wall: float
    cpu: float
    model: pl.LightningModule


def train(recipe: Callable[[], Any], callbacks: Sequence[pl.Callback], folder: Path) -> Training:
    """Train from the same initial weights."""
    pl.seed_everything(0, verbose=False)
    model, data, options = recipe()
    data.setup("fit")
    data.setup = lambda stage: None  # making the images is not part of training
    trainer = pl.Trainer(
        **options, default_root_dir=folder, accelerator="cpu", devices=1, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks],
    )  # fmt: skip
    wall, cpu = time.perf_counter(), time.process_time()
    trainer.fit(model, data)
    return Training(time.perf_counter() - wall, time.process_time() - cpu, model)


@pytest.mark.parametrize("recipe", [modular_addition, cifar10], ids=["modular_addition", "cifar10"])
@pytest.mark.parametrize("kinds", ["LIBCallback", "SAETrainer", "SAETrainer and LIBCallback"])
def test_share_of_training(benchmark: Any, recipe: Callable[[], Any], kinds: str, tmp_path: Path) -> None:
    pairs: list[tuple[Training, Training]] = []
    shares: list[float] = []
    taken: dict[str, int] = {}

    def pair() -> None:
        layers, callbacks = LAYERS[recipe], list[LIBCallback | SAETrainer]()
        latents = None
        if "SAETrainer" in kinds:
            callbacks.append(saes := SAETrainer(layers[1]))
            latents = {layers[1]: saes.dictionary(layers[1])}
        if "LIBCallback" in kinds:
            callbacks.append(LIBCallback(layers, dictionaries=latents))
        # The second training of a pair runs on a warmer machine: the order alternates.
        order = [[], callbacks] if len(pairs) % 2 else [callbacks, []]
        found = {bool(some): train(recipe, some, tmp_path / f"{len(pairs)}-{bool(some)}") for some in order}
        for callback in callbacks:
            if isinstance(callback, LIBCallback):
                assert callback.graph is not None
                assert all(torch.isfinite(E).all() for E in callback.graph.edges.values())
                taken["snapshots"] = callback.snapshots
            else:
                taken["steps of the autoencoder"] = int(callback._scalars["sae/steps"])
        plain, observed = found[False], found[True]
        weights = observed.model.state_dict()
        assert all(torch.equal(x, weights[name]) for name, x in plain.model.state_dict().items()), "unchanged"
        pairs.append((plain, observed))
        shares.append(sum(callback.meter.ratio for callback in callbacks))

    benchmark.pedantic(pair, rounds=PAIRS, iterations=1)
    benchmark.extra_info |= {
        "training without (s)": round(statistics.median(plain.wall for plain, _ in pairs), 1),
        "overhead": f"{statistics.median(shares):.1%}",
        "more wall time": f"{statistics.median(observed.wall / plain.wall for plain, observed in pairs) - 1:.1%}",
        "more CPU time": f"{statistics.median(observed.cpu / plain.cpu for plain, observed in pairs) - 1:.1%}",
    } | taken
