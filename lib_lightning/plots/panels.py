"""Small multiples: a page of equal panels with a common legend."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D

from lib_lightning.plots.fast_axes import FastAxes
from lib_lightning.plots.figure import NotebookFigure
from lib_lightning.plots.palette import MUTED, TEXT
from lib_lightning.plots.text_metrics import DPI, fit_names, text_width

Mark = Line2D | tuple[Line2D, ...]

_PANEL_WIDTH, _PANEL_HEIGHT, _PAGE_WIDTH = 2.25, 1.55, 6.4
# Inches around and between the panels.
_LEFT, _RIGHT, _TOP, _BOTTOM, _ROW_GAP, _COLUMN_GAP, _LEGEND_LINE = 0.82, 0.14, 0.92, 0.62, 0.62, 0.22, 0.26
_LEGEND_SIZE = 10.5
_SEPARATE_SCALE_GAP, _SHARED_X_GAP = 0.6, 0.36
_MAX_TITLE_SIZE, _MIN_TITLE_SIZE, _LINE = 11.0, 8.5, 0.17


@dataclass(frozen=True)
class Grid:
    """Arrangement of panels on a page.

    Attributes:
        columns: Number of panels in a row.
        height: Height of a panel, in inches.
        right: Margin on the right of the page, in inches.
        separate_scales: Whether each panel has its own y scale, with tick labels beside it.
        share_x: Whether the panels of a column share their x axis, with tick labels below the last one.
        title_margin: Points to keep free to the right of a panel's title.
    """

    columns: int
    height: float = _PANEL_HEIGHT
    right: float = _RIGHT
    separate_scales: bool = False
    share_x: bool = False
    title_margin: float = 0.0


def panels(
    names: Sequence[str], title: str, xlabel: str, ylabel: str, n_legend_lines: int = 1, grid: Grid | None = None
) -> tuple[Figure, list[FastAxes]]:
    """Create a page of panels with common axis labels.

    Args:
        names: Title of each panel.
        title: Title of the page.
        xlabel: Label of the x axes.
        ylabel: Label of the y axes.
        n_legend_lines: Number of legend lines below the title.
        grid: Arrangement of the panels; by default two to four in a row, depending on their number.

    Returns:
        A figure that is not registered with pyplot, and its panels.

    Example:
        >>> figure, axes = panels(["first", "second"], "Title", "features", "importance")
        >>> [a.get_title(loc="left") for a in axes]
        ['first', 'second']
    """
    grid = grid or _grid_for(len(names))
    n_rows = max(math.ceil(len(names) / grid.columns), 1)
    column_gap = _SEPARATE_SCALE_GAP if grid.separate_scales else _COLUMN_GAP
    width = max(_PAGE_WIDTH, grid.columns * _PANEL_WIDTH + _LEFT + grid.right)
    panel_width = (width - _LEFT - grid.right - (grid.columns - 1) * column_gap) / grid.columns
    titles, size = _titles(names, 72 * panel_width - grid.title_margin)
    more_lines = _LINE * max((panel_title.count("\n") for panel_title in titles), default=0)
    top = _TOP + n_legend_lines * _LEGEND_LINE + more_lines
    row_gap = (_SHARED_X_GAP if grid.share_x else _ROW_GAP) + more_lines
    height = top + n_rows * grid.height + (n_rows - 1) * row_gap + _BOTTOM
    figure = NotebookFigure(figsize=(width, height), dpi=DPI, facecolor="white")
    figure.text(0.03, 1 - 0.38 / height, title, fontsize=16, fontweight="bold", color=TEXT, parse_math=False)
    all_axes = []
    for k, panel_title in enumerate(titles):
        row, column = divmod(k, grid.columns)
        x = _LEFT + column * (panel_width + column_gap)
        y = height - top - (row + 1) * grid.height - row * row_gap
        bounds = (x / width, y / height, panel_width / width, grid.height / height)
        axes = figure.add_axes(bounds, axes_class=FastAxes)
        assert isinstance(axes, FastAxes)
        axes.left_labels = grid.separate_scales or column == 0
        axes.bottom_labels = k + grid.columns >= len(names) or not grid.share_x
        # An explicit y skips matplotlib's search for a position that overlaps nothing.
        axes.set_title(panel_title, loc="left", y=1.0, fontsize=size, fontweight="bold", color=TEXT, parse_math=False)
        all_axes.append(axes)
    figure.text(
        0.5 * (_LEFT + width - grid.right + _RIGHT) / width, 0.1 / height, xlabel, ha="center", fontsize=11, color=MUTED
    )
    figure.text(
        0.1 / width, (_BOTTOM + height - top) / 2 / height, ylabel, va="center", rotation=90, fontsize=11, color=MUTED
    )
    return figure, all_axes


def add_legend(figure: Figure, rows: Sequence[Sequence[tuple[Mark, str]]]) -> None:
    """Draw a legend below the title.

    Args:
        figure: A page of panels.
        rows: Lines of the legend, from top to bottom, as pairs of a mark (or several side by side) and its label.

    Example:
        >>> figure, _ = panels(["first"], "Title", "features", "importance")
        >>> add_legend(figure, [[(Line2D([], []), "LIB")]])
        >>> len(figure.legends)
        1
    """
    for k, row in enumerate(rows):
        marks: list[Any] = [mark for mark, _ in row]
        figure.legend(
            marks, [label for _, label in row], loc="upper left", ncols=len(row), frameon=False,
            bbox_to_anchor=(0.015, 1 - (0.48 + k * _LEGEND_LINE) / figure.get_figheight()), fontsize=_LEGEND_SIZE,
            labelcolor=MUTED, handlelength=4.0 if any(isinstance(mark, tuple) for mark in marks) else 1.8,
            handletextpad=0.5, columnspacing=1.4, handler_map={tuple: HandlerTuple(None, pad=0)},
        )  # fmt: skip


def wrap_legend(entries: Sequence[tuple[Mark, str]]) -> list[list[tuple[Mark, str]]]:
    """Break a long legend into lines that fit the narrowest page.

    Args:
        entries: Pairs of a mark (or several side by side) and its label.

    Returns:
        The lines.

    Example:
        >>> rows = wrap_legend([(Line2D([], []), f"a label of some length, {k}") for k in range(4)])
        >>> [len(row) for row in rows]
        [2, 2]
    """
    rows: list[list[tuple[Mark, str]]] = []
    remaining = 0.0
    for mark, label in entries:
        # The mark, its distance from the label, and the distance to the next entry.
        width = text_width(label, _LEGEND_SIZE) + _LEGEND_SIZE * ((4.0 if isinstance(mark, tuple) else 1.8) + 0.5 + 1.4)
        if width > remaining:
            rows.append([])
            remaining = 72 * (_PAGE_WIDTH - 0.2)
        rows[-1].append((mark, label))
        remaining -= width
    return rows


def _grid_for(count: int) -> Grid:
    columns = 2 if count in (2, 4) else min(max(count, 1), 3 if count <= 9 else 4)
    return Grid(columns, _PANEL_HEIGHT if count > columns else 1.6 * _PANEL_HEIGHT)


def _titles(names: Sequence[str], max_width: float) -> tuple[list[str], float]:
    """Fit panel titles: break sections into two lines, then fit the names of their node layers, all of them alike."""
    if all(text_width(name, _MAX_TITLE_SIZE, "bold") <= max_width for name in names):
        return list(names), _MAX_TITLE_SIZE
    ends = [name.split(" -> ") for name in names]
    arrow = "-> " if any(len(pair) > 1 for pair in ends) else ""
    space = max_width - text_width(arrow, _MAX_TITLE_SIZE, "bold")
    texts, size = fit_names(tuple(itertools.chain(*ends)), space, _MAX_TITLE_SIZE, _MIN_TITLE_SIZE, lines=2)
    remaining = iter(texts)
    return [f"\n{arrow}".join(itertools.islice(remaining, len(pair))) for pair in ends], size
