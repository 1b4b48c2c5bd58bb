"""The legend of a graph figure: what sizes, widths and colours say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib_lightning.plots.palette import BLUE, MODULES, MUTED, NO_MODULE, OTHER_MODULES, TEXT, VERMILION

# Inches from one row to the next.
ROW = 0.324
# Edges between modules: dashes short enough to be seen in thin lines.
DASHES = (0, (2.5, 1.5))
_SIZE = 10.5


def dot_area(share: np.ndarray | float) -> np.ndarray:
    """Size of the dot of a feature.

    Args:
        share: Its importance, as a share of the layer's largest.

    Returns:
        Area in square points: importances span many decades, so it goes with the square root, from a speck up.

    Example:
        >>> float(dot_area(1.0))
        242.0
    """
    return np.asarray(12 + 230 * np.sqrt(share))


@dataclass(frozen=True)
class Row:
    """A line of a legend.

    Attributes:
        meaning: What is said on the left.
        handles: Examples of the marks, on the right.
        labels: What each of them stands for.
        length: How long the examples are, in letters.
    """

    meaning: str
    handles: list[Line2D]
    labels: list[str]
    length: float = 2.0


def legend_rows(colors: Mapping[int, str] | None = None, unsure: bool = False, numbered: bool = False) -> list[Row]:
    """Say what the marks of a figure mean.

    Args:
        colors: The colour of each module, -1 for features of none, where they are shown.
        unsure: Whether there are hollow dots.
        numbered: Whether dots have the numbers of their lineages beside them.

    Returns:
        Lines of the legend, from the bottom up.

    Example:
        >>> [row.meaning.split(":")[0] for row in legend_rows(unsure=True)]
        ['lines', 'dots', '']
    """
    # With modules the colours have a meaning of their own, which sizes and widths must not seem to share.
    dot, line = (VERMILION, BLUE) if colors is None else (MUTED, MUTED)
    lines = [
        Line2D([], [], color=line, lw=0.4 + 3.6 * math.sqrt(s), alpha=0.06 + 0.84 * math.sqrt(s))
        for s in (1, 0.1, 0.01)
    ]
    dots = [_dot(dot, size=math.sqrt(float(dot_area(share)))) for share in (1.0, 0.1, 0.001)]
    rows = [
        Row("lines: strength, as a share of the section's largest", lines, ["1", "0.1", "0.01"]),
        Row("dots: importance, as a share of the layer's largest", dots, ["1", "0.1", "0.001"]),
    ]
    marks = []
    if unsure:
        marks.append((_dot(dot, hollow=True), "direction not fixed by the samples"))
    if colors is not None:
        marks.append((Line2D([], [], color=MUTED, lw=1.5, ls=DASHES), "between modules"))
    if numbered:
        marks.append((Line2D([], [], ls="", marker="$7$", color=TEXT, ms=6), "lineage"))
    if marks:
        rows.append(Row("", [mark for mark, _ in marks], [label for _, label in marks]))
    if colors is not None:
        rows.append(_modules(colors))
    return rows


def draw_legend(figure: Figure, rows: Sequence[Row]) -> None:
    """Write a legend at the foot of a figure.

    Args:
        figure: The figure.
        rows: Lines of the legend, from the bottom up.

    Example:
        >>> figure = Figure()
        >>> draw_legend(figure, legend_rows())
        >>> len(figure.legends)
        2
    """
    row_height = ROW / figure.get_figheight()
    for k, row in enumerate(rows):
        y = k * row_height
        figure.text(0.03, y + 0.4 * row_height, row.meaning, fontsize=_SIZE, color=MUTED)
        figure.legend(
            row.handles, row.labels, loc="lower right", bbox_to_anchor=(0.99, y), ncols=len(row.handles),
            frameon=False, fontsize=_SIZE, labelcolor=MUTED, handlelength=row.length, handletextpad=0.5,
            columnspacing=1.2 if row.length > 1 else 0.8,
        )  # fmt: skip


def _modules(colors: Mapping[int, str]) -> Row:
    own = {module: color for module, color in colors.items() if color in MODULES}
    handles, labels = [_dot(color) for color in own.values()], [str(module) for module in own]
    others = sum(color == OTHER_MODULES for color in colors.values())
    if others:
        handles, labels = [*handles, _dot(OTHER_MODULES)], [*labels, f"{others} more"]
    if -1 in colors:
        handles, labels = [*handles, _dot(NO_MODULE)], [*labels, "none"]
    return Row("modules", handles, labels, 0.8)


def _dot(color: str, size: float = 9.0, hollow: bool = False) -> Line2D:
    face, edge = ("white", color) if hollow else (color, "white")
    return Line2D([], [], ls="", marker="o", color=face, markeredgecolor=edge, ms=size)
