"""The legend of a graph figure: what the sizes, widths and colours mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib_lightning.plots.palette import (
    AGAINST,
    BETWEEN_MODULES,
    BLUE,
    DRIVES,
    MODULES,
    MUTED,
    THEME,
    VERMILION,
    module_color,
    paler,
)

# Inches from one row to the next.
ROW = 0.324
# Edges between modules: dashes short enough to be visible in thin lines.
DASHES = (0, (2.5, 1.5))
# Width of the strongest edge, in points.
MAX_WIDTH = 4.0
_FONT_SIZE = 10.5


def dot_area(share: np.ndarray | float) -> np.ndarray:
    """Compute the area of a feature's dot.

    Args:
        share: Its importance divided by the largest in its layer.

    Returns:
        Area in square points. Importances span many decades, so the area grows with the square root, from a minimum
        that remains visible.

    Example:
        >>> float(dot_area(1.0))
        242.0
    """
    return np.asarray(THEME["dot"]["area_min"] + THEME["dot"]["area_range"] * np.sqrt(share))


def edge_style(share: np.ndarray | float, max_width: float = MAX_WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """Compute the width and opacity of an edge's line.

    Args:
        share: Its strength divided by the largest in its section.
        max_width: Width of the strongest edge, in points.

    Returns:
        Width in points and opacity, in the shape of ``share``.

    Example:
        >>> width, opacity = edge_style(1.0)
        >>> float(width), round(float(opacity), 2)
        (4.0, 0.9)
    """
    edge, root = THEME["edge"], np.sqrt(share)
    width = max_width * (edge["width_min"] + edge["width_range"] * root)
    return np.asarray(width), np.asarray(edge["opacity_min"] + edge["opacity_range"] * root)


@dataclass(frozen=True)
class Row:
    """A line of a legend.

    Attributes:
        meaning: Explanation on the left.
        handles: Example marks on the right.
        labels: Label of each mark.
        length: Length of the marks, in units of the font size.
    """

    meaning: str
    handles: list[Line2D]
    labels: list[str]
    length: float = 2.0


def legend_rows(
    modules: Sequence[int] | None = None, hollow: bool = False, numbers: str = "", signs: bool = False
) -> list[Row]:
    """Build the legend of a graph figure.

    Args:
        modules: The modules shown, -1 for features in no module; None if modules are not known.
        hollow: Whether there are hollow dots.
        numbers: What the numbers beside dots are; "" if there are none.
        signs: Whether lines are drawn by sign.

    Returns:
        Rows of the legend, from bottom to top.

    Example:
        >>> [row.meaning.split(":")[0] for row in legend_rows(hollow=True)]
        ['lines', 'dots', '']
    """
    # With modules or signs, colours have a meaning of their own, so sizes and widths are explained in grey.
    dot, line = (VERMILION, BLUE) if modules is None and not signs else (MUTED, MUTED)
    lines = []
    for share in (1, 0.1, 0.01):
        width, opacity = edge_style(share)
        lines.append(Line2D([], [], color=line, lw=float(width), alpha=float(opacity)))
    dots = [_dot(dot, size=math.sqrt(float(dot_area(share)))) for share in (1.0, 0.1, 0.001)]
    rows = [
        Row("lines: strength relative to the section's largest", lines, ["1", "0.1", "0.01"]),
        Row("dots: importance relative to the layer's largest", dots, ["1", "0.1", "0.001"]),
    ]
    marks = []
    if hollow:
        marks.append((_dot(dot, hollow=True), "direction not determined"))
    if modules is not None and not signs:
        marks.append((Line2D([], [], color=BETWEEN_MODULES, lw=1.5, ls=DASHES), "between modules"))
    if marks or numbers:
        meaning = f"numbers: {numbers}" if numbers else ""
        rows.append(Row(meaning, [mark for mark, _ in marks], [label for _, label in marks]))
    if signs:
        rows.append(_signs(modules is not None))
    if modules is not None:
        rows.append(_modules(modules))
    return rows


def draw_legend(figure: Figure, rows: Sequence[Row]) -> None:
    """Draw a legend at the bottom of a figure.

    Args:
        figure: The figure.
        rows: Rows of the legend, from bottom to top.

    Example:
        >>> figure = Figure()
        >>> draw_legend(figure, legend_rows())
        >>> len(figure.legends)
        2
    """
    row_height = ROW / figure.get_figheight()
    for k, row in enumerate(rows):
        y = k * row_height
        figure.text(0.03, y + 0.4 * row_height, row.meaning, fontsize=_FONT_SIZE, color=MUTED)
        if not row.handles:
            continue
        figure.legend(
            row.handles, row.labels, loc="lower right", bbox_to_anchor=(0.99, y), ncols=len(row.handles),
            frameon=False, fontsize=_FONT_SIZE, labelcolor=MUTED, handlelength=row.length, handletextpad=0.5,
            columnspacing=1.2 if row.length > 1 else 0.8,
        )  # fmt: skip


def _signs(modules: bool) -> Row:
    colors = [(DRIVES, "-", "drives"), (AGAINST, DASHES, "holds against")]
    if modules:
        colors.append((paler(DRIVES), "-", "between modules"))
    handles = [Line2D([], [], color=color, lw=2, ls=dashes) for color, dashes, _ in colors]
    return Row("colours of lines", handles, [label for *_, label in colors])


def _modules(modules: Sequence[int]) -> Row:
    named = [module for module in modules if 0 <= module < len(MODULES)]
    handles, labels = [_dot(module_color(module)) for module in named], [str(module) for module in named]
    others = sum(module >= len(MODULES) for module in modules)
    if others:
        handles, labels = [*handles, _dot(module_color(len(MODULES)))], [*labels, f"{others} more"]
    if -1 in modules:
        handles, labels = [*handles, _dot(module_color(-1))], [*labels, "none"]
    return Row("modules", handles, labels, 0.8)


def _dot(color: str, size: float = 9.0, hollow: bool = False) -> Line2D:
    face, edge = ("white", color) if hollow else (color, "white")
    return Line2D([], [], ls="", marker="o", color=face, markeredgecolor=edge, ms=size)
