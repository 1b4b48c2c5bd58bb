"""Which numbers of features or edges to try, and the smallest one that will do, for a score that is not monotone."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Literal, get_args

CountGrid = Literal["every", "exponential", "bisection"]
Counts = CountGrid | Sequence[int]

# An exponential schedule goes in half powers of two.
_BASE = 2**0.5
# Beyond the smallest number that holds, this share of it is tried one by one: at least and at most so many.
_SCAN_SHARE, _LEAST, _MOST = 0.05, 8, 100


class ScoreCache:
    """A mean score as a function of how many features or edges are kept, never computed twice.

    Args:
        evaluate: The function.
        largest: Number of features or edges that there are; more than that are the same as all.
        enough: A score from which on a number holds.

    Attributes:
        scores: What was tried.
    """

    def __init__(self, evaluate: Callable[[int], float], largest: int, enough: float) -> None:
        self._evaluate, self.largest, self.enough = evaluate, largest, enough
        self.scores: dict[int, float] = {}

    def __call__(self, count: int) -> float:
        """The score with so many kept."""
        count = min(count, self.largest)
        if count not in self.scores:
            self.scores[count] = self._evaluate(count)
        return self.scores[count]

    def holds(self, count: int) -> bool:
        """Whether so many are enough."""
        return self(count) >= self.enough


def scan(tried: ScoreCache) -> int | None:
    """The smallest number from which on every number tried holds.

    Half powers of two are tried from the top down to the first one that fails; the gap above it is halved until it is
    closed; then come the numbers above the answer, one by one. If one of those fails, it goes on from there. What is
    tried depends on the scores alone, not on how many there are in all.

    Args:
        tried: The score.

    Returns:
        The number; None if not even all of them hold.

    Example:
        >>> scan(ScoreCache(lambda count: float(count in (5, 6) or count > 9), 100, 1.0))
        10
    """
    grid = [0, *powers_of(_BASE, tried.largest)]
    if not tried.holds(grid[-1]):
        return None
    answer = grid[-1]
    for below in reversed(grid[:-1]):
        if not tried.holds(below):
            answer = _halve(tried, below, answer)
            break
        answer = below
    checked = answer
    while checked < min(tried.largest, answer + _scanned(answer)):
        checked += 1
        if not tried.holds(checked):
            answer = checked + 1
    return answer


def _scanned(answer: int) -> int:
    return min(_MOST, max(_LEAST, round(_SCAN_SHARE * answer)))


def bisect(tried: ScoreCache, bracket: int) -> int | None:
    """The number at which halving an interval ends, as in the runs of the paper.

    Args:
        tried: The score.
        bracket: Where the interval begins, from above. The answer depends on it, as the score is not monotone.

    Returns:
        The smallest number tried that holds with all smaller ones tried failing; None if none does.

    Example:
        >>> tried = ScoreCache(lambda count: float(count in (5, 6) or count > 9), 100, 1.0)
        >>> bisect(tried, 30), bisect(tried, 20)
        (10, 5)
    """
    answer = _halve(tried, 0, bracket)
    return min(answer, tried.largest) if tried.holds(answer) else None


def _halve(tried: ScoreCache, fails: int, holds: int) -> int:
    while holds - fails > 1:
        middle = (fails + holds + 1) // 2  # of the answers still possible, from fails + 1 to holds
        if tried.holds(middle):
            holds = middle
        else:
            fails = middle
    return holds


def try_counts(tried: ScoreCache, counts: Counts, bracket: int) -> dict[int, float]:
    """Scores of the numbers that a schedule asks for.

    Args:
        tried: The score.
        counts: ``"every"``, ``"exponential"``, ``"bisection"``, or the numbers.
        bracket: Where a bisection begins.

    Returns:
        Scores by number, ascending.

    Raises:
        ValueError: If a number is out of range, or the schedule unknown.

    Example:
        >>> try_counts(ScoreCache(float, 6, 1.0), "exponential", 6)
        {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 6: 6.0}
    """
    if counts == "bisection":
        bisect(tried, bracket)
        return dict(sorted(tried.scores.items()))
    if counts == "every":
        wanted: Sequence[int] = range(tried.largest + 1)
    elif counts == "exponential":
        wanted = [0, *powers_of(_BASE, tried.largest)]
    else:
        try:
            wanted = sorted({operator.index(count) for count in counts})
        except TypeError:
            schedules = ", ".join(get_args(CountGrid))
            raise ValueError(f"counts is one of {schedules}, or a list of whole numbers; got {counts!r}.") from None
    if wanted and not 0 <= wanted[0] <= wanted[-1] <= tried.largest:
        raise ValueError(f"There are {tried.largest} to keep some of; {list(wanted)} asks for less than 0 or for more.")
    # From the many to the few: what is computed for one number is in part computed for the next.
    return dict(sorted({count: tried(count) for count in reversed(wanted)}.items()))


def powers_of(base: float, largest: int) -> list[int]:
    """Whole numbers nearest to the powers of a base, from 1 up, and the largest one.

    Args:
        base: Above 1.
        largest: Where to end.

    Returns:
        The numbers, ascending; empty if the largest is 0.

    Example:
        >>> powers_of(2, 10)
        [1, 2, 4, 8, 10]
    """
    below = itertools.takewhile(lambda count: count < largest, (round(base**e) for e in itertools.count()))
    return [*dict.fromkeys(below), largest] if largest > 0 else []
