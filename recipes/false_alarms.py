"""How often does `EmergenceDetector` report events where nothing changes, and how many planted changes does it find?

    python -m recipes.false_alarms --folder runs/false_alarms     # train the networks that are missing, and count
    python -m recipes.false_alarms                                # the tables of docs/events.md, as committed

Networks are trained at a constant learning rate until nothing improves any more, and then go on: the same data, the
same learning rate, only the noise of the batches. Of each, 120 snapshots of this plateau are computed as `LIBCallback`
computes them, and the events in them are counted. Beside these are artificial curves without a change, and curves with
planted changes, also in those of the plateaus. Of all events those are counted, too, that are abrupt: changes even if
increments are autocorrelated.

An hour of one CPU core. Started again, networks that are there are not trained again.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lib_lightning import NodeLayer, compute_interaction_graph
from lib_lightning.algorithm.basis_kinds import FIXED_ORDER
from lib_lightning.io.basis_format import STEP
from lib_lightning.lineage import EmergenceDetector, Event, FeatureTracker, reference_features
from lib_lightning.training.schedule import Schedule
from recipes.at_steps import AtSteps
from recipes.mlp import identity
from recipes.modular_addition import AllPairs, ModularAddition

RESULTS = Path(__file__).parent / "false_alarms.json"
# Expected number of false events per snapshot that `EmergenceDetector` promises by default.
PROMISED = 0.05
SEEDS = (0, 1, 2, 3, 4, 5, 6)
# The networks for modular addition do not stay at rest: there are as many as show that.
FEWER_SEEDS = {"modular addition": (0, 1, 2, 3, 4)}
SNAPSHOTS = 120
# Events within so many snapshots of a burst of the loss are counted as its consequences.
AFTER_BURST = 8
# Samples that snapshots are computed on.
SAMPLES = 512
# With the first seed there are snapshots of what forms, too: so many per tenfold increase of the step, as in the recipe
# on grokking.
PER_DECADE = 20


class Plain(L.LightningModule):
    """A network trained by AdamW at a constant learning rate, whose weight decay ends in a balance with the gradient.

    Args:
        network: The network.
        loss: From outputs and targets to the loss.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        lr: float = 3e-3,
        weight_decay: float = 0.3,
    ) -> None:
        super().__init__()
        self.network, self.loss, self.lr, self.weight_decay = network, loss, lr, weight_decay

    def forward(self, x: Tensor) -> Tensor:
        """Outputs of the network."""
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Loss of one batch."""
        x, targets = batch
        return self.loss(self(x), targets)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), self.lr, weight_decay=self.weight_decay)


class Batches(L.LightningDataModule):
    """Examples in memory, shuffled anew in each epoch.

    Args:
        x: Inputs, shape ``(n, ...)``.
        targets: Targets, shape ``(n, ...)``.
        batch_size: Examples in a batch.
    """

    def __init__(self, x: Tensor, targets: Tensor, batch_size: int = 64) -> None:
        super().__init__()
        self.x, self.targets, self.batch_size = x, targets, batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        """The examples, shuffled."""
        return DataLoader(_Examples(self.x, self.targets), self.batch_size, shuffle=True, collate_fn=identity)


class _Examples(Dataset[Any]):
    """Examples in memory, indexed a batch at a time."""

    def __init__(self, x: Tensor, targets: Tensor) -> None:
        self.x, self.targets = x, targets

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.targets[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return self.x[indices], self.targets[indices]


@dataclass(frozen=True)
class Training:
    """A training whose plateau is watched.

    Args:
        module: What is trained.
        data: What it is trained on.
        batch: Inputs and targets that snapshots and losses are computed on.
        layers: The node layers.
        converged: Step from which on nothing changes but by noise.
        every: Number of steps between the snapshots of the plateau.
    """

    module: L.LightningModule
    data: L.LightningDataModule
    batch: tuple[Tensor, Tensor]
    layers: Sequence[str | NodeLayer]
    converged: int
    every: int


def digits_mlp(seed: int) -> Training:
    """The digits of scikit-learn, by two hidden layers."""
    x, labels = _digits()
    network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    layers = ["network.0:input", "network.2:input", "network.4:input", "output"]
    return Training(
        Plain(network, F.cross_entropy), Batches(x, labels), (x[:SAMPLES], labels[:SAMPLES]), layers, 4000, 12
    )


def digits_cnn(seed: int) -> Training:
    """The same digits, by two convolutions."""
    x, labels = _digits()
    x = x.view(-1, 1, 8, 8)
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    layers = ["network.3:input", "network.7:input", "output"]
    return Training(
        Plain(network, F.cross_entropy), Batches(x, labels), (x[:SAMPLES], labels[:SAMPLES]), layers, 4000, 12
    )


def diabetes(seed: int) -> Training:
    """A regression on the diabetes data of scikit-learn."""
    from sklearn.datasets import load_diabetes

    x, y = (torch.from_numpy(a).float() for a in load_diabetes(return_X_y=True))
    x, y = (x - x.mean(0)) / x.std(0), ((y - y.mean()) / y.std()).unsqueeze(1)
    network = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    layers = ["network.0:input", "network.2:input", "network.4:input", "output"]
    return Training(Plain(network, F.mse_loss), Batches(x, y), (x, y), layers, 3500, 7)


def modular_addition(seed: int, modulus: int = 59, converged: int = 5000) -> Training:
    """Modular addition on full batches, as in ``modular_addition.yaml``, long after it has generalised."""
    data = AllPairs(modulus=modulus, split_seed=seed)
    batch = (data.tokens[:SAMPLES], data.answers[:SAMPLES])
    layers = [
        NodeLayer(["transformer.embed"], name="resid_pre"),
        NodeLayer(["transformer.mlp:input"], name="resid_mid"),
        NodeLayer(["transformer.unembed:input"], name="resid_post"),
        "output",
    ]
    return Training(ModularAddition(modulus), data, batch, layers, converged, 25)


TASKS: dict[str, Callable[[int], Training]] = {
    "digits, MLP": digits_mlp,
    "digits, CNN": digits_cnn,
    "diabetes, regression": diabetes,
    "modular addition": modular_addition,
}


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    return torch.from_numpy(digits.data).float() / 16, torch.from_numpy(digits.target).long()


class SnapshotCurves(AtSteps):
    """Computes a snapshot at each of some steps, and keeps what events are detected in.

    Args:
        training: The training.
        steps: Numbers of optimizer steps, ascending.

    Attributes:
        curves: One dict for each snapshot, with ``step``, ``loss``, and, as `EmergenceDetector.update` takes them, the
            lineages and importances of each node layer and the totals of all metrics.
    """

    def __init__(self, training: Training, steps: Sequence[int]) -> None:
        super().__init__(steps)
        self._training = training
        self._tracker = FeatureTracker()
        self.curves: list[dict[str, Any]] = []

    def take(self, step: int, module: L.LightningModule) -> None:
        """Compute a snapshot, and keep its curves."""
        x, targets = self._training.batch
        with torch.no_grad():
            loss = float(F.cross_entropy(module(x), targets) if targets.ndim == 1 else F.mse_loss(module(x), targets))
        graph = compute_interaction_graph(module, [x], self._training.layers, effort="exact")
        graph.info[STEP] = step
        graph.reference_features = reference_features(graph, module, [x])
        self._tracker.update(graph)
        totals = {f"lib/{key}": x for key, x in graph.measure().items() if key.endswith("/total") and math.isfinite(x)}
        layers = {
            name: [graph.lineages[name].ids.tolist(), [float(f"{x:.6g}") for x in basis.importance.tolist()]]
            for name, basis in graph.bases.items()
            if basis.kind not in FIXED_ORDER
        }
        self.curves.append({"step": step, "loss": loss, "layers": layers, "scalars": totals})


def forming_steps(last: int) -> list[int]:
    """Steps of the snapshots while a network forms.

    Args:
        last: The last step.

    Returns:
        Steps from 0, log-spaced.
    """
    schedule, steps = Schedule(log_spaced=PER_DECADE), [0]
    while (due := schedule.next_step_after(steps[-1]) or last + 1) <= last:
        steps.append(due)
    return steps


def train(task: str, seed: int, path: Path) -> None:
    """Train one network, and write the curves of its snapshots.

    Args:
        task: One of `TASKS`.
        seed: Seed of weights and batches.
        path: The file to write: gzipped JSON.
    """
    L.seed_everything(seed)
    training = TASKS[task](seed)
    plateau = [training.converged + training.every * k for k in range(SNAPSHOTS)]
    forming = forming_steps(training.converged - 1) if seed == SEEDS[0] else []
    steps = [*forming, *plateau]
    callback = SnapshotCurves(training, steps)
    trainer = L.Trainer(
        max_steps=plateau[-1], max_epochs=-1, callbacks=[callback], logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(training.module, datamodule=training.data)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with gzip.open(partial, "wt") as file:
        json.dump({"converged": training.converged, "curves": callback.curves}, file)
    partial.replace(path)


def events_of(curves: Sequence[Mapping[str, Any]], detector: EmergenceDetector | None = None) -> list[Event]:
    """The events in the curves of a training.

    Args:
        curves: Snapshots, as `SnapshotCurves` keeps them.
        detector: What detects events; a new one with the settings of the library if None.

    Returns:
        All events.
    """
    detector, events = detector or EmergenceDetector(PROMISED), []
    for one in curves:
        layers = {
            name: (torch.tensor(ids), torch.tensor(importance, dtype=torch.float64))
            for name, (ids, importance) in one["layers"].items()
        }
        events += detector.update(one["step"], layers, one["scalars"])
    return events


def detector_of(runs: int) -> EmergenceDetector:
    """A detector that sees the curves of several runs at the same time.

    Args:
        runs: Number of runs. Each has as many false alarms as by itself: there are as many times more series, and false
            alarms that are allowed, so that the threshold of each series is the same (but for the one of an absent
            feature, which is there once). The autocorrelation is that of all runs together.

    Returns:
        The detector.
    """
    return EmergenceDetector(PROMISED * runs)


def counts_of(events: Sequence[Event]) -> dict[str, int]:
    """How many events there are, and of these abrupt ones."""
    return {"events": len(events), "abrupt": sum(event.abrupt is True for event in events)}


def poisson_interval(count: int) -> tuple[float, float]:
    """The 95% interval of the expectation of a count of independent events (Garwood 1936).

    Args:
        count: What was counted.

    Returns:
        Smallest and largest expectation.

    Example:
        >>> [round(x, 2) for x in poisson_interval(5)]
        [1.62, 11.67]
    """
    low = float(stats.chi2.ppf(0.025, 2 * count)) / 2 if count else 0.0
    return low, float(stats.chi2.ppf(0.975, 2 * count + 2)) / 2


# Artificial curves: 20 features of a layer, and 10 metrics.
FEATURES, METRICS, RUNS = 20, 10, 15


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def autoregressive(noise: Tensor, phi: float) -> Tensor:
    """Series of variance 1 with an autocorrelation.

    Args:
        noise: Independent numbers of variance 1, shape ``(m, N)``.
        phi: Autocorrelation from one number to the next.

    Returns:
        The series, shape ``(m, N)``.
    """
    series = [noise[:, 0]]
    for now in noise.T[1:]:
        series.append(phi * series[-1] + math.sqrt(1 - phi**2) * now)
    return torch.stack(series, 1)


def _heavy_tailed(m: int, n: int, seed: int) -> Tensor:
    """Student's t with 3 degrees of freedom, of variance 1."""
    return _normal(m, n, seed=seed) / _normal(3, m, n, seed=seed + 1).square().sum(0).sqrt()


