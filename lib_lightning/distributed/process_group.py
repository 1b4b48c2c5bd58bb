"""The interface of a process group, and its simplest implementation: a single process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor


class ProcessGroup:
    """Processes that compute one result from different samples. This class is a group with a single process.

    Every process of a group has to make the same calls in the same order.

    Attributes:
        rank: Index of this process, from 0.
        size: Number of processes.
    """

    rank = 0
    size = 1

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sum tensors over processes.

        Args:
            tensors: Tensors with the same shapes on every process.

        Returns:
            The elementwise sums, on every process.
        """
        return list(tensors)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Collect the tensors of all processes.

        Args:
            tensor: A tensor of this process. Sizes may differ between processes, but not the number of dimensions.

        Returns:
            The tensors by rank, on every process.
        """
        return [tensor]

    def broadcast(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Send the tensors of process 0 to all processes.

        Args:
            tensors: Tensors with the same numbers of dimensions on every process; the sizes may differ.

        Returns:
            The tensors of process 0, on every process.
        """
        return list(tensors)

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """Run a block that fails on every process if it fails on one, so that no process waits for a failed one."""
        yield


SINGLE_PROCESS = ProcessGroup()


class Reducible:
    """An object with sums over samples, which add up over processes.

    Attributes:
        sums: Names of the attributes that are sums: tensors of the same shape on every process.
    """

    sums: ClassVar[tuple[str, ...]] = ()


def first_number(counts: Sequence[int], process_group: ProcessGroup) -> int:
    """The number that the first sample of this process has among those of all, counted in the order of the processes.

    Args:
        counts: Numbers of samples as gathered; a single one where every process has all of them.
        process_group: The processes.

    Returns:
        The number, from 0.

    Example:
        >>> first_number([5], SINGLE_PROCESS)
        0
    """
    return sum(counts[: process_group.rank]) if len(counts) > 1 else 0


def first_given(numbers: Sequence[float], process_group: ProcessGroup) -> list[float]:
    """The numbers of the first process that has any, on all processes.

    Args:
        numbers: Numbers of this process; empty if it has none.
        process_group: The processes.

    Returns:
        The numbers; empty if no process has any.

    Example:
        >>> first_given([2, 0.5], SINGLE_PROCESS), first_given([], SINGLE_PROCESS)
        ([2.0, 0.5], [])
    """
    gathered = process_group.gather(torch.tensor(numbers, dtype=torch.float64, device="cpu"))
    found = next((t for t in gathered if len(t)), gathered[0])
    # Where every process has all samples, nothing is gathered.
    (found,) = process_group.broadcast([found])
    return [float(x) for x in found]


def all_reduce(parts: Sequence[Reducible], process_group: ProcessGroup) -> None:
    """Replace the sums of this process by the sums over all processes.

    All of them are exchanged at once, because each exchange takes milliseconds, whatever its size.

    Args:
        parts: Objects whose attributes named by ``sums`` are replaced.
        process_group: The processes.
    """
    attributes = [(part, name) for part in parts for name in part.sums]
    totals = process_group.sum([getattr(*attribute) for attribute in attributes])
    for (part, name), total in zip(attributes, totals, strict=True):
        setattr(part, name, total)
