"""Scalars over training time: panels of named curves with a common step axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator

from lib_lightning.algorithm.basis_kinds import kind_and_number
from lib_lightning.errors import SettingError
from lib_lightning.plots.fast_axes import FastAxes
from lib_lightning.plots.palette import BASES, MODULES, MUTED, TEXT, basis_styles, basis_title
from lib_lightning.plots.panels import Grid, add_legend, panels
from lib_lightning.plots.steps_axis import is_log_spaced, set_step_axis
from lib_lightning.plots.text_metrics import DPI, short_number, shorten, shorten_front, text_width

_TITLE_SIZE, _NAME_SIZE, _LINE_HEIGHT = 11.0, 9.0, 10.5
# Points: the maximum width of the curves' names, and their distance from the panels.
_MAX_NAME_WIDTH, _GAP = 130.0, 5.0
# Positive values with a larger ratio than this are drawn on a logarithmic scale.
_LOG_RATIO = 30.0
# Curves with more points have no markers.
_MAX_MARKERS = 60


@dataclass(frozen=True)
class Curve:
    """One scalar over training time.

    Attributes:
        name: Name of the curve.
        steps: Training steps, in increasing order, shape ``(T,)``.
        values: Values at these steps, shape ``(T,)``, NaN if missing; or ``(runs, T)`` for several runs, which are
            drawn as thin lines with their median.
        color: Colour of the curve; None to choose it by the name, or else by the position among the panel's curves.
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float] | Sequence[Sequence[float]] | np.ndarray
    color: str | None = None


@dataclass(frozen=True)
class Panel:
    """Curves that share a y axis.

    Attributes:
        name: Title of the panel.
        curves: The curves.
        log: Whether the axis is logarithmic; None to decide by the values.
        limits: Limits of the axis; None to choose them by the values.
    """

    name: str
    curves: Sequence[Curve]
    log: bool | None = None
    limits: tuple[float, float] | None = None


def draw_over_time(
    rows: Sequence[Panel] | Mapping[str, Sequence[Panel]],
    title: str = "Over training",
    marks: Mapping[str, int] | None = None,
) -> Figure:
    """Draw a column of panels with a common step axis and the name of each curve at its end.

    Args:
        rows: Panels from top to bottom. To compare runs side by side, several columns by name, with panels of the same
            names; the panels of a row share their y axis.
        title: Title of the figure.
        marks: Steps to mark with a vertical line in all panels, by name.

    Returns:
        A matplotlib figure that is not registered with pyplot.

    Raises:
        SettingError: If the columns have different panels, or a curve has different numbers of steps and values.

    Example:
        >>> accuracy = Panel("accuracy", [Curve("train", [0, 50, 100], [0.1, 1.0, 1.0])], limits=(0, 1))
        >>> figure = draw_over_time([accuracy, Panel("features", [Curve("LIB", [0, 100], [60, 12])])])
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['accuracy', 'features']
    """
    columns = rows if isinstance(rows, Mapping) else {"": rows}
    names = [panel.name for panel in next(iter(columns.values()), [])]
    if any([panel.name for panel in column] != names for column in columns.values()):
        raise SettingError("All columns must have panels of the same names, in the same order.")
    stacked = [list(row) for row in zip(*columns.values(), strict=True)]
    name_widths = [
        text_width(basis_title(c.name), _NAME_SIZE) for row in stacked for panel in row[-1:] for c in panel.curves
    ]
    margin = min(max(name_widths, default=0.0), _MAX_NAME_WIDTH) + 2 * _GAP
    figure, all_axes = panels(
        [""] * len(stacked) * len(columns), title, "training steps", "",
        bool(marks) + isinstance(rows, Mapping), Grid(len(columns), 1.25, margin / 72, share_x=True),
    )  # fmt: skip
    all_curves = [c for row in stacked for panel in row for c in panel.curves]
    # If only some curves have log-spaced steps, the axis is logarithmic.
    log = any(is_log_spaced(curve.steps) for curve in all_curves)
    for r, row in enumerate(stacked):
        axes_row = all_axes[r * len(columns) : (r + 1) * len(columns)]
        max_width = 72 * (axes_row[-1].bbox.x1 - axes_row[0].bbox.x0) / DPI
        panel_title = shorten_front(row[0].name, max_width, _TITLE_SIZE, "bold")
        axes_row[0].set_title(
            panel_title, loc="left", y=1.0, fontsize=_TITLE_SIZE, fontweight="bold", color=TEXT, parse_math=False
        )  # fmt: skip
        for axes, panel in zip(axes_row, row, strict=True):
            draw_curves(axes, panel.curves)
        _set_scale(axes_row, row)
        for axes in axes_row:
            set_step_axis(axes, _all_steps(all_curves), log)
            for step in (marks or {}).values():
                axes.axvline(step, **_MARK_STYLE)
        _draw_names(axes_row[-1], row[-1].curves, margin - 2 * _GAP)
    for axes, name in zip(all_axes, rows if isinstance(rows, Mapping) else (), strict=False):
        axes.annotate(
            name, (0, 1), xycoords="axes fraction", xytext=(0, 24), textcoords="offset points", fontsize=11,
            color=MUTED, annotation_clip=False, parse_math=False,
        )  # fmt: skip
    if marks:
        add_legend(figure, [[(Line2D([], [], **_MARK_STYLE), ", ".join(marks))]])
    return figure


