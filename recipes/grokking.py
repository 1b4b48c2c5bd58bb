"""When do the features move, and when does test accuracy? Modular addition, watched while it groks, for several seeds.

    python -m recipes.grokking --folder runs/grokking     # train what is not there yet, write results and figure
    python -m recipes.grokking                            # the table of the README, from the committed results

Two minutes of one CPU core a seed. Each run is that of ``modular_addition.yaml`` with another seed of split and
weights, twice as many snapshots, and a validation every ten steps.
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


def halfway(steps: Sequence[float], values: Sequence[float], start: float) -> float:
    """When a series had gone half of its way from one step to its end, for good.

    Args:
        steps: Where it was looked at, rising.
        values: What it was there.
        start: Step at which the way begins.

    Returns:
        The step, interpolated; NaN for a series that ends where it was.

    Example:
        >>> halfway([0, 10, 20, 30], [5.0, 1.0, 3.0, 3.0], start=10)
        15.0
    """
    inside = [(step, value) for step, value in zip(steps, values, strict=True) if step >= start]
    (_, first), (_, last) = inside[0], inside[-1]
    if first == last:
        return math.nan
    done = [(step, (value - first) / (last - first)) for step, value in inside]
    before = max(k for k, (_, share) in enumerate(done) if share < 0.5)
    (step, share), (step_next, share_next) = done[before], done[before + 1]
    return step + (step_next - step) * (0.5 - share) / (share_next - share)


def memorised(accuracy: Series) -> float:
    """The step by which the training pairs were known by heart: 99% of them, for good."""
    return 1 + max(step for step, value in zip(accuracy["step"], accuracy["train"], strict=True) if value < 0.99)


def report(results: Mapping[str, Any]) -> str:
    """Say when everything was halfway from memorised to the end.

    Args:
        results: What `measure` has found, by seed.

    Returns:
        A table in Markdown.
    """
    names = [name for name in next(iter(results.values()))["lib"] if name != "step"]
    rows: dict[str, list[float]] = {"memorised": [], "test accuracy": [], **{name: [] for name in names}}
    for run in results.values():
        accuracy, lib = run["accuracy"], run["lib"]
        rows["memorised"].append(start := memorised(accuracy))
        rows["test accuracy"].append(halfway(accuracy["step"], accuracy["test"], start))
        for name in names:
            rows[name].append(halfway(lib["step"], lib[name], start))
    lines = [
        f"| halfway at step | {' | '.join(f'seed {seed}' for seed in results)} | share of test accuracy's |",
        "|---" * (len(results) + 2) + "|",
    ]
    for name, steps in rows.items():
        cells = ["-" if math.isnan(step) else f"{step:,.0f}" for step in steps]
        ratios = [s / test for s, test in zip(steps, rows["test accuracy"], strict=True) if not math.isnan(s)]
        lines.append(f"| {name} | {' | '.join(cells)} | {_mean(ratios) if name != 'test accuracy' else '1'} |")
    return "\n".join(lines)


def _mean(ratios: Sequence[float]) -> str:
    """Geometric mean and range."""
    if not ratios:
        return "-"
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    return f"{mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


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
