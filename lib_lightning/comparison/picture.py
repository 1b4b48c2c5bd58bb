"""A figure of two graphs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lib_lightning.comparison.layers import LayerComparison
from lib_lightning.comparison.scene import Picture, pictures_of
from lib_lightning.comparison.sections import SectionComparison
from lib_lightning.graph import InteractionGraph
from lib_lightning.plots.figure import NotebookFigure
from lib_lightning.plots.palette import MODULES, MUTED, NO_MODULE, TEXT, VERMILION
from lib_lightning.plots.text_metrics import DPI, fit_names, shorten_front

_COLUMN_WIDTH, _HEIGHT, _MARGIN = 1.35, 5.2, 0.35


def draw_comparison(
    graphs: tuple[InteractionGraph, InteractionGraph],
    names: tuple[str, str],
    layers: Sequence[LayerComparison],
    sections: Sequence[SectionComparison],
) -> Figure:
    """Draw both graphs: shared features are filled, at the same height and in the same colour.

    Args:
        graphs: The graphs.
        names: What the networks are called.
        layers: The comparison of each node layer.
        sections: The comparison of each section.

    Returns:
        A matplotlib figure that is not registered with pyplot.
    """
    width = max(3.4, _COLUMN_WIDTH * len(layers))
    figure = NotebookFigure(figsize=(2 * width + 3 * _MARGIN, _HEIGHT), dpi=DPI, facecolor="white")
    for k, picture in enumerate(pictures_of(graphs, layers, sections)):
        left = (_MARGIN + k * (width + _MARGIN)) / figure.get_figwidth()
        axes = figure.add_axes((left, 0.13, width / figure.get_figwidth(), 0.68))
        axes.set_axis_off()
        axes.set_xlim(-0.5, len(layers) - 0.5)
        axes.set_ylim(1.02, -0.02)
        _draw(axes, picture, 72 * width / len(layers))
        title = shorten_front(names[k], 72 * width, 13, "bold")
        figure.text(left, 0.93, title, fontsize=13, fontweight="bold", color=TEXT, parse_math=False)
    dot: dict[str, Any] = {"linestyle": "", "marker": "o", "markersize": 7}
    rows = {
        "shared: same height and colour": Line2D([], [], color=MODULES[0], **dot),
        "rotated, split or merged": Line2D([], [], markerfacecolor="white", markeredgecolor=NO_MODULE, **dot),
        "only here": Line2D([], [], markerfacecolor="white", markeredgecolor=TEXT, **dot),
        "edge that differs": Line2D([], [], color=VERMILION, lw=2),
    }
    figure.legend(
        rows.values(), rows.keys(), loc="lower center", ncols=len(rows), frameon=False, fontsize=9.5, handletextpad=0.4
    )
    return figure


def _draw(axes: Axes, picture: Picture, column_width: float) -> None:
    axes.add_collection(
        LineCollection(
            [[(line.start.x, line.start.y), (line.end.x, line.end.y)] for line in picture.lines],
            linewidths=[line.width for line in picture.lines],
            colors=[to_rgba(line.color, line.opacity) for line in picture.lines],
        )
    )
    dots = picture.dots
    axes.scatter(
        [dot.x for dot in dots],
        [dot.y for dot in dots],
        s=[(2 * dot.radius) ** 2 for dot in dots],
        facecolor=[dot.color if dot.is_filled else "white" for dot in dots],
        edgecolor=["white" if dot.is_filled else dot.color for dot in dots],
        linewidths=[0.7 if dot.is_filled else 1.3 for dot in dots],
        zorder=3,
        clip_on=False,
    )
    headings, size = fit_names(tuple(name for name, _ in picture.layers), column_width - 6, 11.0, 7.0, lines=2)
    for x, (heading, (_, count)) in enumerate(zip(headings, picture.layers, strict=True)):
        style: dict[str, Any] = {"ha": "center", "va": "bottom", "parse_math": False, "clip_on": False}
        axes.text(x, -0.09, heading, fontsize=size, fontweight="bold", color=TEXT, linespacing=1.0, **style)
        axes.text(x, -0.045, count, fontsize=8.5, color=MUTED, **style)
