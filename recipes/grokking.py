"""Which quantities of the features change before test accuracy does? Three tasks while they grok, for twenty seeds.

python -m recipes.grokking --folder runs/grokking     # train the networks that are missing, and measure
python -m recipes.grokking --figure grokking.png      # draw it
python -m recipes.grokking                            # the tables of docs/grokking.md, from the committed results
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.interventions import feature_effects, keep_effects
from lib_lightning.io.basis_format import STEP
from lib_lightning.labels import ExampleLabels, FeatureSamples, Labels, find_labels
from lib_lightning.metrics.functional import effective_edges, effective_features, number_of_features
from lib_lightning.plots.image import render_png
from recipes import leads
from recipes.at_steps import AtSteps
from recipes.grokking_tasks import TASKS, Samples, Task
from recipes.leads import Lead, compare, ends, halfway, holm

RESULTS = Path(__file__).parent / "grokking.json"
SEEDS = tuple(range(20))
THRESHOLDS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)
# Test samples that the effects of features on the likelihood of the answers are measured on.
EFFECT_SAMPLES = 512
# A run counts if test accuracy is at least this in the end.
GENERALISED = 0.9
# Training samples are memorised when so many of them are right.
MEMORISED = 0.99
# Further entries of a graph's info.
ACCURACY, NAMED, ALIKE, LABELS_OF_TRAINING = "accuracy", "named", "alike", "labels of training samples"
MEMORISING = "training samples memorised"
LABELLED = "labelled features"
SHARE, SHARE_TRAINING = "importance in labelled features", "importance in labelled features (training)"
EXAMPLES, EXAMPLES_TRAINING = "examples with the same answer", "examples with the same answer (training)"
# What is small before training, so that it can be followed from there as well.
FROM_ZERO = (LABELLED, SHARE, SHARE_TRAINING, EXAMPLES, EXAMPLES_TRAINING)
Series = dict[str, list[float]]


def snapshot_steps(first: int, last: int, per_decade: int = 12) -> list[int]:
    """Steps of the snapshots: a few at first, and then at regular ratios.

    Args:
        first: Step from which on ratios are regular.
        last: The last step.
        per_decade: Snapshots per tenfold increase of the step from there on.

    Returns:
        The steps, ascending, from 0 to the last.

    Example:
        >>> snapshot_steps(50, 200, 4)
        [0, 12, 25, 50, 89, 158, 200]
    """
    count = math.ceil(per_decade * math.log10(last / first))
    regular = [round(first * 10 ** (k / per_decade)) for k in range(count)]
    return sorted({0, first // 4, first // 2, *regular, last})


class Snapshots(AtSteps):
    """Writes an interaction graph at each of some steps, with accuracies, labels and effects.

    Args:
        task: The task.
        folder: Folder for the files.
        steps: Numbers of optimizer steps.
    """

    def __init__(self, task: Task, folder: Path, steps: Sequence[int]) -> None:
        super().__init__(steps)
        self._task, self._folder = task, folder

    def take(self, step: int, module: L.LightningModule) -> None:
        """Compute a snapshot."""
        task, name = self._task, self._task.before_output
        graph = compute_interaction_graph(module, [task.train], task.layers, effort="exact")
        seen = {split: _feature_samples(graph, module, samples) for split, samples in task.samples.items()}
        labels = {split: task.labeller(own.features, own.inputs) for split, own in seen.items()}
        graph.labels = {name: labels["test"]}
        some = (task.test[0][:EFFECT_SAMPLES], task.test[1][:EFFECT_SAMPLES])
        features = [(name, j) for j in range(graph.bases[name].n_features)]
        keep_effects(
            graph, feature_effects(module, [some], graph, features=features), score="log_likelihood", level=0.05,
            samples=len(some[0]),
        )  # fmt: skip
        examples = [seen["test"].features.flatten(1).topk(6, 0, largest).indices.T for largest in (True, False)]
        graph.info |= {
            STEP: step,
            ACCURACY: {split: _accuracy(module, *samples) for split, samples in task.samples.items()},
            NAMED: sum(map(bool, ExampleLabels().label(seen["test"]).names)),
            LABELS_OF_TRAINING: labels["train"],
            ALIKE: _share_alike(task.test[1], *examples),
        }
        graph.save(self._folder / _file(step))


def _file(step: int) -> str:
    return f"step-{step:06d}.safetensors"


def train(make_task: Callable[[int], Task], folder: Path, seed: int, per_decade: int = 12) -> None:
    """Train one network, with snapshots.

    Args:
        make_task: One of `TASKS`.
        folder: Folder for the snapshots.
        seed: Seed of data and weights.
        per_decade: Snapshots per tenfold increase of the step.
    """
    L.seed_everything(seed)
    task = make_task(seed)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = L.Trainer(
        max_epochs=1, callbacks=[Snapshots(task, folder, snapshot_steps(task.first, task.steps, per_decade))],
        logger=False, limit_val_batches=0, accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task.module, datamodule=task.data)


def measure(folder: Path, make_task: Callable[[int], Task], seed: int) -> dict[str, Series]:
    """Read accuracies and quantities over time from the snapshots of a run.

    Args:
        folder: Folder of `train`.
        make_task: The same as for `train`.
        seed: The same as for `train`.

    Returns:
        ``step``, ``train`` and ``test`` accuracies, and one series for each quantity.
    """
    task, found = make_task(seed), dict[str, list[float]]()
    for path in sorted(folder.glob("*.safetensors")):
        graph = InteractionGraph.load(path)
        row = {"step": graph.info[STEP], **graph.info[ACCURACY], **quantities(graph, task.before_output, task.train[1])}
        for name, value in row.items():
            found.setdefault(name, []).append(float(f"{value:.5g}"))
    return found


def quantities(graph: InteractionGraph, layer: str, answers: Tensor) -> dict[str, float]:
    """The quantities of one snapshot.

    Args:
        graph: The interaction graph.
        layer: The node layer before the output.
        answers: Answers of the samples that it was computed on.

    Returns:
        Numbers by name.
    """
    basis = graph.bases[layer]
    importance, for_output = basis.importance, basis.output_importance
    if for_output is None:
        raise ValueError(f"The graph has no importances for the output at {layer}.")
    labelled, of_training = (
        torch.tensor([bool(label) for label in labels])
        for labels in (graph.labels[layer], graph.info[LABELS_OF_TRAINING])
    )
    edges = [effective_edges(E) for E in graph.edges.values()]
    examples = graph.examples[layer]
    largest, smallest, _ = examples.counts
    extremes = (examples.samples[:, :largest], examples.samples[:, largest : largest + smallest])
    weights = importance / importance.sum()
    return {
        **{f"features above {t:g}": float(number_of_features(importance, t)) for t in THRESHOLDS},
        "effective features": float(effective_features(importance)),
        "effective edges": float(sum(edges)),
        "effective edges to the output": float(edges[-1]),
        "importance for the output": float(for_output.sum()),
        "effective features, for the output": float(effective_features(for_output)),
        "features above 0.01, for the output": float((for_output > 0.01 * for_output.max()).sum()),
        "causal features": float(graph.effects[layer].significant.sum()),
        "features named by examples": float(graph.info[NAMED]),
        EXAMPLES: float(weights @ torch.tensor(graph.info[ALIKE]).to(weights)),
        EXAMPLES_TRAINING: float(weights @ torch.tensor(_share_alike(answers, *extremes)).to(weights)),
        LABELLED: float(labelled.sum()),
        SHARE: float(weights[labelled].sum()),
        SHARE_TRAINING: float(weights[of_training].sum()),
    }


class _FeatureSamples:
    """Keeps the samples that a labeller sees, those of the last node layer in the end."""

    max_positions = ExampleLabels().max_positions

    def label(self, samples: FeatureSamples) -> Labels:
        self.samples = samples
        r = samples.features.shape[2]
        return Labels([""] * r, torch.full((r,), math.nan))

    def __call__(self, features: Tensor, inputs: Tensor, /) -> list[str]:
        return [""] * features.shape[2]


def _feature_samples(graph: InteractionGraph, module: L.LightningModule, samples: Samples) -> FeatureSamples:
    """Features of the node layer before the output on some samples, with what is known of these."""
    labeller = _FeatureSamples()
    find_labels(graph, module, [samples], labeller)
    return labeller.samples


def _accuracy(module: L.LightningModule, x: Tensor, answers: Tensor) -> float:
    with torch.no_grad():
        return float((module(x).argmax(-1) == answers).float().mean())


def _share_alike(answers: Tensor, *examples: Tensor) -> list[float]:
    """Of each feature, the share of pairs of examples of the same end that have the same answer.

    Args:
        answers: Answers of all samples, shape ``(n,)``.
        examples: For each end, numbers of the samples where each feature is largest, or smallest, shape ``(r, K)``.
    """
    shares = []
    for samples in examples:
        own = answers[samples.long()]
        same, k = (own[:, :, None] == own[:, None]).sum((1, 2)), own.shape[1]
        shares.append((same - k) / (k * (k - 1)))
    return torch.stack(shares).mean(0).tolist()


def memorised(run: Mapping[str, Sequence[float]]) -> float:
    """The first step of a snapshot at which the training samples are memorised; NaN if none is."""
    return next((step for step, x in zip(run["step"], run["train"], strict=True) if x >= MEMORISED), math.nan)


def counts(run: Mapping[str, Sequence[float]]) -> bool:
    """Whether a run counts: it memorises, and test accuracy is at least 90% in the end (median of five snapshots)."""
    return not math.isnan(memorised(run)) and statistics.median(run["test"][-5:]) >= GENERALISED


Compared = dict[str, dict[str, Lead]]


def compare_task(runs: Sequence[Mapping[str, Sequence[float]]]) -> tuple[Compared, dict[str, dict[str, float]]]:
    """Compare all quantities of a task with test accuracy.

    Args:
        runs: Results of `measure`; those that do not count are left out.

    Returns:
        Comparisons by kind (``"memorising"`` or ``"start"``, from where quantities go halfway to their final value) and
        quantity; and their p-values, corrected for the number of all of them, likewise.
    """
    runs = [run for run in runs if counts(run)]
    # Some runs have been measured before there were all quantities.
    every = dict.fromkeys(name for run in sorted(runs, key=len, reverse=True) for name in run)
    names = [name for name in every if name not in ("step", "train", "test")]
    starts, zeros = [memorised(run) for run in runs], [0.0] * len(runs)
    found = {
        "memorising": {
            **_compare(runs, names, starts),
            MEMORISING: compare(starts, _halfway(runs, "test", starts), [True] * len(runs)),
        },
        "start": _compare(runs, [name for name in FROM_ZERO if name in names], zeros),
    }
    # That training samples are memorised before halfway from there is no finding.
    tested = [(kind, name) for kind, leads_of in found.items() for name in leads_of if name != MEMORISING]
    corrected: dict[str, dict[str, float]] = {
        kind: dict.fromkeys(leads_of, math.nan) for kind, leads_of in found.items()
    }
    for (kind, name), p_value in zip(tested, holm([found[kind][name].p_value for kind, name in tested]), strict=True):
        corrected[kind][name] = p_value
    return found, corrected


def _compare(
    runs: Sequence[Mapping[str, Sequence[float]]], names: Sequence[str], starts: Sequence[float]
) -> dict[str, Lead]:
    test = _halfway(runs, "test", starts)
    return {name: compare(_halfway(runs, name, starts), test, _rises(runs, name, starts)) for name in names}


def _halfway(runs: Sequence[Mapping[str, Sequence[float]]], name: str, starts: Sequence[float]) -> list[float]:
    return [
        halfway(run["step"], run[name], start) if name in run else math.nan
        for run, start in zip(runs, starts, strict=True)
    ]


def _rises(runs: Sequence[Mapping[str, Sequence[float]]], name: str, starts: Sequence[float]) -> list[bool]:
    changes = [
        ends(run["step"], run[name], start) if name in run else (0.0, 0.0)
        for run, start in zip(runs, starts, strict=True)
    ]
    return [last > first for first, last in changes]


def resolution(results: Mapping[str, Any]) -> str:
    """How much the ratios change if every second snapshot is left out.

    Args:
        results: Results of `measure`, by task and seed.

    Returns:
        A sentence.
    """
    factors = []
    for runs in results.values():
        own = [run for run in runs.values() if counts(run)]
        fewer = [{name: series[::2] for name, series in run.items()} for run in own]
        both = [(one, other) for one, other in zip(own, fewer, strict=True) if counts(other)]
        all_leads, fewer_leads = (compare_task([pair[i] for pair in both])[0]["memorising"] for i in (0, 1))
        for name, lead in all_leads.items():
            if len(lead.ratios) == len(fewer_leads[name].ratios):
                factors += [abs(math.log(a / b)) for a, b in zip(lead.ratios, fewer_leads[name].ratios, strict=True)]
    if not factors:
        return "No run counts."
    factors.sort()
    middle, large = (math.exp(factors[int(q * len(factors))]) - 1 for q in (0.5, 0.9))
    return (
        f"With every second snapshot left out, half of the ratios change by less than {middle:.0%}, and nine in ten by "
        f"less than {large:.0%}."
    )


def report(results: Mapping[str, Any]) -> str:
    """Tabulate when quantities change, compared with test accuracy.

    Args:
        results: Results of `measure`, by task and seed.

    Returns:
        Tables in Markdown.
    """
    parts = [_runs_table(results)]
    titles = {"memorising": "halfway from memorising to the end", "start": "halfway from the start to the end"}
    for task, runs in results.items():
        found, corrected = compare_task(list(runs.values()))
        parts += [leads.table(f"{task}: {titles[kind]}", own, corrected[kind]) for kind, own in found.items()]
    return "\n\n".join([*parts, resolution(results)])


def _runs_table(results: Mapping[str, Any]) -> str:
    lines = [
        "| task | runs | that generalise | memorised at step | test accuracy then | test accuracy halfway at step | "
        "in the end |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, runs in results.items():
        own = [run for run in runs.values() if counts(run)]
        starts = [memorised(run) for run in own]
        at_start = [run["test"][run["step"].index(start)] for run, start in zip(own, starts, strict=True)]
        middle = [halfway(run["step"], run["test"], start) for run, start in zip(own, starts, strict=True)]
        end = [statistics.median(run["test"][-5:]) for run in own]
        cells = [_range(starts, ",.0f"), _range(at_start, ".0%"), _range(middle, ",.0f"), _range(end, ".1%")]
        lines.append(f"| {task} | {len(runs)} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _range(values: Sequence[float], form: str) -> str:
    """Median, smallest and largest."""
    if not values:
        return "-"
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def story(results: Mapping[str, Any]) -> str:
    """What the results show, as the page says it.

    Args:
        results: Results of `measure`, by task and seed.

    Returns:
        A list in Markdown.
    """
    compared = {task: compare_task(list(runs.values()))[0] for task, runs in results.items()}
    late, early = ({task: found[kind] for task, found in compared.items()} for kind in ("memorising", "start"))
    output, tail, effective = "importance for the output", "features above 1e-06", "effective features"
    causal, large = "causal features", "features above 0.1"
    return (
        "Steps are multiples of test accuracy's, in the order addition, subtraction, parity.\n\n"
        "- *No quantity leads in all three tasks*, if it is followed from memorising on. In both perceptrons, "
        f"importance for the output does, which falls ({_times(late, output)}; first in {_first(late, output)} runs), "
        "and so does importance in labelled features with labels from training samples, which rises "
        f"({_times(late, SHARE_TRAINING)}; {_first(late, SHARE_TRAINING)}). In addition, neither can be told from test "
        "accuracy, half of whose rise is over there when the training samples are memorised, so that little is left to "
        "compare.\n"
        "- *To be first is not to foretell.* Over runs, rank correlations with the step of test accuracy are "
        f"{_correlations(late, output)} for the first, and {_correlations(late, SHARE_TRAINING)} for the second: in "
        "perceptrons only the second says when test accuracy will rise, and only in subtraction. What falls or rises "
        "right after memorising may follow the training loss, at a time of its own.\n"
        "- *The number of large features*, above a tenth of the importance of a node layer, leads in subtraction "
        f"alone, where it rises ({_times(late, large)}; first in {_first(late, large)} runs in which it changes). In "
        f"addition it changes by a few features, upwards in {late['addition'][large].rises} of "
        f"{len(late['addition'][large].ratios)} runs: what has no direction has no time either.\n"
        "- *What is part of the solution comes first in addition, from the start of training on*: importance in "
        f"labelled features with labels from test samples ({_times(early, SHARE)}; {_first(early, SHARE)}), though not "
        f"their number ({_times(early, LABELLED)}). In perceptrons it comes after test accuracy. With labels from "
        f"training samples importance is early in all three ({_times(early, SHARE_TRAINING)}): any feature by which "
        "memorised answers are told apart looks like it.\n"
        f"- *Examples on test samples have the same answer* early in parity alone ({_times(late, EXAMPLES)}; "
        f"{_first(late, EXAMPLES)}), where they also go with test accuracy from run to run "
        f"({late['parity'][EXAMPLES].rank_correlation:.2f}).\n"
        "- *Causal features* lead nowhere. They rise just after test accuracy in subtraction "
        f"({_times(late, causal)}), and have no direction in the two others: upwards in {_rises_in(late, causal)} runs "
        "in which their number changes.\n"
        "- *Three claims from five runs of addition do not carry over.* Labelled features come first: there by "
        "importance, from the start of training on, and see above. Averages move with test accuracy: effective "
        f"features have no direction in addition ({late['addition'][effective].rises} of "
        f"{len(late['addition'][effective].ratios)} runs upwards), and lead in perceptrons "
        f"({_times(late, effective)}), upwards in one and downwards in the other. The tail goes last in addition "
        f"({late['addition'][tail].times:.2f}, first in {late['addition'][tail].before} of "
        f"{len(late['addition'][tail].ratios)}), not in parity ({late['parity'][tail].times:.2f}); in subtraction its "
        "size stays the same."
    )


def _times(late: Mapping[str, Mapping[str, Lead]], name: str) -> str:
    """A quantity's steps in all tasks."""
    return _three(f"{late[task][name].times:.2f}" for task in TASKS)


