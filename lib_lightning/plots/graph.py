"""Figure of an interaction graph: node layers are columns, features are dots, edges are lines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.errors import SettingError
from lib_lightning.plots.animated_layout import AnimatedLayout
from lib_lightning.plots.figure import NotebookFigure
from lib_lightning.plots.layout import Band, Column, columns_by_importance, columns_by_module, inside_modules
from lib_lightning.plots.legend import DASHES, MAX_WIDTH, ROW, dot_area, draw_legend, edge_style, legend_rows
from lib_lightning.plots.lineage_series import as_array, degenerate_mask
from lib_lightning.plots.palette import (
    AGAINST,
    BETWEEN_MODULES,
    BLUE,
    DRIVES,
    MODULES,
    MUTED,
    TEXT,
    THEME,
    VERMILION,
    module_color,
    paler,
)
from lib_lightning.plots.text_metrics import DPI, fit_names, non_overlapping, percent, shorten, text_width

# Inches. With modules, there is one more line of counts below the graph.
_HEIGHT, _GRAPH_BOTTOM, _GRAPH_HEIGHT, _TITLE_OFFSET, _COUNT_LINE = 5.4, 1.269, 2.943, 0.378, 0.21
_COLUMN_WIDTH = 1.75
# Longer columns have no space for text beside the dots.
_MAX_LABELS = 16
_NAME_SIZE, _NUMBER_SIZE, _LABEL_SIZE = 13.0, 9.0, 8.5
# Points from the centre of a dot to the text beside it, and the line height of that text.
_LABEL_OFFSET, _LINE_HEIGHT = 11.0, 11.0
# Points to the right of the last column's labels, where the bands end.
_RIGHT_MARGIN = 16.0
_STROKE = [withStroke(linewidth=2.5, foreground="white")]


@dataclass(frozen=True)
class Annotations:
    """What is known about the features of a graph beyond their bases, for each node layer in forward order.

    Attributes:
        modules: The module of each feature, shape ``(r,)``, -1 for none; None if modules are not known.
        labels: A label for each feature, "" for none; None if there are none.
        lineages: The lineage of each feature, shape ``(r,)``; None for a node layer whose features are not tracked.
    """

    modules: Sequence[Tensor] | None = None
    labels: Sequence[Sequence[str]] | None = None
    lineages: Sequence[Tensor | None] | None = None


def draw_graph(
    bases: Sequence[Basis],
    edges: Sequence[Tensor],
    title: str = "Interaction graph",
    max_edges: int = 300,
    max_features: int = THEME["column"]["max_features_in_figures"],
    annotations: Annotations | None = None,
    layout: AnimatedLayout | None = None,
    attributions: Sequence[Tensor] | None = None,
) -> Figure:
    """Draw an interaction graph.

    Features whose direction the samples do not determine are hollow, if the bases have this information. The number
    beside a dot is that in the feature's id: its lineage, or its index where features are not tracked. Modules have the
    colour of their number (`module_color`), and labels are written beside the dots if there is space.

    Args:
        bases: One basis for each node layer, in forward order.
        edges: One matrix ``(r_out, r_in)`` for each pair of neighbouring node layers.
        title: Title of the figure.
        max_edges: Maximum number of edges to draw, divided equally among the sections.
        max_features: Maximum number of features to draw in a column; the most important ones are drawn.
        annotations: Modules, labels and lineages. A module is a band at the same height in all columns.
        layout: Layout of the previous graphs, updated with this one: features that it knows keep their positions. Its
            own limit replaces ``max_features``, and modules are not drawn as bands.
        attributions: One signed matrix for each of ``edges``, to draw lines by sign: in one colour where a feature
            drives the other, in another and dashed where it holds against it, and paler between modules. None to draw
            them without signs.

    Returns:
        A matplotlib figure that is not registered with pyplot, so it is freed when it is no longer referenced.

    Raises:
        SettingError: If ``layout`` is given without the lineages of all node layers.

    Example:
        >>> import torch
        >>> from lib_lightning.algorithm.basis import neuron_basis
        >>> layer = neuron_basis("fc", torch.zeros(2), torch.eye(2))
        >>> isinstance(draw_graph([layer, layer], [torch.eye(2)]), Figure)
        True
    """
    annotations = annotations or Annotations()
    modules, labels = annotations.modules, annotations.labels
    lineages = annotations.lineages or [None] * len(bases)
    bands: dict[int, Band] = {}
    if layout is not None:
        tracked = [of_layer for of_layer in lineages if of_layer is not None]
        if len(tracked) < len(bases):
            raise SettingError("layout= keeps features of the same lineage in place: annotations have no lineages.")
        columns = layout.columns(bases, tracked, edges, modules)
    elif modules is None:
        columns = columns_by_importance(bases, max_features)
    else:
        columns, bands = columns_by_module(bases, modules, max_features)
    columns = [column.with_lineages(of_layer) for column, of_layer in zip(columns, lineages, strict=True)]
    shown_labels = [_shown_labels(column, labels[x]) if labels is not None else [] for x, column in enumerate(columns)]
    hollow = [degenerate_mask(basis)[column.shown] for basis, column in zip(bases, columns, strict=True)]
    numbered = [column for column in columns if 0 < len(column.shown) <= _MAX_LABELS]
    rows = legend_rows(
        None if modules is None else sorted({m for c in columns if c.modules is not None for m in c.modules.tolist()}),
        any(mask.any() for mask in hollow),
        _meaning_of_numbers(numbered),
        attributions is not None,
    )

    figure, axes = _page(len(bases), len(rows) - 2, modules is not None, _label_overhang(shown_labels))
    figure.text(0.03, 1 - _TITLE_OFFSET / figure.get_figheight(), title, fontsize=16, fontweight="bold", color=TEXT)
    _draw_bands(axes, bands)
    for x, E in enumerate(edges):
        inside = inside_modules(E, modules[x], modules[x + 1]) if modules is not None else None
        A = None if attributions is None else as_array(attributions[x])
        _draw_section(axes, x, E, (columns[x], columns[x + 1]), max_edges // len(edges), inside, A)
    column_width = 72 * axes.bbox.width / DPI / np.ptp(axes.get_xlim())
    headings, size = fit_names(tuple(basis.name for basis in bases), column_width - 6, _NAME_SIZE, 7.0, lines=3)
    for x, (basis, column) in enumerate(zip(bases, columns, strict=True)):
        color = VERMILION if attributions is None else MUTED  # where lines have the colours of signs
        _draw_column(axes, x, basis, column, hollow[x], (headings[x], size), color, is_animated=layout is not None)
        next_column = columns[x + 1] if x + 1 < len(columns) else None
        _draw_labels(axes, x, column, shown_labels[x], next_column)
    draw_legend(figure, rows)
    return figure


def _meaning_of_numbers(numbered: Sequence[Column]) -> str:
    """What the numbers beside dots are; "" if there are none."""
    if not numbered:
        return ""
    return "ids" if any(column.lineages is not None for column in numbered) else "indices"


def _page(columns: int, extra_rows: int, module_counts: bool, overhang: float) -> tuple[Figure, Axes]:
    # TensorBoard shows images a few hundred pixels wide: a small page with a large font remains readable.
    width = _width(columns)
    bottom = extra_rows * ROW + _COUNT_LINE * module_counts
    figure = NotebookFigure(figsize=(width + overhang, _HEIGHT + bottom), dpi=DPI, facecolor="white")
    height = figure.get_figheight()
    axes = figure.add_axes((0.0, (_GRAPH_BOTTOM + bottom) / height, 1.0, _GRAPH_HEIGHT / height))
    axes.set_axis_off()
    axes.set_xlim(-0.5, columns - 0.5 + overhang / width * columns)
    axes.set_ylim(-0.02, 1.02)
    return figure, axes


def _width(columns: int) -> float:
    return max(6.4, _COLUMN_WIDTH * columns + 0.4)


def _draw_bands(axes: Axes, bands: dict[int, Band]) -> None:
    for band in bands.values():
        if 0 <= band.module < len(MODULES):
            # Bars at both ends instead of a tint: a PNG of 256 colours cannot represent many light tints.
            for start in (0.014, 0.978):
                axes.axhspan(
                    band.low, band.high, start, start + 0.008, facecolor=module_color(band.module), lw=0, zorder=0
                )


def _draw_section(
    axes: Axes,
    x: int,
    E: Tensor,
    columns: tuple[Column, Column],
    limit: int,
    inside: np.ndarray | None,
    attributions: np.ndarray | None = None,
) -> None:
    strength = as_array(E)
    before, after = columns
    grid = np.ix_(after.shown, before.shown)
    visible = strength[grid]
    total, strongest = strength.sum(), strength.max(initial=0.0)
    order = np.argsort(visible, axis=None)[::-1][:limit]
    order = order[visible.flat[order] > 1e-6 * strongest][::-1]
    i, j = np.unravel_index(order, visible.shape)
    if len(order):
        share = visible[i, j] / strongest
        ends = zip(before.heights[j], after.heights[i], strict=True)
        lines = [[(x, y), (x + 1, y_next)] for y, y_next in ends]
        rgba = np.tile([*to_rgb(BLUE), 1.0], (len(i), 1))
        # Among many edges, lines are thinner, to keep them distinguishable.
        max_width = MAX_WIDTH * min(1.0, math.sqrt(THEME["edge"]["crowd"] / len(order)))
        widths, rgba[:, 3] = edge_style(share, max_width)
        within = None if inside is None else inside[grid][i, j]
        dashed = np.zeros(len(i), dtype=bool)
        if attributions is not None:
            # Dashes as well as colours, so that signs are visible in black and white.
            dashed = attributions[grid][i, j] < 0
            rgba[:, :3] = _sign_colors(dashed, within)
            # Dashes of very thin lines are not visible as such.
            widths = np.maximum(widths, THEME["signs"]["points_min"])
            rgba[:, 3] = np.maximum(rgba[:, 3], THEME["signs"]["opacity_min"])
        elif within is not None:
            dashed = ~within
            if before.modules is not None:
                ends_in = zip(before.modules[j].tolist(), within, strict=True)
                rgba[:, :3] = [to_rgb(module_color(m) if is_in else BETWEEN_MODULES) for m, is_in in ends_in]
        # Lines between modules are drawn first, so that they do not cover edges inside modules.
        for part in (np.ones(len(i), dtype=bool),) if within is None else (~within, within):
            for ends_of, dashes in ((dashed, DASHES), (~dashed, "solid")):
                drawn = part & ends_of
                segments = [line for line, is_drawn in zip(lines, drawn, strict=True) if is_drawn]
                if segments:
                    axes.add_collection(
                        LineCollection(segments, linewidths=widths[drawn], colors=rgba[drawn], linestyles=dashes)
                    )
    covered = visible[i, j].sum() / total if total > 0 else 0.0
    counts = f"{len(order):,} of {np.count_nonzero(strength):,} edges\n{percent(covered)} of strength"
    if inside is not None:
        counts += f"\n{percent(strength[inside].sum() / total if total > 0 else 0.0)} inside modules"
    axes.text(
        x + 0.5, -0.06, counts, ha="center", va="top", fontsize=11, linespacing=1.3,
        color=BLUE if inside is None and attributions is None else MUTED,
    )  # fmt: skip


def _sign_colors(against: np.ndarray, within: np.ndarray | None) -> list[tuple[float, float, float]]:
    colors = [AGAINST if is_against else DRIVES for is_against in against]
    if within is not None:
        colors = [color if is_in else paler(color) for color, is_in in zip(colors, within, strict=True)]
    return [to_rgb(color) for color in colors]


def _draw_column(
    axes: Axes, x: int, basis: Basis, column: Column, hollow: np.ndarray, heading: tuple[str, float], color: str,
    is_animated: bool,
) -> None:  # fmt: skip
    importance = as_array(basis.importance)
    shown, heights = column.shown, column.heights
    share = importance[shown] / max(importance.max(initial=0.0), np.finfo(float).tiny)
    # Points between neighbouring dots: in a long column, dots must not merge.
    spacing = 72 * _GRAPH_HEIGHT * (-np.diff(heights)).min() if len(shown) > 1 else np.inf
    # In an animated layout there are free slots between dots, so large dots may extend beyond their own.
    area = np.minimum(dot_area(share), ((2.5 if is_animated else 1.1) * spacing) ** 2)
    if column.modules is not None:  # Gaps between bands can leave very little space.
        area = np.maximum(area, 7.0)
    colors = np.array([color] * len(shown), dtype=object)
    if column.modules is not None:
        colors[:] = [module_color(module) for module in column.modules.tolist()]
    # Small dots are drawn over large ones.
    order = np.argsort(-area, kind="stable") if is_animated else np.arange(len(shown))
    axes.scatter(
        np.full(len(shown), x), heights[order], s=area[order], zorder=3, clip_on=False,
        facecolor=list(np.where(hollow, "white", colors)[order]),
        edgecolor=list(np.where(hollow, colors, "white")[order]),
        linewidths=[1.1 if is_hollow else 0.7 for is_hollow in hollow[order]],
    )  # fmt: skip
    count = f"{len(shown)} of {len(importance)}" if len(shown) < len(importance) else f"{len(importance)}"
    features = THEME["feature_names"].get(basis.kind, f"{basis.kind} features")
    text, size = heading
    # Single lines stand on one line, with descenders or without; several grow upwards.
    align = "bottom" if "\n" in text else "baseline"
    axes.text(
        x, 1.135, text, parse_math=False, ha="center", va=align, fontsize=size, fontweight="bold", color=TEXT,
        clip_on=False, linespacing=1.0,
    )  # fmt: skip
    count_color = color if column.modules is None else MUTED
    axes.text(x, 1.055, f"{count} {features}", ha="center", fontsize=11, color=count_color, clip_on=False)


def _shown_labels(column: Column, labels: Sequence[str]) -> list[str]:
    # In a long column only the most important features, which have the lowest indices, are labelled.
    labelled = sorted(index for index in column.shown if labels[index])[:_MAX_LABELS]
    return [labels[index] if index in labelled else "" for index in column.shown]


def _label_overhang(labels: Sequence[Sequence[str]]) -> float:
    """Inches that the last column's labels extend beyond half a column width."""
    column_width = _width(len(labels)) / len(labels)
    widest = max((text_width(label, _LABEL_SIZE) for label in labels[-1]), default=0.0)
    overhang = (widest + _LABEL_OFFSET + _RIGHT_MARGIN) / 72 - column_width / 2
    return min(max(0.0, overhang), 0.5 * column_width) if widest else 0.0