# Curves without a change: from a seed to levels in units of their noise, shape ``(m, N)``.
NULLS: dict[str, Callable[[int, int, int], Tensor]] = {
    "levels, AR(1), 0.5": lambda m, n, seed: autoregressive(_normal(m, n, seed=seed), 0.5),
    "levels, AR(1), 0.9": lambda m, n, seed: autoregressive(_normal(m, n, seed=seed), 0.9),
    "random walks": lambda m, n, seed: _normal(m, n, seed=seed).cumsum(1),
    "walks, increments AR(1), 0.3": lambda m, n, seed: autoregressive(_normal(m, n, seed=seed), 0.3).cumsum(1),
    "walks, increments AR(1), 0.7": lambda m, n, seed: autoregressive(_normal(m, n, seed=seed), 0.7).cumsum(1),
    "walks, increments AR(1), 0.9": lambda m, n, seed: autoregressive(_normal(m, n, seed=seed), 0.9).cumsum(1),
    "walks, increments Student's t(3)": lambda m, n, seed: _heavy_tailed(m, n, seed).cumsum(1),
}


def artificial(levels: Tensor, metrics: Tensor | None = None) -> list[dict[str, Any]]:
    """Curves of several runs, as `SnapshotCurves` keeps them: each has a layer, named by its number.

    Args:
        levels: log10 of importances, shape ``(runs, r, N)``; NaN where a feature is not there.
        metrics: log10 of metrics, shape ``(runs, m, N)``.

    Returns:
        One dict for each snapshot.
    """
    curves = []
    for t in range(levels.shape[2]):
        now = metrics[:, :, t].flatten().tolist() if metrics is not None else []
        layers = {}
        for run, of_run in enumerate(levels[:, :, t]):
            there = of_run.isfinite().nonzero().flatten()
            layers[str(run)] = [there.tolist(), (10 ** of_run[there]).tolist()]
        curves.append({"step": t, "layers": layers, "scalars": {f"m{i}": 10**x for i, x in enumerate(now)}})
    return curves


