"""Searches for the smallest sufficient number of features or edges, with a score that need not be monotone in it."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from lib_lightning.errors import SettingError, check_number

CountGrid = Literal["every", "exponential", "bisection"]
Counts = CountGrid | Sequence[int]

# Base of the exponential grid.
_BASE = 2**0.5
# Fraction of the smallest sufficient number by which it is exceeded one by one, and bounds of this range.
_SCAN_FRACTION, _SCAN_MIN, _SCAN_MAX = 0.05, 8, 100
# Share of the number by which a coarse search may be wrong.
_PRECISION = 1 / 8


def check_tolerance(tolerance: float) -> None:
    """Raise an error for an accepted loss of score that is negative or no number.

    Args:
        tolerance: The loss.

    Raises:
        SettingError: If it is negative or NaN.
    """
    check_number("tolerance", tolerance, lambda x: x >= 0, "must be at least 0")


class ScoreCache:
    """A mean score as a function of the number of features or edges kept, computed once for each number.

    Args:
        evaluate: The function.
        largest: Total number of features or edges; larger numbers are treated as this one.
        threshold: The score from which a number is sufficient.

    Attributes:
        scores: Scores computed so far, by number.
    """

    def __init__(self, evaluate: Callable[[int], float], largest: int, threshold: float) -> None:
        self._evaluate, self.largest, self.threshold = evaluate, largest, threshold
        self.scores: dict[int, float] = {}

    def __call__(self, count: int) -> float:
        """The score with a number of features or edges kept."""
        count = min(count, self.largest)
        if count not in self.scores:
            self.scores[count] = self._evaluate(count)
        return self.scores[count]

    def holds(self, count: int) -> bool:
        """Whether a number is sufficient."""
        return self(count) >= self.threshold


def scan(cache: ScoreCache) -> int | None:
    """Find the smallest number from which on every tried number is sufficient.

    Powers of the square root of 2 are tried from the largest one down to the first that is insufficient, and the
    interval above it is bisected. Then the next numbers above the result are tried one by one; after one that is
    insufficient, the scan continues from there. The result depends on the scores only, not on the total number.

    Args:
        cache: The score.

    Returns:
        The number; None if all features or edges are insufficient.

    Example:
        >>> scan(ScoreCache(lambda count: float(count in (5, 6) or count > 9), 100, 1.0))
        10
    """
    grid = [0, *powers_of(_BASE, cache.largest)]
    if not cache.holds(grid[-1]):
        return None
    answer = grid[-1]
    for below in reversed(grid[:-1]):
        if not cache.holds(below):
            answer = _bisect(cache, below, answer)
            break
        answer = below
    checked = answer
    while checked < min(cache.largest, answer + _scanned(answer)):
        checked += 1
        if not cache.holds(checked):
            answer = checked + 1
    return answer


def _scanned(answer: int) -> int:
    return min(_SCAN_MAX, max(_SCAN_MIN, round(_SCAN_FRACTION * answer)))


def bisect(cache: ScoreCache, bracket: int) -> int | None:
    """Find a sufficient number by bisection, as the paper does.

    Args:
        cache: The score.
        bracket: Upper end of the interval. The result depends on it, because the score is not monotone.

    Returns:
        The smallest sufficient number that was tried; None if there is none.

    Example:
        >>> cache = ScoreCache(lambda count: float(count in (5, 6) or count > 9), 100, 1.0)
        >>> bisect(cache, 30), bisect(cache, 20)
        (10, 5)
    """
    answer = _bisect(cache, 0, bracket)
    return min(answer, cache.largest) if cache.holds(answer) else None


def coarse(cache: ScoreCache) -> int | None:
    """Find a sufficient number to an eighth, in few steps where it is a large share of all.

    A half, an eighth, a 128th of all are tried, and so on, each factor the square of the one before, doubled, until one
    is insufficient. Then the ratio of the two that are known is bisected.

    Args:
        cache: The score.

    Returns:
        The smallest sufficient number that was tried; None if all features or edges are insufficient.

    Example:
        >>> cache = ScoreCache(lambda count: float(count >= 700), 1000, 1.0)
        >>> coarse(cache), sorted(cache.scores)
        (707, [500, 595, 649, 707])
    """
    fails, holds, factor = 0, cache.largest, 2
    while (middle := cache.largest // factor) > 0:
        if not cache.holds(middle):
            fails = middle
            break
        holds, factor = middle, 2 * factor**2
    while holds - fails > max(1, _PRECISION * fails):
        middle = min(max(round(math.sqrt(max(1, fails) * holds)), fails + 1), holds - 1)
        fails, holds = (fails, middle) if cache.holds(middle) else (middle, holds)
    return holds if cache.holds(holds) else None


def _bisect(cache: ScoreCache, fails: int, holds: int) -> int:
    while holds - fails > 1:
        middle = (fails + holds + 1) // 2  # of the answers still possible, from fails + 1 to holds
        if cache.holds(middle):
            holds = middle
        else:
            fails = middle
    return holds


def try_counts(cache: ScoreCache, counts: Counts, bracket: int) -> dict[int, float]:
    """Scores of the numbers in a grid.

    Args:
        cache: The score.
        counts: ``"every"``, ``"exponential"``, ``"bisection"``, or the numbers.
        bracket: Upper end of the interval of a bisection.

    Returns:
        Scores by number, ascending.

    Raises:
        SettingError: If a number is out of range, or the grid is unknown.

    Example:
        >>> try_counts(ScoreCache(float, 6, 1.0), "exponential", 6)
        {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 6: 6.0}
    """
    if counts == "bisection":
        bisect(cache, bracket)
        return dict(sorted(cache.scores.items()))
    if counts == "every":
        wanted: Sequence[int] = range(cache.largest + 1)
    elif counts == "exponential":
        wanted = [0, *powers_of(_BASE, cache.largest)]
    else:
        try:
            wanted = sorted({operator.index(count) for count in counts})
        except TypeError:
            grids = ", ".join(get_args(CountGrid))
            raise SettingError(f"counts must be one of {grids}, or a list of integers; got {counts!r}.") from None
    if wanted and not 0 <= wanted[0] <= wanted[-1] <= cache.largest:
        raise SettingError(
            f"counts must be between 0 and {cache.largest}, the number of features or edges; got {list(wanted)}."
        )
    # In descending order, in which each step reuses most of what the previous one has computed.
    return dict(sorted({count: cache(count) for count in reversed(wanted)}.items()))


def powers_of(base: float, largest: int) -> list[int]:
    """Powers of a base, rounded to integers, from 1 to below a largest number, and that number.

    Args:
        base: Larger than 1.
        largest: The last number.

    Returns:
        The numbers, ascending; empty if the largest is 0.

    Example:
        >>> powers_of(2, 10)
        [1, 2, 4, 8, 10]
    """
    below = itertools.takewhile(lambda count: count < largest, (round(base**e) for e in itertools.count()))
    return [*dict.fromkeys(below), largest] if largest > 0 else []