def _draw_labels(axes: Axes, x: int, column: Column, labels: Sequence[str], next_column: Column | None) -> None:
    """Write the number in a feature's id to the left of its dot, and its label to the right."""
    heights, distance = column.heights, _LINE_HEIGHT / (72 * _GRAPH_HEIGHT)
    if len(column.shown) <= _MAX_LABELS:
        for k in non_overlapping(heights.tolist(), distance):
            _annotate(axes, x, heights[k], str(column.numbers[k]), _NUMBER_SIZE, left=True)
    max_width = _label_width(axes, x, next_column)
    by_importance = sorted((k for k, label in enumerate(labels) if label), key=lambda k: column.shown[k])
    for place in non_overlapping([heights[k] for k in by_importance], distance):
        k = by_importance[place]
        _annotate(axes, x, heights[k], shorten(labels[k], max_width, _LABEL_SIZE), _LABEL_SIZE, left=False)


def _label_width(axes: Axes, x: int, next_column: Column | None) -> float:
    """Points available for a label: up to the numbers of the next column, or to the edge of the page."""
    left, right = axes.get_xlim()
    column_width = axes.bbox.width * 72 / DPI / (right - left)
    if next_column is None:
        return column_width * (right - x) - _LABEL_OFFSET - _RIGHT_MARGIN + 1
    numbers = [str(number) for number in next_column.numbers] if len(next_column.shown) <= _MAX_LABELS else []
    return column_width - 2 * _LABEL_OFFSET - 6 - max((text_width(text, _NUMBER_SIZE) for text in numbers), default=0.0)


def _annotate(axes: Axes, x: int, y: float, text: str, size: float, left: bool) -> None:
    axes.annotate(
        text, (x, y), xytext=(-_LABEL_OFFSET if left else _LABEL_OFFSET, 0), textcoords="offset points",
        ha="right" if left else "left", va="center", fontsize=size, color=TEXT, zorder=4, path_effects=_STROKE,
        parse_math=False,
    )  # fmt: skip