def draw_sparsity_over_time(
    steps: Sequence[int], scalars: Mapping[str, Mapping[str, Sequence[float]]], title: str = "Sparsity over training"
) -> Figure:
    """Draw sparsity metrics of a graph over training: a panel for each metric, a line for each basis.

    Args:
        steps: The training step of each snapshot, in increasing order.
        scalars: Values by name of the metric and by basis ("lib", "pca", "neuron"), shape ``(T,)``; NaN at snapshots
            for which the metric was not computed.
        title: Title of the figure.

    Returns:
        A matplotlib figure that is not registered with pyplot.

    Raises:
        SettingError: If a metric has different numbers of steps and values.

    Example:
        >>> figure = draw_sparsity_over_time([0, 10], {"effective_features": {"lib": [9.0, 4.0], "pca": [9.5, 7.0]}})
        >>> figure.axes[0].get_title(loc="left")
        'effective features'
    """
    bases = list(dict.fromkeys(name for by_basis in scalars.values() for name in by_basis))
    styles = basis_styles(bases)
    entries: list[tuple[Any, str]] = [(Line2D([], [], color=styles[b][0], lw=1.8), basis_title(b)) for b in bases]
    n_columns = 1 if len(scalars) == 1 else 2 if len(scalars) <= 8 else 3
    names = [name.replace("_", " ") for name in scalars]
    figure, all_axes = panels(names, title, "training steps", "", 1, Grid(n_columns, 1.35, separate_scales=True))
    for axes, by_basis in zip(all_axes, scalars.values(), strict=True):
        curves = [Curve(basis, steps, values, styles[basis][0]) for basis, values in by_basis.items()]
        draw_curves(axes, curves)
        _set_scale([axes], [Panel("", curves)])
        set_step_axis(axes, steps)
    add_legend(figure, [entries])
    return figure


def draw_curves(axes: Axes, curves: Sequence[Curve]) -> None:
    """Draw curves into a panel, with gaps at missing values.

    Args:
        axes: The panel.
        curves: The curves; earlier ones are drawn on top.

    Raises:
        SettingError: If a curve has different numbers of steps and values.

    Example:
        >>> axes = Figure().add_subplot()
        >>> draw_curves(axes, [Curve("LIB", [0, 1, 2], [3.0, float("nan"), 1.0])])
        >>> [list(map(float, line.get_ydata())) for line in axes.lines]
        [[3.0, nan, 1.0]]
    """
    for k, (curve, color) in enumerate(zip(curves, _colors(curves), strict=True)):
        values, z = _runs(curve), 3 - k / 100
        x = np.asarray(curve.steps)
        for run in values if len(values) > 1 else ():
            axes.plot(x, run, color=color, lw=0.7, alpha=0.45, zorder=z - 1)
        median = _median(values)
        present = np.isfinite(median)
        # Between missing values, only a marker is visible.
        has_gaps = present.any() and not present[present.argmax() : len(present) - present[::-1].argmax()].all()
        marker = "o" if has_gaps or present.sum() <= _MAX_MARKERS else ""
        axes.plot(x, median, color=color, lw=1.7, marker=marker, ms=2.4, zorder=z, clip_on=False)


