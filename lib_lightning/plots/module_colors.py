"""Colours that modules keep from snapshot to snapshot, though every search numbers them anew."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from lib_lightning.plots.lineage_series import LayerSnapshot, as_array
from lib_lightning.plots.palette import MODULES, NO_MODULE, OTHER_MODULES


class ModuleColors:
    """Gives a module the colour of the earlier one that it shares most with.

    What two modules share are the lineages in both, weighted by importance. A module that shares nothing takes the
    colour that has been out of use for longest; those for which no colour is left share a neutral one.

    Example:
        >>> import torch
        >>> ids, importance, colors = torch.tensor([0, 1]), torch.tensor([2.0, 1.0]), ModuleColors()
        >>> colors.update({"fc": LayerSnapshot(ids, importance, torch.tensor([0, 1]))})
        {0: '#0072B2', 1: '#E69F00'}
        >>> colors.update({"fc": LayerSnapshot(ids, importance, torch.tensor([1, 0]))})
        {1: '#0072B2', 0: '#E69F00'}
    """

    def __init__(self) -> None:
        # For each node layer the lineages of the last snapshot with modules and the number of each one's colour.
        self._known: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        # Colours that were never used count as the longest out of use, the first ones above all.
        self._unused_for = list(range(len(MODULES), 0, -1))

    def update(self, layers: Mapping[str, LayerSnapshot]) -> dict[int, str]:
        """Choose the colours of the next snapshot.

        Args:
            layers: All node layers of the snapshot; those without modules are passed over.

        Returns:
            The colour of each module, those with most importance first, -1 for features of none last.
        """
        parts = {name: _modules(m) for name, m in layers.items() if m.modules is not None}
        if not parts:
            return {}
        found = np.unique(np.concatenate([module for _, module, _ in parts.values()]))
        own = found[found >= 0]
        weight, shared = np.zeros(len(own)), np.zeros((len(own), len(MODULES)))
        for name, (ids, module, share) in parts.items():
            row = np.searchsorted(own, module)
            np.add.at(weight, row[module >= 0], share[module >= 0])
            known_ids, known_colors = self._known.get(name, (np.arange(0), np.arange(0)))
            _, here, there = np.intersect1d(ids, known_ids, return_indices=True)
            both = (module[here] >= 0) & (known_colors[there] >= 0)
            np.add.at(shared, (row[here[both]], known_colors[there[both]]), share[here[both]])
        chosen = self._choose(weight, shared)
        of_module = {-1: -1} | dict(zip(own.tolist(), chosen.tolist(), strict=True))
        for name, (ids, module, _) in parts.items():
            self._known[name] = ids, np.array([of_module[m] for m in module.tolist()], dtype=int)
        heaviest = np.argsort(-weight, kind="stable")
        colors = {int(own[k]): MODULES[chosen[k]] if chosen[k] >= 0 else OTHER_MODULES for k in heaviest}
        return colors | ({-1: NO_MODULE} if (found < 0).any() else {})

    def state_dict(self) -> dict[str, Any]:
        """What the next choice depends on, in plain numbers and lists."""
        known = {name: [part.tolist() for part in parts] for name, parts in self._known.items()}
        return {"known": known, "unused_for": list(self._unused_for)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: What `state_dict` gave.
        """
        self._known = {
            name: (np.array(ids, dtype=int), np.array(colors, dtype=int))
            for name, (ids, colors) in state["known"].items()
        }
        self._unused_for = list(state["unused_for"])

    def _choose(self, weight: np.ndarray, shared: np.ndarray) -> np.ndarray:
        """The number of each module's colour, -1 where none is left."""
        chosen, free = np.full(len(weight), -1), set(range(len(MODULES)))
        for flat in np.argsort(-shared, axis=None, kind="stable"):
            k, color = divmod(int(flat), len(MODULES))
            if shared[k, color] > 0 and chosen[k] < 0 and color in free:
                chosen[k] = color
                free.remove(color)
        rested = sorted(free, key=lambda color: -self._unused_for[color])
        for k, color in zip((k for k in np.argsort(-weight, kind="stable") if chosen[k] < 0), rested, strict=False):
            chosen[k] = color
        self._unused_for = [0 if color in chosen else age + 1 for color, age in enumerate(self._unused_for)]
        return chosen


def _modules(moment: LayerSnapshot) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    assert moment.modules is not None
    return as_array(moment.ids).astype(int), as_array(moment.modules).astype(int), moment.shares()
