"""Lineages over training time, drawn as bands with their births, splits and deaths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from lib_lightning.plots.lineage_series import LayerSnapshot, LineageTable, as_array, lineage_table
from lib_lightning.plots.palette import (
    MODULES,
    MUTED,
    NO_MODULE,
    OTHER_MODULES,
    TEXT,
    label_colors,
    label_group,
    module_color,
    without_percentage,
)
from lib_lightning.plots.panels import Grid, Mark, add_legend, panels, wrap_legend
from lib_lightning.plots.steps_axis import check_snapshots, set_step_axis
from lib_lightning.plots.text_metrics import DPI, non_overlapping, shorten, text_width

_OTHERS_COLOR = "#E4E4E4"
# Share of its colour in a band that has no label yet.
_PALE = 0.35
# Inches on the right, for names.
_MARGIN = 1.0
_NAME_SIZE, _NAME_HEIGHT, _COUNT_SIZE = 8.0, 8.5, 9.5
# Points: minimum width of a band to be named.
_MIN_NAMED = 3.0
_STROKE = [withStroke(linewidth=1.6, foreground="white")]
# Shares of importance whose widths are shown beside each panel.
_SCALE_SHARES = (1.0, 0.1)


def draw_timeline(
    steps: Sequence[int],
    layers: Mapping[str, Sequence[LayerSnapshot]],
    title: str = "Features over training",
    limit: int = 40,
) -> Figure:
    """Draw the lineages of every node layer as stacked bands over training time.

    The width of a band is the square root of its feature's share of the layer's importance, so that a feature with 1%
    is a tenth as wide as one with 100%, and still visible. A higher stack means that the importance is distributed over
    more features. The order of bands is fixed, and a lineage that split from another is drawn next to it. Colours
    correspond to labels, if there are any, and otherwise to modules.

    Args:
        steps: The training step of each snapshot, in increasing order.
        layers: For each node layer, its features in each snapshot.
        title: Title of the figure.
        limit: Maximum number of lineages to draw in a panel: those with the largest share in any snapshot. The others
            are combined in one band.

    Returns:
        A matplotlib figure that is not registered with pyplot.

    Raises:
        ValueError: If a node layer has a different number of snapshots than there are steps.

    Example:
        >>> import torch
        >>> before = LayerSnapshot(torch.tensor([0]), torch.ones(1))
        >>> after = LayerSnapshot(torch.tensor([0, 1]), torch.ones(2), parents=torch.tensor([-1, 0]))
        >>> isinstance(draw_timeline([0, 10, 20], {"fc": [before, after, after]}), Figure)
        True
    """
    check_snapshots(steps, layers)
    tables = {name: lineage_table(snapshots) for name, snapshots in layers.items()}
    shown = {name: _shown(table, limit) for name, table in tables.items()}
    colors, color_legend = _colors(layers, tables, shown)
    if any(_has_labels(snapshots) for snapshots in layers.values()):
        color_legend.append((_patch(_tint(MODULES[0])), "pale: before its label"))
    marks: list[tuple[Mark, str]] = [
        (Line2D([], [], ls="", marker="^", ms=5, color=TEXT), "appears"),
        (Line2D([], [], ls="", marker="x", ms=5, color=TEXT), "last seen"),
        (Line2D([], [], lw=1.0, color=TEXT), "split from"),
        (Line2D([], [], lw=7, color=_OTHERS_COLOR, solid_capstyle="butt"), "all others"),
    ]
    if any(not _has_labels(snapshots) for snapshots in layers.values()):
        marks.append((Line2D([], [], ls="", marker="$7$", ms=6, color=TEXT), "id"))
    entries = [*wrap_legend(color_legend), marks]
    height = min(1.6, max(0.9, 7.0 / max(len(layers), 1)))
    totals = {name: len(table.ids) for name, table in tables.items()}
    counts = [
        f"{n} features in all" if n == len(shown[name]) else f"{len(shown[name])} of {n} features in all"
        for name, n in totals.items()
    ]
    counts_width = max((text_width(text, _COUNT_SIZE) for text in counts), default=0.0) + 10
    figure, all_axes = panels(
        list(layers), title, "training steps; each band is one feature, as wide as √ of its share", "features",
        len(entries), Grid(1, height, _MARGIN, share_x=True, title_margin=counts_width),
    )  # fmt: skip
    for axes, name, text in zip(all_axes, layers, counts, strict=True):
        axes.set_title(text, loc="right", y=1.0, fontsize=_COUNT_SIZE, color=MUTED)
        names = _final_names(layers[name], tables[name])
        _draw_layer(axes, steps, tables[name], shown[name], colors[name], names)
    add_legend(figure, entries)
    return figure


def _shown(table: LineageTable, limit: int) -> np.ndarray:
    """The most important lineages, from bottom to top: by birth, but each next to the lineage that it split from."""
    most = table.share.max(0, initial=0.0)
    kept = np.sort(np.argsort(-most, kind="stable")[:limit])
    order = kept[np.lexsort((-most[kept], table.first[kept]))]
    children: dict[int, list[int]] = {int(k): [] for k in order}
    roots: list[int] = []
    for k in order.tolist():
        parent = int(table.parents[k])
        (children[parent] if parent in children and parent != k else roots).append(k)
    # The latest child is next to its parent, so each lineage is next to its parent at the time of the split.
    stacked: list[int] = []
    pending = roots[::-1]
    while pending:
        k = pending.pop()
        stacked.append(k)
        pending += children[k]
    return np.array(stacked, dtype=int)


def _colors(
    layers: Mapping[str, Sequence[LayerSnapshot]], tables: Mapping[str, LineageTable], shown: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[tuple[Mark, str]]]:
    """For each node layer, the colour of each band in each snapshot, shape ``(T, n)``; and a legend of the colours."""
    # "" where a lineage is absent.
    colors = {name: np.full((len(tables[name].share), len(k)), "", dtype=object) for name, k in shown.items()}
    color_of = label_colors(_label_weights(layers))
    drawn_groups: set[str] = set()
    for name, snapshots in layers.items():
        for t, snapshot in enumerate(snapshots):
            feature = tables[name].feature[t, shown[name]]
            present = np.flatnonzero(feature >= 0)
            if color_of:
                groups = [label_group(snapshot.labels[k]) if snapshot.labels else "" for k in feature[present]]
                colors[name][t, present] = [color_of.get(group, NO_MODULE) for group in groups]
                drawn_groups.update(groups)
            elif snapshot.modules is not None:
                module = as_array(snapshot.modules)[feature[present]].astype(int)
                colors[name][t, present] = [module_color(m) for m in module.tolist()]
            else:
                colors[name][t, present] = NO_MODULE
    drawn = {name: np.where(of_layer == "", NO_MODULE, of_layer) for name, of_layer in colors.items()}
    if color_of:
        for of_layer in drawn.values():
            _tint_before_label(of_layer)
    else:
        has_modules = any(snapshot.modules is not None for layer in layers.values() for snapshot in layer)
        return drawn, _module_legend(colors, has_modules)
    shown_colors = {group: color for group, color in color_of.items() if group in drawn_groups}
    rows: list[tuple[Mark, str]] = [(_patch(color), group) for group, color in shown_colors.items() if color in MODULES]
    if others := len(shown_colors) - len(rows):
        rows.append((_patch(OTHER_MODULES), f"{others} more"))
    return drawn, [*rows, (_patch(NO_MODULE), "no label")]


def _tint_before_label(colors: np.ndarray) -> None:
    """Paint each band pale in the colour that it will have, as long as it has no label, to tell its past apart."""
    for column in colors.T:
        labelled = np.flatnonzero(column != NO_MODULE)
        if len(labelled):
            column[: labelled[0]] = _tint(column[labelled[0]])


def _tint(color: str) -> str:
    red, green, blue = to_rgb(color)
    return to_hex((1 - _PALE * (1 - red), 1 - _PALE * (1 - green), 1 - _PALE * (1 - blue)))


def _label_weights(layers: Mapping[str, Sequence[LayerSnapshot]]) -> list[dict[str, float]]:
    """For each snapshot, the importance of each group of labels, as shares of their node layers."""
    weights: list[dict[str, float]] = []
    for snapshots in zip(*layers.values(), strict=True):
        weights.append({})
        for snapshot in snapshots:
            for label, share in zip(snapshot.labels or (), snapshot.shares().tolist(), strict=False):
                group = label_group(label)
                weights[-1][group] = weights[-1].get(group, 0.0) + share
    return weights


def _module_legend(keys: Mapping[str, np.ndarray], has_modules: bool) -> list[tuple[Mark, str]]:
    if not has_modules:
        return []
    used = {color for key in keys.values() for color in np.unique(key.astype(str))}
    rows: list[tuple[Mark, str]] = []
    if patches := tuple(_patch(color) for color in MODULES if color in used):
        rows.append((patches, "modules"))
    others = [(OTHER_MODULES, "other modules"), (NO_MODULE, "no module")]
    return rows + [(_patch(color), label) for color, label in others if color in used]


def _patch(color: str) -> Line2D:
    return Line2D([], [], color=color, lw=7, solid_capstyle="butt")


def _has_labels(snapshots: Sequence[LayerSnapshot]) -> bool:
    return any(any(snapshot.labels or ()) for snapshot in snapshots)


def _final_names(snapshots: Sequence[LayerSnapshot], table: LineageTable) -> list[str]:
    """The text at the right end of each lineage: its label, or the number in its id if the layer has no labels."""
    feature = table.feature[-1] if len(table.feature) else np.arange(0)
    if not _has_labels(snapshots):
        return [str(k) for k in table.ids]
    labels = snapshots[-1].labels
    return [without_percentage(labels[int(k)]) if labels is not None and k >= 0 else "" for k in feature]


def _draw_layer(
    axes: Axes, steps: Sequence[int], table: LineageTable, shown: np.ndarray, colors: np.ndarray, names: Sequence[str]
) -> None:
    widths = np.sqrt(table.share)
    hidden = np.sqrt(np.delete(table.share, shown, axis=1).sum(1))
    # From bottom to top; the lineages that are not drawn are on top, where they do not displace the others.
    edges = np.cumsum(np.column_stack([np.zeros(len(steps)), widths[:, shown], hidden]), axis=1)
    x = np.asarray(steps, dtype=float)
    set_step_axis(axes, steps)
    axes.set_ylim(0, 1.02 * max(edges.max(initial=0.0), 1.0))
    shapes, faces = [], []
    for k, lineage in enumerate(shown):
        start, stop = max(table.first[lineage] - 1, 0), min(table.last[lineage] + 1, len(x) - 1)
        for low, high, color in _color_runs(colors[:, k], start, stop, table, lineage):
            part = slice(low, high + 1)
            outline = np.column_stack([x[part], edges[part, k]]), np.column_stack([x[part], edges[part, k + 1]])[::-1]
            shapes.append(np.concatenate(outline))
            faces.append(color)
    axes.add_collection(
        PolyCollection(shapes, facecolors=faces, edgecolors="white", linewidths=0.3, zorder=2), autolim=False
    )
    axes.fill_between(x, edges[:, -2], edges[:, -1], color=_OTHERS_COLOR, lw=0, zorder=1)
    _mark_events(axes, x, table, shown, (edges[:, :-2] + edges[:, 1:-1]) / 2)
    _draw_names(axes, table, shown, edges, colors, names)
    _draw_scale(axes)


def _color_runs(
    colors: np.ndarray, start: int, stop: int, table: LineageTable, lineage: int
) -> list[tuple[int, int, str]]:
    """Parts of a band with the same colour, each ending where the next one begins."""
    present = np.flatnonzero(table.feature[:, lineage] >= 0)
    changes = [int(t) for before, t in pairwise(present) if colors[before] != colors[t]]
    bounds = [start, *changes, stop]
    sources = [int(present[0]), *changes]
    return [
        (low, high, str(colors[source])) for low, high, source in zip(bounds[:-1], bounds[1:], sources, strict=True)
    ]


def _mark_events(axes: Axes, x: np.ndarray, table: LineageTable, shown: np.ndarray, middle: np.ndarray) -> None:
    first, last = table.first[shown], table.last[shown]
    column = np.arange(len(shown))
    born, dead = first > 0, last < len(x) - 1
    position_of = {lineage: k for k, lineage in enumerate(shown.tolist())}
    split_lines = []
    for k in column[born]:
        parent = position_of.get(int(table.parents[shown[k]]))
        if parent is not None:
            t = first[k]
            split_lines.append([(x[t - 1], middle[t - 1, parent]), (x[t], middle[t, k])])
    axes.add_collection(LineCollection(split_lines, colors=TEXT, linewidths=0.8, zorder=3), autolim=False)
    for marker, t, which in (("^", first, born), ("x", last, dead)):
        axes.scatter(
            x[t[which]], middle[t[which], column[which]], marker=marker, s=11, c=TEXT, zorder=4, clip_on=False,
            linewidths=0.0 if marker == "^" else 0.9,
        )  # fmt: skip


def _draw_names(
    axes: Axes, table: LineageTable, shown: np.ndarray, edges: np.ndarray, colors: np.ndarray, names: Sequence[str]
) -> None:
    """Write names to the right of the bands, where there is space; wider bands have priority."""
    points = 72 * axes.bbox.height / DPI / np.ptp(axes.get_ylim())
    widths, middle = np.diff(edges[-1]) * points, (edges[-1, :-1] + edges[-1, 1:]) / 2
    alive = table.last[shown] == len(edges) - 1
    candidates = [k for k in np.argsort(-widths[:-1], kind="stable") if alive[k] and widths[k] >= _MIN_NAMED]
    candidates = [k for k in candidates if names[shown[k]]]
    for position in non_overlapping([middle[k] for k in candidates], _NAME_HEIGHT / points):
        k = candidates[position]
        axes.annotate(
            shorten(names[shown[k]], 72 * _MARGIN - 10, _NAME_SIZE), (axes.get_xlim()[1], middle[k]), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=_NAME_SIZE, color=str(colors[-1, k]),
            annotation_clip=False, parse_math=False,
        )  # fmt: skip


def _draw_scale(axes: Axes) -> None:
    """Draw a scale of band widths on the left."""
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    across, x, low = axes.get_yaxis_transform(), -0.018, 0.0
    line = 10 * DPI / 72 * np.ptp(axes.get_ylim()) / axes.bbox.height
    for share in _SCALE_SHARES:
        high = low + np.sqrt(share)
        if high > axes.get_ylim()[1]:  # it would grow into the panel above
            break
        axes.plot([x, x], [low, high], transform=across, color=MUTED, lw=2.2, solid_capstyle="butt", clip_on=False)
        axes.text(
            x - 0.012, (low + high) / 2, f"{share:.0%}", transform=across, ha="right", va="center", fontsize=8,
            color=MUTED,
        )  # fmt: skip
        # Keep the labels non_overlapping even if the bars are shorter than the text.
        low = max(high + 0.3 * line, (low + high) / 2 + line)
