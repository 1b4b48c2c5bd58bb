"""Importance spectra over training time: the number of features above several thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import Tensor

from lib_lightning.plots.lineage_series import as_array
from lib_lightning.plots.palette import MUTED
from lib_lightning.plots.panels import Grid, add_legend, panels
from lib_lightning.plots.steps_axis import check_snapshots, set_step_axis
from lib_lightning.plots.text_metrics import DPI, non_overlapping, short_number

# Fractions of a layer's largest importance.
THRESHOLDS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)
_NAMES = ("≥ 10%", "1%", "0.1%", "0.01%", "1e-6 of the largest")
# From the most to the least important features: increasingly lighter blues.
_DARK, _LIGHT = np.array([0.0, 0.27, 0.45]), np.array([0.86, 0.92, 0.97])
_COLORS = [to_hex(_DARK + (_LIGHT - _DARK) * k / (len(THRESHOLDS) - 1)) for k in range(len(THRESHOLDS))]
_Y_MIN, _TICKS = 0.7, (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_FONT_SIZE, _LINE_HEIGHT, _MARGIN = 8.0, 9.0, 0.45


def draw_spectrum_over_time(
    steps: Sequence[int],
    importances: Mapping[str, Sequence[Tensor]],
    title: str = "Importance of features over training",
) -> Figure:
    """Draw the number of features above 10%, 1%, 0.1%, 0.01% and 0.0001% of each node layer's largest importance.

    The upper edge of each shade is the count at its threshold. From bottom to top, the shades show the spectrum from
    the most to the least important features. The final counts are written on the right.

    Args:
        steps: The training step of each snapshot, in increasing order.
        importances: For each node layer, the importances in each snapshot, shape ``(r,)``.
        title: Title of the figure.

    Returns:
        A matplotlib figure that is not registered with pyplot.

    Raises:
        ValueError: If a node layer has a different number of snapshots than there are steps.

    Example:
        >>> import torch
        >>> spectra = [torch.tensor([1.0, 0.5, 0.2]), torch.tensor([1.0, 1e-3])]
        >>> figure = draw_spectrum_over_time([0, 100], {"fc": spectra})
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['1', '2']
    """
    check_snapshots(steps, importances)
    figure, all_axes = panels(
        list(importances), title, "training steps", "number of features", 1,
        Grid(1 if len(importances) <= 3 else 2, 1.35, _MARGIN, separate_scales=True, share_x=True),
    )  # fmt: skip
    highest = max((len(importance) for snapshots in importances.values() for importance in snapshots), default=1)
    for axes, snapshots in zip(all_axes, importances.values(), strict=True):
        counts = np.array([counts_above(importance) for importance in snapshots]).reshape(len(steps), len(THRESHOLDS))
        _draw_counts(axes, steps, counts)
        _frame(axes, steps, max(highest, 2))
        _write_counts(axes, counts[-1] if len(counts) else np.arange(0))
    marks = [
        (Line2D([], [], color=color, lw=9, solid_capstyle="butt"), name)
        for color, name in zip(_COLORS, _NAMES, strict=True)
    ]
    add_legend(figure, [marks])
    return figure


def counts_above(importance: Tensor) -> list[int]:
    """Count the features above each of `THRESHOLDS`.

    Args:
        importance: Shape ``(r,)``.

    Returns:
        For each threshold, the number of features at or above it; 0 if all importances are 0.

    Example:
        >>> import torch
        >>> counts_above(torch.tensor([4.0, 2.0, 1e-5]))
        [2, 2, 2, 2, 3]
    """
    values = as_array(importance)
    largest = values.max(initial=0.0)
    return [int((values >= share * largest).sum()) if largest > 0 else 0 for share in THRESHOLDS]


def _draw_counts(axes: Axes, steps: Sequence[int], counts: np.ndarray) -> None:
    lower = np.full(len(steps), _Y_MIN)
    for k, color in enumerate(_COLORS):
        # A count of 0 is drawn below the first tick of the logarithmic axis.
        edge = np.maximum(counts[:, k], _Y_MIN)
        axes.fill_between(steps, lower, edge, color=color, lw=0, zorder=2)
        axes.plot(steps, edge, color="white", lw=0.6, zorder=3)
        lower = edge


def _frame(axes: Axes, steps: Sequence[int], highest: int) -> None:
    axes.set_yscale("log")
    axes.set_ylim(_Y_MIN, 1.15 * highest)
    ticks = [tick for tick in _TICKS if tick <= highest]
    axes.yaxis.set_major_locator(FixedLocator(ticks if len(ticks) <= 6 else [t for t in ticks if str(t)[0] == "1"]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda count, _: short_number(count)))
    set_step_axis(axes, steps)


def _write_counts(axes: Axes, counts: np.ndarray) -> None:
    """Write the final counts on the right; smaller counts have priority."""
    low, high = np.log(axes.get_ylim())
    points = 72 * axes.bbox.height / DPI / (high - low)
    present = sorted({int(count) for count in counts if count})
    for k in non_overlapping([float(np.log(count)) for count in present], _LINE_HEIGHT / points):
        axes.annotate(
            f"{present[k]:,}", (axes.get_xlim()[1], present[k]), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=_FONT_SIZE, color=MUTED, annotation_clip=False,
        )  # fmt: skip
