"""A comparison as text."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

from lib_lightning.comparison.layers import KINDS, LOST, MERGED, NEW, LayerComparison, SideOfLayer
from lib_lightning.comparison.sections import SectionComparison

# Lost and new features, and changed edges, that are named.
_NAMED = 5
_WIDTH = 118


def table_of(
    names: tuple[str, str], layers: Sequence[LayerComparison], sections: Sequence[SectionComparison], level: float
) -> str:
    """Write a comparison as a table.

    Args:
        names: What the networks are called.
        layers: The comparison of each node layer.
        sections: The comparison of each section.
        level: The false discovery rate of matches.

    Returns:
        Lines of text.
    """
    a, b = names
    head = ["features", a, b, *KINDS, "importance shared", "explained", "overlap", "p"]
    rows = [_layer_row(layer) for layer in layers]
    lines = [f"A is {a}, B is {b}."] if max(map(len, names)) > 12 else []
    if lines:
        head[1:3] = ["A", "B"]
    lines += _aligned([head, *rows])
    if sections:
        head = ["edges", "shared features", "correlation", "beyond features", "p", "changed"]
        lines += ["", *_aligned([head, *map(_section_row, sections)])]
    lines += ["", *_differences(names, layers, sections)]
    values = min((layer.num_values for layer in layers), default=0)
    lines += [
        "",
        f"Matches by {values:,} values of each feature, with a false discovery rate of {level:.0%}, against permuted "
        "samples and random bases of the same subspace. Rotated: in a subspace that both have, but another feature. "
        "Importance shared: in shared features. Explained: by all features of the other network together.",
    ]
    return "\n".join(part for line in lines for part in _wrapped(line))


def _wrapped(line: str) -> list[str]:
    # Rows of tables are never cut.
    return textwrap.wrap(line, _WIDTH, break_long_words=False, subsequent_indent="  ") if ", " in line else [line]


def _layer_row(layer: LayerComparison) -> list[str]:
    a, b = layer.a, layer.b
    name = a.layer if a.layer == b.layer else f"{a.layer} / {b.layer}"
    counts = [(a if kind in (LOST, MERGED) else b).kinds.count(kind) for kind in KINDS]
    shares = [f"{f(a):.0%} / {f(b):.0%}" for f in (_shared, _explained)]
    return [
        name,
        f"{len(a.ids):,}",
        f"{len(b.ids):,}",
        *(f"{n:,}" for n in counts),
        *shares,
        f"{layer.overlap:.2f}",
        f"{layer.overlap_p_value:.2g}",
    ]


def _shared(side: SideOfLayer) -> float:
    return side.shared_importance


def _explained(side: SideOfLayer) -> float:
    return side.explained_importance


def _section_row(section: SectionComparison) -> list[str]:
    ends = [x if x == y else f"{x} / {y}" for x, y in zip(section.a, section.b, strict=True)]
    known = not math.isnan(section.correlation)
    numbers = [f"{section.correlation:.2f}", f"{section.beyond_features:.2f}", f"{section.p_value:.2g}"]
    return [
        " -> ".join(ends),
        " x ".join(f"{n:,}" for n in section.shared),
        *(numbers if known else ["", "", ""]),
        f"{len(section.changed):,}",
    ]


def _differences(
    names: tuple[str, str], layers: Sequence[LayerComparison], sections: Sequence[SectionComparison]
) -> list[str]:
    """Names of the most important features, and of the strongest edges, that differ."""
    lines = []
    sides: list[tuple[str, str, list[SideOfLayer]]] = [
        (f"only in {names[0]}", LOST, [layer.a for layer in layers]),
        (f"only in {names[1]}", NEW, [layer.b for layer in layers]),
    ]
    for title, kind, of_layers in sides:
        found = [
            (share, name)
            for side in of_layers
            for share, name, own in zip(side.importance.tolist(), side.ids, side.kinds, strict=True)
            if own == kind
        ]
        found.sort(reverse=True)
        texts = [f"{name} ({share:.1%})" if share >= 0.0005 else f"{name} (<0.1%)" for share, name in found]
        if texts:
            lines.append(f"{title}, with the share of the importance of its layer: {_listed(texts)}")
    changes = sorted((x for s in sections for x in s.changed), key=lambda x: -max(x.strength_a, x.strength_b))
    texts = []
    for x in changes:
        ends = x.b or x.a or ("", "")
        strengths = f"{x.strength_a:.2g} -> {x.strength_b:.2g}"
        texts.append(f"{x.kind} {ends[0]} -> {ends[1]} ({strengths})")
    if texts:
        lines.append(f"edges: {_listed(texts)}")
    return lines or ["All features and edges are in both networks."]


def _listed(texts: Sequence[str]) -> str:
    rest = f" and {len(texts) - _NAMED:,} more" if len(texts) > _NAMED else ""
    return ", ".join(texts[:_NAMED]) + rest


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
