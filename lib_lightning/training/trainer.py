"""What the callback needs to know of a trainer, and all that it uses of Lightning's internals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist
from torch.utils.data import DistributedSampler

from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from lib_lightning.distributed.torch_group import ReplicatedGroup, TorchProcessGroup
from lib_lightning.errors import LIBError
from lib_lightning.model.batch import map_tensors
from lib_lightning.model.batch_layout import BatchLayout
from lib_lightning.model.process_state import PROCESS_LOCK
from lib_lightning.training.first_batches import OneShotError, batches_without_trace
from lib_lightning.training.frameworks import is_instance, member, package_of

if TYPE_CHECKING:
    import lightning.pytorch as pl


# Called with a batch before any is kept: raises if the model cannot be run on it, and returns its layout.
CheckBatch = Callable[[Any], BatchLayout]


def process_group_of(trainer: pl.Trainer) -> ProcessGroup:
    """The processes of a trainer's run.

    Args:
        trainer: The trainer, whose process group has been set up.

    Returns:
        `TorchProcessGroup` where each process holds the whole model, `ReplicatedGroup` where it is sharded.
    """
    if trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
        return SINGLE_PROCESS
    return ReplicatedGroup() if is_sharded(trainer) else TorchProcessGroup()


def is_sharded(trainer: pl.Trainer) -> bool:
    """Whether the model's weights are sharded over processes."""
    return is_instance(trainer.strategy, "strategies.ModelParallelStrategy")


def check_strategy(trainer: pl.Trainer, dtype: torch.dtype | None) -> None:
    """Refuse strategies that snapshots cannot be computed with.

    Args:
        trainer: The trainer.
        dtype: Type to compute in; None for the model's own.

    Raises:
        LIBError: With the reason, and what to use instead.
    """
    strategy = trainer.strategy
    if is_instance(strategy, "strategies.DeepSpeedStrategy"):
        raise LIBError(
            "LIBCallback does not work with DeepSpeedStrategy: its engine gathers weights for one backward pass "
            "through the whole model, and a basis needs many through parts of it. Use DDPStrategy or "
            "ModelParallelStrategy, or follow its checkpoints by 'lib-lightning trace --watch'."
        )
    if is_instance(strategy, "strategies.FSDPStrategy"):
        raise LIBError(
            "LIBCallback does not work with FSDPStrategy: it frees a module's weights after one backward pass, and a "
            "basis needs many over the same forward pass. Use ModelParallelStrategy with fully_shard, its successor, "
            "or DDPStrategy, or follow its checkpoints by 'lib-lightning trace --watch'."
        )
    if is_sharded(trainer) and dtype is not None:
        raise LIBError(
            f"LIBCallback cannot compute in {str(dtype).split('.')[-1]} on a model whose weights are sharded over "
            f"processes ({type(strategy).__name__}): leave dtype out to compute in the model's own type."
        )


def has_validation(trainer: pl.Trainer) -> bool:
    """Whether this fit validates; True as long as the data loaders have not been set up."""
    return bool(trainer.enable_validation and (trainer.val_dataloaders is None or sum(trainer.num_val_batches)))


def require_validation(trainer: pl.Trainer, process_group: ProcessGroup, index: int) -> None:
    """Stop before the first step, on all processes, if there will be no validation batches to compute on.

    Args:
        trainer: The trainer.
        process_group: Its processes.
        index: Index of the validation data loader that is used.

    Raises:
        LIBError: If it has no batches, or does not exist, on any process.
    """
    # Before the first validation, the number of batches is known from the sanity check, if there was one.
    batches = trainer.num_val_batches if trainer.val_dataloaders is not None else [1] * (index + 1)
    if trainer.enable_validation and index >= len(batches):
        raise LIBError(
            f"val_dataloader={index} of LIBCallback counts from 0, but there are only {len(batches)} validation data "
            "loaders."
        )
    mode = _combined_mode(trainer)
    if index and mode != "sequential":
        raise LIBError(
            f"val_dataloader={index} of LIBCallback cannot be used, since each batch combines all loaders "
            f"(CombinedLoader in mode '{mode}'): leave val_dataloader at 0, and choose a part of the batch with "
            "input_fn."
        )
    exists = bool(trainer.enable_validation and batches[index])
    missing = [rank for rank, t in enumerate(process_group.gather(torch.tensor([exists], device="cpu"))) if not t]
    if missing:
        where = "" if len(missing) == process_group.size else f" on process {missing[0]}"
        raise LIBError(
            f"LIBCallback computes on validation batches, and there are none{where}: give the trainer a validation "
            "data loader with data in it, a validation_step, and limit_val_batches above 0; or give the callback a "
            "dataloader of its own."
        )


