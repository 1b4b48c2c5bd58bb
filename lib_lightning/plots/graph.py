"""The interaction graph as a figure: node layers as columns, features as dots, interactions as lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.plots.animated_layout import AnimatedLayout
from lib_lightning.plots.layout import Band, Column, banded_columns, columns_of, inside_modules
from lib_lightning.plots.legend import DASHES, ROW, dot_area, draw_legend, legend_rows
from lib_lightning.plots.palette import BLUE, MODULES, MUTED, TEXT, VERMILION
from lib_lightning.plots.text_metrics import DPI, percent, shorten, shorten_front, width_of

# Inches. With modules there is one more line of counts below the graph.
_HEIGHT, _GRAPH_BOTTOM, _GRAPH_HEIGHT, _TITLE_BELOW_TOP, _COUNT_LINE = 5.4, 1.269, 2.943, 0.378, 0.21
_PITCH = 1.75
_KIND_NAMES = {"lib": "features", "pca": "PCA features", "neuron": "neurons", "centered": "neurons, centred"}
# A longer column has no room for words beside its dots.
_MOST_LABELS = 16
_INDEX_SIZE, _LABEL_SIZE = 9.0, 8.5
# Points from the middle of a dot to the words beside it, and the height of a line of them.
_BESIDE, _LINE_HEIGHT = 11.0, 11.0
# Points kept free at the right of the last column's names, where the bands end.
_RIM = 16.0
_STROKE = [withStroke(linewidth=2.5, foreground="white")]


def draw_graph(
    bases: Sequence[Basis],
    edges: Sequence[Tensor],
    title: str = "Interaction graph",
    max_edges: int = 300,
    max_features: int = 40,
    modules: Sequence[Tensor] | None = None,
    labels: Sequence[Sequence[str]] | None = None,
    lineages: Sequence[Tensor] | None = None,
    layout: AnimatedLayout | None = None,
) -> Figure:
    """Draw an interaction graph.

    Features whose direction the samples do not fix are hollow, where the bases know them.

    Args:
        bases: One basis for each node layer, in forward order.
        edges: One matrix ``(r_out, r_in)`` for each pair of neighbouring node layers.
        title: Title of the figure.
        max_edges: Most edges to draw, shared equally among the sections.
        max_features: Most features to draw in a column, the most important ones.
        modules: For each node layer the module of each feature, shape ``(r,)``, -1 for none: they become bands at one
            height in all columns. Those with most features have colours of their own.
        labels: For each node layer a name for each feature, "" for none, written beside the dots where there is room.
        lineages: For each node layer the lineage of each feature, shape ``(r,)``; required with ``layout``.
        layout: Layout of the previous graphs, updated with this one: features and modules that it knows keep their
            positions and colours. Its own limit replaces ``max_features``, and modules are not drawn as bands.

    Returns:
        A matplotlib figure that pyplot does not know of, so that nothing is kept when it is dropped.

    Raises:
        ValueError: If ``layout`` is given without ``lineages``.

    Example:
        >>> import torch
        >>> from lib_lightning.algorithm.basis import neuron_basis
        >>> layer = neuron_basis("fc", torch.zeros(2), torch.eye(2))
        >>> type(draw_graph([layer, layer], [torch.eye(2)])).__name__
        'Figure'
    """
    bands: dict[int, Band] = {}
    colors: dict[int, str] | None = None
    if layout is not None:
        if lineages is None:
            raise ValueError("layout= keeps features of the same lineage in place: lineages= is missing.")
        columns, colors = layout.columns(bases, lineages, edges, modules)
    elif modules is None:
        columns = columns_of(bases, max_features)
    else:
        columns, bands = banded_columns(bases, modules, max_features)
        colors = {module: band.color for module, band in bands.items()}
    names = [_names_shown(column, labels[x]) if labels is not None else [] for x, column in enumerate(columns)]
    unsure = [_unsure(basis)[column.shown] for basis, column in zip(bases, columns, strict=True)]
    rows = legend_rows(
        colors,
        any(hollow.any() for hollow in unsure),
        any(column.numbers is not None and 0 < len(column.shown) <= _MOST_LABELS for column in columns),
    )

    figure, axes = _page(len(bases), len(rows) - 2, colors is not None, _overhang(names))
    figure.text(0.03, 1 - _TITLE_BELOW_TOP / figure.get_figheight(), title, fontsize=16, fontweight="bold", color=TEXT)
    _draw_bands(axes, bands)
    for x, E in enumerate(edges):
        inside = inside_modules(E, modules[x], modules[x + 1]) if modules is not None else None
        _draw_section(axes, x, E, (columns[x], columns[x + 1]), max_edges // len(edges), inside, colors or {})
    for x, (basis, column) in enumerate(zip(bases, columns, strict=True)):
        _draw_column(axes, x, basis, column, unsure[x], colors)
        beyond = columns[x + 1] if x + 1 < len(columns) else None
        _write_names(axes, x, column, names[x], beyond)
    draw_legend(figure, rows)
    return figure


def _page(columns: int, more_rows: int, counts_inside: bool, overhang: float) -> tuple[Figure, Axes]:
    # TensorBoard shows images a few hundred pixels wide: a small page with large letters stays readable there.
    width = _width(columns)
    foot = more_rows * ROW + _COUNT_LINE * counts_inside
    figure = Figure(figsize=(width + overhang, _HEIGHT + foot), dpi=DPI, facecolor="white")
    height = figure.get_figheight()
    axes = figure.add_axes((0.0, (_GRAPH_BOTTOM + foot) / height, 1.0, _GRAPH_HEIGHT / height))
    axes.set_axis_off()
    axes.set_xlim(-0.5, columns - 0.5 + overhang / width * columns)
    axes.set_ylim(-0.02, 1.02)
    return figure, axes


def _width(columns: int) -> float:
    return max(6.4, _PITCH * columns + 0.4)


def _unsure(basis: Basis) -> np.ndarray:
    if basis.unsure is None:
        return np.zeros(basis.n_features, dtype=bool)
    return np.asarray(basis.unsure.detach().cpu())


def _draw_bands(axes: Axes, bands: dict[int, Band]) -> None:
    for band in bands.values():
        if band.color in MODULES:
            # Bars at both ends, not tints all over: the palette of a small PNG has no room for colours so light.
            for start in (0.014, 0.978):
                axes.axhspan(band.low, band.high, start, start + 0.008, facecolor=band.color, lw=0, zorder=0)


def _draw_section(
    axes: Axes,
    x: int,
    E: Tensor,
    columns: tuple[Column, Column],
    limit: int,
    inside: np.ndarray | None,
    colors: Mapping[int, str],
) -> None:
    strength = E.detach().cpu().double().numpy()
    before, after = columns
    grid = np.ix_(after.shown, before.shown)
    visible = strength[grid]
    total, strongest = strength.sum(), strength.max(initial=0.0)
    order = np.argsort(visible, axis=None)[::-1][:limit]
    order = order[visible.flat[order] > 1e-6 * strongest][::-1]
    i, j = np.unravel_index(order, visible.shape)
    if len(order):
        share = np.sqrt(visible[i, j] / strongest)
        ends = zip(before.heights[j], after.heights[i], strict=True)
        lines = [[(x, y), (x + 1, y_next)] for y, y_next in ends]
        rgba = np.tile([*to_rgb(BLUE), 1.0], (len(i), 1))
        rgba[:, 3] = 0.06 + 0.84 * share
        # In a crowd the same widths would run into one block.
        widest = 4.0 * min(1.0, math.sqrt(40 / len(order)))
        widths = widest * (0.1 + 0.9 * share)
        if inside is None:
            axes.add_collection(LineCollection(lines, linewidths=widths, colors=rgba))
        else:
            within = inside[grid][i, j]
            if before.modules is not None:
                own = [colors[m] if w else MUTED for m, w in zip(before.modules[j], within, strict=True)]
                rgba[:, :3] = [to_rgb(color) for color in own]
            # Dashes below, so that they never hide what holds a module together.
            for part, dashes in ((~within, DASHES), (within, "solid")):
                some = [line for line, drawn in zip(lines, part, strict=True) if drawn]
                axes.add_collection(LineCollection(some, linewidths=widths[part], colors=rgba[part], linestyles=dashes))
    covered = visible[i, j].sum() / total if total > 0 else 0.0
    counts = f"{len(order):,} of {strength.size:,} edges\n{percent(covered)} of strength"
    if inside is not None:
        counts += f"\n{percent(strength[inside].sum() / total if total > 0 else 0.0)} inside modules"
    axes.text(
        x + 0.5, -0.06, counts, ha="center", va="top", fontsize=11, color=BLUE if inside is None else MUTED,
        linespacing=1.3,
    )  # fmt: skip


def _draw_column(
    axes: Axes, x: int, basis: Basis, column: Column, unsure: np.ndarray, colors: Mapping[int, str] | None
) -> None:
    importance = basis.importance.detach().cpu().double().numpy()
    shown, heights = column.shown, column.heights
    share = importance[shown] / max(importance.max(initial=0.0), np.finfo(float).tiny)
    # Points between neighbouring dots, so that a long column stays a row of dots.
    spacing = 72 * _GRAPH_HEIGHT * (-np.diff(heights)).min() if len(shown) > 1 else np.inf
    # In a film there are free places between them, and large dots may reach beyond their own.
    area = np.minimum(dot_area(share), ((1.1 if column.numbers is None else 2.5) * spacing) ** 2)
    if colors is not None:  # Gaps between bands can leave very little to a dot.
        area = np.maximum(area, 7.0)
    color = np.array([VERMILION] * len(shown), dtype=object)
    if colors is not None and column.modules is not None:
        color[:] = [colors[module] for module in column.modules]
    # Small dots on large ones.
    order = np.argsort(-area, kind="stable") if column.numbers is not None else np.arange(len(shown))
    axes.scatter(
        np.full(len(shown), x), heights[order], s=area[order], zorder=3, clip_on=False,
        facecolor=list(np.where(unsure, "white", color)[order]),
        edgecolor=list(np.where(unsure, color, "white")[order]),
        linewidths=[1.1 if hollow else 0.7 for hollow in unsure[order]],
    )  # fmt: skip
    of = f"{len(shown)} of {len(importance)}" if len(shown) < len(importance) else f"{len(importance)}"
    features = _KIND_NAMES[basis.kind]
    name, size = _fitting_name(basis.name, 72 * axes.bbox.width / DPI / np.ptp(axes.get_xlim()) - 3)
    axes.text(
        x, 1.135, name, parse_math=False, ha="center", fontsize=size, fontweight="bold", color=TEXT, clip_on=False
    )  # fmt: skip
    counted = VERMILION if colors is None else MUTED
    axes.text(x, 1.055, f"{of} {features}", ha="center", fontsize=11, color=counted, clip_on=False)


def _names_shown(column: Column, labels: Sequence[str]) -> list[str]:
    names = [labels[index] for index in column.shown]
    # Features count from the most important one: in a long column the first have names, the rest no room.
    named = sorted(index for index in column.shown if labels[index])[:_MOST_LABELS]
    return [name if index in named else "" for index, name in zip(column.shown, names, strict=True)]


def _overhang(names: Sequence[Sequence[str]]) -> float:
    """Inches that the last column's names need beyond its half of a pitch."""
    pitch = _width(len(names)) / len(names)
    widest = max((width_of(name, _LABEL_SIZE) for name in names[-1]), default=0.0)
    return min(max(0.0, (widest + _BESIDE + _RIM) / 72 - pitch / 2), 0.5 * pitch) if widest else 0.0