def _first(late: Mapping[str, Mapping[str, Lead]], name: str) -> str:
    return _three(f"{late[task][name].before} of {len(late[task][name].ratios)}" for task in TASKS)


def _rises_in(late: Mapping[str, Mapping[str, Lead]], name: str) -> str:
    return _three(f"{late[task][name].rises} of {len(late[task][name].ratios)}" for task in TASKS)


def _correlations(late: Mapping[str, Mapping[str, Lead]], name: str) -> str:
    return _three(f"{late[task][name].rank_correlation:.2f}" for task in TASKS)


def _three(words: Iterable[str]) -> str:
    *before, last = words
    return f"{', '.join(before)} and {last}"


def draw(results: Mapping[str, Any]) -> Figure:
    """Draw for each task and quantity when it changes in each run, compared with test accuracy.

    Args:
        results: Results of `measure`, by task and seed.

    Returns:
        The figure.
    """
    compared = [compare_task(list(runs.values())) for runs in results.values()]
    titles = [f"{task}, {sum(map(counts, runs.values()))} runs" for task, runs in results.items()]
    return leads.draw(
        titles, [found["memorising"] for found, _ in compared], [corrected["memorising"] for _, corrected in compared],
        "test accuracy",
    )  # fmt: skip


def main(args: Sequence[str] | None = None) -> None:
    """Train, measure, draw, and print."""
    parser = argparse.ArgumentParser(prog="python -m recipes.grokking", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--folder", type=Path, help="train the networks that are missing in this folder, and measure all of them"
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="only these tasks")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="only these seeds")
    parser.add_argument("--figure", type=Path, help="file of the figure to write")
    parsed = parser.parse_args(args)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if parsed.folder is not None:
        for task in parsed.tasks:
            new = {str(seed): _run(parsed.folder, task, seed) for seed in parsed.seeds}
            results[task] = dict(sorted((results.get(task, {}) | new).items(), key=lambda run: int(run[0])))
        RESULTS.write_text(json.dumps(results, separators=(",", ":")) + "\n")
    if parsed.figure is not None:
        parsed.figure.write_bytes(render_png(draw(results)).data)
    text = report(results)
    if set(results) == set(TASKS) and all(any(map(counts, runs.values())) for runs in results.values()):
        text += f"\n\n{story(results)}"
    sys.stdout.write(text + "\n")


def _run(folder: Path, task: str, seed: int) -> dict[str, Series]:
    """Results of one run: those in the folder, or of a training."""
    path, run = folder / f"{task}-{seed}.json", folder / task / f"seed-{seed}"
    if not path.exists():
        if not (run / _file(TASKS[task](seed).steps)).exists():
            train(TASKS[task], run, seed)
        path.write_text(json.dumps(measure(run, TASKS[task], seed)))
    found: dict[str, Series] = json.loads(path.read_text())
    return found


if __name__ == "__main__":
    main()
