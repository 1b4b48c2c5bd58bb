"""Where the features of two graphs are drawn, so that shared ones have the same height and colour in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lib_lightning.comparison.layers import CONSTANT, LOST, NEW, SHARED, LayerComparison, SideOfLayer
from lib_lightning.comparison.sections import SectionComparison
from lib_lightning.graph import InteractionGraph
from lib_lightning.plots.legend import edge_style
from lib_lightning.plots.palette import MODULES, NO_MODULE, TEXT, THEME, VERMILION

# Smallest share of the strongest edge of a section that is drawn.
_FAINTEST = 0.005
_MAX_EDGES = 150
# Widest line, and smallest and largest radius of a dot, in points.
_WIDEST, _SMALLEST, _LARGEST = 3.5, 2.6, 7.0
# Edges that both networks have.
_LINE = "#5F7F9F"


@dataclass(frozen=True)
class Dot:
    """A feature.

    Attributes:
        x: Number of the node layer, from 0.
        y: Height, from 0 at the top to 1.
        radius: In points.
        color: Of a shared feature that of its pair; else that of the ring.
        is_filled: Whether the feature is shared.
        row: Number of its height at its node layer: shared features have the same one in both networks.
        feature: Its id.
        text: What is known about it.
    """

    x: int
    y: float
    radius: float
    color: str
    is_filled: bool
    row: int
    feature: str
    text: str


@dataclass(frozen=True)
class Line:
    """An edge.

    Attributes:
        start: Its feature at the earlier node layer.
        end: Its feature at the later one.
        width: In points.
        opacity: From 0 to 1.
        color: Whether it has changed.
        text: What is known about it.
    """

    start: Dot
    end: Dot
    width: float
    opacity: float
    color: str
    text: str


@dataclass(frozen=True)
class Picture:
    """One of the two graphs.

    Attributes:
        layers: Names of the node layers, and how many of their features are drawn.
        dots: The features.
        lines: The edges, the strongest last.
    """

    layers: list[tuple[str, str]]
    dots: list[Dot]
    lines: list[Line]


def pictures_of(
    graphs: tuple[InteractionGraph, InteractionGraph],
    layers: Sequence[LayerComparison],
    sections: Sequence[SectionComparison],
    max_features: int = THEME["column"]["max_features"],
) -> tuple[Picture, Picture]:
    """Lay out both graphs.

    Args:
        graphs: The graphs.
        layers: The comparison of each node layer.
        sections: The comparison of each section.
        max_features: Number of heights of a node layer: the most important features are drawn.

    Returns:
        A picture of each.
    """
    rows = [_rows(layer, max_features) for layer in layers]
    pictures = []
    for k, graph in enumerate(graphs):
        sides = [layer.b if k else layer.a for layer in layers]
        columns = [
            _column(x, side, [row[k] for row in rows[x]], graph.labels.get(side.layer)) for x, side in enumerate(sides)
        ]
        heads = [(side.layer, f"{len(dots)} of {_varying(side)}") for side, dots in zip(sides, columns, strict=True)]
        changed = {ends: change.kind for x in sections for change in x.changed if (ends := change.b if k else change.a)}
        # Lines are as wide in both pictures where edges are as strong.
        drawn = [
            line
            for x in sections
            for line in _lines(
                graph.edges[x.b if k else x.a],
                _strongest(graphs, x),
                columns,
                _place(sides, x.b if k else x.a),
                changed,
            )
        ]
        dots = [dot for column in columns for dot in column.values()]
        pictures.append(Picture(heads, dots, sorted(drawn, key=lambda line: line.opacity)))
    return pictures[0], pictures[1]


def _rows(layer: LayerComparison, limit: int) -> list[tuple[int | None, int | None]]:
    """Indices of the features of both networks at each height: shared ones first, by importance."""
    a, b = layer.a, layer.b
    weights = [side.importance.tolist() for side in (a, b)]
    partner = {int(b.partners[j]): j for j, kind in enumerate(b.kinds) if kind == SHARED}
    shared = [(i, j, max(weights[0][i], weights[1][j])) for i, j in partner.items()]
    others: list[tuple[int | None, int | None, float]] = [
        (i, None, weights[0][i]) for i, kind in enumerate(a.kinds) if kind not in (SHARED, CONSTANT)
    ]
    others += [(None, j, weights[1][j]) for j, kind in enumerate(b.kinds) if kind not in (SHARED, CONSTANT)]
    by_weight = sorted([*shared, *others], key=lambda row: -row[2])[:limit]
    return [(i, j) for i, j, _ in sorted(by_weight, key=lambda row: (None in row, -row[2]))]


def _column(x: int, side: SideOfLayer, indices: Sequence[int | None], labels: Sequence[str] | None) -> dict[int, Dot]:
    count, largest = len(indices), max(side.importance.tolist(), default=0.0) or 1.0
    span = min(1.0, max(count - 1, 0) / THEME["column"]["min_intervals"])
    crowded = min(1.0, (24 / max(count, 1)) ** 0.5)
    dots = {}
    for row, index in enumerate(indices):
        if index is None:
            continue
        kind = side.kinds[index]
        y = 0.5 + span * (row / (count - 1) - 0.5) if count > 1 else 0.5
        share = float(side.importance[index]) / largest
        radius = crowded * (_SMALLEST + (_LARGEST - _SMALLEST) * share**0.5)
        label = f" ({labels[index]})" if labels and labels[index] else ""
        text = f"{side.ids[index]}{label}: {kind}, similarity {float(side.similarity[index]):.2f}"
        text += f", p {float(side.p_values[index]):.2g}" if float(side.p_values[index]) < 1 else ""
        text += f"; {float(side.explained[index]):.0%} explained, {float(side.importance[index]):.1%} of the importance"
        ring = TEXT if kind in (LOST, NEW) else NO_MODULE
        color = MODULES[row % len(MODULES)] if kind == SHARED else ring
        dots[index] = Dot(x, y, radius, color, kind == SHARED, row, side.ids[index], text)
    return dots


def _varying(side: SideOfLayer) -> int:
    return len(side.kinds) - side.kinds.count(CONSTANT)


def _strongest(graphs: tuple[InteractionGraph, InteractionGraph], section: SectionComparison) -> float:
    edges = graphs[0].edges[section.a], graphs[1].edges[section.b]
    return max(float(E.max()) if E.numel() else 0.0 for E in edges)


def _place(sides: Sequence[SideOfLayer], section: tuple[str, str]) -> int:
    return next(x for x, side in enumerate(sides) if side.layer == section[0])


def _lines(
    E: Tensor,
    strongest: float,
    columns: Sequence[dict[int, Dot]],
    x: int,
    changed: dict[tuple[str, str], str],
) -> list[Line]:
    order = E.flatten().argsort(descending=True, stable=True)[:_MAX_EDGES].tolist()
    visible = [divmod(place, E.shape[1]) for place in order if float(E.flatten()[place]) > _FAINTEST * strongest]
    ends = [(i, j) for i, j in visible if i in columns[x + 1] and j in columns[x]]
    max_width = _WIDEST * min(1.0, (THEME["edge"]["crowd"] / max(1, len(ends))) ** 0.5)
    lines = []
    for i, j in ends:
        start, end, strength = columns[x][j], columns[x + 1][i], float(E[i, j])
        kind = changed.get((start.feature, end.feature), "")
        width, opacity = (float(t) for t in edge_style(strength / strongest, max_width))
        text = f"{start.feature} to {end.feature}: {strength:.3g}" + (f", {kind}" if kind else "")
        lines.append(Line(start, end, width, opacity, VERMILION if kind else _LINE, text))
    return lines
