"""A clock that counts operations: what takes how long does not depend on the machine, and not on what else runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lib_lightning.algorithm.effort import PER_CALL, PER_NUMBER, OperationCount
from lib_lightning.model.torch_internals import operations_observed


class OperationsClock:
    """Counts the operations of torch at their prices, as "seconds"."""

    def __init__(self) -> None:
        self._count = OperationCount()

    def perf_counter(self) -> float:
        """Operations so far."""
        count = self._count
        return sum(count.flops.values()) + count.padding + PER_NUMBER * count.numbers + PER_CALL * count.calls

    @contextmanager
    def running(self) -> Iterator[OperationsClock]:
        """A block whose operations are counted."""
        with operations_observed(self._count.add):
            yield self