def _write_names(axes: Axes, x: int, column: Column, names: Sequence[str], beyond: Column | None) -> None:
    """Write the index of a feature on the left of its dot and its name on the right."""
    if len(column.shown) <= _MOST_LABELS:
        for k in _apart(column.heights):
            _beside(axes, x, column.heights[k], str(column.called[k]), _INDEX_SIZE, left=True)
    room = _room(axes, x, beyond)
    written: list[float] = []
    for k in sorted((k for k, name in enumerate(names) if name), key=lambda k: column.shown[k]):
        height = column.heights[k]
        if all(72 * _GRAPH_HEIGHT * abs(height - other) >= _LINE_HEIGHT for other in written):
            written.append(height)
            _beside(axes, x, height, shorten(names[k], room, _LABEL_SIZE), _LABEL_SIZE, left=False)


def _room(axes: Axes, x: int, beyond: Column | None) -> float:
    """Points from where a name begins to where the next column's indices begin, or to the rim of the page."""
    left, right = axes.get_xlim()
    pitch = axes.bbox.width * 72 / DPI / (right - left)
    if beyond is None:
        return pitch * (right - x) - _BESIDE - _RIM + 1
    indices = [str(number) for number in beyond.called] if len(beyond.shown) <= _MOST_LABELS else []
    return pitch - 2 * _BESIDE - 6 - max((width_of(index, _INDEX_SIZE) for index in indices), default=0.0)


def _apart(heights: np.ndarray) -> list[int]:
    """Places, from the top down, between which there is room for lines of text."""
    kept: list[int] = []
    for k, height in enumerate(heights):
        if not kept or 72 * _GRAPH_HEIGHT * (heights[kept[-1]] - height) >= _LINE_HEIGHT:
            kept.append(k)
    return kept


def _beside(axes: Axes, x: int, y: float, text: str, size: float, left: bool) -> None:
    axes.annotate(
        text, (x, y), xytext=(-_BESIDE if left else _BESIDE, 0), textcoords="offset points",
        ha="right" if left else "left", va="center", fontsize=size, color=TEXT, zorder=4, path_effects=_STROKE,
        parse_math=False,
    )  # fmt: skip


def _fitting_name(name: str, room: float) -> tuple[str, float]:
    """Make the name of a node layer as wide as its column; what tells layers apart is often at the end."""
    # About 17 bold letters of size 13 fit between two columns.
    size = min(13.0, max(7.0, 13.0 * 17 / max(len(name), 1)))
    width = width_of(name, size, "bold")
    size = max(min(size, 7.0), size * min(1.0, room / max(width, 1.0)))
    return shorten_front(name, room, size, "bold"), size
