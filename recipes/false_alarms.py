"""How often does `EmergenceDetector` report events where nothing changes, and how many planted changes does it find?

    python -m recipes.false_alarms --folder runs/false_alarms     # train the networks that are missing, and count
    python -m recipes.false_alarms                                # the tables of docs/events.md, as committed

Networks are trained at a constant learning rate until nothing improves any more, and then go on: the same data, the
same learning rate, only the noise of the batches. Of each, 120 snapshots of this plateau are computed as `LIBCallback`
computes them, and the events in them are counted. Beside these are artificial curves without a change, and curves with
planted changes.

Half an hour of one CPU core. Started again, networks that are there are not trained again.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lib_lightning import NodeLayer, compute_interaction_graph
from lib_lightning.algorithm.basis_kinds import FIXED_ORDER
from lib_lightning.io.basis_format import STEP
from lib_lightning.lineage import FeatureTracker, reference_features
from lib_lightning.training.schedule import Schedule
from recipes.mlp import identity
from recipes.modular_addition import AllPairs, ModularAddition

SEEDS = (0, 1, 2, 3, 4)
SNAPSHOTS = 120
# Samples that snapshots are computed on.
SAMPLES = 512
# Snapshots per tenfold increase of the step while a network forms, as in `recipes.grokking`.
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
        Plain(network, F.cross_entropy), Batches(x, labels), (x[:SAMPLES], labels[:SAMPLES]), layers, 6000, 23
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
        Plain(network, F.cross_entropy), Batches(x, labels), (x[:SAMPLES], labels[:SAMPLES]), layers, 6000, 23
    )


def diabetes(seed: int) -> Training:
    """A regression on the diabetes data of scikit-learn."""
    from sklearn.datasets import load_diabetes

    x, y = (torch.from_numpy(a).float() for a in load_diabetes(return_X_y=True))
    x, y = (x - x.mean(0)) / x.std(0), ((y - y.mean()) / y.std()).unsqueeze(1)
    network = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))
    layers = ["network.0:input", "network.2:input", "network.4:input", "output"]
    return Training(Plain(network, F.mse_loss), Batches(x, y), (x, y), layers, 8000, 21)


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


class SnapshotCurves(L.Callback):
    """Computes a snapshot at each of some steps, and keeps what events are detected in.

    Args:
        training: The training.
        steps: Numbers of optimizer steps, ascending.

    Attributes:
        curves: One dict for each snapshot, with ``step``, ``loss``, and, as `EmergenceDetector.update` takes them, the
            lineages and importances of each node layer and the totals of all metrics.
    """

    def __init__(self, training: Training, steps: Sequence[int]) -> None:
        self._training, self._steps = training, set(steps)
        self._tracker = FeatureTracker()
        self.curves: list[dict[str, Any]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the snapshot before training, if it is one of them."""
        self._take(trainer.global_step, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a snapshot, if it is due."""
        self._take(trainer.global_step, pl_module)

    def _take(self, step: int, module: L.LightningModule) -> None:
        if step not in self._steps:
            return
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
    steps = [*forming_steps(training.converged - 1), *plateau]
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
