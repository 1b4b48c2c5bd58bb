"""What a trainer means for snapshots: which processes there are, who sees which data, and what cannot work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import RunningStage
from torch import distributed as dist
from torch.utils._pytree import tree_leaves

from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from lib_lightning.distributed.torch_group import ReplicatedGroup, TorchProcessGroup
from lib_lightning.errors import LIBError
from lib_lightning.model.batch import batch_size, map_tensors, slice_batch
from lib_lightning.training.sample_buffer import num_unpadded_samples


def process_group_of(trainer: pl.Trainer) -> ProcessGroup:
    """The processes that a trainer's run consists of.

    Args:
        trainer: The trainer, its process group set up.

    Returns:
        `TorchProcessGroup` where each holds the whole model, `ReplicatedGroup` where they hold it together.
    """
    if trainer.world_size == 1 or not (dist.is_available() and dist.is_initialized()):
        return SINGLE_PROCESS
    return ReplicatedGroup() if is_sharded(trainer) else TorchProcessGroup()


def is_sharded(trainer: pl.Trainer) -> bool:
    """Whether processes hold the model's weights in parts."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def check_strategy(trainer: pl.Trainer, dtype: torch.dtype | None) -> None:
    """Stop at the start of fit where a snapshot cannot be computed.

    Args:
        trainer: The trainer.
        dtype: Type to compute in, or None for the model's own.

    Raises:
        LIBError: With the reason, and what to do.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DeepSpeedStrategy):
        raise LIBError(
            "LIBCallback does not work with DeepSpeedStrategy: its engine gathers weights for one backward pass "
            "through the whole model, and a basis needs many through parts of it. Use DDPStrategy or "
            "ModelParallelStrategy."
        )
    if isinstance(strategy, FSDPStrategy):
        raise LIBError(
            "LIBCallback does not work with FSDPStrategy: it frees a module's weights after one backward pass, and a "
            "basis needs many over the same forward pass. Use ModelParallelStrategy with fully_shard, its successor, "
            "or DDPStrategy."
        )
    if is_sharded(trainer) and dtype is not None:
        raise LIBError(
            f"LIBCallback cannot compute in {str(dtype).split('.')[-1]} on a model whose weights lie in parts on "
            f"several processes ({type(strategy).__name__}): leave dtype out to compute in the model's own type."
        )


def has_validation(trainer: pl.Trainer) -> bool:
    """Whether there are validations in this fit; yes as long as nobody has asked for the data."""
    return bool(trainer.enable_validation and (trainer.val_dataloaders is None or sum(trainer.num_val_batches)))


def refuse_without_validation(trainer: pl.Trainer, process_group: ProcessGroup, index: int) -> None:
    """Stop before the first step where there will be no validation batches to compute on, on all processes alike.

    Args:
        trainer: The trainer.
        process_group: Its processes.
        index: Which of the validation data loaders is wanted.

    Raises:
        LIBError: If there are none, there or on one of the processes.
    """
    # Before the first validation, the number of batches is known from the sanity check, if there was one.
    batches = trainer.num_val_batches if trainer.val_dataloaders is not None else [1] * (index + 1)
    if trainer.enable_validation and index >= len(batches):
        raise LIBError(
            f"LIBCallback is to compute on validation data loader {index}, counted from 0, but there are only "
            f"{len(batches)}."
        )
    combined = trainer.fit_loop.epoch_loop.val_loop._combined_loader
    if index and combined is not None and combined._mode != "sequential":
        raise LIBError(
            f"LIBCallback is to compute on validation data loader {index}, but batches of all loaders come together "
            f"(CombinedLoader in mode '{combined._mode}'): leave val_dataloader at 0, and choose with input_fn."
        )
    there = bool(trainer.enable_validation and batches[index])
    missing = [rank for rank, t in enumerate(process_group.gather(torch.tensor([there]))) if not t]
    if missing:
        where = "" if len(missing) == process_group.size else f" on process {missing[0]}"
        raise LIBError(
            f"LIBCallback computes on validation batches, and there are none{where}: give the trainer a validation "
            "data loader with data in it, a validation_step, and limit_val_batches above 0; or give the callback a "
            "dataloader of its own."
        )


def run_folder(trainer: pl.Trainer) -> Path | None:
    """The folder of this run: the log directory, or one named after the run where a logger keeps all runs in one.

    Args:
        trainer: The trainer; all processes have to ask together.

    Returns:
        The folder; None for trial runs, which leave nothing behind.
    """
    if trainer.fast_dev_run or trainer.barebones:  # type: ignore[attr-defined]
        return None
    logger = trainer.logger
    if logger is None or isinstance(logger, (TensorBoardLogger, CSVLogger)):
        return Path(trainer.log_dir or trainer.default_root_dir)
    parts = (logger.save_dir or trainer.default_root_dir, logger.name, logger.version)
    folder = Path(*(str(part) for part in parts if part is not None))
    return Path(trainer.strategy.broadcast(str(folder)))


@contextmanager
def isolated_forward(trainer: pl.Trainer, pl_module: pl.LightningModule, dtype: torch.dtype | None) -> Iterator[None]:
    """A block that calls the model as the trainer would, though it is not the trainer that does.

    Tensors that the model makes are of the type that the trainer's precision asks for. What it logs goes nowhere.

    Args:
        trainer: The trainer.
        pl_module: The model; modules inside it may log, too.
        dtype: Type to compute in, or None for the model's own.

    Yields:
        Nothing.
    """
    default = torch.get_default_dtype()
    modules = [module for module in pl_module.modules() if isinstance(module, pl.LightningModule)]
    kept = [module.__dict__.get("log") for module in modules]
    for module in modules:
        module.__dict__["log"] = lambda *args, **kwargs: None  # log_dict goes through it
    try:
        with trainer.precision_plugin.forward_context():
            if dtype is not None:
                torch.set_default_dtype(dtype)
            yield
    finally:
        torch.set_default_dtype(default)
        for module, log in zip(modules, kept, strict=True):
            del module.__dict__["log"]
            if log is not None:
                module.__dict__["log"] = log


def logging_step(trainer: pl.Trainer) -> int:
    """The step axis of ``LightningModule.log``: batches that ended in an optimizer step, counted from 0.

    Once training has ended that count has moved on, but the last numbers belong beside those of the last validation.
    """
    return min(trainer.fit_loop.epoch_loop._batches_that_stepped, max(trainer.global_step - 1, 0))


def synchronize(trainer: pl.Trainer) -> None:
    """Wait until the device has done what training has asked of it, which goes on after the call has returned."""
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)


def data_rank(trainer: pl.Trainer) -> tuple[int, int]:
    """Which part of the data this process sees: its number among processes with different data, and their number."""
    if isinstance(trainer.strategy, ModelParallelStrategy):
        kwargs = trainer.strategy.distributed_sampler_kwargs
        return kwargs["rank"], kwargs["num_replicas"]
    return trainer.global_rank, trainer.world_size


def distinct_validation_samples(trainer: pl.Trainer, dataloader_idx: int) -> int | None:
    """How many samples of a validation data loader are not repeated for the sake of even numbers; None for all."""
    loaders = tree_leaves(trainer.val_dataloaders)
    return num_unpadded_samples(loaders[dataloader_idx]) if dataloader_idx < len(loaders) else None


def sharded_batches(trainer: pl.Trainer, dataloader: Iterable[Any], num_samples: int) -> Iterator[Any]:
    """Go through batches as the trainer would, each process taking its turn.

    Args:
        trainer: The trainer, which moves batches to its device.
        dataloader: The batches, the same on every process.
        num_samples: Samples to take, over all processes.

    Yields:
        The batches of this process.
    """
    rank, size = data_rank(trainer)
    taken = 0
    stage = trainer.state.stage
    trainer.state.stage = RunningStage.VALIDATING  # hooks on the way to the device may augment what is for training
    try:
        for index, batch in enumerate(dataloader):
            wanted = num_samples - taken
            taken += batch_size(batch)
            if index % size == rank:
                batch = trainer.precision_plugin.convert_input(slice_batch(batch, 0, wanted))
                batch = trainer.lightning_module._on_before_batch_transfer(batch)
                yield trainer.strategy.batch_to_device(batch)
            if taken >= num_samples:
                return
    finally:
        trainer.state.stage = stage


def shared_samples(trainer: pl.Trainer, batches: list[Any]) -> list[Any]:
    """Samples to compute on: a process's own, or everybody's where the model runs on all processes in step.

    Args:
        trainer: The trainer.
        batches: Batches of this process.

    Returns:
        Batches; where they are everybody's, the same on every process and in the same order.
    """
    if trainer.world_size == 1 or not is_sharded(trainer):
        return batches
    own = (data_rank(trainer)[0], [map_tensors(batch, lambda t: t.cpu()) for batch in batches])
    everyone: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(everyone, own)
    # Processes that split a layer, not the data, have seen the same samples.
    by_place = dict(reversed(everyone))
    device = trainer.strategy.root_device
    return [map_tensors(batch, lambda t: t.to(device)) for place in sorted(by_place) for batch in by_place[place]]
