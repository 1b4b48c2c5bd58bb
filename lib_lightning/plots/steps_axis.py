"""The axis of training steps, common to all figures over training time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from lib_lightning.errors import SettingError
from lib_lightning.plots.palette import THEME
from lib_lightning.plots.text_metrics import short_number

# Decades between step 0 and the first step after it, on a logarithmic axis.
_ZERO_DECADES = 0.5
# Steps are log-spaced if their median gap is smaller than the mean gap by this factor.
_LOG_MAX_GAP_RATIO: float = THEME["steps"]["log_max_gap_ratio"]


def is_log_spaced(steps: Sequence[int]) -> bool:
    """Check whether steps are spaced roughly logarithmically.

    Args:
        steps: Training steps, in any order.

    Returns:
        True if the median gap is much smaller than the mean gap.

    Example:
        >>> is_log_spaced([0, 1, 3, 10, 32, 100]), is_log_spaced([0, 50, 100, 150])
        (True, False)
    """
    gaps = np.diff(np.unique(np.asarray(steps, dtype=float)))
    return len(gaps) > 2 and bool(np.median(gaps) < _LOG_MAX_GAP_RATIO * gaps.mean())


def check_snapshots(steps: Sequence[int], layers: Mapping[str, Sequence[Any]]) -> None:
    """Check that every node layer has one entry per snapshot.

    Args:
        steps: The training step of each snapshot.
        layers: For each node layer, one entry per snapshot.

    Raises:
        SettingError: If a node layer has a different number of entries.

    Example:
        >>> check_snapshots([0, 10], {"fc": [1, 2]})
    """
    for name, entries in layers.items():
        if len(entries) != len(steps):
            raise SettingError(f"'{name}' has {len(entries)} snapshots, but there are {len(steps)} steps.")


def set_step_axis(axes: Axes, steps: Sequence[int], log: bool | None = None) -> None:
    """Configure the x axis for training steps: logarithmic for log-spaced steps, with a position for step 0.

    Args:
        axes: A panel.
        steps: Steps of everything in the panel, in any order.
        log: Whether the axis is logarithmic; None to decide by the steps.

    Example:
        >>> from matplotlib.figure import Figure
        >>> axes = Figure().add_subplot()
        >>> set_step_axis(axes, [0, 1, 3, 10, 32, 100])
        >>> axes.get_xscale(), [str(tick.get_text()) for tick in axes.get_xticklabels()]
        ('symlog', ['0', '1', '10', '100'])
    """
    first, last = (float(f(steps)) for f in (min, max)) if len(steps) else (0.0, 1.0)
    if (is_log_spaced(steps) if log is None else log) and 0 <= first < last:
        smallest = min(float(step) for step in steps if step > 0)
        if first > 0:
            axes.set_xscale("log")
        else:
            # In units of log10, matplotlib gives the linear part linscale / (1 - 1 / 10).
            axes.set_xscale("symlog", linthresh=smallest, linscale=0.9 * _ZERO_DECADES)
        axes.xaxis.set_major_locator(FixedLocator(([0.0] if first == 0 else []) + _round_steps(smallest, last)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: short_number(step)))
    axes.set_xlim((first, last) if last > first else (first - 0.5, first + 0.5))


def _round_steps(smallest: float, last: float) -> list[float]:
    """Powers of ten, and multiples of them if there are fewer than three."""
    decades = range(math.floor(math.log10(smallest)), math.ceil(math.log10(last)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [f * 10.0**d for d in decades for f in factors if smallest <= f * 10.0**d <= last]
        if len(ticks) >= 3:
            break
    return ticks