def null_curves(name: str, runs: int, snapshots: int = SNAPSHOTS) -> list[dict[str, Any]]:
    """Curves without a change: features with noise of 0.2, and metrics with noise of 0.1, both in log10.

    Args:
        name: One of `NULLS`.
        runs: Number of runs.
        snapshots: Number of snapshots.

    Returns:
        The curves.
    """
    base = torch.linspace(0, -1.5, FEATURES, dtype=torch.float64)[:, None]
    levels = NULLS[name](runs * FEATURES, snapshots, 0).view(runs, FEATURES, snapshots)
    metrics = NULLS[name](runs * METRICS, snapshots, 50).view(runs, METRICS, snapshots)
    return artificial(base + 0.2 * levels, 0.1 * metrics)


# Planted changes of a feature, from and to these levels, after 20 snapshots, within so many.
PLANTED = {"emerged": (-3.5, -0.5), "faded": (-0.5, -3.5), "rose": (-1.2, 0.2), "fell": (0.2, -1.2)}
START, LENGTHS, AFTER = 20, (1, 3, 6), 12
# Noise of the features beside planted changes, and of the feature itself, in log10; the last is that of `null_curves`.
NOISES = (0.02, 0.05, 0.2)


def _planted_level(kind: str, length: int, k: int) -> float:
    """The level of a feature ``k`` snapshots after the first changed one."""
    before, after = PLANTED["emerged" if kind == "born" else kind]
    return before + (after - before) * min(max((k + 1) / length, 0.0), 1.0)


