"""Small multiples: a page of equal panels with one legend for all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D

from lib_lightning.plots.fast_axes import FastAxes
from lib_lightning.plots.palette import MUTED, TEXT
from lib_lightning.plots.text_metrics import DPI, shorten_front, width_of

Mark = Line2D | tuple[Line2D, ...]

_PANEL_WIDTH, _PANEL_HEIGHT, _PAGE_WIDTH = 2.25, 1.55, 6.4
# Inches around and between the panels.
_LEFT, _RIGHT, _TOP, _FOOT, _ROW_GAP, _COLUMN_GAP, _ENTRIES = 0.82, 0.14, 0.92, 0.62, 0.62, 0.22, 0.26
_ENTRY_SIZE = 10.5
_OWN_SCALE_GAP, _SHARED_ROW_GAP = 0.6, 0.36
_LARGEST_NAME, _SMALLEST_NAME, _SECOND_LINE = 11.0, 8.5, 0.17


@dataclass(frozen=True)
class Grid:
    """How panels stand on a page, where that is not left to their number.

    Attributes:
        columns: Panels in a row.
        height: Of a panel, in inches.
        right: Inches that are kept free at the right of the page.
        own_scale: Whether each panel has a scale of its own, so that its numbers are written beside it.
        one_below_another: Whether the panels of a column share their x axis, whose numbers stand below the last one.
    """

    columns: int
    height: float = _PANEL_HEIGHT
    right: float = _RIGHT
    own_scale: bool = False
    one_below_another: bool = False


def panels(
    names: Sequence[str], title: str, xlabel: str, ylabel: str, n_entries: int = 1, grid: Grid | None = None
) -> tuple[Figure, list[FastAxes]]:
    """Make a page of panels that share what is written at their axes.

    Args:
        names: What each panel is about.
        title: Title of the page.
        xlabel: What lies along the panels' x axes.
        ylabel: What lies along their y axes.
        n_entries: Lines of the legend below the title.
        grid: How the panels stand; by default three in a row, four of many.

    Returns:
        A figure that pyplot does not know of, and its panels.

    Example:
        >>> figure, axes = panels(["first", "second"], "Title", "features", "importance")
        >>> [a.get_title(loc="left") for a in axes]
        ['first', 'second']
    """
    grid = grid or _grid_for(len(names))
    n_rows = max(math.ceil(len(names) / grid.columns), 1)
    column_gap = _OWN_SCALE_GAP if grid.own_scale else _COLUMN_GAP
    width = max(_PAGE_WIDTH, grid.columns * _PANEL_WIDTH + _LEFT + grid.right)
    panel_width = (width - _LEFT - grid.right - (grid.columns - 1) * column_gap) / grid.columns
    headings, size = _headings(names, 72 * panel_width)
    second_line = _SECOND_LINE * any("\n" in heading for heading in headings)
    top = _TOP + n_entries * _ENTRIES + second_line
    row_gap = (_SHARED_ROW_GAP if grid.one_below_another else _ROW_GAP) + second_line
    height = top + n_rows * grid.height + (n_rows - 1) * row_gap + _FOOT
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    figure.text(0.03, 1 - 0.38 / height, title, fontsize=16, fontweight="bold", color=TEXT, parse_math=False)
    made = []
    for k, heading in enumerate(headings):
        row, column = divmod(k, grid.columns)
        x = _LEFT + column * (panel_width + column_gap)
        y = height - top - (row + 1) * grid.height - row * row_gap
        place = (x / width, y / height, panel_width / width, grid.height / height)
        axes = figure.add_axes(place, axes_class=FastAxes)
        assert isinstance(axes, FastAxes)
        axes.numbers_left = grid.own_scale or column == 0
        axes.numbers_below = k + grid.columns >= len(names) or not grid.one_below_another
        # A place given for the title spares looking for one that is free.
        axes.set_title(heading, loc="left", y=1.0, fontsize=size, fontweight="bold", color=TEXT, parse_math=False)
        made.append(axes)
    figure.text(
        0.5 * (_LEFT + width - grid.right + _RIGHT) / width, 0.1 / height, xlabel, ha="center", fontsize=11, color=MUTED
    )
    figure.text(
        0.1 / width, (_FOOT + height - top) / 2 / height, ylabel, va="center", rotation=90, fontsize=11, color=MUTED
    )
    return figure, made


def add_entries(figure: Figure, rows: Sequence[Sequence[tuple[Mark, str]]]) -> None:
    """Write a legend below the title.

    Args:
        figure: A page of panels.
        rows: Lines of the legend, from the top down: marks, or several side by side, and what they stand for.

    Example:
        >>> figure, _ = panels(["first"], "Title", "features", "importance")
        >>> add_entries(figure, [[(Line2D([], []), "LIB")]])
        >>> len(figure.legends)
        1
    """
    for k, row in enumerate(rows):
        marks: list[Any] = [mark for mark, _ in row]
        figure.legend(
            marks, [label for _, label in row], loc="upper left", ncols=len(row), frameon=False,
            bbox_to_anchor=(0.015, 1 - (0.48 + k * _ENTRIES) / figure.get_figheight()), fontsize=_ENTRY_SIZE,
            labelcolor=MUTED, handlelength=4.0 if any(isinstance(mark, tuple) for mark in marks) else 1.8,
            handletextpad=0.5, columnspacing=1.4, handler_map={tuple: HandlerTuple(None, pad=0)},
        )  # fmt: skip


def in_rows(entries: Sequence[tuple[Mark, str]]) -> list[list[tuple[Mark, str]]]:
    """Break a long legend into lines.

    Args:
        entries: Marks, or several side by side, and what they stand for.

    Returns:
        As many lines as it takes on the narrowest page.

    Example:
        >>> rows = in_rows([(Line2D([], []), f"a name of some length, {k}") for k in range(4)])
        >>> [len(row) for row in rows]
        [2, 2]
    """
    rows: list[list[tuple[Mark, str]]] = []
    left = 0.0
    for mark, label in entries:
        # The mark, its distance from the label, and that from the next entry.
        width = width_of(label, _ENTRY_SIZE) + _ENTRY_SIZE * ((4.0 if isinstance(mark, tuple) else 1.8) + 0.5 + 1.4)
        if width > left:
            rows.append([])
            left = 72 * (_PAGE_WIDTH - 0.2)
        rows[-1].append((mark, label))
        left -= width
    return rows


def _grid_for(count: int) -> Grid:
    columns = 2 if count in (2, 4) else min(max(count, 1), 3 if count <= 9 else 4)
    return Grid(columns, _PANEL_HEIGHT if count > columns else 1.6 * _PANEL_HEIGHT)


def _headings(names: Sequence[str], room: float) -> tuple[list[str], float]:
    """Make names as wide as a panel: sections in two lines, smaller letters, and as a last resort their ends alone."""
    lines = [name.replace(" -> ", "\n-> ").split("\n") for name in names]
    if all(width_of(name, _LARGEST_NAME, "bold") <= room for name in names):
        lines = [[name] for name in names]
    widest = max((width_of(line, _LARGEST_NAME, "bold") for parts in lines for line in parts), default=0.0)
    size = max(_SMALLEST_NAME, _LARGEST_NAME * min(1.0, room / max(widest, 1.0)))
    return ["\n".join(shorten_front(line, room, size, "bold") for line in parts) for parts in lines], size
