"""What watching costs: training with `LIBCallback` at its defaults and without, in turns; the median of the pairs."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lib_lightning import LIBCallback
from recipes.mlp import MLP, Labelled, LabelledData
from recipes.modular_addition import AllPairs, ModularAddition
from tests.benchmarks.subjects import PIXELS, labelled_images

PAIRS = int(os.environ.get("BENCH_PAIRS", 3))
# How much of a training: 1 is about a minute without the callback.
LENGTH = float(os.environ.get("BENCH_LENGTH", 1))


class Images(LabelledData):
    """As many made-up images as CIFAR-10 has."""

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
    """The recipe on made-up images: a validation after every epoch."""
    return MLP([PIXELS, 100, 100, 10]), Images(), {"max_epochs": max(1, round(12 * LENGTH))}


LAYERS = {
    modular_addition: ["transformer.embed", "transformer.mlp:input", "transformer.unembed:input", "output"],
    cifar10: ["layers.0:input", "layers.2:input", "layers.4:input", "output"],
}


def train(recipe: Callable[[], Any], callback: LIBCallback | None, folder: Path) -> tuple[float, pl.LightningModule]:
    """Seconds of a whole training, and the trained model."""
    pl.seed_everything(0, verbose=False)
    model, data, options = recipe()
    data.setup("fit")
    data.setup = lambda stage: None  # to make images is no part of training
    trainer = pl.Trainer(
        **options, default_root_dir=folder, accelerator="cpu", devices=1, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback] if callback else [],
    )  # fmt: skip
    started = time.perf_counter()
    trainer.fit(model, data)
    return time.perf_counter() - started, model


@pytest.mark.parametrize("recipe", [modular_addition, cifar10], ids=["modular_addition", "cifar10"])
def test_share_of_training(benchmark: Any, recipe: Callable[[], Any], tmp_path: Path) -> None:
    overheads, without, snapshots = [], [], 0

    def pair() -> None:
        nonlocal snapshots
        callback = LIBCallback(LAYERS[recipe])
        # Whoever comes second has the warmer machine: they take turns.
        watched_first = len(overheads) % 2
        runs = [(True, callback), (False, None)] if watched_first else [(False, None), (True, callback)]
        found = {watched: train(recipe, c, tmp_path / f"{len(overheads)}-{watched}") for watched, c in runs}
        assert callback.graph is not None
        assert all(torch.isfinite(E).all() for E in callback.graph.edges.values())
        plain, watched = (found[w][1].state_dict() for w in (False, True))
        assert all(torch.equal(weight, watched[name]) for name, weight in plain.items()), "training is untouched"
        overheads.append(found[True][0] - found[False][0])
        without.append(found[False][0])
        snapshots = callback.snapshots

    benchmark.pedantic(pair, rounds=PAIRS, iterations=1)
    over = statistics.median(own / plain for own, plain in zip(overheads, without, strict=True))
    benchmark.extra_info |= {
        "training without (s)": round(statistics.median(without), 1),
        "overhead, of training without": f"{over:.1%}",
        "share of wall time": f"{over / (1 + over):.1%}",
        "snapshots": snapshots,
    }
