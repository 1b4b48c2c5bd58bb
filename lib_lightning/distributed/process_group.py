"""What `build` needs of several processes that work on different samples of the same run, and what one alone gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from torch import Tensor


class ProcessGroup:
    """One process, with nothing to share: the interface through which sums go, and its simplest case.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    rank = 0
    size = 1

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sum over processes, entry by entry; the shapes are the same everywhere."""
        return list(tensors)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, of any sizes, but with equally many axes."""
        return [tensor]

    def broadcast(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of process 0, for all to go on with the same numbers."""
        return list(tensors)

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """A block that all processes leave well, or all with an error: nobody waits for one that has failed."""
        yield


SINGLE_PROCESS = ProcessGroup()


class Reducible:
    """What adds up over samples, and so over the processes that have them.

    Attributes:
        sums: Names of the attributes that are sums: tensors of the same shape on every process.
    """

    sums: ClassVar[tuple[str, ...]] = ()


def all_reduce(parts: Sequence[Reducible], process_group: ProcessGroup) -> None:
    """Join the sums of several processes, all of them in one exchange: each takes milliseconds, whatever its size.

    Args:
        parts: What has been summed here; afterwards it is what all have summed.
        process_group: The processes.
    """
    places = [(part, name) for part in parts for name in part.sums]
    for (part, name), total in zip(places, process_group.sum([getattr(*place) for place in places]), strict=True):
        setattr(part, name, total)