def planted_curves(kind: str, length: int, runs: int, noise: float = NOISES[0]) -> list[dict[str, Any]]:
    """Curves of 20 features, one of which changes; "born" is absent before.

    Args:
        kind: One of `PLANTED`, or "born".
        length: Number of snapshots that the change takes.
        runs: Number of runs.
        noise: Standard deviation of the independent scatter of all features about their levels, in log10.

    Returns:
        The curves.
    """
    n = START + AFTER
    levels = torch.linspace(0, -4, FEATURES, dtype=torch.float64)[:, None].expand(FEATURES, n).clone()
    levels[7] = torch.tensor([_planted_level(kind, length, k - START) for k in range(n)], dtype=torch.float64)
    if kind == "born":
        levels[7, :START] = math.nan
    return artificial(levels + noise * _normal(runs, FEATURES, n, seed=0))


def with_change(
    curves: Sequence[Mapping[str, Any]], layer: str, feature: int, kind: str, length: int, start: int
) -> list[dict[str, Any]]:
    """Curves in which one feature changes: its importance is what it was, times a factor that changes.

    Args:
        curves: The curves, as `SnapshotCurves` keeps them.
        layer: Node layer of the feature.
        feature: Its id.
        kind: One of `PLANTED`, or "born". What emerges or fades is as it was at the end, or the beginning.
        length: Number of snapshots that the change takes.
        start: Index of the first changed snapshot.

    Returns:
        The curves.
    """
    before, after = PLANTED["emerged" if kind == "born" else kind]
    full = after if kind in ("born", "emerged") else before
    found = []
    for k, one in enumerate(curves):
        ids, importance = one["layers"][layer]
        level = _planted_level(kind, length, k - start) - full
        changed = [x * 10**level if i == feature else x for i, x in zip(ids, importance, strict=True)]
        kept = [j for j, i in enumerate(ids) if not (kind == "born" and k < start and i == feature)]
        found.append({**one, "layers": {**one["layers"], layer: [[ids[j] for j in kept], [changed[j] for j in kept]]}})
    return found