def run_folder(trainer: pl.Trainer) -> Path | None:
    """The folder of this run: the log directory, or one named after the run where a logger has one for all runs.

    Args:
        trainer: The trainer; all processes call this at the same time.

    Returns:
        The folder; None for trial runs (``fast_dev_run``, ``barebones``), which write nothing.
    """
    if trainer.fast_dev_run or trainer.barebones:  # type: ignore[attr-defined]
        return None
    logger = trainer.logger
    if logger is None:
        return Path(trainer.log_dir or trainer.default_root_dir)
    if is_instance(logger, "loggers.TensorBoardLogger", "loggers.CSVLogger"):
        # Not trainer.log_dir, which does not know the loggers of the other package.
        return Path(trainer.strategy.broadcast(str(logger.log_dir)))
    parts = (logger.save_dir or trainer.default_root_dir, logger.name, logger.version)
    folder = Path(*(str(part) for part in parts if part is not None))
    return Path(trainer.strategy.broadcast(str(folder)))


@contextmanager
def trainer_precision(trainer: pl.Trainer, dtype: torch.dtype | None) -> Iterator[None]:
    """A block that runs the model in the trainer's precision: tensors that the model creates are of that type.

    Args:
        trainer: The trainer.
        dtype: Type to compute in; None for the model's own.

    Yields:
        Nothing.
    """
    # Both the precision and the default dtype are settings of the process.
    with PROCESS_LOCK:
        default = torch.get_default_dtype()
        try:
            with trainer.precision_plugin.forward_context():
                if dtype is not None:
                    torch.set_default_dtype(dtype)
                yield
        finally:
            torch.set_default_dtype(default)


def logging_step(trainer: pl.Trainer) -> int:
    """The step axis of ``LightningModule.log``: batches that ended in an optimizer step, counted from 0.

    Once training has ended that count has moved on, but the last scalars belong beside those of the last validation.
    """
    return min(_batches_that_stepped(trainer), max(trainer.global_step - 1, 0))


