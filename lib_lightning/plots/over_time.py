"""Numbers over training time: panels of named curves on one step axis."""

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

from lib_lightning.plots.fast_axes import FastAxes
from lib_lightning.plots.palette import BASES, BASIS_NAMES, MODULES, MUTED, TEXT, basis_styles
from lib_lightning.plots.panels import Grid, add_entries, panels
from lib_lightning.plots.steps_axis import is_log_spaced, set_steps
from lib_lightning.plots.text_metrics import DPI, short_number, shorten, shorten_front, width_of

_HEADING_SIZE, _NAME_SIZE, _LINE_HEIGHT = 11.0, 9.0, 10.5
# Points: the widest room for names, and what lies between them and the panels.
_MOST_ROOM, _GAP = 130.0, 5.0
# Values that span more than this are drawn on a logarithmic scale.
_WIDE_SPAN = 30.0
# Up to here measurements are marked one by one.
_MOST_MARKS = 60


@dataclass(frozen=True)
class Curve:
    """One number over training time.

    Attributes:
        name: What it is called.
        steps: Where it was measured, rising, shape ``(T,)``.
        values: What it was, shape ``(T,)``, or ``(runs, T)`` for several runs, drawn thin with their median; NaN where
            there is none.
        color: Its colour; None for one that is chosen by the name, or by the place among its panel's curves.
    """

    name: str
    steps: Sequence[int]
    values: Sequence[float] | Sequence[Sequence[float]] | np.ndarray
    color: str | None = None


