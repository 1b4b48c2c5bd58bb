"""The step axis of everything that is drawn over training time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from lib_lightning.plots.text_metrics import short_number

# Decades that lie between step 0 and the first step after it.
_ZERO_ROOM = 0.5


def is_log_spaced(steps: Sequence[int]) -> bool:
    """Tell whether steps lie closer and closer towards the beginning.

    Args:
        steps: Training steps, in any order.

    Returns:
        True where a typical distance of neighbours is much less than the mean one.

    Example:
        >>> is_log_spaced([0, 1, 3, 10, 32, 100]), is_log_spaced([0, 50, 100, 150])
        (True, False)
    """
    gaps = np.diff(np.unique(np.asarray(steps, dtype=float)))
    return len(gaps) > 2 and bool(np.median(gaps) < gaps.mean() / 2)


def check_snapshots(steps: Sequence[int], layers: Mapping[str, Sequence[Any]]) -> None:
    """Refuse node layers that have another number of snapshots than there are steps.

    Args:
        steps: The training step of each snapshot.
        layers: For each node layer what there is of each snapshot.

    Raises:
        ValueError: Naming the first such layer.

    Example:
        >>> check_snapshots([0, 10], {"fc": [1, 2]})
    """
    for name, of_layer in layers.items():
        if len(of_layer) != len(steps):
            raise ValueError(f"'{name}' has {len(of_layer)} snapshots, and there are {len(steps)} steps.")


def set_steps(axes: Axes, steps: Sequence[int], log: bool | None = None) -> None:
    """Make the x axis one of training steps: logarithmic for steps that are spaced so, with room for step 0.

    Args:
        axes: A panel.
        steps: The steps of everything in it, in any order.
        log: Whether to make it logarithmic; None for a choice by the steps.

    Example:
        >>> from matplotlib.figure import Figure
        >>> axes = Figure().add_subplot()
        >>> set_steps(axes, [0, 1, 3, 10, 32, 100])
        >>> axes.get_xscale(), [str(tick.get_text()) for tick in axes.get_xticklabels()]
        ('symlog', ['0', '1', '10', '100'])
    """
    first, last = (float(f(steps)) for f in (min, max)) if len(steps) else (0.0, 1.0)
    if (is_log_spaced(steps) if log is None else log) and 0 <= first < last:
        least = min(float(step) for step in steps if step > 0)
        if first > 0:
            axes.set_xscale("log")
        else:
            # In units of log10, matplotlib gives the linear part linscale / (1 - 1 / 10).
            axes.set_xscale("symlog", linthresh=least, linscale=0.9 * _ZERO_ROOM)
        axes.xaxis.set_major_locator(FixedLocator(([0.0] if first == 0 else []) + _round_steps(least, last)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: short_number(step)))
    axes.set_xlim((first, last) if last > first else (first - 0.5, first + 0.5))


def _round_steps(least: float, last: float) -> list[float]:
    """Powers of ten, and what lies between them where they are few."""
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(last)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [f * 10.0**d for d in decades for f in factors if least <= f * 10.0**d <= last]
        if len(ticks) >= 3:
            break
    return ticks