def may_validate_next(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether validation, or the end of training, may follow a training batch.

    Args:
        trainer: The trainer, at the end of the batch.
        batch_idx: Index of the batch.

    Returns:
        False only if neither follows at once.
    """
    every = trainer.val_check_batch  # infinity for data without a length, None where time decides
    at_interval = not every or (every != float("inf") and (batch_idx + 1) % every == 0)
    is_last_step = 0 < trainer.max_steps <= trainer.global_step
    return trainer.is_last_batch or at_interval or is_last_step or trainer.should_stop


def synchronize(trainer: pl.Trainer) -> None:
    """Wait until the device has finished the kernels that training has queued."""
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)


@contextmanager
def on_training_device(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """A block with the model on the device of training, from which the trainer takes it at the end.

    Args:
        trainer: The trainer.
        pl_module: The model.

    Yields:
        Nothing.
    """
    device = pl_module.device
    if is_sharded(trainer) or device == trainer.strategy.root_device:
        yield
        return
    pl_module.to(trainer.strategy.root_device)
    try:
        yield
    finally:
        pl_module.to(device)


def data_rank(trainer: pl.Trainer) -> tuple[int, int]:
    """Rank of this process among those that see different data, and their number."""
    if is_sharded(trainer):
        kwargs: dict[str, int] = trainer.strategy.distributed_sampler_kwargs  # type: ignore[attr-defined]
        return kwargs["rank"], kwargs["num_replicas"]
    return trainer.global_rank, trainer.world_size


def num_validation_samples(trainer: pl.Trainer, dataloader_idx: int) -> int | None:
    """Number of samples of a validation data loader that are not padding; None if all of them are not."""
    loaders = _flatten(trainer.val_dataloaders)
    return num_unpadded_samples(loaders[dataloader_idx]) if dataloader_idx < len(loaders) else None


def _flatten(loaders: Any) -> list[Any]:
    """Data loaders in nested lists, tuples and dicts, in Lightning's order."""
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    return (
        [leaf for loader in loaders for leaf in _flatten(loader)] if isinstance(loaders, (list, tuple)) else [loaders]
    )


def sharded_batches(
    trainer: pl.Trainer, dataloader: Iterable[Any], num_samples: int, check: CheckBatch
) -> Iterator[tuple[Any, BatchLayout]]:
    """Go through batches as the trainer would, with every n-th batch on each of n processes.

    Args:
        trainer: The trainer, which moves batches to its device.
        dataloader: The batches, the same on every process.
        num_samples: Number of samples to go through, over all processes.
        check: Called with each batch of this process, and with the first; returns which parts of it have one entry for
            each sample.

    Yields:
        The batches of this process, on its device, and their layouts.
    """
    rank, size = data_rank(trainer)
    n_seen, layout = 0, None
    with _validating(trainer):
        for index, batch in enumerate(dataloader):
            wanted = num_samples - n_seen
            if index % size == rank or layout is None:
                moved = _before_transfer(trainer.lightning_module, trainer.precision_plugin.convert_input(batch))
                moved = trainer.strategy.batch_to_device(moved)
                layout = check(moved)
                if index % size == rank:
                    yield layout.select(moved, slice(0, wanted)), layout
            n_seen += layout.num_samples(batch)
            if n_seen >= num_samples:
                return


def batches_before_training(
    trainer: pl.Trainer, index: int | None, check: CheckBatch
) -> Iterator[tuple[Any, BatchLayout]]:
    """Go through the first batches of one of the trainer's data loaders before the first step, without leaving a trace.

    Args:
        trainer: The trainer.
        index: Index of a validation data loader; None for the training data loader.
        check: Called with each batch; returns which parts of it have one entry for each sample.

    Yields:
        The batches of this process as in a validation, on its device, and their layouts.

    Raises:
        OneShotError: If that is not possible.
    """
    if index is None:
        loaders, limits = _flatten(trainer.train_dataloader), [trainer.num_training_batches]
        if len(loaders) != 1:
            raise OneShotError("each training batch combines several data loaders")
        loader, limit, index = loaders[0], limits[0], 0
    else:
        if trainer.val_dataloaders is None:
            raise OneShotError("the trainer makes its validation data loaders later")
        if _combined_mode(trainer) != "sequential":
            raise OneShotError("each validation batch combines several data loaders")
        loader, limit = _flatten(trainer.val_dataloaders)[index], trainer.num_val_batches[index]
    with batches_without_trace(loader) as batches, _validating(trainer):
        for k, batch in enumerate(batches):
            if k >= limit:
                break
            moved = _before_transfer(trainer.lightning_module, trainer.precision_plugin.convert_input(batch), index)
            moved = trainer.strategy.batch_to_device(moved, dataloader_idx=index)
            yield moved, check(moved)


@contextmanager
def _validating(trainer: pl.Trainer) -> Iterator[None]:
    """A block in which the trainer says that it validates: transfer hooks may augment training batches."""
    stage = trainer.state.stage
    trainer.state.stage = member(package_of(trainer), "trainer.states.RunningStage").VALIDATING
    try:
        yield
    finally:
        trainer.state.stage = stage


def shared_samples(trainer: pl.Trainer, batches: list[Any]) -> list[Any]:
    """Batches to compute on: those of this process, or of all processes where the model is sharded over them.

    Args:
        trainer: The trainer.
        batches: Batches of this process.

    Returns:
        The batches; those of all processes come in the same order on each.
    """
    if trainer.world_size == 1 or not is_sharded(trainer):
        return batches
    own = (data_rank(trainer)[0], [map_tensors(batch, lambda t: t.cpu()) for batch in batches])
    everyone: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(everyone, own)
    # Under tensor parallelism several processes have seen the same samples.
    by_place = dict(reversed(everyone))
    device = trainer.strategy.root_device
    return [map_tensors(batch, lambda t: t.to(device)) for place in sorted(by_place) for batch in by_place[place]]


def shard_size(num_samples: int, rank: int, size: int) -> int:
    """Number of samples that one of several processes keeps.

    Args:
        num_samples: Number of samples over all processes.
        rank: Rank of the process.
        size: Number of processes.

    Returns:
        Its number of samples.

    Example:
        >>> [shard_size(7, rank, 3) for rank in range(3)]
        [3, 2, 2]
    """
    return (num_samples - rank + size - 1) // size


def num_unpadded_samples(data_loader: Any) -> int | None:
    """Number of samples that a data loader has before its distributed sampler repeats some as padding.

    Distributed samplers repeat samples at the end, so that all processes get equally many.

    Args:
        data_loader: Any iterable of batches.

    Returns:
        The number; None if nothing is repeated.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> sampler = DistributedSampler(range(7), num_replicas=2, rank=1, shuffle=False)
        >>> len(sampler), num_unpadded_samples(DataLoader(range(7), sampler=sampler))
        (4, 3)
    """
    batches = getattr(data_loader, "batch_sampler", None)
    sampler = getattr(data_loader if batches is None else batches, "sampler", None)
    if not isinstance(sampler, DistributedSampler):
        return None
    return shard_size(len(sampler.dataset), sampler.rank, sampler.num_replicas)  # type: ignore[arg-type]


def has_received_sigterm(trainer: pl.Trainer) -> bool:
    """Whether the trainer is going to end for SIGTERM; never with versions of Lightning that do not tell."""
    return bool(getattr(trainer, "received_sigterm", False))


def sigterm_exception(trainer: pl.Trainer) -> BaseException:
    """What the trainer raises between two batches after SIGTERM."""
    cls = member(package_of(trainer), "utilities.exceptions.SIGTERMException") or SystemExit
    return cls()


# Internals of Lightning, each with a fallback for versions without it. tests/training/test_lightning_internals.py names
# all of them.


def _batches_that_stepped(trainer: pl.Trainer) -> int:
    """Lightning's own step axis; without it, the number of optimizer steps, which only differs if there are several."""
    return int(getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step))


