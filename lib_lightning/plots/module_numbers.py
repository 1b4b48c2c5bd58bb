"""Numbers that modules keep from snapshot to snapshot, although each search numbers them anew.

The number of a module determines its colour (`lib_lightning.plots.palette.module_color`), so that every picture of a
graph shows the same colours. This file needs neither torch nor matplotlib: the viewer uses it as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lib_lightning.plots.palette import MODULES


class Members(NamedTuple):
    """The features of one node layer and their modules in one snapshot.

    Attributes:
        ids: Lineage of each feature, shape ``(r,)``, integer.
        modules: Module of each feature, shape ``(r,)``, integer, -1 for none.
        importance: Importance of each feature, shape ``(r,)``.
    """

    ids: np.ndarray
    modules: np.ndarray
    importance: np.ndarray


class ModuleNumbers:
    """Gives each module the number of the earlier module that it overlaps most with.

    The overlap of two modules is the importance of the lineages that are in both, each as a share of the importance of
    its node layer. Only the numbers below ``len(MODULES)`` have a colour of their own. One of these belongs to the same
    module for as long as that is found again. Then it goes to the largest module without a colour, the number that has
    been unused for longest first.

    Example:
        >>> ids, importance, numbers = np.array([0, 1]), np.array([2.0, 1.0]), ModuleNumbers()
        >>> numbers.update({"fc": Members(ids, np.array([0, 1]), importance)})
        {0: 0, 1: 1}
        >>> numbers.update({"fc": Members(ids, np.array([1, 0]), importance)})
        {0: 1, 1: 0}
    """

    def __init__(self) -> None:
        # For each node layer, the lineages of the last snapshot with modules, and the number of the module of each.
        self._last: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        # Snapshots since each number with a colour was used. Those never used come first, in order.
        self._unused_for = list(range(len(MODULES), 0, -1))

    def update(self, layers: Mapping[str, Members]) -> dict[int, int]:
        """Choose the numbers of the modules of the next snapshot.

        Args:
            layers: The node layers of the snapshot whose features have lineages and modules.

        Returns:
            The number of each module, by its number in this snapshot. A smaller number in the snapshot has priority.
        """
        found = _distinct(part.modules for part in layers.values())
        if not len(found):
            return {}
        known = _distinct(numbers for _, numbers in self._last.values())
        overlap = np.zeros((len(found), len(known)))
        for name, (ids, modules, importance) in layers.items():
            last_ids, last_numbers = self._last.get(name, (np.arange(0), np.arange(0)))
            _, now, then = np.intersect1d(ids, last_ids, return_indices=True)
            both = (modules[now] >= 0) & (last_numbers[then] >= 0)
            row, column = (
                np.searchsorted(found, modules[now[both]]),
                np.searchsorted(known, last_numbers[then[both]]),
            )
            np.add.at(overlap, (row, column), importance[now[both]] / (importance.sum() or 1.0))
        number_of = self._choose(found.tolist(), known.tolist(), overlap)
        for name, (ids, modules, _) in layers.items():
            self._last[name] = ids, np.array([number_of.get(m, -1) for m in modules.tolist()], dtype=int)
        return number_of

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
            name: (np.array(ids, dtype=int), np.array(numbers, dtype=int))
            for name, (ids, numbers) in state["known"].items()
        }
        self._unused_for = list(state["unused_for"])

    def _choose(self, found: list[int], known: list[int], overlap: np.ndarray) -> dict[int, int]:
        number_of: dict[int, int] = {}
        for flat in np.argsort(-overlap, axis=None, kind="stable").tolist():
            k, column = divmod(flat, max(len(known), 1))
            if overlap.flat[flat] > 0 and found[k] not in number_of and known[column] not in number_of.values():
                number_of[found[k]] = known[column]
        taken = set(number_of.values())
        colored = [n for n in range(len(MODULES)) if n not in taken]
        colored.sort(key=lambda n: -self._unused_for[n])
        further = iter(n for n in range(len(MODULES), len(MODULES) + len(found) + len(taken)) if n not in taken)
        for module in found:
            if number_of.get(module, len(MODULES)) >= len(MODULES):
                if colored:
                    number_of[module] = colored.pop(0)
                elif module not in number_of:
                    number_of[module] = next(further)
        used = set(number_of.values())
        self._unused_for = [0 if n in used else age + 1 for n, age in enumerate(self._unused_for)]
        return {module: number_of[module] for module in found}


def _distinct(parts: Any) -> np.ndarray:
    """The distinct modules in some arrays, without -1, in increasing order."""
    found = np.unique(np.concatenate([np.arange(0), *parts])).astype(int)
    return found[found >= 0]
