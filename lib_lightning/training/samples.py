"""The samples that all snapshots of a run are computed on: where they come from, and how they outlast the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from lib_lightning.errors import LIBError
from lib_lightning.model.preserve import preserve_rng
from lib_lightning.training.sample_buffer import SampleBuffer, shard_size, take_fraction
from lib_lightning.training.snapshot import SnapshotData
from lib_lightning.training.trainer import (
    data_rank,
    distinct_validation_samples,
    refuse_without_validation,
    sharded_batches,
    shared_samples,
)
from lib_lightning.training.writer import SnapshotDirectory

log = logging.getLogger(__name__)

# Samples that features are followed on, and how many of the sanity check's will do: eight for each of 64 dimensions are
# enough to see that features have only turned among themselves.
NUM_REFERENCE_SAMPLES = 1024
_ENOUGH_REFERENCE_SAMPLES = 512


class SampleStore:
    """Samples of one run: those of the first whole validation, before it those of the sanity check, or the user's own.

    They are written beside the snapshots, so that a resumed run goes on with the same ones. Some of the first of them,
    chosen by a seed, are probe samples: those stay the same throughout.

    Args:
        num_samples: SnapshotData to keep, over all processes.
        dataloader: Batches of the user's own; None for validation batches.
        val_dataloader: Which of several validation data loaders to take.
        hold_out: Whether to keep as many samples more, which snapshots are not computed on.
        held_out_dataloader: Which validation data loader to take those from; None for those that follow.

    Raises:
        ValueError: If fewer than two samples are wanted.

    Attributes:
        buffer: The samples of this process.
        held_out: SnapshotData that snapshots are not computed on.
        probes: SnapshotData that features are followed on.
        seed: Chooses the probe samples.
    """

    def __init__(
        self,
        num_samples: int,
        dataloader: Iterable[Any] | None,
        val_dataloader: int,
        hold_out: bool = False,
        held_out_dataloader: int | None = None,
    ) -> None:
        if num_samples < 2:
            raise ValueError(f"num_samples is a number from 2 on: a basis needs samples to vary; got {num_samples}.")
        self.num_samples, self.dataloader, self.val_dataloader = num_samples, dataloader, val_dataloader
        self.hold_out, self.held_out_dataloader = hold_out, held_out_dataloader
        self._settings = {"num_samples": num_samples, "own": dataloader is not None, "val_dataloader": val_dataloader}
        if hold_out:
            self._settings["held_out"] = -1 if held_out_dataloader is None else held_out_dataloader
        self.reset()

    def reset(self) -> None:
        """Forget the run before."""
        self.buffer, self.held_out = (SampleBuffer(self.num_samples) for _ in range(2))
        self.probes = SampleBuffer(NUM_REFERENCE_SAMPLES)
        self.seed = 0
        self.known = self._checked_sanity = False
        self._process_group: ProcessGroup = SINGLE_PROCESS
        self._folder: SnapshotDirectory | None = None
        self._written_to: str | None = None
        self._unwritten = False
        self._resumed: tuple[str, bool] | None = None

    @property
    def batches(self) -> list[Any]:
        """The samples of this process."""
        return self.buffer.batches

    def start(self, trainer: pl.Trainer, process_group: ProcessGroup, folder: SnapshotDirectory | None) -> None:
        """Learn what run this is."""
        self._process_group, self._folder = process_group, folder
        self._writes = trainer.state.fn == "fit"  # a look from outside leaves the run's samples alone
        for buffer in self._buffers:
            buffer.num_samples = shard_size(self.num_samples, *data_rank(trainer))
        self.probes.num_samples = shard_size(NUM_REFERENCE_SAMPLES, *data_rank(trainer))

    @property
    def _buffers(self) -> tuple[SampleBuffer, SampleBuffer]:
        return self.buffer, self.held_out

    def prepare(self, trainer: pl.Trainer, check: Callable[[Any], None]) -> None:
        """Take the samples that are there before the first step, and make sure that there will be some.

        Args:
            trainer: The trainer.
            check: Called with a batch before any is taken.

        Raises:
            LIBError: If there are no validation batches, and none of the user's own.
        """
        self._restore(trainer, check)
        if self.dataloader is None:
            refuse_without_validation(trainer, self._process_group, self.val_dataloader)
            if self.held_out_dataloader is not None:
                refuse_without_validation(trainer, self._process_group, self.held_out_dataloader)
        else:
            self.collect(trainer, check)

    def collect(self, trainer: pl.Trainer, check: Callable[[Any], None]) -> None:
        """Go through the user's own batches, if there are any and it has not been done."""
        if self.dataloader is None or self.buffer.complete:
            return
        for buffer in self._buffers:
            buffer.num_samples = self.num_samples  # shared out by whole batches
        wanted = self.num_samples * (1 + self.hold_out)
        with preserve_rng(_generators(self.dataloader)), self._process_group.sync_errors():
            for batch in sharded_batches(trainer, self.dataloader, wanted):
                check(batch)
                self._add(batch, None)
        if not any(self._process_group.gather(torch.tensor([len(self.batches)]))):
            raise LIBError("The dataloader given to LIBCallback has no batches, or is an iterator that is used up.")
        self.keep(complete=True)

    def new_pass(self) -> None:
        """A validation begins: what was kept of the one before was perhaps only a sanity check."""
        if not self.buffer.complete:
            for buffer in self._buffers:
                buffer.clear()

    def see(self, trainer: pl.Trainer, batch: Any, dataloader_idx: int, check: Callable[[Any], None]) -> None:
        """Keep a copy of a validation batch, if it is one of those that count."""
        if self.dataloader is not None or self.buffer.complete:
            return
        if dataloader_idx == self.val_dataloader:
            check(batch)
            self._add(batch, distinct_validation_samples(trainer, dataloader_idx))
        if self.hold_out and dataloader_idx == self.held_out_dataloader:
            self.held_out.add(batch, distinct_validation_samples(trainer, dataloader_idx))

    def _add(self, batch: Any, available: int | None) -> None:
        rest = self.buffer.add(batch, available)
        if self.hold_out and self.held_out_dataloader is None and rest is not None:
            self.held_out.add(rest)

    def end_pass(self, sanity_check: bool) -> None:
        """A validation ends, or the data would have been seen in one."""
        self._checked_sanity = sanity_check
        if not sanity_check:
            self.keep(complete=True)
        elif self._resumed is None:
            self.keep(complete=False)

    def keep(self, complete: bool) -> None:
        """Keep the samples; complete ones stay as they are for the rest of the run."""
        self.known = True
        if self.buffer.complete:
            return
        for buffer in self._buffers:
            buffer.complete = complete
        if not self.probes.complete:
            self.probes.choose(self.buffer, self.seed)
            self.probes.complete = complete or self._enough_probes()
        self._unwritten = True

    def _enough_probes(self) -> bool:
        return (
            sum(int(t) for t in self._process_group.gather(torch.tensor([self.probes.count])))
            >= _ENOUGH_REFERENCE_SAMPLES
        )

    def _files(self, folder: SnapshotDirectory) -> list[tuple[Path, SampleBuffer]]:
        kinds = {"": self.buffer, "probes": self.probes, **({"held-out": self.held_out} if self.hold_out else {})}
        place = self._process_group.rank, self._process_group.size
        return [(folder.samples_file(*place, kind), buffer) for kind, buffer in kinds.items()]

    def for_snapshot(self, trainer: pl.Trainer, part: float = 1.0) -> SnapshotData:
        """What to compute a snapshot on: this process's samples, or everybody's where all compute in step.

        Args:
            trainer: The trainer.
            part: Part of each process's samples to compute on, the first ones.

        Returns:
            The samples.
        """
        # Where there were not enough to hold any out, scores are of the same samples.
        any_held_out = any(int(t) for t in self._process_group.gather(torch.tensor([self.held_out.count])))
        own = self.buffer.batches if part == 1 else take_fraction(self.buffer.batches, part)
        every = own, (self.held_out if any_held_out else self.buffer).batches, self.probes.batches
        batches, held_out, probes = (shared_samples(trainer, batches) for batches in every)
        return SnapshotData(batches, held_out, probes, self.seed)

    def _restore(self, trainer: pl.Trainer, check: Callable[[Any], None]) -> None:
        if self._resumed is None:
            return
        folder, complete = self._resumed
        before = SnapshotDirectory(Path(folder))
        files = self._files(before)
        restored = [SampleBuffer(buffer.num_samples) for _, buffer in files]
        device = trainer.strategy.root_device
        found = all(buffer.load(path, device) for buffer, (path, _) in zip(restored, files, strict=True))
        if all(self._process_group.gather(torch.tensor([found]))):
            for batch in restored[0].batches[:1]:
                check(batch)
            self.buffer, self.probes, self.held_out = [*restored, self.held_out][:3]
            self.probes.complete = complete or self._enough_probes()
            self.keep(complete)
            return
        log.warning("The samples that snapshots were computed on are not in %s any more; new ones are taken.", folder)
        if self._checked_sanity:
            self.keep(complete=False)

    def state_dict(self) -> dict[str, Any]:
        """Where the samples are, for a resumed run: written only now that there may be one."""
        if self._unwritten and self._folder is not None and self._writes:
            saved = [buffer.save(path) for path, buffer in self._files(self._folder)]
            self._written_to = str(self._folder.path.resolve()) if all(saved) else None
            self._unwritten = False
        return {"written_to": self._written_to, "complete": self.buffer.complete, "seed": self.seed,
            "settings": self._settings,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Note where the samples of the interrupted run are."""
        if state["settings"] != self._settings:
            log.warning("SnapshotData are to be taken in another way than before the interruption; new ones are taken.")
        elif state["written_to"] is not None:
            self._resumed, self.seed = (state["written_to"], state["complete"]), state["seed"]


def _generators(dataloader: Any) -> list[torch.Generator]:
    """Random generators of a data loader's own, which another one may share."""
    batch_sampler = getattr(dataloader, "batch_sampler", None)
    holders = (dataloader, getattr(dataloader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = (getattr(holder, "generator", None) for holder in holders)
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
