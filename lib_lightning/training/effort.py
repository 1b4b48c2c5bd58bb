"""How much the snapshots of a run compute: their share of the operations of the training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.algorithm.effort import EffortPlan, choose_effort, measure_cost
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.training.schedule import Schedule

if TYPE_CHECKING:
    import lightning.pytorch as pl

# Share of the operations of the training that all snapshots may take, where the user sets none.
SHARE = 0.03
# Operations that a snapshot may take in any case: a second or so.
MIN_OPERATIONS = 1e10
# A training step has one forward pass and two backward passes, for activations and weights.
_PASSES = 3


def plan_effort(
    trainer: pl.Trainer,
    instrumented: InstrumentedModel,
    batches: Sequence[Any],
    config: LIBConfig,
    num_samples: int,
    all_samples: bool,
    snapshots: float,
    share: float,
) -> EffortPlan:
    """Choose what every snapshot of a run computes.

    Args:
        trainer: The trainer, whose training has begun.
        instrumented: The model and its node layers.
        batches: Samples of this process, of which a few are run.
        config: What to compute; numbers of probes and of pushed features that are given are kept.
        num_samples: Number of samples that a snapshot can use, over all processes.
        all_samples: Whether it uses all of them in any case.
        snapshots: Number of graphs that are expected to be computed in this run.
        share: Share of the operations of the training that all of them may take.

    Returns:
        The plan.
    """
    size = instrumented.num_samples(batches[0])
    with model_session(instrumented):
        cost = measure_cost(instrumented, batches[0])
    training = 0.0
    if trainer.state.fn == "fit":
        steps = trainer.estimated_stepping_batches
        if not math.isfinite(steps):  # of a training without an end, the interval between two validations
            steps, snapshots = trainer.num_training_batches if math.isfinite(trainer.num_training_batches) else 0, 1
        training = _PASSES * cost.forward.of(_samples_per_step(trainer, size)) * steps
    allowed = max(MIN_OPERATIONS, share * training / max(1.0, snapshots))
    return choose_effort(cost, config, num_samples, allowed, all_samples)


def expected_snapshots(schedule: Schedule, trainer: pl.Trainer) -> float:
    """About how many snapshots a schedule has until the end of the training; infinite if that is unknown.

    A standalone validation has one.
    """
    if trainer.state.fn != "fit":
        return 1.0
    return schedule.count(_validations(trainer), trainer.estimated_stepping_batches)


def progress_of(trainer: pl.Trainer) -> float | None:
    """Share of the optimizer steps of a training that are over; None if their number is unknown."""
    steps = trainer.estimated_stepping_batches
    return trainer.global_step / steps if math.isfinite(steps) and steps else None


def _validations(trainer: pl.Trainer) -> float:
    epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
    batches = trainer.num_training_batches
    if trainer.max_steps not in (None, -1) and math.isfinite(batches):
        epochs = min(epochs, trainer.max_steps * trainer.accumulate_grad_batches / max(1, batches))
    interval = trainer.val_check_batch if trainer.val_check_batch not in (None, math.inf) else batches
    every = (trainer.check_val_every_n_epoch or 1) * max(1, interval) / max(1, batches)
    return epochs / every if math.isfinite(batches) else epochs


def validation_samples(trainer: pl.Trainer, size: int) -> float:
    """About how many samples a validation has, with batches of a size; infinite as long as that is unknown."""
    batches = max(trainer.num_val_batches, default=0) if trainer.val_dataloaders is not None else 0
    return batches * size * trainer.world_size if batches else math.inf


def _samples_per_step(trainer: pl.Trainer, size: int) -> int:
    """Samples between two optimizer steps: from the training data loader, or of validation batches if it has none."""
    return int(getattr(trainer.train_dataloader, "batch_size", None) or size) * max(1, trainer.accumulate_grad_batches)
