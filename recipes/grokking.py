"""When do features change, and when does test accuracy? Modular addition while it groks, for several seeds.

    python -m recipes.grokking --folder runs/grokking     # train the networks that are missing, and measure
    python -m recipes.grokking --figure grokking.png      # draw it
    python -m recipes.grokking                            # the tables of docs/grokking.md, from the committed results

Two minutes of one CPU core per seed. Each run is that of ``modular_addition.yaml`` with another seed of split and
weights, twice as many snapshots, and a validation every ten steps.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure

from lib_lightning import InteractionGraph, LIBCallback, NodeLayer
from lib_lightning.labels.fourier import FourierLabels
from lib_lightning.metrics.functional import effective_edges, effective_features, number_of_features
from lib_lightning.plots.image import render_png
from lib_lightning.plots.over_time import Curve, Panel, draw_over_time
from recipes.modular_addition import AllPairs, ModularAddition

RESULTS = Path(__file__).parent / "grokking.json"
SEEDS = (0, 1, 2, 3, 4)
STEPS = 3000
THRESHOLDS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)
# The last node layer before the logits.
BEFORE_OUTPUT = "resid_post"
TO_OUTPUT, LABELLED = "effective edges to the output", "Fourier-labelled features"
SHARE = "share of the importance in Fourier-labelled features"
Series = dict[str, list[float]]


def train(
    folder: Path,
    seed: int,
    modulus: int = 59,
    steps: int = STEPS,
    per_decade: int = 20,
    callbacks: Sequence[L.Callback] = (),
) -> None:
    """Train one network with the callback.

    Args:
        folder: Folder for its snapshots and accuracies.
        seed: Seed of split and weights.
        modulus: The modulus ``p``.
        steps: Number of steps.
        per_decade: Snapshots per tenfold increase of the step.
        callbacks: Further callbacks, such as one that logs something else.
    """
    L.seed_everything(seed)
    data = AllPairs(modulus=modulus, steps_per_epoch=steps, split_seed=seed)
    layers = [
        NodeLayer(["transformer.embed"], name="resid_pre"),
        NodeLayer(["transformer.mlp:input"], name="resid_mid"),
        NodeLayer(["transformer.unembed:input"], name=BEFORE_OUTPUT),
        "output",
    ]
    callback = LIBCallback(layers, log_spaced=per_decade, labeller=FourierLabels(modulus), effort="exact")
    logger = CSVLogger(folder, name="", version="")
    trainer = L.Trainer(
        max_epochs=1, val_check_interval=min(10, steps), callbacks=[callback, *callbacks], logger=logger,
        accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(ModularAddition(modulus), datamodule=data)


def measure(folder: Path) -> dict[str, Any]:
    """Read accuracies and metrics over time from the files of a run.

    Args:
        folder: Folder of `train`.

    Returns:
        ``accuracy`` and ``lib``, each with ``step`` and series over it.
    """
    accuracy: Series = {"step": [], "train": [], "test": []}
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            if row["accuracy/test"]:
                # Lightning logs the index of a step, which starts at 0.
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
        TO_OUTPUT: float(edges[-1]),
        LABELLED: float(sum(map(bool, labels))),
        SHARE: float(importance[[bool(label) for label in labels]].sum() / importance.sum()),
    }


def halfway(steps: Sequence[float], values: Sequence[float], start: float) -> float:
    """Find when a series first reaches the midpoint between its value at one step and its final value.

    Args:
        steps: Steps, increasing.
        values: Values at these steps. The final value is the median of the last five, because training at this learning
            rate has spikes, after which accuracy is low for some steps.
        start: Step of the first value.

    Returns:
        The step, interpolated; NaN if the final value equals the first.

    Example:
        >>> halfway([0, 10, 20, 30, 40, 50], [5.0, 1.0, 3.0, 5.0, 5.0, 5.0], start=10)
        20.0
    """
    first = next(k for k, step in enumerate(steps) if step >= start)
    change = statistics.median(values[-5:]) - values[first]
    if change == 0:
        return math.nan
    done = [(value - values[first]) / change for value in values]
    after = next(k for k in range(first, len(values)) if done[k] >= 0.5)
    weight = (0.5 - done[after - 1]) / (done[after] - done[after - 1])
    return steps[after - 1] + (steps[after] - steps[after - 1]) * weight


def memorised(accuracy: Series) -> float:
    """The first step at which 99% of the training pairs are correct."""
    return next(step for step, value in zip(accuracy["step"], accuracy["train"], strict=True) if value >= 0.99)


def reached(steps: Sequence[float], values: Sequence[float], level: float) -> float:
    """Find when a series first reaches a level; NaN if it never does.

    Example:
        >>> reached([0, 10, 20], [0.1, 0.4, 0.7], 0.4)
        10
    """
    return next((step for step, value in zip(steps, values, strict=True) if value >= level), math.nan)


def report(results: Mapping[str, Any]) -> str:
    """Tabulate when test accuracy and features changed.

    Args:
        results: Results of `measure`, by seed.

    Returns:
        Two tables in Markdown.
    """
    runs = list(results.values())
    names = [name for name in runs[0]["lib"] if name not in ("step", SHARE)]
    starts = [memorised(run["accuracy"]) for run in runs]
    middle = {
        "test accuracy": [
            halfway(run["accuracy"]["step"], run["accuracy"]["test"], start)
            for run, start in zip(runs, starts, strict=True)
        ],
        **{
            name: [halfway(run["lib"]["step"], run["lib"][name], s) for run, s in zip(runs, starts, strict=True)]
            for name in names
        },
    }
    half = {
        "test accuracy": [reached(run["accuracy"]["step"], run["accuracy"]["test"], 0.5) for run in runs],
        SHARE: [reached(run["lib"]["step"], run["lib"][SHARE], 0.5) for run in runs],
    }
    first = {"training pairs memorised": starts}
    return "\n\n".join(
        _table(title, list(results), rows)
        for title, rows in (
            ("halfway from memorising to the end, at step", middle | first),
            ("half, at step", half),
        )
    )


def _table(title: str, seeds: Sequence[str], rows: Mapping[str, Sequence[float]]) -> str:
    lines = [
        f"| {title} | {' | '.join(f'seed {seed}' for seed in seeds)} | of test accuracy's step |",
        "|---" * (len(seeds) + 2) + "|",
    ]
    for name, steps in rows.items():
        cells = ["-" if math.isnan(step) else f"{step:,.0f}" for step in steps]
        pairs = zip(steps, rows["test accuracy"], strict=True)
        ratios = [step / test for step, test in pairs if not math.isnan(step)]
        lines.append(f"| {name} | {' | '.join(cells)} | {'1' if name == 'test accuracy' else _mean(ratios)} |")
    return "\n".join(lines)


def _mean(ratios: Sequence[float]) -> str:
    """Geometric mean and range."""
    if not ratios:
        return "-"
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    return f"{mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def draw(results: Mapping[str, Any]) -> Figure:
    """Draw accuracies and features of all seeds side by side.

    Args:
        results: Results of `measure`, by seed.

    Returns:
        A figure with one column for each seed.
    """
    return draw_over_time(
        {f"seed {seed}": _panels(run["accuracy"], run["lib"]) for seed, run in results.items()},
        title="Modular addition: when features move, and when test accuracy does",
    )


def _panels(accuracy: Series, lib: Series) -> list[Panel]:
    def curve(name: str, series: Series, key: str) -> Curve:
        return Curve(name, [int(step) for step in series["step"]], series[key])

    counts = [curve(f"above {t:g}", lib, f"features above {t:g}") for t in THRESHOLDS]
    return [
        Panel("accuracy", [curve("train", accuracy, "train"), curve("test", accuracy, "test")], limits=(0, 1)),
        Panel(f"features of {BEFORE_OUTPUT}", counts, log=True),
        Panel("effective features", [curve("LIB", lib, "effective features")]),
        Panel("effective edges", [curve("all", lib, "effective edges"), curve("to output", lib, TO_OUTPUT)]),
        Panel("Fourier-labelled", [curve("features", lib, LABELLED)]),
        Panel("their importance", [curve("share", lib, SHARE)], limits=(0, 1)),
    ]


def main(args: Sequence[str] | None = None) -> None:
    """Train, measure, draw, and print."""
    parser = argparse.ArgumentParser(prog="python -m recipes.grokking", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--folder", type=Path, help="train the networks that are missing in this folder, and measure all of them"
    )
    parser.add_argument("--figure", type=Path, help="file of the figure to write")
    parsed = parser.parse_args(args)
    if parsed.folder is not None:
        found = {}
        for seed in SEEDS:
            run = parsed.folder / f"seed-{seed}"
            if not (run / "lib" / "final.safetensors").exists():
                train(run, seed)
            found[str(seed)] = measure(run)
        RESULTS.write_text(json.dumps(found))
    results = json.loads(RESULTS.read_text())
    if parsed.figure is not None:
        parsed.figure.write_bytes(render_png(draw(results)).data)
    sys.stdout.write(report(results) + "\n")


if __name__ == "__main__":
    main()
