"""The samples that all snapshots of a run are computed on: where they come from, and how they survive the run."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lib_lightning.distributed.process_group import ProcessGroup
from lib_lightning.errors import LIBError, SettingTypeError, brief, check_number, counted, shortened
from lib_lightning.io.basis_file import write_bytes
from lib_lightning.io.run_layout import RunLayout
from lib_lightning.model.batch import hash_tensors, map_tensors, tensors_in
from lib_lightning.model.batch_layout import BatchLayout
from lib_lightning.model.preserve import preserve_rng
from lib_lightning.training.first_batches import OneShotError
from lib_lightning.training.frameworks import rank_zero_info
from lib_lightning.training.snapshot import SnapshotData
from lib_lightning.training.trainer import (
    CheckBatch,
    batches_before_training,
    data_rank,
    has_validation,
    num_validation_samples,
    require_validation,
    shard_size,
    sharded_batches,
    shared_samples,
)

if TYPE_CHECKING:
    import lightning.pytorch as pl

log = logging.getLogger(__name__)

# Samples on which features are recognised from snapshot to snapshot. Eight for each of 64 dimensions are enough to see
# that features have only rotated among themselves, so that many from the sanity check are kept for the whole run.
NUM_REFERENCE_SAMPLES = 1024
_ENOUGH_REFERENCE_SAMPLES = 512


class SampleBuffer:
    """Copies of batches, up to a number of samples.

    Args:
        num_samples: Number of samples to keep.
        layout: Which parts of a batch have one entry for each sample.

    Attributes:
        batches: The copies.
        count: Number of samples in them.
        is_frozen: Whether no more samples are accepted.

    Example:
        >>> buffer = SampleBuffer(3)
        >>> rest = [buffer.add((torch.zeros(2, 5), torch.zeros(2))) for _ in range(2)]
        >>> [inputs.shape[0] for inputs, labels in buffer.batches], buffer.is_full
        ([2, 1], True)
    """

    def __init__(self, num_samples: int, layout: BatchLayout | None = None) -> None:
        self.num_samples, self.layout = num_samples, layout or BatchLayout()
        self.batches: list[Any] = []
        self.count = 0
        self.is_frozen = False
        self._offered = 0
        self._digest = -1, b""

    @property
    def is_full(self) -> bool:
        """Whether the number of samples is reached."""
        return self.count >= self.num_samples

    def add(self, batch: Any, available: int | None = None, layout: BatchLayout | None = None) -> Any:
        """Copy a batch, or as many of its samples as are still wanted.

        Args:
            batch: What a data loader returns.
            available: Number of distinct samples that the data loader has; the ones after these are padding by a
                distributed sampler, and are ignored.
            layout: Which parts of the batch have one entry for each sample; None for the same as before.

        Returns:
            The available samples that were not wanted; None if there are none. A batch that cannot be split is kept as
            a whole.
        """
        self.layout = layout or self.layout
        n = self.layout.num_samples(batch)
        distinct = n if available is None else max(0, min(n, available - self._offered))
        wanted = min(distinct, self.num_samples - self.count)
        self._offered += n
        if not self.layout.can_split(batch) and wanted > 0:
            wanted = distinct = n
        rest = self.layout.select(batch, slice(max(0, wanted), distinct)) if wanted < distinct else None
        if wanted <= 0 or self.is_frozen:
            return rest
        # Copies made outside inference mode are ordinary tensors, which gradients can be taken through.
        with torch.inference_mode(False):
            kept = batch if n <= wanted else self.layout.select(batch, slice(0, wanted))
            parts = self.layout.uniform_parts(kept)
            self.batches += [map_tensors(part, lambda t: t.detach().clone()) for part in parts]
        self.count += wanted
        return rest

    def use(self, layout: BatchLayout) -> None:
        """Count the samples anew, with the layout of the batches."""
        self.layout, self.count = layout, sum(map(layout.num_samples, self.batches))

    @property
    def digest(self) -> bytes:
        """Hash of the samples so far; computed once for each number of them."""
        if self._digest[0] != self.count:
            self._digest = self.count, hash_tensors(("", t) for batch in self.batches for t in tensors_in(batch))
        return self._digest[1]

    def freeze(self) -> None:
        """Accept no more samples."""
        self.is_frozen = True

    def subsample(self, num_samples: int, seed: int) -> SampleBuffer:
        """A new buffer with some of the samples, chosen at random.

        Args:
            num_samples: Number of samples to choose, at most.
            seed: Seed of the choice.

        Returns:
            The buffer; samples keep their order and batches.
        """
        subset = SampleBuffer(num_samples, self.layout)
        chosen = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed), device="cpu")[:num_samples]
        start = 0
        for batch in self.batches:
            n = self.layout.num_samples(batch)
            here = chosen[(chosen >= start) & (chosen < start + n)].sort().values - start
            start += n
            if len(here):
                subset.add(self.layout.select(batch, here))
        return subset

    def save(self, path: Path) -> bool:
        """Write the samples to a file, so that a resumed run continues with the same ones.

        Args:
            path: Where to write.

        Returns:
            Whether that was possible. If not (a full disk, batches of classes that cannot be loaded safely), a warning
            says why.
        """
        data = io.BytesIO()
        try:
            torch.save([map_tensors(batch, lambda t: t.cpu()) for batch in self.batches], data)
            torch.load(io.BytesIO(data.getvalue()), weights_only=True)
            write_bytes(path, data.getvalue())
        except Exception as error:
            log.warning(
                "The samples of the snapshots could not be written to %s; a run resumed from here will collect new "
                "ones. %s: %s",
                path, type(error).__name__, str(error).split("\n")[0],
            )  # fmt: skip
            return False
        return True

    @classmethod
    def load(cls, path: Path, num_samples: int, device: torch.device) -> SampleBuffer | None:
        """Read a file that `save` wrote.

        Args:
            path: The file.
            num_samples: Number of samples that the buffer may hold.
            device: Where to put the samples.

        Returns:
            The buffer; None if the file is missing or damaged.
        """
        buffer = cls(num_samples)
        try:
            buffer.batches = torch.load(path, map_location=device, weights_only=True)
            buffer.use(buffer.layout)
        except Exception:  # a damaged file can raise nearly anything
            return None
        return buffer


# What a number of samples must be, for messages.
AT_LEAST_TWO = "must be at least 2: a basis needs samples to vary"


@dataclass(frozen=True)
class SampleConfig:
    """Which samples snapshots are computed on.

    Args:
        num_samples: Number of samples, over all processes.
        dataloader: The user's own batches; None for validation batches.
        val_dataloader: Index of the validation data loader to use, where there are several.
        hold_out: Whether to keep as many samples again that bases are not computed on, for ablations.
        held_out_dataloader: Index of the validation data loader that these come from; None for the samples that follow.

    Raises:
        SettingError: If fewer than two samples are asked for.
    """

    num_samples: int
    dataloader: Iterable[Any] | None = None
    val_dataloader: int = 0
    hold_out: bool = False
    held_out_dataloader: int | None = None

    def __post_init__(self) -> None:
        check_number("num_samples", self.num_samples, lambda n: n >= 2, AT_LEAST_TWO, integer=True)
        check_number("val_dataloader", self.val_dataloader, lambda k: k >= 0, "counts from 0", integer=True)
        # An object without __iter__ may still be iterated over, by __getitem__.
        is_loader = hasattr(self.dataloader, "__iter__") or hasattr(self.dataloader, "__getitem__")
        if self.dataloader is not None and (
            not is_loader or isinstance(self.dataloader, (str, bytes, Mapping, Tensor))
        ):
            raise SettingTypeError(
                "dataloader must be an iterable of batches, such as a DataLoader or a list of tensors; got "
                f"{shortened(repr(self.dataloader), 80)}."
            )

    @property
    def plain(self) -> dict[str, Any]:
        """The settings as plain values, which a resumed run compares with its own."""
        own = {"num_samples": int(self.num_samples), "own": self.dataloader is not None}
        held_out = -1 if self.held_out_dataloader is None else self.held_out_dataloader
        return {**own, "val_dataloader": self.val_dataloader, **({"held_out": held_out} if self.hold_out else {})}


@dataclass
class SavedSamples:
    """Where the samples of a run have been written; plain values, so that a checkpoint can hold them.

    Attributes:
        written_to: The run folder; None if they have not been written.
        complete: Whether they are those of a whole validation, and stay the same for the rest of the run.
        seed: Seed of the choice of reference samples.
        settings: `SampleConfig.plain` of the run.
    """

    written_to: str | None = None
    complete: bool = False
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def forget(self) -> None:
        """The files are of no use to this run."""
        self.written_to = None

    def update(self, written_to: str | None, complete: bool, settings: dict[str, Any]) -> None:
        """Note where the samples are now."""
        self.written_to, self.complete, self.settings = written_to, complete, settings


class SampleStore:
    """Collects the samples of one run, keeps them for all of its snapshots, and saves them for a resumed run.

    They are the first ones of the validation data, or the user's own. Where a snapshot is due before the first
    validation, they are read before the first step, if that leaves no trace; else they are those of the sanity check
    until then. Some of the first samples, chosen at random, are reference samples: these stay the same throughout the
    run.

    Args:
        config: Which samples to collect.
        saved: Where the samples of an interrupted run are; updated in place when samples are written.
        trainer: The trainer.
        process_group: Its processes.
        layout: The run folder; None for a run that writes nothing.

    Attributes:
        buffer: Samples of this process that snapshots are computed on.
        held_out: Samples of this process that only ablations are scored on.
        reference: Samples of this process that features are recognised on.
        is_ready: Whether there are samples to compute a snapshot on.
        has_given_up: Whether there are none because collecting them has failed.
    """

    def __init__(
        self,
        config: SampleConfig,
        saved: SavedSamples,
        trainer: pl.Trainer,
        process_group: ProcessGroup,
        layout: RunLayout | None,
    ) -> None:
        self._config, self._saved, self._process_group = config, saved, process_group
        # A standalone validation leaves the files of the training run alone.
        self._layout = layout if trainer.state.fn == "fit" else None
        self._can_restore = saved.written_to is not None and saved.settings == config.plain
        if saved.written_to is not None and not self._can_restore:
            log.warning("The resumed run asks for other samples than the interrupted one; new ones are collected.")
            saved.forget()
        # The user's own batches are distributed as a whole, validation samples evenly.
        rank, size = (0, 1) if config.dataloader is not None else data_rank(trainer)
        self._capacity = shard_size(config.num_samples, rank, size)
        self._reference_capacity = shard_size(NUM_REFERENCE_SAMPLES, *data_rank(trainer))
        self.buffer, self.held_out = SampleBuffer(self._capacity), SampleBuffer(self._capacity)
        self.reference = SampleBuffer(self._reference_capacity)
        self.is_ready = self._is_unsaved = self._seen_sanity_check = self._has_failed = self.has_given_up = False

    def prepare(self, trainer: pl.Trainer, check: CheckBatch, is_due_early: bool = False) -> None:
        """Get the samples that are available before the first step, and make sure that there will be some.

        Args:
            trainer: The trainer.
            check: Called with a batch before any is kept; returns which parts of it have one entry for each sample.
            is_due_early: Whether a snapshot may be due before the first validation.

        Raises:
            LIBError: If there are no batches to compute on.
        """
        if self._can_restore:
            self._restore(trainer, check)
        if self._config.dataloader is not None:
            self.collect_own(trainer, check)
            return
        # The loaders of some processes may be empty, which is an error.
        validates = any(self._process_group.gather(torch.tensor([has_validation(trainer)], device="cpu")))
        if not validates and self._takes_training_samples(trainer, check):
            return
        require_validation(trainer, self._process_group, self._config.val_dataloader)
        if self._config.held_out_dataloader is not None:
            require_validation(trainer, self._process_group, self._config.held_out_dataloader)
        if is_due_early and not self.buffer.is_frozen:
            reason = self._read_first(trainer, self._config.val_dataloader, check)
            if reason:
                has = (
                    f"the {counted(self.buffer.count, 'sample')} of the sanity check" if self.is_ready else "no samples"
                )
                rank_zero_info(f"Before the first validation, snapshots have {has}: {reason}.")

    def _takes_training_samples(self, trainer: pl.Trainer, check: CheckBatch) -> bool:
        """Without validation, read the training data instead; whether that was possible."""
        if self.buffer.is_frozen:
            return True
        uses_first = self._config.val_dataloader == 0 and self._config.held_out_dataloader is None
        if not uses_first or self._read_first(trainer, None, check):
            return False
        rank_zero_info(
            f"Snapshots are computed on {counted(self.buffer.count, 'training sample')}, since this training has no "
            "validation; dataloader= of LIBCallback takes others."
        )
        return True

    def _read_first(self, trainer: pl.Trainer, index: int | None, check: CheckBatch) -> str:
        """Read all samples before the first step, from the trainer's data loaders, which stay as they are.

        Args:
            trainer: The trainer.
            index: Index of a validation data loader; None for the training data loader.
            check: Called with each batch before it is kept.

        Returns:
            Why that was not possible; empty if it was.
        """
        before, reason = (self.buffer, self.held_out), ""
        self.buffer, self.held_out = SampleBuffer(self._capacity), SampleBuffer(self._capacity)
        with self._process_group.sync_errors():  # of the model, which stop the run before its first step
            try:
                self._read(trainer, index, check)
            except OneShotError as error:
                reason = str(error)
            except LIBError:
                raise
            except Exception as error:  # of the data, which the trainer will report when it reads them
                reason = f"reading them failed with {brief(error)}"
        if any(self._process_group.gather(torch.tensor([bool(reason)], device="cpu"))):
            self.buffer, self.held_out = before
            return reason or "another process cannot read its own without leaving a trace"
        self._keep(complete=True)
        return ""

    def _read(self, trainer: pl.Trainer, index: int | None, check: CheckBatch) -> None:
        holds_out, other = self._config.hold_out, self._config.held_out_dataloader
        available = None if index is None else num_validation_samples(trainer, index)
        for batch, layout in batches_before_training(trainer, index, check):
            self._add(batch, available, layout)
            if self.buffer.is_full and (not holds_out or other is not None or self.held_out.is_full):
                break
        if holds_out and other is not None:
            available = num_validation_samples(trainer, other)
            for batch, _ in batches_before_training(trainer, other, lambda _: self.buffer.layout):
                self.held_out.add(batch, available, self.buffer.layout)
                if self.held_out.is_full:
                    break

    def collect_own(self, trainer: pl.Trainer, check: CheckBatch) -> None:
        """Go through the user's own batches, if there are any and they have not been collected yet.

        Args:
            trainer: The trainer.
            check: Called with each batch before it is kept.

        Raises:
            LIBError: If there are no batches.
        """
        if self._config.dataloader is None or self.buffer.is_frozen:
            return
        wanted = self._config.num_samples * (1 + self._config.hold_out)
        with preserve_rng(_generators(self._config.dataloader)), self._process_group.sync_errors():
            for batch, layout in sharded_batches(trainer, self._config.dataloader, wanted, check):
                self._add(batch, None, layout)
        if not any(self._process_group.gather(torch.tensor([len(self.buffer.batches)], device="cpu"))):
            raise LIBError("The dataloader given to LIBCallback has no batches, or is an iterator that is exhausted.")
        self._keep(complete=True)

    def start_validation(self) -> None:
        """A validation begins: samples of a sanity check are replaced."""
        if not self.buffer.is_frozen:
            self.buffer, self.held_out = SampleBuffer(self._capacity), SampleBuffer(self._capacity)

    def observe(self, trainer: pl.Trainer, batch: Any, dataloader_idx: int, check: CheckBatch) -> None:
        """Keep a copy of a validation batch, if it is from the data loader that is used.

        Args:
            trainer: The trainer.
            batch: The batch.
            dataloader_idx: Index of its data loader.
            check: Called with the batch before it is kept.
        """
        if self._config.dataloader is not None or self.buffer.is_frozen:
            return
        if dataloader_idx not in (self._config.val_dataloader, self._config.held_out_dataloader) or self._has_failed:
            return
        try:
            if dataloader_idx == self._config.val_dataloader:
                self._add(batch, num_validation_samples(trainer, dataloader_idx), check(batch))
            if self._config.hold_out and dataloader_idx == self._config.held_out_dataloader:
                self.held_out.add(batch, num_validation_samples(trainer, dataloader_idx), self.buffer.layout)
        except Exception as error:
            # Wrong settings stop a run before its first step; after that, nothing does.
            if isinstance(error, LIBError) and trainer.global_step == 0:
                raise
            self._has_failed = True
            log.warning(
                "No samples for snapshots are collected any more; training continues. %s: %s",
                type(error).__name__,
                error,
            )

    def _add(self, batch: Any, available: int | None, layout: BatchLayout) -> None:
        rest = self.buffer.add(batch, available, layout)
        if self._config.hold_out and self._config.held_out_dataloader is None and rest is not None:
            self.held_out.add(rest, None, layout)

    def end_validation(self, is_sanity_check: bool) -> None:
        """A validation has ended, or a training epoch in a run without validation.

        Args:
            is_sanity_check: Whether it was the sanity check, which sees few samples.
        """
        self._seen_sanity_check = is_sanity_check
        # In a resumed run, samples are about to be restored.
        if not is_sanity_check or not self._can_restore:
            self._keep(complete=not is_sanity_check)

    def _keep(self, complete: bool) -> None:
        """Keep the samples seen so far; complete ones stay the same for the rest of the run."""
        # Where collecting them has failed, that has been said.
        has_none = self._has_failed and not self.buffer.batches
        self.has_given_up = all(self._process_group.gather(torch.tensor([has_none], device="cpu")))
        self.is_ready = not self.has_given_up
        if self.buffer.is_frozen:
            return
        if complete:
            self.buffer.freeze()
            self.held_out.freeze()
        if not self.reference.is_frozen:
            self.reference = self.buffer.subsample(self._reference_capacity, self._saved.seed)
            self._freeze_reference(complete)
        self._is_unsaved = True

    def _freeze_reference(self, complete: bool) -> None:
        counts = self._process_group.gather(torch.tensor([self.reference.count], device="cpu"))
        if complete or sum(int(n) for n in counts) >= _ENOUGH_REFERENCE_SAMPLES:
            self.reference.freeze()

    def for_snapshot(self, trainer: pl.Trainer) -> SnapshotData:
        """The samples to compute a snapshot on: those of this process, or of all where processes compute in step.

        Args:
            trainer: The trainer.

        Returns:
            The samples.
        """
        # Without samples to hold out, scores are computed on the samples of the basis.
        counts = self._process_group.gather(torch.tensor([self.held_out.count], device="cpu"))
        held_out = self.held_out if any(int(n) for n in counts) else self.buffer
        batches, held_out_batches, reference = (
            shared_samples(trainer, buffer.batches) for buffer in (self.buffer, held_out, self.reference)
        )
        digest = self.buffer.digest if batches is self.buffer.batches else b""
        return SnapshotData(batches, held_out_batches, reference, self._saved.seed, digest)

    def _files(self, path_of: Callable[[int, int, str], Path]) -> dict[str, Path]:
        kinds = ["", "reference", *(["held-out"] if self._config.hold_out else [])]
        return {kind: path_of(self._process_group.rank, self._process_group.size, kind) for kind in kinds}

    def _restore(self, trainer: pl.Trainer, check: CheckBatch) -> None:
        """Read the samples of the interrupted run; collect new ones where any process is missing its own."""
        self._can_restore = False
        assert self._saved.written_to is not None
        capacities = {"": self._capacity, "reference": self._reference_capacity, "held-out": self._capacity}
        device = trainer.strategy.root_device
        files = self._files(RunLayout(self._saved.written_to).existing_samples_file)
        restored = {kind: SampleBuffer.load(path, capacities[kind], device) for kind, path in files.items()}
        buffer, reference = restored[""], restored["reference"]
        found = all(part is not None for part in restored.values())
        if all(self._process_group.gather(torch.tensor([found], device="cpu"))):
            assert buffer is not None
            assert reference is not None
            for batch in buffer.batches[:1]:
                layout = check(batch)
                for part in restored.values():
                    assert part is not None
                    part.use(layout)
            self.buffer, self.reference = buffer, reference
            self.held_out = restored.get("held-out") or self.held_out
            self._freeze_reference(self._saved.complete)
            self._keep(self._saved.complete)
            return
        log.warning(
            "The samples that snapshots were computed on are no longer in %s; new ones are collected.",
            self._saved.written_to,
        )
        if self._seen_sanity_check:
            self._keep(complete=False)

    def save(self) -> None:
        """Write the samples to the run folder, unless they have been: called when a checkpoint is saved."""
        if self._layout is None:
            return
        written_to = self._saved.written_to
        if self._is_unsaved:
            buffers = {"": self.buffer, "reference": self.reference, "held-out": self.held_out}
            written = [buffers[kind].save(path) for kind, path in self._files(self._layout.samples_file).items()]
            self._is_unsaved = False
            written_to = str(self._layout.path.resolve()) if all(written) else None
        self._saved.update(written_to, self.buffer.is_frozen, self._config.plain)


def _generators(dataloader: Any) -> list[torch.Generator]:
    """Random generators of a data loader, which may share them with another one."""
    batch_sampler = getattr(dataloader, "batch_sampler", None)
    holders = (dataloader, getattr(dataloader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = (getattr(holder, "generator", None) for holder in holders)
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
