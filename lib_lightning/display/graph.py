"""The interaction graph as a figure: node layers as columns, features as dots, interactions as lines."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from torch import Tensor

from lib_lightning.core.basis import Basis

# Blue lines and vermilion dots of the palette of Okabe and Ito: told apart under every common colour blindness.
_LINE, _DOT, _TEXT, _MUTED = "#0072B2", "#D55E00", "#222222", "#666666"
_HEIGHT, _AXES_BOTTOM, _AXES_HEIGHT = 5.4, 0.235, 0.545
_KIND_NAMES = {"lib": "features", "pca": "PCA features", "neuron": "neurons"}


def draw_graph(
    bases: Sequence[Basis],
    edges: Sequence[Tensor],
    title: str = "Interaction graph",
    max_edges: int = 300,
    max_features: int = 40,
) -> Figure:
    """Draw an interaction graph.

    Args:
        bases: One basis for each node layer, in forward order.
        edges: One matrix ``(r_out, r_in)`` for each pair of neighbouring node layers.
        title: Title of the figure.
        max_edges: Most edges to draw, shared equally among the sections.
        max_features: Most features to draw in a column, the most important ones.

    Returns:
        A matplotlib figure that pyplot does not know of, so that nothing is kept when it is dropped.

    Example:
        >>> import torch
        >>> from lib_lightning.core.basis import neuron_basis
        >>> layer = neuron_basis("fc", torch.zeros(2), torch.eye(2))
        >>> type(draw_graph([layer, layer], [torch.eye(2)])).__name__
        'Figure'
    """
    columns = len(bases)
    # TensorBoard shows images a few hundred pixels wide: a small page with large letters stays readable there.
    figure = Figure(figsize=(max(6.4, 1.75 * columns + 0.4), _HEIGHT), dpi=140, facecolor="white")
    axes = figure.add_axes((0.0, _AXES_BOTTOM, 1.0, _AXES_HEIGHT))
    axes.set_axis_off()
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(-0.02, 1.02)

    shown = [_most_important(basis, max_features) for basis in bases]
    heights = [_heights(len(index)) for index in shown]
    for x, E in enumerate(edges):
        _draw_section(axes, x, E, (shown[x], shown[x + 1]), (heights[x], heights[x + 1]), max_edges // len(edges))
    for x, basis in enumerate(bases):
        _draw_column(axes, x, basis, shown[x], heights[x])

    figure.text(0.03, 0.93, title, fontsize=16, fontweight="bold", color=_TEXT)
    _legend(figure)
    return figure


def _most_important(basis: Basis, limit: int) -> np.ndarray:
    order = basis.importance.argsort(descending=True, stable=True)[:limit]
    return np.asarray(order.sort().values if basis.kind == "neuron" else order)


def _heights(count: int) -> np.ndarray:
    # A short column keeps the spacing of a column of twelve, around the middle, instead of spreading to the rims.
    span = min(1.0, max(count - 1, 0) / 11)
    return np.linspace(0.5 + span / 2, 0.5 - span / 2, count) if count > 1 else np.full(count, 0.5)


def _draw_section(
    axes: Axes,
    x: int,
    E: Tensor,
    shown: tuple[np.ndarray, np.ndarray],
    heights: tuple[np.ndarray, np.ndarray],
    limit: int,
) -> None:
    strength = E.detach().cpu().double().numpy()
    before, after = shown
    visible = strength[np.ix_(after, before)]
    total, strongest = strength.sum(), strength.max(initial=0.0)
    order = np.argsort(visible, axis=None)[::-1][:limit]
    order = order[visible.flat[order] > 1e-6 * strongest][::-1]
    if len(order):
        i, j = np.unravel_index(order, visible.shape)
        share = np.sqrt(visible[i, j] / strongest)
        lines = [[(x, y), (x + 1, y_next)] for y, y_next in zip(heights[0][j], heights[1][i], strict=True)]
        colors = np.tile([0.0, 0.447, 0.698, 1.0], (len(i), 1))
        colors[:, 3] = 0.06 + 0.84 * share
        # In a crowd the same widths would run into one block.
        widest = 4.0 * min(1.0, math.sqrt(40 / len(order)))
        widths = widest * (0.1 + 0.9 * share)
        axes.add_collection(LineCollection(lines, linewidths=widths, colors=colors))
    covered = visible[np.unravel_index(order, visible.shape)].sum() / total if total > 0 else 0.0
    axes.text(
        x + 0.5, -0.06, f"{len(order):,} of {strength.size:,} edges\n{_percent(covered)} of strength",
        ha="center", va="top", fontsize=11, color=_LINE, linespacing=1.3,
    )  # fmt: skip


def _draw_column(axes: Axes, x: int, basis: Basis, shown: np.ndarray, heights: np.ndarray) -> None:
    importance = basis.importance.detach().cpu().double().numpy()
    share = importance[shown] / max(importance.max(initial=0.0), np.finfo(float).tiny)
    # Points between neighbouring dots, so that a long column stays a row of dots.
    spacing = 72 * _HEIGHT * _AXES_HEIGHT * (heights[0] - heights[1]) if len(shown) > 1 else np.inf
    area = np.minimum(_dot_area(share), (1.1 * spacing) ** 2)
    axes.scatter(
        np.full(len(shown), x), heights, s=area, color=_DOT, edgecolor="white", lw=0.7, zorder=3, clip_on=False
    )
    for index, y in list(zip(shown, heights, strict=True)) if len(shown) <= 16 else []:
        axes.annotate(
            str(index), (x, y), xytext=(-11, 0), textcoords="offset points", ha="right", va="center",
            fontsize=9, color=_TEXT, zorder=4, path_effects=[withStroke(linewidth=2.5, foreground="white")],
        )  # fmt: skip
    of = f"{len(shown)} of {len(importance)}" if len(shown) < len(importance) else f"{len(importance)}"
    features = _KIND_NAMES[basis.kind]
    axes.text(
        x,
        1.135,
        basis.name,
        parse_math=False,
        ha="center",
        fontsize=_fitting_size(basis.name),
        fontweight="bold",
        color=_TEXT,
        clip_on=False,
    )
    axes.text(x, 1.055, f"{of} {features}", ha="center", fontsize=11, color=_DOT, clip_on=False)


def _dot_area(share: np.ndarray | float) -> np.ndarray:
    # Importances span many decades: area goes with the square root, from a speck up.
    return np.asarray(12 + 230 * np.sqrt(share))


def _fitting_size(name: str) -> float:
    # About 17 bold letters of size 13 fit between two columns.
    return min(13.0, max(7.0, 13.0 * 17 / max(len(name), 1)))


def _legend(figure: Figure) -> None:
    dots = [
        Line2D([], [], ls="", marker="o", color=_DOT, markeredgecolor="white", ms=math.sqrt(float(_dot_area(share))))
        for share in (1.0, 0.1, 0.001)
    ]
    lines = [
        Line2D([], [], color=_LINE, lw=0.4 + 3.6 * math.sqrt(s), alpha=0.06 + 0.84 * math.sqrt(s))
        for s in (1, 0.1, 0.01)
    ]
    keys = (
        (0.06, "dots: importance, as a share of the layer's largest", dots, ["1", "0.1", "0.001"]),
        (0.0, "lines: strength, as a share of the section's largest", lines, ["1", "0.1", "0.01"]),
    )
    for y, meaning, handles, labels in keys:
        figure.text(0.03, y + 0.024, meaning, fontsize=10.5, color=_MUTED)
        figure.legend(
            handles, labels, loc="lower right", bbox_to_anchor=(0.99, y), ncols=3, frameon=False, fontsize=10.5,
            labelcolor=_MUTED, handletextpad=0.5, columnspacing=1.2,
        )  # fmt: skip


def _percent(share: float) -> str:
    # "100%" is said only where nothing that matters is left out.
    return f"{100 * share:.0f}%" if share < 0.995 or share > 0.9999 else f"{math.floor(1000 * share) / 10:g}%"
