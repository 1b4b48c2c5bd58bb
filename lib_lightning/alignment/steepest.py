"""Where a noisy, irregularly sampled curve changes most steeply, and how well that can be told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from lib_lightning.errors import SettingError

Direction = Literal["either", "rise", "fall"]

# What follows is also in viewer/static/steepest.js: the tab computes the same numbers.
# The part of its range by which a curve must change for a stretch of the axis to count.
_PART = 1 / 4
# Width of the windows of the running median, as parts of the axis: the first with which noise is small enough.
_WINDOWS = (1 / 20, 1 / 10, 1 / 5)
_MIN_POINTS = 5
# By how many standard errors of the change it must exceed zero, and others must be slower to be told apart from it.
_CLEAR, _TOLD_APART = 3.0, 2.0
# Stretches that are longer by less than this are not told apart, whatever the noise.
_SLOWER = 1.1
# Standard error of a median of n normal numbers, times sqrt(n) and divided by their standard deviation: sqrt(pi / 2).
_MEDIAN = 1.2533
# 90% of normal numbers are within so many standard deviations.
_NINETY = 1.6449
# Smaller relative changes are rounding.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class SteepestChange:
    """Where a curve changes most steeply.

    Attributes:
        step: The middle of the steepest stretches, on the axis; NaN if there is no steepest change.
        first: Begin of the steps that cannot be told apart from it; NaN if there is none.
        last: End of them.
        direction: ``"rise"`` or ``"fall"``; "" if there is none.
        before: Value of the smoothed curve at ``first``; NaN if there is none.
        after: The same at ``last``.
        reason: Why there is none, as the end of a sentence about the curve; "" if there is one.
    """

    step: float = math.nan
    first: float = math.nan
    last: float = math.nan
    direction: str = ""
    before: float = math.nan
    after: float = math.nan
    reason: str = ""

    @property
    def exists(self) -> bool:
        """Whether there is one."""
        return not self.reason

    @property
    def text(self) -> str:
        """As the end of a sentence about the curve."""
        if not self.exists:
            return self.reason
        verb = "rises" if self.direction == "rise" else "falls"
        return f"{verb} most steeply at step {self.step:,.0f} ({self.first:,.0f} to {self.last:,.0f})"


def steepest_change(
    steps: Sequence[float],
    values: Sequence[float],
    direction: Direction = "either",
    log: bool = False,
    between: tuple[float, float] = (-math.inf, math.inf),
) -> SteepestChange:
    """Find where a curve changes most steeply.

    That is the shortest stretch of the axis over which the curve changes by a quarter of its range. Shorter changes of
    less, such as that of a single noisy point, do not count, and where points are dense or sparse makes no difference.
    The curve is smoothed before by running medians, which keep jumps as steep as they are, over a twentieth of the
    axis; over a tenth or a fifth if it is so noisy that a quarter of its range is not three standard errors of such a
    change. What does not last for half a window (and two points) does not count.

    Args:
        steps: Training steps, in any order; of equal ones, the last counts.
        values: The curve at these steps. Points that are NaN or infinite are left out.
        direction: ``"rise"``, ``"fall"``, or ``"either"`` for the steeper of both.
        log: Whether the axis is logarithmic, ``log(step + 1)``.
        between: First and last step to look at.

    Returns:
        The change: its step, and the steps around which other stretches of the same change are not longer by a tenth,
        nor by two standard errors. If there is none, because the curve is flat, or not told apart from it by its
        noise, or has fewer than five points, the result says why.

    Raises:
        SettingError: If the direction is unknown, or steps and values are not equally many.

    Example:
        >>> steps = range(0, 2000, 20)
        >>> curve = [1 / (1 + math.exp((step - 700) / 50)) for step in steps]
        >>> steepest_change(steps, curve).text
        'falls most steeply at step 700 (640 to 760)'
        >>> steepest_change(steps, [0.5] * 100).text
        'does not change'
    """
    if direction not in get_args(Direction):
        raise SettingError(f"direction must be one of {', '.join(get_args(Direction))}; got {direction!r}.")
    if len(steps) != len(values):
        raise SettingError(f"There must be a value for each step; got {len(steps)} steps and {len(values)} values.")
    points = {float(s): float(y) for s, y in zip(steps, values, strict=True) if between[0] <= s <= between[1]}
    kept = sorted((s, y) for s, y in points.items() if math.isfinite(y) and math.isfinite(s))
    if len(kept) < _MIN_POINTS:
        return SteepestChange(reason=f"has {len(kept)} points; {_MIN_POINTS} are needed")
    y = np.array([value for _, value in kept])
    x = np.array([math.log10(max(s, 0.0) + 1) if log else s for s, _ in kept])
    found = SteepestChange(reason="does not change")
    for width in _WINDOWS:
        found = _steepest(x, *_smoothed(x, y, width), float(np.abs(y).max()), direction)
        if found.exists:
            break
    back = (lambda at: 10**at - 1) if log else float
    return SteepestChange(
        back(found.step), back(found.first), back(found.last), found.direction, found.before, found.after, found.reason
    )


def _smoothed(x: np.ndarray, y: np.ndarray, width: float) -> tuple[np.ndarray, np.ndarray]:
    """Running medians of at least five points, and their standard errors.

    A window has as many points on either side, so that the median of a curve that only rises or only falls is the
    curve itself. At the end it stays as wide as it is: a change must have time to last. At the beginning it narrows.
    """
    n = len(x)
    half = width / 2 * (x[-1] - x[0])
    index = np.arange(n)
    before = index - np.searchsorted(x, x - half)
    after = np.searchsorted(x, x + half, side="right") - 1 - index
    reach = np.where(x + half > x[-1], before, np.minimum(before, after))
    reach = np.minimum(np.minimum(np.maximum(reach, 2), index), (n - 1) // 2)
    begin = np.minimum(index - reach, n - 1 - 2 * reach)
    smooth = np.array([np.median(y[b : b + 2 * r + 1]) for b, r in zip(begin, reach, strict=True)])
    # A first point that is far from what the next ones lead to may be an outlier.
    extrapolated = smooth[1] + (smooth[1] - smooth[2]) * (x[1] - x[0]) / (x[2] - x[1])
    smooth[0] = sorted([y[0], smooth[1], extrapolated])[1]
    noise = np.quantile(np.abs(y - smooth), 0.9) / _NINETY
    return smooth, _MEDIAN * noise / np.sqrt(2 * np.maximum(reach, 1) + 1)


def _steepest(
    x: np.ndarray, smooth: np.ndarray, error: np.ndarray, size: float, direction: Direction
) -> SteepestChange:
    """The steepest change of a smoothed curve, on its axis; ``size`` is that of the largest value."""
    span = float(smooth.max() - smooth.min())
    if span <= _ROUNDING * size:
        return SteepestChange(reason="does not change")
    part = _PART * span
    found = []
    for name, sign in (("fall", -1.0), ("rise", 1.0)):
        if direction in ("either", name):
            begin, end = _stretches(x, sign * smooth, part)
            if len(begin):
                found.append((float((end - begin).min()), name, begin, end))
    if not found:
        return SteepestChange(reason=f"does not {direction} by a quarter of its range")
    shortest, name, begin, end = min(found, key=lambda one: one[0])
    best = int((end - begin).argmin())
    uncertain = math.hypot(np.interp(begin[best], x, error), np.interp(end[best], x, error))
    if part < _CLEAR * uncertain:
        return SteepestChange(reason="has no change that stands out of its noise")
    slower = 1 / (1 - min(0.9, _TOLD_APART * uncertain / part))
    close = end - begin <= max(_SLOWER, slower) * shortest
    first, last = float(begin[close].min()), float(end[close].max())
    low, high = _together(begin, end, close, best)
    middle = (low + high) / 2
    return SteepestChange(
        middle, first, last, name, float(np.interp(first, x, smooth)), float(np.interp(last, x, smooth))
    )


def _together(begin: np.ndarray, end: np.ndarray, close: np.ndarray, best: int) -> tuple[float, float]:
    """Begin and end of the stretches that cannot be told apart and are at the same place as the shortest one.

    Two are if they overlap, or are neighbours: those between them are then no longer than both.
    """
    low, high, previous = begin[best], end[best], -1
    for i in np.flatnonzero(close).tolist():
        if previous < 0 or (begin[i] > high and i != previous + 1):
            if previous >= best:
                break
            low, high = begin[i], end[i]
        high, previous = max(high, end[i]), i
    return float(low), float(high)


def _stretches(x: np.ndarray, y: np.ndarray, part: float) -> tuple[np.ndarray, np.ndarray]:
    """The shortest stretches over which a piecewise linear curve rises by a given part, by their beginnings.

    One begins or ends at each point; where none does, there is one of infinite length, so that neighbours in the list
    are neighbours on the axis.
    """
    n = len(x)
    later = np.triu(np.ones((n, n), dtype=bool), 1)
    reached = later & (y[None, :] >= (y + part)[:, None])
    begins, ends = [], []
    for i in range(n):
        if reached[i].any():
            j = int(reached[i].argmax())
            begins.append(x[i])
            ends.append(_crossing(x, y, j - 1, y[i] + part))
        else:
            begins.append(x[i])
            ends.append(math.inf)
    left = later & (y[:, None] <= (y - part)[None, :])
    for j in range(n):
        if left[:, j].any():
            i = n - 1 - int(left[::-1, j].argmax())
            begins.append(_crossing(x, y, i, y[j] - part))
            ends.append(x[j])
    begin, end = np.array(begins), np.array(ends)
    if not np.isfinite(end).any():
        return begin[:0], end[:0]
    order = np.argsort(begin, kind="stable")
    return begin[order], end[order]


def _crossing(x: np.ndarray, y: np.ndarray, i: int, level: float) -> float:
    """Where the line from point i to the next one is at a level."""
    rise = y[i + 1] - y[i]
    return float(x[i] if rise == 0 else x[i] + (x[i + 1] - x[i]) * (level - y[i]) / rise)
