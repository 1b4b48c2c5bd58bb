"""Whether the features that two networks share also interact in the same way, and which edges differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from scipy.stats import rankdata
from torch import Tensor

from lib_lightning.comparison.layers import LOST, NEW, SHARED, LayerComparison

# Fewest features on either side of a section whose edges are correlated.
_FEWEST = 3
_PERMUTATIONS = 199
# Smallest share of the strongest edge of a section from which an edge counts.
_COUNTS = 0.01
# Smallest share of an edge that must be gone, or have been added, for it to be another edge.
_CHANGED = 0.5
# Number of standard errors that a change must exceed.
_ERRORS = 3.0


@dataclass(frozen=True)
class EdgeChange:
    """An edge that one network has and the other has not, or has with another strength.

    Attributes:
        kind: ``"new"`` if a feature at one of its ends is new, ``"lost"`` if one is lost, else ``"stronger"`` or
            ``"weaker"``.
        a: Ids of its ends in the first network, the earlier node layer first; None for a new edge.
        b: Ids of its ends in the second one; None for a lost edge.
        strength_a: Its strength in the first network.
        strength_b: Its strength in the second one.
    """

    kind: str
    a: tuple[str, str] | None
    b: tuple[str, str] | None
    strength_a: float
    strength_b: float


@dataclass(frozen=True)
class SectionComparison:
    """The edges between two neighbouring node layers in two networks.

    Attributes:
        a: Names of the node layers in the first network.
        b: Names of the node layers in the second one.
        shared: Number of features that both networks share at the earlier and the later node layer.
        correlation: Rank correlation of the edges between shared features (Spearman). Features with many strong edges
            in both networks suffice for a high one. NaN with fewer than three shared features at either end.
        beyond_features: The same without what is due to single features: ranks less their means over rows and columns.
            Positive if the same pairs of features interact more strongly than the strengths of both features explain.
        p_value: How probable it is that ``beyond_features`` is as large if the edges have nothing to do with each
            other, by permutations of the shared features of one network.
        changed: Edges that differ, strongest first.
    """

    a: tuple[str, str]
    b: tuple[str, str]
    shared: tuple[int, int]
    correlation: float
    beyond_features: float
    p_value: float
    changed: list[EdgeChange]


def compare_section(
    layers: tuple[LayerComparison, LayerComparison],
    edges: tuple[Tensor, Tensor],
    errors: tuple[Tensor | None, Tensor | None],
    seed: int = 0,
) -> SectionComparison:
    """Compare the edges of a section.

    Args:
        layers: The comparisons of its two node layers.
        edges: Its edges in both networks, each of shape ``(r_after, r_before)``.
        errors: Their standard errors, with their shapes; None if unknown.
        seed: Seed of permutations.

    Returns:
        The comparison.
    """
    before, after = (_shared_pairs(layer) for layer in layers)
    x, y = (E[after[k]][:, before[k]] for k, E in enumerate(edges))
    correlation, beyond, p_value = _agreement(x, y, seed)
    changed = [*_of_shared(layers, (before, after), edges, errors), *_of_others(layers, edges)]
    changed.sort(key=lambda change: -max(change.strength_a, change.strength_b))
    names = ((layers[0].a.layer, layers[1].a.layer), (layers[0].b.layer, layers[1].b.layer))
    return SectionComparison(*names, (len(before[0]), len(after[0])), correlation, beyond, p_value, changed)


def _shared_pairs(layer: LayerComparison) -> tuple[Tensor, Tensor]:
    """Indices of the features that both networks share: in the first one and in the second one."""
    shared = [j for j, kind in enumerate(layer.b.kinds) if kind == SHARED]
    return layer.b.partners[shared], torch.tensor(shared, dtype=torch.int64, device="cpu")


def _agreement(x: Tensor, y: Tensor, seed: int) -> tuple[float, float, float]:
    if min(x.shape) < _FEWEST:
        return (torch.nan,) * 3
    ranks = [torch.from_numpy(rankdata(edges.numpy(), axis=None)).reshape(edges.shape) for edges in (x, y)]
    correlation = _cosine(*(rank - rank.mean() for rank in ranks))
    centred = [rank - rank.mean(0) - rank.mean(1, keepdim=True) + rank.mean() for rank in ranks]
    beyond = _cosine(*centred)
    generator = torch.Generator().manual_seed(seed)
    reached = 0
    for _ in range(_PERMUTATIONS):
        i, j = (torch.randperm(size, generator=generator, device="cpu") for size in x.shape)
        reached += _cosine(centred[0][i][:, j], centred[1]) >= beyond * (1 - 1e-9)
    return correlation, beyond, (1 + reached) / (1 + _PERMUTATIONS)


def _cosine(x: Tensor, y: Tensor) -> float:
    lengths = float(x.norm() * y.norm())
    return float((x * y).sum()) / lengths if lengths else 0.0


def _of_shared(
    layers: tuple[LayerComparison, LayerComparison],
    shared: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    edges: tuple[Tensor, Tensor],
    errors: tuple[Tensor | None, Tensor | None],
) -> Iterator[EdgeChange]:
    """Edges between shared features whose strength differs by more than errors explain."""
    before, after = shared
    x, y = (E[after[k]][:, before[k]] for k, E in enumerate(edges))
    change, larger = (x - y).abs(), torch.maximum(x, y)
    noise = torch.zeros_like(change)
    for k, error in enumerate(errors):
        if error is not None:
            noise += error[after[k]][:, before[k]].square()
    differs = (change > _CHANGED * larger) & (change > _ERRORS * noise.sqrt())
    differs &= larger > _COUNTS * max(_largest(E) for E in edges)
    for i, j in differs.nonzero().tolist():
        ends = [
            (side[0].ids[int(before[k][j])], side[1].ids[int(after[k][i])])
            for k, side in enumerate(((layers[0].a, layers[1].a), (layers[0].b, layers[1].b)))
        ]
        strengths = float(x[i, j]), float(y[i, j])
        yield EdgeChange("stronger" if strengths[1] > strengths[0] else "weaker", ends[0], ends[1], *strengths)


def _of_others(layers: tuple[LayerComparison, LayerComparison], edges: tuple[Tensor, Tensor]) -> Iterator[EdgeChange]:
    """Edges of features that are lost or new."""
    for kind, E, sides in ((LOST, edges[0], [x.a for x in layers]), (NEW, edges[1], [x.b for x in layers])):
        is_other = [torch.tensor([k == kind for k in side.kinds], dtype=torch.bool, device="cpu") for side in sides]
        found = (is_other[1].unsqueeze(1) | is_other[0]) & (_COUNTS * _largest(E) < E)
        for i, j in found.nonzero().tolist():
            ends, strength = (sides[0].ids[j], sides[1].ids[i]), float(E[i, j])
            yield (
                EdgeChange(kind, ends, None, strength, 0.0)
                if kind == LOST
                else EdgeChange(kind, None, ends, 0.0, strength)
            )


def _largest(E: Tensor) -> float:
    return float(E.max()) if E.numel() else 0.0
