"""Layout of a graph figure: which features are shown, and at what height."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.plots.palette import THEME

# A column with fewer dots is centred at the spacing of this many intervals instead of being spread over the height.
_MIN_INTERVALS: int = THEME["column"]["min_intervals"]
# Gap between two modules, in dot intervals.
_MODULE_GAP: float = THEME["column"]["module_gap"]


@dataclass(frozen=True)
class Column:
    """The dots of one node layer, from top to bottom.

    Attributes:
        shown: Indices of the features shown, shape ``(n,)``.
        heights: Height of each dot, from 0 to 1, shape ``(n,)``.
        modules: Module of each feature, -1 for none, shape ``(n,)``; None if modules are not known.
        lineages: Lineage of each feature, shape ``(n,)``; None if features are not tracked.
    """

    shown: np.ndarray
    heights: np.ndarray
    modules: np.ndarray | None = None
    lineages: np.ndarray | None = None

    @property
    def numbers(self) -> np.ndarray:
        """The number written beside each dot, as in the feature's id: its lineage, or its index without lineages."""
        return self.shown if self.lineages is None else self.lineages

    def with_lineages(self, lineages: Tensor | None) -> Column:
        """The same column with the lineages of its features.

        Args:
            lineages: Lineage of each feature of the node layer, shape ``(r,)``; None if they are not tracked.

        Returns:
            A new column.
        """
        return self if lineages is None else replace(self, lineages=lineages.cpu().numpy()[self.shown])


@dataclass(frozen=True)
class Band:
    """The range of heights of a module, the same in all columns.

    Attributes:
        module: Number of the module, -1 for features in no module.
        low: Lower bound, in the unit of the heights.
        high: Upper bound.
        slots: Largest number of its features in a column.
    """

    module: int
    low: float
    high: float
    slots: int


def columns_by_importance(bases: Sequence[Basis], limit: int) -> list[Column]:
    """Lay out features by importance, and single neurons by index.

    Args:
        bases: One basis for each node layer.
        limit: Maximum number of features in a column; the most important ones are shown.

    Returns:
        A column for each node layer.

    Example:
        >>> import torch
        >>> from lib_lightning.algorithm.basis import neuron_basis
        >>> (column,) = columns_by_importance([neuron_basis("fc", torch.zeros(3), torch.eye(3))], limit=2)
        >>> column.shown
        array([0, 1])
    """
    shown = [_most_important(basis, limit) for basis in bases]
    return [Column(index, even_heights(len(index))) for index in shown]


def columns_by_module(
    bases: Sequence[Basis], modules: Sequence[Tensor], limit: int
) -> tuple[list[Column], dict[int, Band]]:
    """Lay out features by module, so that a module has the same height in all columns.

    Args:
        bases: One basis for each node layer.
        modules: Module of each feature, -1 for none, one tensor ``(r,)`` for each node layer.
        limit: Maximum number of features in a column; the most important ones are shown.

    Returns:
        A column for each node layer, and the bands from top to bottom, those with most features first.

    Example:
        >>> import torch
        >>> from lib_lightning.algorithm.basis import neuron_basis
        >>> basis = neuron_basis("fc", torch.zeros(3), torch.eye(3))
        >>> (column,), bands = columns_by_module([basis], [torch.tensor([-1, 4, 4])], limit=9)
        >>> column.shown, list(bands)
        (array([1, 2, 0]), [4, -1])
    """
    shown = [_most_important(basis, limit) for basis in bases]
    members = [m.detach().cpu().numpy()[index] for m, index in zip(modules, shown, strict=True)]
    bands = _bands(members)
    columns = []
    for index, module in zip(shown, members, strict=True):
        parts = [(np.flatnonzero(module == m), band) for m, band in bands.items()]
        order = np.concatenate([part for part, _ in parts]) if parts else np.arange(0)
        heights = [_heights_in_band(len(part), band) for part, band in parts]
        columns.append(Column(index[order], np.concatenate([[], *heights]), module[order]))
    return columns, bands


def inside_modules(E: Tensor, before: Tensor, after: Tensor) -> np.ndarray:
    """Find the edges of a section that connect features of the same module.

    Args:
        E: Edges, shape ``(r_after, r_before)``.
        before: Modules of the features of the earlier node layer, shape ``(r_before,)``.
        after: Modules of the features of the later node layer, shape ``(r_after,)``.

    Returns:
        True where both ends are in the same module, in the shape of ``E``.

    Example:
        >>> import torch
        >>> inside_modules(torch.ones(1, 3), torch.tensor([0, 1, -1]), torch.tensor([0]))
        array([[ True, False, False]])
    """
    rows, columns = after.detach().cpu().numpy()[:, None], before.detach().cpu().numpy()[None]
    assert (len(rows), columns.size) == E.shape
    return np.asarray((rows == columns) & (rows >= 0))


def even_heights(count: int) -> np.ndarray:
    """Space dots evenly; a few dots are centred rather than spread over the full height.

    Args:
        count: Number of dots.

    Returns:
        Heights from top to bottom, shape ``(count,)``.

    Example:
        >>> even_heights(12)[[0, -1]], even_heights(1)
        (array([1., 0.]), array([0.5]))
    """
    span = min(1.0, max(count - 1, 0) / _MIN_INTERVALS)
    return np.linspace(0.5 + span / 2, 0.5 - span / 2, count) if count > 1 else np.full(count, 0.5)


def _most_important(basis: Basis, limit: int) -> np.ndarray:
    order = basis.importance.argsort(descending=True, stable=True)[:limit]
    return np.asarray((order.sort().values if basis.kind == "neuron" else order).cpu())


def _bands(members: Sequence[np.ndarray]) -> dict[int, Band]:
    all_members = np.concatenate([[], *members]).astype(int)
    found, sizes = np.unique(all_members[all_members >= 0], return_counts=True)
    ranked = [int(m) for m in found[np.argsort(-sizes, kind="stable")]]
    ranked += [-1] if (all_members < 0).any() else []
    # The column with most of a module's features determines the height of its band.
    slots = [max(int((m == module).sum()) for m in members) for module in ranked]
    total = sum(slots) + _MODULE_GAP * max(len(slots) - 1, 0)
    step = 1 / max(total - 1, _MIN_INTERVALS)
    top, bands = 0.5 + step * total / 2, {}
    for module, count in zip(ranked, slots, strict=True):
        bands[module] = Band(module, top - count * step, top, count)
        top -= (count + _MODULE_GAP) * step
    return bands


def _heights_in_band(count: int, band: Band) -> np.ndarray:
    # Fewer features than slots are centred with a slightly larger spacing, so that they still read as one group.
    slot = (band.high - band.low) / band.slots
    step = slot * min(1.6, (band.slots - 1) / (count - 1)) if count > 1 else 0.0
    return (band.low + band.high) / 2 + step * ((count - 1) / 2 - np.arange(count))
