"""A fixed set of validation samples, kept for snapshots to be computed on, and beside the basis files for resuming."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from lib_lightning.io.basis_file import write_bytes
from lib_lightning.model.batch import batch_size, index_batch, map_tensors, slice_batch

log = logging.getLogger(__name__)


class SampleBuffer:
    """Copies of batches, up to a number of samples.

    Args:
        num_samples: Samples to keep.

    Attributes:
        batches: The copies.
        count: Number of samples in them.
        complete: Whether they are to stay as they are for the rest of the run.

    Example:
        >>> buffer = SampleBuffer(3)
        >>> rest = [buffer.add((torch.zeros(2, 5), torch.zeros(2))) for _ in range(2)]
        >>> [inputs.shape[0] for inputs, labels in buffer.batches], buffer.full
        ([2, 1], True)
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.clear()

    @property
    def full(self) -> bool:
        """Whether all samples are there."""
        return self.count >= self.num_samples

    def add(self, batch: Any, available: int | None = None) -> Any:
        """Copy a batch, or as many of its samples as are still wanted.

        Args:
            batch: What a data loader gives.
            available: Number of samples that its data loader has in all; what comes after them repeats earlier ones,
                and is left out.

        Returns:
            The samples that were not wanted any more, of those available; None if there are none.
        """
        n = batch_size(batch)
        there = n if available is None else max(0, min(n, available - self._offered))
        wanted = min(there, self.num_samples - self.count)
        self._offered += n
        rest = slice_batch(batch, max(0, wanted), there) if wanted < there else None
        if wanted <= 0 or self.complete:
            return rest
        # Copies made outside inference mode are ordinary tensors, which gradients can be taken through.
        with torch.inference_mode(False):
            kept = batch if n <= wanted else slice_batch(batch, 0, wanted)
            self.batches.append(map_tensors(kept, lambda t: t.detach().clone()))
        self.count += wanted
        return rest

    def choose(self, buffer: SampleBuffer, seed: int) -> None:
        """Take some of another buffer's samples, chosen at random, in place of what is here.

        Args:
            buffer: Where to take them from.
            seed: Chooses them.
        """
        self.clear()
        chosen = torch.randperm(buffer.count, generator=torch.Generator().manual_seed(seed))[: self.num_samples]
        start = 0
        for batch in buffer.batches:
            here = chosen[(chosen >= start) & (chosen < start + batch_size(batch))].sort().values - start
            start += batch_size(batch)
            if len(here):
                self.add(index_batch(batch, here))

    def clear(self) -> None:
        """Drop everything."""
        self.batches: list[Any] = []
        self.count = 0
        self.complete = False
        self._offered = 0

    def save(self, path: Path) -> bool:
        """Write the samples to a file, for a resumed run to go on with the same ones.

        Args:
            path: Where to write.

        Returns:
            Whether that was possible; if not (no place, batches of classes that cannot be read back safely), a
            warning says why.
        """
        data = io.BytesIO()
        try:
            torch.save([map_tensors(batch, lambda t: t.cpu()) for batch in self.batches], data)
            torch.load(io.BytesIO(data.getvalue()), weights_only=True)
            write_bytes(path, data.getvalue())
        except Exception as error:
            log.warning(
                "The samples of snapshots could not be written to %s; a run resumed from here takes new ones. %s: %s",
                path, type(error).__name__, str(error).split("\n")[0],
            )  # fmt: skip
            return False
        return True

    def load(self, path: Path, device: torch.device) -> bool:
        """Take the samples of a file that `save` wrote.

        Args:
            path: The file.
            device: Where the samples are wanted.

        Returns:
            Whether the file was there, and whole.
        """
        try:
            batches = torch.load(path, map_location=device, weights_only=True)
            count = sum(map(batch_size, batches))
        except Exception:  # whatever a broken file makes of it
            return False
        self.clear()
        self.batches, self.count = batches, count
        return True


def take_fraction(batches: Sequence[Any], part: float) -> list[Any]:
    """Take the first of some samples: always the same ones, of the same batches.

    Args:
        batches: Batches.
        part: How many to take, of all of them.

    Returns:
        Batches, the last one perhaps shorter; at least one sample if there is any.

    Example:
        >>> [len(batch) for batch in take_fraction([torch.zeros(4), torch.zeros(4)], 0.75)]
        [4, 2]
    """
    wanted = round(part * sum(map(batch_size, batches)))
    taken: list[Any] = []
    for batch in batches:
        if wanted > 0 or not taken:
            taken.append(slice_batch(batch, 0, max(1, wanted)) if wanted < batch_size(batch) else batch)
        wanted -= batch_size(batch)
    return taken


def shard_size(num_samples: int, rank: int, size: int) -> int:
    """How many of so many samples one of several processes keeps, where they take turns.

    Args:
        num_samples: Samples in all.
        rank: Number of the process, from 0.
        size: Number of processes.

    Returns:
        Its number of samples.

    Example:
        >>> [shard_size(7, rank, 3) for rank in range(3)]
        [3, 2, 2]
    """
    return (num_samples - rank + size - 1) // size


def num_unpadded_samples(data_loader: Any) -> int | None:
    """How many samples of its own a data loader has before a distributed sampler repeats those of other processes.

    Samplers that split data among processes repeat samples at the end, so that all of them get equally many.

    Args:
        data_loader: Any iterable of batches.

    Returns:
        The number; None where nothing is repeated.

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
