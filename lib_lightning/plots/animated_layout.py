"""Layout of successive graphs of a run: features keep their positions, so that the figures can be played as a film."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.basis_kinds import FIXED_ORDER
from lib_lightning.plots.layout import Column, columns_by_importance, columns_by_module, even_heights
from lib_lightning.plots.lineage_series import as_array
from lib_lightning.plots.palette import THEME

# Slots per visible feature: the spare ones let a new feature be placed near the features that it interacts with.
_SLOTS_PER_FEATURE = 1.25


class AnimatedLayout:
    """Positions of features, kept from graph to graph.

    A feature whose lineage remains visible keeps its position. A new feature gets the free slot nearest to the mean
    height of its neighbours in the adjacent columns, weighted by edge strength. Single neurons are ordered by index.
    The first graph is laid out like a single one.

    Args:
        limit: Maximum number of features in a column; the most important ones are shown. It also determines the
            slots, so loading a state replaces it.

    Example:
        >>> import torch
        >>> from lib_lightning.algorithm.basis import Basis
        >>> def layer(importance):
        ...     return Basis("fc", "pca", torch.zeros(2), torch.eye(2), torch.eye(2), torch.tensor(importance))
        >>> layout = AnimatedLayout(limit=9)
        >>> (before,) = layout.columns([layer([2.0, 1.0])], [torch.tensor([0, 1])], [])
        >>> (after,) = layout.columns([layer([4.0, 3.0])], [torch.tensor([1, 0])], [])
        >>> before.lineages, after.lineages, bool((before.heights == after.heights).all())
        (array([0, 1]), array([0, 1]), True)
    """

    def __init__(self, limit: int = THEME["column"]["max_features_in_figures"]) -> None:
        self.limit = limit
        # For each node layer, the slot of each visible lineage, counted from the top.
        self._slots: dict[str, dict[int, int]] = {}

    def columns(
        self,
        bases: Sequence[Basis],
        lineages: Sequence[Tensor],
        edges: Sequence[Tensor],
        modules: Sequence[Tensor] | None = None,
    ) -> list[Column]:
        """Lay out the next graph.

        Args:
            bases: One basis for each node layer.
            lineages: Lineage of each feature, shape ``(r,)``, for each node layer.
            edges: One matrix ``(r_out, r_in)`` for each pair of neighbouring node layers.
            modules: Module of each feature, -1 for none, shape ``(r,)``, for each node layer.

        Returns:
            A column for each node layer.
        """
        if modules is None:
            static = columns_by_importance(bases, self.limit)
        else:
            static = columns_by_module(bases, modules, self.limit)[0]
        ids = [as_array(layer).astype(int) for layer in lineages]
        strengths = [as_array(E) for E in edges]
        first = not self._slots
        heights = [np.full(len(layer), np.nan) for layer in ids]
        for basis, column, layer, height in zip(bases, static, ids, heights, strict=True):
            if basis.kind in FIXED_ORDER:
                height[column.shown] = even_heights(len(layer))[column.shown]
                continue
            previous = self._slots.get(basis.name, {})
            slots = {k: previous[k] for k in layer[column.shown].tolist() if k in previous}
            if first:
                for feature, target in zip(column.shown, column.heights, strict=True):
                    slots[int(layer[feature])] = self._nearest_free(target, slots)
            self._slots[basis.name] = slots
            for feature in column.shown:
                if layer[feature] in slots:
                    height[feature] = self._height(slots[int(layer[feature])])
        # From the last column to the first: the output neurons never move, and the others are placed relative to them.
        for x in reversed(range(len(bases))):
            new = [k for k in np.sort(static[x].shown) if np.isnan(heights[x][k])]
            for feature in sorted(new, key=lambda k: -float(bases[x].importance[k])):
                target = _mean_neighbour_height(x, feature, heights, strengths)
                slot = self._nearest_free(target, self._slots[bases[x].name])
                self._slots[bases[x].name][int(ids[x][feature])] = slot
                heights[x][feature] = self._height(slot)
        columns = []
        for x, (column, height) in enumerate(zip(static, heights, strict=True)):
            shown = column.shown[np.argsort(-height[column.shown], kind="stable")]
            members = None if modules is None else as_array(modules[x]).astype(int)[shown]
            columns.append(Column(shown, height[shown], members, ids[x][shown]))
        return columns

    def state_dict(self) -> dict[str, Any]:
        """State needed to continue, as plain numbers, strings and lists."""
        slots = {name: [list(pair) for pair in layer.items()] for name, layer in self._slots.items()}
        return {"limit": self.limit, "places": slots}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state.

        Args:
            state: Return value of `state_dict`.
        """
        self.limit = state["limit"]
        self._slots = {name: dict(pairs) for name, pairs in state["places"].items()}

    @property
    def _slot_count(self) -> int:
        return max(round(_SLOTS_PER_FEATURE * self.limit), 2)

    def _height(self, slot: int) -> float:
        return 1.0 - slot / (self._slot_count - 1)

    def _nearest_free(self, height: float, slots: Mapping[int, int]) -> int:
        occupied = set(slots.values())
        free = [slot for slot in range(self._slot_count) if slot not in occupied]
        return min(free, key=lambda slot: (round(abs(self._height(slot) - height), 9), slot))


def _mean_neighbour_height(
    x: int, feature: int, heights: Sequence[np.ndarray], strengths: Sequence[np.ndarray]
) -> float:
    """Mean height of the neighbours already placed, weighted by edge strength; 0.5 if there are none."""
    sections = []
    if x > 0:
        sections.append((strengths[x - 1][feature], heights[x - 1]))
    if x + 1 < len(heights):
        sections.append((strengths[x][:, feature], heights[x + 1]))
    total, moment = 0.0, 0.0
    for strength, height in sections:
        placed = ~np.isnan(height)
        # Edge strengths of different sections have different units: give both sections the same weight.
        weight = strength[placed] / strength[placed].sum() if strength[placed].sum() > 0 else 0 * strength[placed]
        total, moment = total + float(weight.sum()), moment + float(weight @ height[placed])
    return moment / total if total > 0 else 0.5
