"""Features over training time: lineages as bands, with their births, splits and deaths."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from lib_lightning.plots.lineage_series import LayerSnapshot, LineageTable, as_array, lineage_table
from lib_lightning.plots.module_colors import ModuleColors
from lib_lightning.plots.palette import MODULES, MUTED, NO_MODULE, OTHER_MODULES, TEXT
from lib_lightning.plots.panels import Grid, Mark, add_entries, in_rows, panels
from lib_lightning.plots.steps_axis import check_snapshots, set_steps
from lib_lightning.plots.text_metrics import DPI, apart, shorten

_OTHERS = "#E4E4E4"
# Inches at the right, for names.
_MARGIN = 1.0
_NAME_SIZE, _NAME_HEIGHT = 8.0, 8.5
# A band at least this wide has a name, in points.
_LEAST_NAMED = 3.0
_STROKE = [withStroke(linewidth=1.6, foreground="white")]
# Shares whose widths are shown beside each panel.
_SCALE = (1.0, 0.1)


def draw_timeline(
    steps: Sequence[int],
    layers: Mapping[str, Sequence[LayerSnapshot]],
    title: str = "Features over training",
    limit: int = 40,
) -> Figure:
    """Draw the lineages of every node layer as bands that lie on each other, from snapshot to snapshot.

    A band is as wide as the square root of the share that its feature has in the sum of importances: a feature with 1%
    is a tenth as wide as one with all, and can be seen beside it. A high stack is one of many features that share the
    importance. Bands keep their order, and those that split from another one lie on it. Where features have names,
    colours go by these, otherwise by modules.

    Args:
        steps: The training step of each snapshot, rising.
        layers: For each node layer its features in each snapshot.
        title: Title of the figure.
        limit: Most lineages to draw in a panel, those with the largest share ever; the others are one band.

    Returns:
        A matplotlib figure that pyplot does not know of.

    Raises:
        ValueError: If a node layer has another number of snapshots than there are steps.

    Example:
        >>> import torch
        >>> before = LayerSnapshot(torch.tensor([0]), torch.ones(1))
        >>> after = LayerSnapshot(torch.tensor([0, 1]), torch.ones(2), parents=torch.tensor([-1, 0]))
        >>> type(draw_timeline([0, 10, 20], {"fc": [before, after, after]})).__name__
        'Figure'
    """
    check_snapshots(steps, layers)
    lives = {name: lineage_table(moments) for name, moments in layers.items()}
    shown = {name: _shown(of_layer, limit) for name, of_layer in lives.items()}
    colors, meaning = _colors(layers, lives, shown)
    marks: list[tuple[Mark, str]] = [
        (Line2D([], [], ls="", marker="^", ms=5, color=TEXT), "appears"),
        (Line2D([], [], ls="", marker="x", ms=5, color=TEXT), "gone after"),
        (Line2D([], [], lw=1.0, color=TEXT), "split from"),
        (Line2D([], [], lw=7, color=_OTHERS, solid_capstyle="butt"), "all others"),
    ]
    entries = [*in_rows(meaning), marks]
    height = min(1.6, max(0.9, 7.0 / max(len(layers), 1)))
    figure, all_axes = panels(
        list(layers), title, "training steps; a band is as wide as the √ of its share of importance", "features",
        len(entries), Grid(1, height, _MARGIN, one_below_another=True),
    )  # fmt: skip
    for axes, name in zip(all_axes, layers, strict=True):
        names = _last_names(layers[name], lives[name])
        _draw_layer(axes, steps, lives[name], shown[name], colors[name], names)
    add_entries(figure, entries)
    return figure


def _shown(lives: LineageTable, limit: int) -> np.ndarray:
    """The most important lineages, from the bottom up: by birth, but each beside the one that it has split from."""
    most = lives.share.max(0, initial=0.0)
    kept = np.sort(np.argsort(-most, kind="stable")[:limit])
    order = kept[np.lexsort((-most[kept], lives.first[kept]))]
    children: dict[int, list[int]] = {int(k): [] for k in order}
    roots: list[int] = []
    for k in order.tolist():
        parent = int(lives.parents[k])
        (children[parent] if parent in children and parent != k else roots).append(k)
    # The latest child lies next to its parent, so that each has come to lie there when it was born.
    stacked: list[int] = []
    waiting = roots[::-1]
    while waiting:
        k = waiting.pop()
        stacked.append(k)
        waiting += children[k]
    return np.array(stacked, dtype=int)


def _colors(
    layers: Mapping[str, Sequence[LayerSnapshot]], lives: Mapping[str, LineageTable], shown: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], list[tuple[Mark, str]]]:
    """For each node layer the colour of each band in each snapshot, shape ``(T, n)``, and what the colours mean."""
    keys = {name: np.full((len(lives[name].share), len(index)), "", dtype=object) for name, index in shown.items()}
    named = any(label for moments in layers.values() for moment in moments for label in moment.labels or ())
    of_modules = ModuleColors()
    for t in range(len(next(iter(keys.values()), []))):
        now = {name: moments[t] for name, moments in layers.items()}
        found = {} if named else of_modules.update(now)
        for name, moment in now.items():
            place = lives[name].place[t, shown[name]]
            there = np.flatnonzero(place >= 0)
            if named and moment.labels is not None:
                keys[name][t, there] = [_theme(moment.labels[k]) for k in place[there]]
            elif moment.modules is not None and not named:
                module = as_array(moment.modules)[place[there]]
                keys[name][t, there] = [found[int(m)] for m in module]
    if not named:
        has_modules = any(moment.modules is not None for moments in layers.values() for moment in moments)
        return {name: np.where(key == "", NO_MODULE, key) for name, key in keys.items()}, _meaning_of_modules(
            keys, has_modules
        )
    weights: dict[str, float] = {}
    for name, key in keys.items():
        share = lives[name].share[:, shown[name]]
        for theme in np.unique(key.astype(str)):
            weights[theme] = weights.get(theme, 0.0) + float(share[key == theme].sum())
    ranked = sorted((theme for theme in weights if theme), key=lambda theme: -weights[theme])
    palette = {"": NO_MODULE} | dict(zip(ranked, (*MODULES, *[OTHER_MODULES] * len(ranked)), strict=False))
    rows: list[tuple[Mark, str]] = [(_patch(color), theme) for theme, color in palette.items() if color in MODULES]
    if len(ranked) > len(MODULES):
        rows.append((_patch(OTHER_MODULES), f"{len(ranked) - len(MODULES)} more"))
    colors = {
        name: np.array([[palette[k] for k in row] for row in key], dtype=object).reshape(key.shape)
        for name, key in keys.items()
    }
    return colors, [*rows, (_patch(NO_MODULE), "no name")]


def _meaning_of_modules(keys: Mapping[str, np.ndarray], has_modules: bool) -> list[tuple[Mark, str]]:
    if not has_modules:
        return []
    used = {color for key in keys.values() for color in np.unique(key.astype(str))}
    rows: list[tuple[Mark, str]] = []
    if own := tuple(_patch(color) for color in MODULES if color in used):
        rows.append((own, "modules"))
    others = [(OTHER_MODULES, "smaller ones"), (NO_MODULE, "in none")]
    return rows + [(_patch(color), meaning) for color, meaning in others if color in used]


def _patch(color: str) -> Line2D:
    return Line2D([], [], color=color, lw=7, solid_capstyle="butt")


@cache
def _theme(label: str) -> str:
    """What a name is about: its beginning, where that sets something (k=17 a+b), or else all but a percentage."""
    match = re.match(r"\S+=\S+", label)
    return match.group() if match else _without_percentage(label)


def _without_percentage(label: str) -> str:
    return re.sub(r"\s*\d+(\.\d+)?%$", "", label)


def _last_names(moments: Sequence[LayerSnapshot], lives: LineageTable) -> list[str]:
    """What is written at the end of each lineage that is there: its name, or its number."""
    place = lives.place[-1] if len(lives.place) else np.arange(0)
    if not any(any(moment.labels or ()) for moment in moments):
        return [str(k) for k in lives.ids]
    labels = moments[-1].labels
    return [_without_percentage(labels[int(k)]) if labels is not None and k >= 0 else "" for k in place]


def _draw_layer(
    axes: Axes, steps: Sequence[int], lives: LineageTable, shown: np.ndarray, colors: np.ndarray, names: Sequence[str]
) -> None:
    widths = np.sqrt(lives.share)
    hidden = np.sqrt(np.delete(lives.share, shown, axis=1).sum(1))
    # From the bottom up; what is left out lies on top, where it moves nothing.
    rims = np.cumsum(np.column_stack([np.zeros(len(steps)), widths[:, shown], hidden]), axis=1)
    x = np.asarray(steps, dtype=float)
    set_steps(axes, steps)
    axes.set_ylim(0, 1.02 * max(rims.max(initial=0.0), 1.0))
    shapes, faces = [], []
    for k, lineage in enumerate(shown):
        start, stop = max(lives.first[lineage] - 1, 0), min(lives.last[lineage] + 1, len(x) - 1)
        for low, high, color in _runs(colors[:, k], start, stop, lives, lineage):
            part = slice(low, high + 1)
            there = np.column_stack([x[part], rims[part, k]]), np.column_stack([x[part], rims[part, k + 1]])[::-1]
            shapes.append(np.concatenate(there))
            faces.append(color)
    axes.add_collection(
        PolyCollection(shapes, facecolors=faces, edgecolors="white", linewidths=0.3, zorder=2), autolim=False
    )
    axes.fill_between(x, rims[:, -2], rims[:, -1], color=_OTHERS, lw=0, zorder=1)
    _mark_events(axes, x, lives, shown, (rims[:, :-2] + rims[:, 1:-1]) / 2)
    _write_names(axes, lives, shown, rims, colors, names)
    _draw_scale(axes)
    left_out = len(lives.ids) - len(shown)
    counts = f"{len(shown)} of {len(lives.ids)} lineages" if left_out else f"{len(lives.ids)} lineages"
    axes.set_title(counts, loc="right", y=1.0, fontsize=9.5, color=MUTED)


def _runs(colors: np.ndarray, start: int, stop: int, lives: LineageTable, lineage: int) -> list[tuple[int, int, str]]:
    """Parts of a band that have one colour, each up to where the next one begins."""
    there = np.flatnonzero(lives.place[:, lineage] >= 0)
    changes = [int(t) for before, t in pairwise(there) if colors[before] != colors[t]]
    bounds = [start, *changes, stop]
    owners = [int(there[0]), *changes]
    return [(low, high, str(colors[owner])) for low, high, owner in zip(bounds[:-1], bounds[1:], owners, strict=True)]


def _mark_events(axes: Axes, x: np.ndarray, lives: LineageTable, shown: np.ndarray, middle: np.ndarray) -> None:
    first, last = lives.first[shown], lives.last[shown]
    column = np.arange(len(shown))
    born, dead = first > 0, last < len(x) - 1
    where = {lineage: k for k, lineage in enumerate(shown.tolist())}
    links = []
    for k in column[born]:
        parent = where.get(int(lives.parents[shown[k]]))
        if parent is not None:
            t = first[k]
            links.append([(x[t - 1], middle[t - 1, parent]), (x[t], middle[t, k])])
    axes.add_collection(LineCollection(links, colors=TEXT, linewidths=0.8, zorder=3), autolim=False)
    for marker, t, which in (("^", first, born), ("x", last, dead)):
        axes.scatter(
            x[t[which]], middle[t[which], column[which]], marker=marker, s=11, c=TEXT, zorder=4, clip_on=False,
            linewidths=0.0 if marker == "^" else 0.9,
        )  # fmt: skip


def _write_names(
    axes: Axes, lives: LineageTable, shown: np.ndarray, rims: np.ndarray, colors: np.ndarray, names: Sequence[str]
) -> None:
    """Write names at the right of the bands, the widest first, as far as there is room."""
    points = 72 * axes.bbox.height / DPI / np.ptp(axes.get_ylim())
    widths, middle = np.diff(rims[-1]) * points, (rims[-1, :-1] + rims[-1, 1:]) / 2
    alive = lives.last[shown] == len(rims) - 1
    wanted = [k for k in np.argsort(-widths[:-1], kind="stable") if alive[k] and widths[k] >= _LEAST_NAMED]
    wanted = [k for k in wanted if names[shown[k]]]
    for place in apart([middle[k] for k in wanted], _NAME_HEIGHT / points):
        k = wanted[place]
        axes.annotate(
            shorten(names[shown[k]], 72 * _MARGIN - 10, _NAME_SIZE), (axes.get_xlim()[1], middle[k]), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=_NAME_SIZE, color=str(colors[-1, k]),
            annotation_clip=False, parse_math=False,
        )  # fmt: skip


def _draw_scale(axes: Axes) -> None:
    """Show on the left how wide some shares are."""
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    across, x, low = axes.get_yaxis_transform(), -0.018, 0.0
    line = 10 * DPI / 72 * np.ptp(axes.get_ylim()) / axes.bbox.height
    for share in _SCALE:
        high = low + np.sqrt(share)
        axes.plot([x, x], [low, high], transform=across, color=MUTED, lw=2.2, solid_capstyle="butt", clip_on=False)
        axes.text(
            x - 0.012, (low + high) / 2, f"{share:.0%}", transform=across, ha="right", va="center", fontsize=8,
            color=MUTED,
        )  # fmt: skip
        # Where bars are shorter than letters, it is these that must keep apart.
        low = max(high + 0.3 * line, (low + high) / 2 + line)