def _is_found(event: Event, layer: str, feature: int, kind: str, first: int) -> bool:
    """Whether an event says of a changed feature that it rises, or falls, as it does."""
    rises = kind in ("born", "emerged", "rose")
    is_this = event.layer == layer and event.lineage == feature and event.step >= first
    return is_this and (event.kind in ("emerged", "rose")) == rises


def power_among(curves: Sequence[Mapping[str, Any]], places: Sequence[tuple[str, int]], runs: int) -> dict[str, int]:
    """How many planted changes are found in curves that scatter as those of a training, or wander.

    Args:
        curves: The curves, without a change.
        places: Node layer and id of the features to change, at the same time and each in a run of its own.
        runs: Number of runs in the curves.

    Returns:
        Number of changes of all kinds and lengths, of those that are found, and of those found as abrupt; nothing if
        there are too few snapshots.
    """
    if len(curves) <= AFTER:
        return {}
    counts = {"changes": 0, "planted found": 0, "planted abrupt": 0}
    start = len(curves) - AFTER
    for kind in ("born", *PLANTED):
        for length in LENGTHS:
            changed = list(curves)
            for layer, feature in places:
                changed = with_change(changed, layer, feature, kind, length, start)
            events = events_of(changed, detector_of(runs))
            for layer, feature in places:
                found = [e for e in events if _is_found(e, layer, feature, kind, curves[start]["step"])]
                counts["changes"] += 1
                counts["planted found"] += bool(found)
                counts["planted abrupt"] += any(e.abrupt is True for e in found[:1])
    return counts


def power(kind: str, length: int, noise: float, runs: int = RUNS) -> dict[str, float | None]:
    """How many planted changes are found.

    Args:
        kind: As for `planted_curves`.
        length: As for `planted_curves`.
        noise: As for `planted_curves`.
        runs: Number of runs.

    Returns:
        Number of runs in which an event of the feature says that it rises, or falls, as it does; the median of the
        snapshots from the first changed one to the first such event; the number of these that are abrupt; and the
        number of other events.
    """
    found: dict[str | None, Event] = {}
    events = events_of(planted_curves(kind, length, runs, noise), detector_of(runs))
    for event in events:
        if _is_found(event, str(event.layer), 7, kind, START):
            found.setdefault(event.layer, event)
    delay = statistics.median(event.step - START for event in found.values()) if found else None
    abrupt = counts_of([*found.values()])["abrupt"]
    return {"found": len(found), "delay": delay, "abrupt": abrupt, "others": len(events) - len(found)}


def bursts_of(losses: Sequence[float]) -> dict[int, float]:
    """Snapshots at which a network is no longer at rest.

    Args:
        losses: Losses at the snapshots.

    Returns:
        For each at which the loss is more than ten times that at the snapshot before, by index: how many times.

    Example:
        >>> bursts_of([2**-20, 2**-17, 2**-9, 2**-10])
        {2: 256.0}
    """
    return {k: losses[k] / losses[k - 1] for k in range(1, len(losses)) if losses[k] > 10 * losses[k - 1]}


