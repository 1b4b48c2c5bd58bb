"""Colours that modules keep from snapshot to snapshot, although each partition numbers them independently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lib_lightning.plots.lineage_series import LayerSnapshot, as_array
from lib_lightning.plots.palette import MODULES, NO_MODULE, OTHER_MODULES


class ModuleColors:
    """Assigns each module the colour of the earlier module that it overlaps most with.

    The overlap of two modules is the importance of the lineages that are in both. A module without overlap gets the
    colour that has been unused for longest. When all colours are in use, the remaining modules share a neutral one.

    Example:
        >>> import torch
        >>> ids, importance, colors = torch.tensor([0, 1]), torch.tensor([2.0, 1.0]), ModuleColors()
        >>> colors.update({"fc": LayerSnapshot(ids, importance, torch.tensor([0, 1]))})
        {0: '#0072B2', 1: '#E69F00'}
        >>> colors.update({"fc": LayerSnapshot(ids, importance, torch.tensor([1, 0]))})
        {1: '#0072B2', 0: '#E69F00'}
    """

    def __init__(self) -> None:
        # For each node layer, the lineage ids of the last snapshot with modules and the colour index of each lineage.
        self._last: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        # Snapshots since each colour was used. Colours that were never used come first, in the order of the palette.
        self._unused_for = list(range(len(MODULES), 0, -1))

    def update(self, layers: Mapping[str, LayerSnapshot]) -> dict[int, str]:
        """Choose the colours of the next snapshot.

        Args:
            layers: All node layers of the snapshot; those without modules are ignored.

        Returns:
            Colour of each module, the most important module first, and -1 for features in no module last.
        """
        parts = {name: _members(layer) for name, layer in layers.items() if layer.modules is not None}
        if not parts:
            return {}
        found = np.unique(np.concatenate([module for _, module, _ in parts.values()]))
        modules = found[found >= 0]
        weight, overlap = np.zeros(len(modules)), np.zeros((len(modules), len(MODULES)))
        for name, (ids, module, share) in parts.items():
            row = np.searchsorted(modules, module)
            np.add.at(weight, row[module >= 0], share[module >= 0])
            last_ids, last_colors = self._last.get(name, (np.arange(0), np.arange(0)))
            _, now, then = np.intersect1d(ids, last_ids, return_indices=True)
            both = (module[now] >= 0) & (last_colors[then] >= 0)
            np.add.at(overlap, (row[now[both]], last_colors[then[both]]), share[now[both]])
        chosen = self._choose(weight, overlap)
        color_of = {-1: -1} | dict(zip(modules.tolist(), chosen.tolist(), strict=True))
        for name, (ids, module, _) in parts.items():
            self._last[name] = ids, np.array([color_of[m] for m in module.tolist()], dtype=int)
        by_weight = np.argsort(-weight, kind="stable")
        colors = {int(modules[k]): MODULES[chosen[k]] if chosen[k] >= 0 else OTHER_MODULES for k in by_weight}
        return colors | ({-1: NO_MODULE} if (found < 0).any() else {})

    def state_dict(self) -> dict[str, Any]:
        """State needed to continue, as plain numbers and lists."""
        known = {name: [part.tolist() for part in parts] for name, parts in self._last.items()}
        return {"known": known, "unused_for": list(self._unused_for)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state.

        Args:
            state: Return value of `state_dict`.
        """
        self._last = {
            name: (np.array(ids, dtype=int), np.array(colors, dtype=int))
            for name, (ids, colors) in state["known"].items()
        }
        self._unused_for = list(state["unused_for"])

    def _choose(self, weight: np.ndarray, overlap: np.ndarray) -> np.ndarray:
        """Colour index of each module, -1 if no colour is left."""
        chosen, free = np.full(len(weight), -1), set(range(len(MODULES)))
        for flat in np.argsort(-overlap, axis=None, kind="stable"):
            k, color = divmod(int(flat), len(MODULES))
            if overlap[k, color] > 0 and chosen[k] < 0 and color in free:
                chosen[k] = color
                free.remove(color)
        longest_unused = sorted(free, key=lambda color: -self._unused_for[color])
        remaining = (k for k in np.argsort(-weight, kind="stable") if chosen[k] < 0)
        for k, color in zip(remaining, longest_unused, strict=False):
            chosen[k] = color
        self._unused_for = [0 if color in chosen else age + 1 for color, age in enumerate(self._unused_for)]
        return chosen


def _members(layer: LayerSnapshot) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    assert layer.modules is not None
    return as_array(layer.ids).astype(int), as_array(layer.modules).astype(int), layer.shares()
