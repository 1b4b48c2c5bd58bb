"""Loops of a long computation: all of their parts, or, to predict its time, some of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")

# Parts of a loop that a trial does at least, and at most as long as they take less than so many seconds.
_FEWEST, _MOST, _SECONDS = 4, 32, 0.02


class LoopTrial:
    """Does some parts of each loop, and predicts how long the others would take: as long as the median.

    Args:
        clock: Returns seconds.

    Attributes:
        seconds: What all parts that were left out would take.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.seconds = 0.0
        self._clock = clock

    def some(self, parts: Sequence[T], count: int, fewest: int) -> Iterator[T]:
        """Iterate over some of the parts, at even distances.

        Args:
            parts: The parts that are there.
            count: How many there would be without a trial.
            fewest: How many are done at least.

        Yields:
            The parts.
        """
        fewest = max(_FEWEST, fewest)
        left = len(parts)
        spent: list[float] = []
        for index in _spread(len(parts), max(_MOST, fewest)):
            if len(spent) >= fewest and sum(spent) > _SECONDS:
                break
            started, skipped = self._clock(), self.seconds
            yield parts[index]
            spent.append(self._clock() - started + self.seconds - skipped)
            left -= 1
        # The first part may prepare something for the others.
        self.seconds += (count - len(parts) + left) * statistics.median(spent[1:] or spent or [0.0])


def _spread(count: int, most: int) -> list[int]:
    """Up to some of the numbers below a count, such that the first few are spread over all of them.

    Example:
        >>> _spread(3, 8), _spread(100, 8)
        ([0, 1, 2], [0, 50, 25, 75, 12, 62, 37, 87])
    """
    if count <= most:
        return list(range(count))
    bits = (most - 1).bit_length()
    order = [int(format(k, f"0{bits}b")[::-1], 2) for k in range(2**bits)]
    return list(dict.fromkeys(k * count // 2**bits for k in order))[:most]


_trial: ContextVar[LoopTrial | None] = ContextVar("_trial", default=None)


def parts_of(parts: Sequence[T], count: int | None = None, fewest: int = 0) -> Iterable[T]:
    """The parts of a loop; in a trial, some of them.

    Args:
        parts: All parts, or, in a trial, those that are there.
        count: How many there would be without a trial; None for those that are there.
        fewest: How many a trial does at least, as far as there are so many.

    Returns:
        The parts to do. Nothing is done between two of them that is not part of one.

    Example:
        >>> list(parts_of(range(100)))[-1]
        99
        >>> with loops_shortened(LoopTrial(clock=lambda: 0.0)):
        ...     len(list(parts_of(range(100))))
        32
    """
    trial = _trial.get()
    return parts if trial is None else trial.some(parts, len(parts) if count is None else count, fewest)


@contextmanager
def loops_shortened(trial: LoopTrial) -> Iterator[None]:
    """A block in which loops do only some of their parts.

    Args:
        trial: Measures them.

    Yields:
        Nothing.
    """
    token = _trial.set(trial)
    try:
        yield
    finally:
        _trial.reset(token)