def measure_plateaus(folder: Path) -> dict[str, Any]:
    """Events in the trainings of a folder.

    Args:
        folder: The folder.

    Returns:
        For each task how many snapshots there are, how the loss of each training changes from the first half of the
        plateau to the second, its events, and of these abrupt ones; the bursts of each (`bursts_of`), and its events
        within `AFTER_BURST` snapshots of one; and events while the first one forms.
    """
    found: dict[str, Any] = {"plateaus": {}, "forming": {}}
    for task in TASKS:
        for path in sorted(folder.glob(f"{_file(task, '*')}")):
            with gzip.open(path, "rt") as file:
                run = json.load(file)
            plateau = [one for one in run["curves"] if one["step"] >= run["converged"]]
            forming = [one for one in run["curves"] if one["step"] < run["converged"]]
            lists = ("losses", "bursts", "after bursts", "events", "abrupt")
            one = found["plateaus"].setdefault(task, {"snapshots": len(plateau), **{name: [] for name in lists}})
            losses = [snapshot["loss"] for snapshot in plateau]
            half = len(losses) // 2
            one["losses"].append([_rounded(statistics.fmean(part)) for part in (losses[:half], losses[half:])])
            bursts, index = bursts_of(losses), {snapshot["step"]: k for k, snapshot in enumerate(plateau)}
            one["bursts"].append([_rounded(times) for times in bursts.values()])
            events = events_of(plateau)
            one["after bursts"].append(sum(any(0 <= index[e.step] - k <= AFTER_BURST for k in bursts) for e in events))
            for name, count in counts_of(events).items():
                one[name].append(count)
            if not bursts:
                _add(one, power_among(plateau, [_second(plateau)], 1))
            if forming:
                found["forming"][task] = _forming(forming)
    return found


def _second(curves: Sequence[Mapping[str, Any]]) -> tuple[str, int]:
    """The second most important feature of the second node layer, of those that are always there (or the only one)."""
    layer = list(curves[0]["layers"])[1]
    always = set.intersection(*(set(one["layers"][layer][0]) for one in curves))
    ids, importance = curves[-1]["layers"][layer]
    ranked = sorted((-x, i) for i, x in zip(ids, importance, strict=True) if i in always)
    return layer, ranked[min(1, len(ranked) - 1)][1]


def _add(total: dict[str, Any], counts: Mapping[str, int]) -> None:
    for name, count in counts.items():
        total[name] = total.get(name, 0) + count