@dataclass(frozen=True)
class Panel:
    """Curves that share a scale.

    Attributes:
        name: What they are about.
        curves: The curves.
        log: Whether the scale is logarithmic; None for a choice by the values.
        limits: The ends of the scale; None for a choice by the values.
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
    """Draw panels of curves one below another, on one step axis, with the names of curves at their ends.

    Args:
        rows: Panels from the top down; or several such columns by name, of panels with the same names, as for runs
            that are shown side by side: those of a row share a scale.
        title: Title of the figure.
        marks: Steps to mark by a line across all panels, by name.

    Returns:
        A matplotlib figure that pyplot does not know of.

    Raises:
        ValueError: If columns have different panels, or a curve another number of values than of steps.

    Example:
        >>> accuracy = Panel("accuracy", [Curve("train", [0, 50, 100], [0.1, 1.0, 1.0])], limits=(0, 1))
        >>> figure = draw_over_time([accuracy, Panel("features", [Curve("LIB", [0, 100], [60, 12])])])
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['accuracy', 'features']
    """
    columns = rows if isinstance(rows, Mapping) else {"": rows}
    names = [panel.name for panel in next(iter(columns.values()), [])]
    if any([panel.name for panel in column] != names for column in columns.values()):
        raise ValueError("All columns have panels of the same names, in the same order.")
    stacked = [list(row) for row in zip(*columns.values(), strict=True)]
    words = [width_of(_shown(c.name), _NAME_SIZE) for row in stacked for panel in row[-1:] for c in panel.curves]
    room = min(max(words, default=0.0), _MOST_ROOM) + 2 * _GAP
    figure, all_axes = panels(
        [""] * len(stacked) * len(columns), title, "training steps", "",
        bool(marks) + isinstance(rows, Mapping), Grid(len(columns), 1.25, room / 72, one_below_another=True),
    )  # fmt: skip
    everything = [c for row in stacked for panel in row for c in panel.curves]
    # Where some curves are evenly spaced and others are not, these say which axis is meant.
    log = any(is_log_spaced(curve.steps) for curve in everything)
    for r, row in enumerate(stacked):
        beside = all_axes[r * len(columns) : (r + 1) * len(columns)]
        across = 72 * (beside[-1].bbox.x1 - beside[0].bbox.x0) / DPI
        heading = shorten_front(row[0].name, across, _HEADING_SIZE, "bold")
        beside[0].set_title(
            heading, loc="left", y=1.0, fontsize=_HEADING_SIZE, fontweight="bold", color=TEXT, parse_math=False
        )  # fmt: skip
        for axes, panel in zip(beside, row, strict=True):
            draw_curves(axes, panel.curves)
        _set_scale(beside, row)
        for axes in beside:
            set_steps(axes, _all_steps(everything), log)
            for step in (marks or {}).values():
                axes.axvline(step, **_MARK)
        _write_names(beside[-1], row[-1].curves, room - 2 * _GAP)
    for axes, name in zip(all_axes, rows if isinstance(rows, Mapping) else (), strict=False):
        axes.annotate(
            name, (0, 1), xycoords="axes fraction", xytext=(0, 24), textcoords="offset points", fontsize=11,
            color=MUTED, annotation_clip=False, parse_math=False,
        )  # fmt: skip
    if marks:
        add_entries(figure, [[(Line2D([], [], **_MARK), ", ".join(marks))]])
    return figure


def draw_sparsity_over_time(
    steps: Sequence[int],
    numbers: Mapping[str, Mapping[str, Sequence[float]]],
    title: str = "Sparsity over training",
) -> Figure:
    """Draw how sparse a graph was over training: a panel for each metric, a line for each basis.

    Args:
        steps: The training step of each snapshot, rising.
        numbers: For the name of each metric and each basis ("lib", "pca", "neuron") its values, shape ``(T,)``; NaN
            where there are none, such as those of metrics that are computed at a slower pace.
        title: Title of the figure.

    Returns:
        A matplotlib figure that pyplot does not know of.

    Raises:
        ValueError: If there is another number of values than of steps.

    Example:
        >>> figure = draw_sparsity_over_time([0, 10], {"effective_features": {"lib": [9.0, 4.0], "pca": [9.5, 7.0]}})
        >>> figure.axes[0].get_title(loc="left")
        'effective features'
    """
    bases = list(dict.fromkeys(name for of_bases in numbers.values() for name in of_bases))
    styles = basis_styles(bases)
    entries: list[tuple[Any, str]] = [(Line2D([], [], color=styles[b][0], lw=1.8), _shown(b)) for b in bases]
    n_columns = 1 if len(numbers) == 1 else 2 if len(numbers) <= 8 else 3
    names = [name.replace("_", " ") for name in numbers]
    figure, all_axes = panels(names, title, "training steps", "", 1, Grid(n_columns, 1.35, own_scale=True))
    for axes, of_bases in zip(all_axes, numbers.values(), strict=True):
        curves = [Curve(basis, steps, values, styles[basis][0]) for basis, values in of_bases.items()]
        draw_curves(axes, curves)
        _set_scale([axes], [Panel("", curves)])
        set_steps(axes, steps)
    add_entries(figure, [entries])
    return figure


def draw_curves(axes: Axes, curves: Sequence[Curve]) -> None:
    """Draw curves into a panel.

    Where values are missing between others a line is dotted.

    Args:
        axes: The panel.
        curves: The curves; the first ones lie on top.

    Raises:
        ValueError: If a curve has another number of values than of steps.

    Example:
        >>> axes = Figure().add_subplot()
        >>> draw_curves(axes, [Curve("LIB", [0, 1, 2], [3.0, float("nan"), 1.0])])
        >>> [list(map(float, line.get_ydata())) for line in axes.lines]
        [[3.0, 1.0], [3.0, nan, 1.0]]
    """
    for k, (curve, color) in enumerate(zip(curves, _colors(curves), strict=True)):
        values, z = _runs(curve), 3 - k / 100
        x = np.asarray(curve.steps)
        for run in values if len(values) > 1 else ():
            axes.plot(x, run, color=color, lw=0.7, alpha=0.45, zorder=z - 1)
        middle = _median(values)
        there = np.isfinite(middle)
        if there.any() and not there[there.argmax() : len(there) - there[::-1].argmax()].all():
            axes.plot(x[there], middle[there], color=color, lw=1.0, ls=(0, (1, 1.5)), zorder=z)
        marker = "o" if there.sum() <= _MOST_MARKS else ""
        axes.plot(x, middle, color=color, lw=1.7, marker=marker, ms=2.4, zorder=z, clip_on=False)


_MARK: dict[str, Any] = {"color": MUTED, "lw": 0.9, "ls": (0, (4, 2)), "zorder": 1}


def _runs(curve: Curve) -> np.ndarray:
    values = np.atleast_2d(np.asarray(curve.values, dtype=float))
    if values.shape[-1] != len(curve.steps):
        raise ValueError(f"'{curve.name}' has {values.shape[-1]} values, and there are {len(curve.steps)} steps.")
    return values


def _median(values: np.ndarray) -> np.ndarray:
    """The median of the runs that have a value, NaN where none has."""
    middle = np.full(values.shape[1], np.nan)
    there = np.isfinite(values)
    some = there.any(0)
    middle[some] = np.nanmedian(np.where(there, values, np.nan)[:, some], axis=0)
    return middle


def _colors(curves: Sequence[Curve]) -> list[str]:
    chosen = [curve.color or BASES.get(curve.name) for curve in curves]
    free = [color for color in MODULES if color not in chosen] or list(MODULES)
    return [color or free[k % len(free)] for k, color in enumerate(chosen)]


def _set_scale(beside: Sequence[FastAxes], row: Sequence[Panel]) -> None:
    """Give panels that stand beside each other one scale, with numbers in short."""
    values = np.concatenate([[], *(_runs(curve).ravel() for panel in row for curve in panel.curves)])
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    log = row[0].log
    if log is None:
        log = row[0].limits is None and low > 0 and high / low > _WIDE_SPAN
    margin = 0.07 * (high - low) or 0.5
    limits = (low / 1.3, high * 1.3) if log and low > 0 else (low - margin if low < 0 else 0.0, high + margin)
    for axes in beside:
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


def _write_names(axes: Axes, curves: Sequence[Curve], room: float) -> None:
    """Write the name of each curve at the height of its last value, moved so far that none lies on another."""
    colors = _colors(curves)
    ends = {}
    for k, curve in enumerate(curves):
        middle = _median(_runs(curve))
        there = np.flatnonzero(np.isfinite(middle))
        if len(there):
            ends[k] = axes.transAxes.inverted().transform(axes.transData.transform((1, middle[there[-1]])))[1]
    line = _LINE_HEIGHT / (72 * axes.bbox.height / DPI)
    heights = _spread([ends[k] for k in ends], line)
    for (k, _), height in zip(ends.items(), heights, strict=True):
        axes.annotate(
            shorten(_shown(curves[k].name), room + 1, _NAME_SIZE), (1, height), xycoords="axes fraction",
            xytext=(_GAP, 0), textcoords="offset points", va="center", fontsize=_NAME_SIZE, color=colors[k],
            annotation_clip=False, parse_math=False,
        )  # fmt: skip


def _spread(heights: Iterable[float], least: float) -> np.ndarray:
    """Move lines of text apart, each as little as it takes, from the lowest one up and then back into the panel."""
    wanted = np.asarray(list(heights), dtype=float)
    order = np.argsort(wanted, kind="stable")
    moved = np.clip(wanted[order], 0.0, 1.0)
    for k in range(1, len(moved)):
        moved[k] = max(moved[k], moved[k - 1] + least)
    for k in reversed(range(len(moved))):
        above = moved[k + 1] - least if k + 1 < len(moved) else 1.0
        moved[k] = min(moved[k], above)
    result = np.empty(len(moved))
    result[order] = moved
    return result


def _all_steps(curves: Sequence[Curve]) -> list[int]:
    return sorted({int(step) for curve in curves for step in curve.steps})


def _shown(name: str) -> str:
    return BASIS_NAMES.get(name, name)
