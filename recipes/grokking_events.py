"""Which events of features come before a network generalises? Modular addition while it groks, for several seeds.

    python -m recipes.grokking_events --folder runs/grokking_events   # train the networks that are missing, and measure
    python -m recipes.grokking_events --figure align.png              # draw it
    python -m recipes.grokking_events                                 # the tables of docs/align.md, from the results

Two and a half minutes of one CPU core per seed. Each run is modular addition modulo 59 with another seed of
split and weights, twice as many snapshots, and a validation every ten steps. Beside them another tool,
`recipes.learning_coefficient`, writes its estimates to ``llc.csv``. Afterwards, ``tensorboard --logdir
runs/grokking_events`` shows events, accuracies and these estimates on the same slider.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from matplotlib.figure import Figure

from lib_lightning import LIBCallback, NodeLayer, align_events
from lib_lightning.alignment import KindOffsets, SteepestChange
from lib_lightning.alignment.offsets import offsets_of, weighted_quantile
from lib_lightning.labels.fourier import FourierLabels
from lib_lightning.plots.image import render_png
from lib_lightning.plots.palette import MODULES, MUTED, TEXT
from recipes.learning_coefficient import LearningCoefficient
from recipes.modular_addition import AllPairs, ModularAddition

RESULTS = Path(__file__).parent / "grokking_events.json"
SEEDS = (0, 1, 2, 3, 4)
MODULUS, STEPS = 59, 3000
# Scalars, which change of each, and what the page calls it.
SCALARS = {
    "accuracy/test": ("rise", "test accuracy rises"),
    "loss/test": ("fall", "test loss falls"),
    "llc/mean": ("fall", "the learning coefficient falls"),
}
# In the order of the table: those of features, and those of metrics of the whole graph.
KINDS = ("born", "split", "emerged", "rose", "fell", "faded", "merged", "died", "metric rose", "metric fell")


def train(
    folder: Path,
    seed: int,
    modulus: int = MODULUS,
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
        NodeLayer(["transformer.unembed:input"], name="resid_post"),
        "output",
    ]
    callback = LIBCallback(layers, log_spaced=per_decade, labeller=FourierLabels(modulus), effort="exact")
    logger = CSVLogger(folder, name="", version="")
    trainer = L.Trainer(
        max_epochs=1, val_check_interval=min(10, steps), callbacks=[callback, *callbacks], logger=logger,
        accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(ModularAddition(modulus), datamodule=data)


def run(folder: Path, seed: int, modulus: int = MODULUS, steps: int = STEPS, per_decade: int = 20) -> None:
    """Train one network with both callbacks.

    Args:
        folder: Log directory.
        seed: Seed of split and weights.
        modulus: The modulus ``p``.
        steps: Number of steps.
        per_decade: Snapshots, and estimates of the other tool, per tenfold increase of the step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = AllPairs(modulus=modulus, split_seed=seed)
    tokens, answers = data.tokens[: data.n_train], data.answers[: data.n_train]
    due = {0, *(round(10 ** (k / per_decade)) for k in range(math.ceil(per_decade * math.log10(steps)))), steps}
    other = LearningCoefficient(folder / "llc.csv", sorted(due), tokens, answers, "transformer")
    train(folder, seed, modulus, steps, per_decade, [other])


def measure(folders: Sequence[Path], scalars: Mapping[str, tuple[str, str]] = SCALARS) -> dict[str, Any]:
    """Align the events of all runs with each scalar.

    Args:
        folders: Log directories.
        scalars: Names of scalars, with the direction of the change and words for it.

    Returns:
        For each scalar ``runs``, with the ``change`` of each, and by kind the number of its ``events`` and the step at
        which half of their weight has come; and ``kinds``, the rows of the table.
    """
    found = {}
    for scalar, (direction, _) in scalars.items():
        aligned = align_events(folders, scalar, direction=direction)  # type: ignore[arg-type]
        whole = aligned.to_dict()
        found[scalar] = {
            "log": aligned.log,
            "runs": [
                {
                    "name": folder.name,
                    "change": written["change"],
                    "events": {
                        kind: [len(events), weighted_quantile(events, 0.5)]
                        for kind, events in sorted(one.events.items())
                    },
                }
                for folder, one, written in zip(folders, aligned.runs, whole["runs"], strict=True)
            ],
            "kinds": whole["kinds"],
        }
    return found


def offsets(aligned: Mapping[str, Any], kind: str) -> KindOffsets:
    """The offsets of a kind of event, from the steps at which half of its events have come in each run.

    Args:
        aligned: Results for one scalar.
        kind: The kind.

    Returns:
        As `lib_lightning.align_events`, with the number of all events.
    """
    runs = [run for run in aligned["runs"] if not run["change"]["reason"] and kind in run["events"]]
    found = offsets_of(kind, [(_change(run), [(run["events"][kind][1], 1.0)]) for run in runs])
    return KindOffsets(**{**vars(found), "num_events": sum(run["events"][kind][0] for run in runs)})


def _change(run: Mapping[str, Any]) -> SteepestChange:
    return SteepestChange(**{key: math.nan if value is None else value for key, value in run["change"].items()})


def table(results: Mapping[str, Any]) -> str:
    """How long before or after each change the events come.

    Args:
        results: As `measure` returns them.

    Returns:
        Tables in Markdown.
    """
    return "\n\n".join(_table(scalar, aligned) for scalar, aligned in results.items())