def _forming(curves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Events while a network forms, and features that emerge; of both the abrupt ones; and the autocorrelation."""
    detector = EmergenceDetector(PROMISED)
    events = events_of(curves, detector)
    emerged = [event for event in events if event.kind == "emerged"]
    return {
        **counts_of(events),
        "emerged": len({event.subject for event in emerged}),
        "emerged abruptly": len({event.subject for event in emerged if event.abrupt}),
        "autocorrelation": round(detector.autocorrelation, 2),
    }


def measure_artificial() -> dict[str, Any]:
    """Events on artificial curves without a change, and planted changes that are found."""
    return {
        "runs": RUNS,
        "snapshots": SNAPSHOTS,
        "nulls": {
            null: counts_of(events_of(null_curves(null, RUNS), detector_of(RUNS)))
            | power_among(null_curves(null, RUNS, START + AFTER), [(str(run), 7) for run in range(RUNS)], RUNS)
            for null in NULLS
        },
        "planted": {
            f"{kind}, {length}": {str(noise): power(kind, length, noise) for noise in NOISES}
            for kind in ("born", *PLANTED)
            for length in LENGTHS
        },
    }


def report(found: Mapping[str, Any]) -> str:
    """Tables of false alarms and of power.

    Args:
        found: As it is committed.

    Returns:
        Markdown.
    """
    lines = [
        "| curves | runs | false events, promised at most | found | of these abrupt | planted changes found "
        "| as abrupt |",
        "|---" * 7 + "|",
    ]
    at_rest, most = {"events": 0, "abrupt": 0}, 0.0
    for task, one in found["plateaus"].items():
        runs, bursts = len(one["events"]), sum(map(len, one["bursts"]))
        promised = PROMISED * runs * one["snapshots"]
        what = "plateau" if not bursts else f"{bursts} bursts, no plateau"
        counts = {name: sum(one[name]) for name in at_rest}
        if not bursts:
            most += promised
            at_rest = {name: at_rest[name] + count for name, count in counts.items()}
        lines.append(
            f"| {what}: {task} | {runs} | {promised:.0f} | {counts['events']} | {counts['abrupt']} | {_power(one)} |"
        )
    promised = PROMISED * found["runs"] * found["snapshots"]
    for null, one in found["nulls"].items():
        lines.append(
            f"| {null} | {found['runs']} | {promised:.0f} | {one['events']} | {one['abrupt']} | {_power(one)} |"
        )
    for noise in NOISES:
        every = [by_noise[str(noise)] for by_noise in found["planted"].values()]
        runs = found["runs"] * len(every)
        false, planted, abrupt = (sum(one[name] for one in every) for name in ("others", "found", "abrupt"))
        lines.append(
            f"| planted changes, noise {noise} | {runs} | {PROMISED * runs * (START + AFTER):.0f} | {false} | "
            f"{'0' if not false else '-'} | {planted} of {runs} | {abrupt} |"
        )
    said = [
        f"{at_rest[name]} (95% interval {low:.1f} to {high:.1f})"
        for name in at_rest
        for low, high in [poisson_interval(at_rest[name])]
    ]
    lines += [
        "",
        f"All plateaus together: {said[0]} of at most {most:.0f} events; of these {said[1]} abrupt.",
        "",
        f"| planted change, {found['runs']} runs "
        + "".join(f"| found, noise {noise} | snapshots later | found as abrupt " for noise in NOISES)
        + "|",
        "|---" * (1 + 3 * len(NOISES)) + "|",
    ]
    for planted, by_noise in found["planted"].items():
        kind, length = planted.split(", ")
        cells = [f"{kind} within {length} snapshot{'s' * (length != '1')}"]
        for noise in NOISES:
            one = by_noise[str(noise)]
            cells += [str(one["found"]), "" if one["delay"] is None else f"{one['delay']:g}", str(one["abrupt"])]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| while a network forms | events | of these abrupt | features that emerge | of these abruptly "
        "| autocorrelation of increments |",
        "|---|---|---|---|---|---|",
    ]
    columns = ("events", "abrupt", "emerged", "emerged abruptly", "autocorrelation")
    lines += [
        f"| {task} | {' | '.join(str(one[name]) for name in columns)} |" for task, one in found["forming"].items()
    ]
    return "\n".join(lines)


def _power(one: Mapping[str, Any]) -> str:
    """Two cells: how many planted changes are found, and of these as abrupt; empty if there were none."""
    if "changes" not in one:
        return " | "
    return f"{one['planted found']} of {one['changes']} | {one['planted abrupt']}"


def to_json(found: Mapping[str, Any]) -> str:
    """Convert results to JSON, with a line for each task, null and planted change.

    Args:
        found: The results.

    Returns:
        The text of a file.
    """
    parts = []
    for name, value in found.items():
        if isinstance(value, Mapping):
            rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(one)}" for key, one in value.items())
            parts.append(f" {json.dumps(name)}: {{\n{rows}\n }}")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _rounded(x: float) -> float:
    return float(f"{x:.3g}")


def _file(task: str, seed: object) -> str:
    return f"{task.replace(', ', '_').replace(' ', '_')}-{seed}.json.gz"


def main(args: Sequence[str] | None = None) -> None:
    """Train what is missing, count, and print; or print what is committed."""
    parser = argparse.ArgumentParser(prog="python -m recipes.false_alarms", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, help="train, and count; without it, print the committed results")
    parser.add_argument("--commit", action="store_true", help="also write the committed results")
    parsed = parser.parse_args(args)
    if parsed.folder is None:
        sys.stdout.write(report(json.loads(RESULTS.read_text())) + "\n")
        return
    if importlib.util.find_spec("sklearn") is None:
        raise SystemExit("This recipe needs scikit-learn: pip install scikit-learn")
    for seed in SEEDS:
        for task in TASKS:
            if seed in FEWER_SEEDS.get(task, SEEDS) and not (path := parsed.folder / _file(task, seed)).exists():
                train(task, seed, path)
    found = measure_artificial() | measure_plateaus(parsed.folder)
    for path in (parsed.folder / "false_alarms.json", *([RESULTS] if parsed.commit else [])):
        path.write_text(to_json(found))
    sys.stdout.write(report(found) + "\n")


if __name__ == "__main__":
    main()
