"""The layout of graphs that follow each other: what stays keeps its place, so that stepping through reads as a film."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.plots.layout import Column, banded_columns, columns_of, even_heights
from lib_lightning.plots.lineage_series import LayerSnapshot, as_array
from lib_lightning.plots.module_colors import ModuleColors

# There are more places than features at a time: those that come find a free one near their partners.
_ROOM = 1.25


class AnimatedLayout:
    """Places of features and colours of modules, kept from graph to graph.

    A feature whose lineage stays visible stays where it is. A new one takes the free place nearest to the features that
    it interacts with in the neighbouring columns, each counted by the strength of the edge. Single neurons keep their
    own order. The first graph is laid out as a single one is.

    Args:
        limit: Most features in a column, the most important ones. It fixes the places: a loaded state
            brings its own.

    Example:
        >>> import torch
        >>> from lib_lightning.algorithm.basis import Basis
        >>> def layer(importance):
        ...     return Basis("fc", "pca", torch.zeros(2), torch.eye(2), torch.eye(2), torch.tensor(importance))
        >>> film = AnimatedLayout(limit=9)
        >>> (before,), _ = film.columns([layer([2.0, 1.0])], [torch.tensor([0, 1])], [])
        >>> (after,), _ = film.columns([layer([4.0, 3.0])], [torch.tensor([1, 0])], [])
        >>> before.numbers, after.numbers, bool((before.heights == after.heights).all())
        (array([0, 1]), array([0, 1]), True)
    """

    def __init__(self, limit: int = 40) -> None:
        self.limit = limit
        # For each node layer the place of each visible lineage, from the top down.
        self._places: dict[str, dict[int, int]] = {}
        self._colors = ModuleColors()

    def columns(
        self,
        bases: Sequence[Basis],
        lineages: Sequence[Tensor],
        edges: Sequence[Tensor],
        modules: Sequence[Tensor] | None = None,
    ) -> tuple[list[Column], dict[int, str] | None]:
        """Lay out the next graph.

        Args:
            bases: One basis for each node layer.
            lineages: The lineage of each feature, shape ``(r,)``, for each node layer.
            edges: One matrix ``(r_out, r_in)`` for each pair of neighbouring node layers.
            modules: The module of each feature, -1 for none, shape ``(r,)``, for each node layer.

        Returns:
            A column for each node layer, with lineages as numbers; and the colour of each module, None without modules.
        """
        still = columns_of(bases, self.limit) if modules is None else banded_columns(bases, modules, self.limit)[0]
        ids = [as_array(of_layer).astype(int) for of_layer in lineages]
        strengths = [as_array(E) for E in edges]
        first = not self._places
        heights = [np.full(len(own), np.nan) for own in ids]
        for basis, column, own, height in zip(bases, still, ids, heights, strict=True):
            if _in_own_order(basis):
                height[column.shown] = even_heights(len(own))[column.shown]
                continue
            kept = self._places.get(basis.name, {})
            places = {k: kept[k] for k in own[column.shown].tolist() if k in kept}
            if first:
                for feature, wanted in zip(column.shown, column.heights, strict=True):
                    places[int(own[feature])] = self._nearest_free(wanted, places)
            self._places[basis.name] = places
            for feature in column.shown:
                if own[feature] in places:
                    height[feature] = self._height(places[int(own[feature])])
        # From the last column on: its neurons never move, and everything else gathers around them.
        for x in reversed(range(len(bases))):
            new = [k for k in np.sort(still[x].shown) if np.isnan(heights[x][k])]
            for feature in sorted(new, key=lambda k: -float(bases[x].importance[k])):
                wanted = _among_partners(x, feature, heights, strengths)
                place = self._nearest_free(wanted, self._places[bases[x].name])
                self._places[bases[x].name][int(ids[x][feature])] = place
                heights[x][feature] = self._height(place)
        columns = []
        for x, (column, height) in enumerate(zip(still, heights, strict=True)):
            shown = column.shown[np.argsort(-height[column.shown], kind="stable")]
            members = None if modules is None else as_array(modules[x]).astype(int)[shown]
            columns.append(Column(shown, height[shown], members, ids[x][shown]))
        if modules is None:
            return columns, None
        moments = zip(bases, lineages, modules, strict=True)
        return columns, self._colors.update({b.name: LayerSnapshot(k, b.importance, m) for b, k, m in moments})

    def state_dict(self) -> dict[str, Any]:
        """What the next layout depends on, in plain numbers, texts and lists."""
        places = {name: [list(pair) for pair in places.items()] for name, places in self._places.items()}
        return {"limit": self.limit, "places": places, "colors": self._colors.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: What `state_dict` gave.
        """
        self.limit = state["limit"]
        self._places = {name: dict(pairs) for name, pairs in state["places"].items()}
        self._colors.load_state_dict(state["colors"])

    @property
    def _count(self) -> int:
        return max(round(_ROOM * self.limit), 2)

    def _height(self, place: int) -> float:
        return 1.0 - place / (self._count - 1)

    def _nearest_free(self, height: float, taken: Mapping[int, int]) -> int:
        occupied = set(taken.values())
        free = [place for place in range(self._count) if place not in occupied]
        return min(free, key=lambda place: (round(abs(self._height(place) - height), 9), place))


def _in_own_order(basis: Basis) -> bool:
    return basis.kind in ("neuron", "centered")


def _among_partners(x: int, feature: int, heights: Sequence[np.ndarray], strengths: Sequence[np.ndarray]) -> float:
    """The mean height of a feature's partners that have one, by strength; the middle where there are none."""
    sections = []
    if x > 0:
        sections.append((strengths[x - 1][feature], heights[x - 1]))
    if x + 1 < len(heights):
        sections.append((strengths[x][:, feature], heights[x + 1]))
    total, moment = 0.0, 0.0
    for strength, height in sections:
        there = ~np.isnan(height)
        # Sections have units of their own: each counts the same.
        weight = strength[there] / strength[there].sum() if strength[there].sum() > 0 else 0 * strength[there]
        total, moment = total + float(weight.sum()), moment + float(weight @ height[there])
    return moment / total if total > 0 else 0.5
