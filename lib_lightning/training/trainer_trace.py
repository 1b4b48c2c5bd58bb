"""A trace with the model, the data, the precision and the callbacks of a trainer, which takes no step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_lightning.distributed.process_group import SINGLE_PROCESS
from lib_lightning.errors import LIBError
from lib_lightning.training.callback import LIBCallback
from lib_lightning.training.effort import RunPlan, RunPlanner, training_steps
from lib_lightning.training.frameworks import Callback, callback_of_both_packages, rank_zero_info
from lib_lightning.training.samples import SampleStore
from lib_lightning.training.trace import CheckpointSource, TracedSamples, Tracer, run_tracers
from lib_lightning.training.trainer import trainer_precision

if TYPE_CHECKING:
    import lightning.pytorch as pl


class _Done(BaseException):
    """Ends fit. Not an Exception, so that no handler in fit takes it for an error.

    Args:
        is_traced: Whether the checkpoints have been traced; if not, a whole validation is needed for samples.
    """

    def __init__(self, is_traced: bool) -> None:
        super().__init__()
        self.is_traced = is_traced


def trace_in_trainer(build: Callable[[], Any], source: CheckpointSource, logs: Path, watch: float | None) -> None:
    """Take the snapshots that the callbacks of a trainer would have taken, from the checkpoints of its training.

    The trainer begins to fit, so that samples, precision and plan are those of a training, and stops before its first
    step.

    Args:
        build: Returns an object with ``trainer``, ``model`` and ``datamodule``, such as LightningCLI; called again if
            the validation data can only be read in a validation.
        source: The checkpoints.
        logs: The log directory.
        watch: As for `lib_lightning.trace`.

    Raises:
        LIBError: As for `lib_lightning.trace`.
    """
    for sanity_steps in (None, math.inf):
        cli = build()
        trainer: Any = cli.trainer
        callbacks = [callback for callback in trainer.callbacks if isinstance(callback, LIBCallback)]
        trainer.callbacks = [_TraceInstead(callbacks or [LIBCallback()], source, logs, watch)]
        if sanity_steps is not None:
            trainer.num_sanity_val_steps = sanity_steps
        try:
            trainer.fit(cli.model, datamodule=cli.datamodule)
        except _Done as done:
            if done.is_traced:
                return
        else:
            raise LIBError("This training has no steps to begin with, so there is nothing to trace it by.")


@callback_of_both_packages
class _TraceInstead(Callback):
    """Traces checkpoints where the training would begin.

    Args:
        callbacks: The settings.
        source: The checkpoints.
        logs: The log directory.
        watch: As for `lib_lightning.trace`.
    """

    def __init__(self, callbacks: list[LIBCallback], source: CheckpointSource, logs: Path, watch: float | None) -> None:
        super().__init__()
        self._callbacks, self._source, self._logs, self._watch = callbacks, source, logs, watch
        self._runs: list[tuple[Tracer, SampleStore]] = []
        self._has_validated = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Create the objects of each run, and check names."""
        for callback in self._callbacks:
            precision = partial(trainer_precision, trainer, callback.spec.dtype)
            tracer = Tracer(callback, pl_module, self._source, self._logs, precision)
            layout, saved = callback.reporter.layout, callback.state.samples
            store = SampleStore(callback.sample_config, saved, trainer, SINGLE_PROCESS, layout)
            callback.resolver.check_names(pl_module)
            self._runs.append((tracer, store))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start collecting samples."""
        for _, store in self._runs:
            store.start_validation()

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep a copy of the batch."""
        for tracer, store in self._runs:
            store.observe(trainer, batch, dataloader_idx, partial(tracer.callback.check, pl_module))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the samples of a sanity check that was the whole validation."""
        self._has_validated = trainer.num_sanity_val_steps == math.inf
        for _, store in self._runs:
            store.end_validation(is_sanity_check=not self._has_validated)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Trace, instead of the training."""
        for tracer, store in self._runs:
            store.prepare(trainer, partial(tracer.callback.check, pl_module), is_due_early=True)
        if not self._has_validated and not all(store.buffer.is_frozen for _, store in self._runs):
            raise _Done(is_traced=False)
        for tracer, store in self._runs:
            store.save()
            data = store.for_snapshot(trainer)
            if not data.batches:
                raise LIBError("There are no validation batches to compute on.")
            tracer.prepare(TracedSamples(data, partial(_plan, trainer, tracer, data.batches)))
        run_tracers([tracer for tracer, _ in self._runs], self._watch)
        raise _Done(is_traced=True)


def _plan(trainer: pl.Trainer, tracer: Tracer, batches: Sequence[Any]) -> RunPlan:
    """What every snapshot of a training would compute, and at which steps."""
    callback = tracer.callback
    instrumented = callback.resolver.instrument(tracer.model, SINGLE_PROCESS)
    available = sum(map(instrumented.num_samples, batches))
    planner = RunPlanner(trainer, callback.schedule, callback.max_overhead, len(callback.computer.prefixes))
    with callback.resolver.precision():
        found = planner.plan(instrumented, batches[0], callback.plan_settings(available))
    steps = training_steps(trainer)
    if found.plan.snapshots is not None and not callback.schedule.is_explicit and 1 <= steps < math.inf:
        callback.state.cursor.plan(found.plan.snapshots, int(steps))
    rank_zero_info(
        f"{callback.name}: each snapshot uses {found.plan.effort.text}, about {found.plan.seconds:.2g} s each"
    )
    return found.plan