def _combined_mode(trainer: pl.Trainer) -> str:
    """How several validation loaders are combined; without the internals, as by default."""
    combined = getattr(trainer.fit_loop.epoch_loop.val_loop, "_combined_loader", None)
    return str(getattr(combined, "_mode", "sequential"))


def call_again_last(trainer: pl.Trainer, callback: Any) -> bool:
    """Have the hook of a callback that is running called once more, after those of all callbacks except checkpoints.

    The trainer goes through its own list of callbacks, so an entry that is added further down is reached. If Lightning
    went through a copy, there would be no second call.

    Args:
        trainer: The trainer, in the middle of calling a hook of all callbacks.
        callback: The callback.

    Returns:
        Whether there are others in between; if not, nothing is added. `remove_duplicates` is for the second call.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    place = callbacks.index(callback)
    end = next((k for k, other in enumerate(callbacks) if is_instance(other, "callbacks.Checkpoint")), len(callbacks))
    if place + 1 >= end:
        return False
    callbacks.insert(end, callback)
    return True


def remove_duplicates(trainer: pl.Trainer) -> None:
    """Undo `call_again_last`. The list is a new one, because the trainer is going through the present one."""
    once = {id(callback): callback for callback in trainer.callbacks}  # type: ignore[attr-defined]
    trainer.callbacks = list(once.values())  # type: ignore[attr-defined]


def _before_transfer(pl_module: pl.LightningModule, batch: Any, index: int = 0) -> Any:
    """Apply the module's or data module's hook before a batch of a data loader is moved to the device."""
    internal = getattr(pl_module, "_on_before_batch_transfer", None)
    return pl_module.on_before_batch_transfer(batch, index) if internal is None else internal(batch, index)
