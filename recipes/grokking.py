"""When do the features move, and when does test accuracy? Modular addition, watched while it groks, for several seeds.

    python -m recipes.grokking --folder runs/grokking     # train what is not there yet, write results and figure
    python -m recipes.grokking                            # the table of the README, from the committed results

Two minutes of one CPU core a seed. Each run is that of ``modular_addition.yaml`` with another seed of split and weights,
twice as many snapshots, and a validation every ten steps.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from lib_lightning import InteractionGraph, LIBCallback, NodeLayer
from lib_lightning.labels import FourierLabels
from lib_lightning.metrics.functional import effective_edges, effective_features, number_of_features
from recipes.modular_addition import AllPairs, ModularAddition

RESULTS = Path(__file__).parent / "grokking.json"
SEEDS = (0, 1, 2, 3, 4)
STEPS = 3000
THRESHOLDS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)
# The last node layer that features are of; the one after it are the logits.
BEFORE_OUTPUT = "resid_post"
Series = dict[str, list[float]]


def train(folder: Path, seed: int, modulus: int = 59, steps: int = STEPS, per_decade: int = 20) -> None:
    """Train one network and watch it.

    Args:
        folder: Where its snapshots and its accuracies go.
        seed: Of split and weights.
        modulus: The modulus ``p``.
        steps: Number of steps.
        per_decade: Snapshots for each tenfold of steps.
    """
    L.seed_everything(seed)
    data = AllPairs(modulus=modulus, steps_per_epoch=steps, split_seed=seed)
    layers = [
        NodeLayer(["transformer.embed"], name="resid_pre"),
        NodeLayer(["transformer.mlp:input"], name="resid_mid"),
        NodeLayer(["transformer.unembed:input"], name=BEFORE_OUTPUT),
        "output",
    ]
    callback = LIBCallback(layers, log_spaced=per_decade, labeller=FourierLabels(modulus))
    logger = CSVLogger(folder, name="", version="")
    trainer = L.Trainer(
        max_epochs=1, val_check_interval=min(10, steps), callbacks=[callback], logger=logger, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(ModularAddition(modulus), datamodule=data)


def measure(folder: Path) -> dict[str, Any]:
    """Read from a run's files how everything went.

    Args:
        folder: Where `train` has put them.

    Returns:
        ``accuracy`` and ``lib``, each with ``step`` and series over it.
    """
    accuracy: Series = {"step": [], "train": [], "test": []}
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            if row["accuracy/test"]:
                # Lightning counts a step from before it.
                values = (int(row["step"]) + 1, row["accuracy/train"], row["accuracy/test"])
                for series, value in zip(accuracy.values(), values, strict=True):
                    series.append(float(value))
    found: Series = {"step": []}
    for path in sorted((folder / "lib" / "snapshots").glob("*.safetensors")):
        graph = InteractionGraph.load(path)
        found["step"].append(graph.info["step"])
        for name, value in _quantities(graph).items():
            found.setdefault(name, []).append(value)
    return {"accuracy": accuracy, "lib": found}


def _quantities(graph: InteractionGraph) -> dict[str, float]:
    importance = graph.bases[BEFORE_OUTPUT].importance
    labels = graph.labels[BEFORE_OUTPUT]
    edges = [effective_edges(E) for E in graph.edges.values()]
    return {
        **{f"features above {t:g}": float(number_of_features(importance, t)) for t in THRESHOLDS},
        "effective features": float(effective_features(importance)),
        "effective edges": float(sum(edges)),
        "effective edges to the output": float(edges[-1]),
        "Fourier-labelled features": float(sum(map(bool, labels))),
        "their share of the importance": float(importance[[bool(label) for label in labels]].sum() / importance.sum()),
    }


def moved(steps: Sequence[float], values: Sequence[float], share: float, start: float, end: float) -> float:
    """When a series had gone so much of its way from one step to another, for good.

    Args:
        steps: Where it was looked at, rising.
        values: What it was there.
        share: Of the way, between 0 and 1.
        start: Step at which the way begins.
        end: Step at which it ends.

    Returns:
        The step, interpolated; NaN for a series that has not moved.

    Example:
        >>> moved([0, 10, 20, 30], [5.0, 1.0, 3.0, 3.0], 0.5, start=10, end=30)
        15.0
    """
    way = _at(steps, values, end) - (first := _at(steps, values, start))
    if not way:
        return math.nan
    inside = [(s, (v - first) / way) for s, v in zip(steps, values, strict=True) if start <= s <= end]
    before = max((k for k, (_, done) in enumerate(inside) if done < share), default=-1)
    if before + 1 >= len(inside) or before < 0:
        return float(end if before >= 0 else start)
    (s, done), (s_next, done_next) = inside[before], inside[before + 1]
    return s + (s_next - s) * (share - done) / (done_next - done)


def _at(steps: Sequence[float], values: Sequence[float], step: float) -> float:
    return values[min(range(len(steps)), key=lambda k: abs(steps[k] - step))]


def main(args: Sequence[str] | None = None) -> None:
    """Train, measure, and print."""
    parser = argparse.ArgumentParser(prog="python -m recipes.grokking", description=__doc__)
    parser.add_argument("--folder", type=Path, help="train here what is not there yet, and measure it anew")
    parsed = parser.parse_args(args)
    if parsed.folder is not None:
        results = {}
        for seed in SEEDS:
            run = parsed.folder / f"seed-{seed}"
            if not (run / "lib" / "final.safetensors").exists():
                train(run, seed)
            results[str(seed)] = measure(run)
        RESULTS.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