_MARK_STYLE: dict[str, Any] = {"color": MUTED, "lw": 0.9, "ls": (0, (4, 2)), "zorder": 1}


def _runs(curve: Curve) -> np.ndarray:
    values = np.atleast_2d(np.asarray(curve.values, dtype=float))
    if values.shape[-1] != len(curve.steps):
        raise SettingError(f"'{curve.name}' has {values.shape[-1]} values, but there are {len(curve.steps)} steps.")
    return values


def _median(values: np.ndarray) -> np.ndarray:
    """Median over the runs that have a value; NaN if none has."""
    median = np.full(values.shape[1], np.nan)
    present = np.isfinite(values)
    any_present = present.any(0)
    median[any_present] = np.nanmedian(np.where(present, values, np.nan)[:, any_present], axis=0)
    return median


def _colors(curves: Sequence[Curve]) -> list[str]:
    chosen = [curve.color or BASES.get(kind_and_number(curve.name)[0]) for curve in curves]
    # Curves beyond the palette are grey: a second one in a colour would be taken for the first.
    free = iter([color for color in MODULES if color not in chosen])
    return [color or next(free, MUTED) for color in chosen]


def _set_scale(axes_row: Sequence[FastAxes], row: Sequence[Panel]) -> None:
    """Set a common y axis for the panels of a row, with compact tick labels."""
    values = np.concatenate([[], *(_runs(curve).ravel() for panel in row for curve in panel.curves)])
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    log = row[0].log
    if log is None:
        log = row[0].limits is None and low > 0 and high / low > _LOG_RATIO
    margin = 0.07 * (high - low) or 0.5
    limits = (low / 1.3, high * 1.3) if log and low > 0 else (low - margin if low < 0 else 0.0, high + margin)
    for axes in axes_row:
        if log:
            axes.set_yscale("log" if low > 0 else "symlog", **({} if low > 0 else {"linthresh": 1, "linscale": 0.3}))
            axes.yaxis.set_major_locator(_log_ticks(low, high))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        axes.set_ylim(row[0].limits or limits)
        axes.grid_lines = True


def _log_ticks(low: float, high: float) -> Locator:
    decades = [10.0**d for d in range(math.floor(math.log10(max(high, 1.0))) + 1)]
    if low <= 0:
        return FixedLocator([0.0, *decades[:: 1 + len(decades) // 5]])
    return LogLocator(subs=(1.0,) if high / low > 100 else (1.0, 3.0), numticks=5)


def _draw_names(axes: Axes, curves: Sequence[Curve], max_width: float) -> None:
    """Write the name of each curve at the height of its last value, moved as needed to avoid overlaps."""
    colors = _colors(curves)
    ends = {}
    for k, curve in enumerate(curves):
        median = _median(_runs(curve))
        present = np.flatnonzero(np.isfinite(median))
        if len(present):
            ends[k] = axes.transAxes.inverted().transform(axes.transData.transform((1, median[present[-1]])))[1]
    line = _LINE_HEIGHT / (72 * axes.bbox.height / DPI)
    heights = _spread([ends[k] for k in ends], line)
    for (k, _), height in zip(ends.items(), heights, strict=True):
        axes.annotate(
            shorten(basis_title(curves[k].name), max_width + 1, _NAME_SIZE), (1, height), xycoords="axes fraction",
            xytext=(_GAP, 0), textcoords="offset points", va="center", fontsize=_NAME_SIZE, color=colors[k],
            annotation_clip=False, parse_math=False,
        )  # fmt: skip


def _spread(heights: Iterable[float], distance: float) -> np.ndarray:
    """Move lines of text apart as little as possible: upwards from the lowest one, then back into the panel."""
    targets = np.asarray(list(heights), dtype=float)
    order = np.argsort(targets, kind="stable")
    moved = np.clip(targets[order], 0.0, 1.0)
    for k in range(1, len(moved)):
        moved[k] = max(moved[k], moved[k - 1] + distance)
    for k in reversed(range(len(moved))):
        above = moved[k + 1] - distance if k + 1 < len(moved) else 1.0
        moved[k] = min(moved[k], above)
    result = np.empty(len(moved))
    result[order] = moved
    return result


def _all_steps(curves: Sequence[Curve]) -> list[int]:
    return sorted({int(step) for curve in curves for step in curve.steps})