def _table(scalar: str, aligned: Mapping[str, Any]) -> str:
    changes = [_change(run) for run in aligned["runs"]]
    steps = ", ".join(f"{change.step:,.0f}" if change.exists else "-" for change in changes)
    lines = [
        f"When {SCALARS[scalar][1]} (`{scalar}`), most steeply at step {steps}:",
        "",
        "| event | events | median | quartiles | times its step | before, within, after | p |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        one = offsets(aligned, kind)
        if one.num_runs < 2:
            continue
        low, high = one.quartiles
        p = "-" if math.isnan(one.p_value) else f"{one.p_value:.2g}"
        lines.append(
            f"| {kind} | {one.num_events:,} | {one.offset:+,.0f} | {low:+,.0f} to {high:+,.0f} | {one.times:.2f} | "
            f"{one.before}, {one.within}, {one.after} | {p} |"
        )
    return "\n".join(lines)


def story(results: Mapping[str, Any]) -> str:
    """What the results show, as the page says it.

    Args:
        results: As `measure` returns them.

    Returns:
        A list in Markdown.
    """
    every = [run for aligned in results.values() for run in aligned["runs"]]
    if any(run["change"]["reason"] or "emerged" not in run["events"] for run in every):
        return "Not all runs have steepest changes and features that emerge."
    changes = {scalar: [run["change"]["step"] for run in aligned["runs"]] for scalar, aligned in results.items()}
    loss, llc = changes["loss/test"], changes["llc/mean"]
    aligned = results["loss/test"]
    emerged = [run["events"]["emerged"][1] for run in aligned["runs"]]
    died = offsets(aligned, "died")
    earlier = sum(a < b for a, b in zip(llc, loss, strict=True))
    return (
        f"- *Emergence does not wait.* Half of what emerges has emerged by step {min(emerged):,.0f} to "
        f"{max(emerged):,.0f} in all {len(emerged)} networks, whether the test loss falls at step {min(loss):,.0f} or "
        f"at {max(loss):,.0f}. So it comes before, but at a time of its own: while training pairs are being memorised."
        f"\n- *Deaths follow.* Half of the features that die, by importance, have died at {died.times:.1f} times the "
        f"step at which the test loss falls (median), and after it in {died.after} of {died.num_runs} networks.\n"
        f"- *The learning coefficient is early, too.* It rises while pairs are memorised, and falls before the test "
        f"loss in {earlier} of {len(loss)} networks."
    )


def draw(results: Mapping[str, Any]) -> Figure:
    """Draw for each scalar and kind of event when it comes in each run, on the run's own time.

    Args:
        results: As `measure` returns them.

    Returns:
        The figure, 1,000 pixels wide.
    """
    kinds = [k for k in KINDS if any(offsets(aligned, k).num_runs >= 2 for aligned in results.values())]
    figure = Figure(figsize=(10, 1.75 + 0.3 * len(kinds)), dpi=100, facecolor="white")
    height = 1.75 + 0.3 * len(kinds)
    title = "When events of features come: before, or after"
    figure.text(0.012, 1 - 0.32 / height, title, fontsize=14, weight="bold", color=TEXT)
    every = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.11, right=0.985, top=1 - 0.85 / height, bottom=0.85 / height, wspace=0.08)
    for axes, (scalar, aligned) in zip(every, results.items(), strict=True):
        axes.set_title(f"1: {SCALARS[scalar][1]}", fontsize=10.5, weight="bold", color=TEXT, loc="left")
        located = [run for run in aligned["runs"] if not run["change"]["reason"]]
        for y, kind in enumerate(kinds):
            axes.axhline(y, color=MUTED, lw=0.4, alpha=0.5, zorder=0)
            times = [run["events"][kind][1] / run["change"]["step"] for run in located if kind in run["events"]]
            color = MODULES[2] if kind.startswith("metric") else MODULES[0]
            axes.plot(times, [y] * len(times), "o", color=color, ms=5, alpha=0.65, mew=0)
            if len(times) >= 2:
                axes.plot([offsets(aligned, kind).times], [y], "|", color=TEXT, ms=13, mew=2)
        axes.axvline(1, color=TEXT, lw=1, ls=(0, (4, 2)), zorder=1)
        if located:
            ends = [[run["change"][key] / run["change"]["step"] for run in located] for key in ("first", "last")]
            low, high = (weighted_quantile([(value, 1.0) for value in values], 0.5) for values in ends)
            axes.axvspan(low, high, color=MUTED, alpha=0.15, lw=0, zorder=0)
        axes.set_xscale("log")
        axes.set_xlim(0.02, 12)
        axes.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
        axes.minorticks_off()
        axes.set_yticks(range(len(kinds)), kinds)
        axes.tick_params(labelsize=9.5, colors=TEXT, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    every[0].invert_yaxis()
    key = (
        "dots: one run each, when half of its events, by importance, have come; bars: median; "
        "grey: steps that cannot be told apart from 1"
    )
    figure.text(0.11, 0.14 / height, key, fontsize=9.5, color=MUTED)
    axis = "step of the events, divided by the step of the steepest change"
    figure.text(0.55, 0.38 / height, axis, fontsize=9.5, color=TEXT, ha="center")
    return figure


def main(args: Sequence[str] | None = None) -> None:
    """Train, measure, draw, and print."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.grokking_events", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--folder", type=Path, help="train the networks that are missing in this folder, and measure")
    parser.add_argument("--figure", type=Path, help="file of the figure to write")
    parsed = parser.parse_args(args)
    if parsed.folder is not None:
        folders = [parsed.folder / f"seed-{seed}" for seed in SEEDS]
        for folder, seed in zip(folders, SEEDS, strict=True):
            if not (folder / "lib" / "final.safetensors").exists():
                run(folder, seed)
        RESULTS.write_text(json.dumps(measure(folders), indent=1) + "\n")
    results = json.loads(RESULTS.read_text())
    if parsed.figure is not None:
        parsed.figure.write_bytes(render_png(draw(results)).data)
    sys.stdout.write(f"{table(results)}\n\n{story(results)}\n")


if __name__ == "__main__":
    main()
