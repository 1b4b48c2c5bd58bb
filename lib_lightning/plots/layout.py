"""Where the features of a graph lie: which are shown, how high, and in what colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.plots.palette import MODULES, NO_MODULE, OTHER_MODULES

# A short column keeps the spacing of a column of twelve, around the middle, instead of spreading to the rims.
_ROOMY = 11
# Free places between two modules.
_GAP = 0.7


@dataclass(frozen=True)
class Column:
    """The dots of one node layer, from top to bottom.

    Attributes:
        shown: Indices of the features, shape ``(n,)``.
        heights: How high each lies, from 0 to 1, shape ``(n,)``.
        modules: The module of each, -1 for none, shape ``(n,)``; None where there are no modules.
        numbers: What each is called in the figure, shape ``(n,)``; None for the indices.
    """

    shown: np.ndarray
    heights: np.ndarray
    modules: np.ndarray | None = None
    numbers: np.ndarray | None = None

    @property
    def called(self) -> np.ndarray:
        """The numbers, or indices."""
        return self.shown if self.numbers is None else self.numbers


@dataclass(frozen=True)
class Band:
    """The place of a module, the same in all columns.

    Attributes:
        module: Its number, -1 for the features of none.
        color: The colour of its dots and lines.
        low: Lower rim, on the scale of the heights.
        high: Upper rim.
        places: How many features the fullest column has in it.
    """

    module: int
    color: str
    low: float
    high: float
    places: int


def columns_of(bases: Sequence[Basis], limit: int) -> list[Column]:
    """Lay features out by importance, or single neurons in their own order.

    Args:
        bases: One basis for each node layer.
        limit: Most features in a column, the most important ones.

    Returns:
        A column for each node layer.

    Example:
        >>> import torch
        >>> from lib_lightning.algorithm.basis import neuron_basis
        >>> (column,) = columns_of([neuron_basis("fc", torch.zeros(3), torch.eye(3))], limit=2)
        >>> column.shown
        array([0, 1])
    """
    shown = [_most_important(basis, limit) for basis in bases]
    return [Column(index, even_heights(len(index))) for index in shown]


def banded_columns(
    bases: Sequence[Basis], modules: Sequence[Tensor], limit: int
) -> tuple[list[Column], dict[int, Band]]:
    """Lay features out by module, so that a module lies at one height in all columns.

    Args:
        bases: One basis for each node layer.
        modules: The module of each feature, -1 for none, one tensor ``(r,)`` for each node layer.
        limit: Most features in a column, the most important ones.

    Returns:
        A column for each node layer; and the bands from top to bottom, those with most features shown first.

    Example:
        >>> import torch
        >>> from lib_lightning.algorithm.basis import neuron_basis
        >>> basis = neuron_basis("fc", torch.zeros(3), torch.eye(3))
        >>> (column,), bands = banded_columns([basis], [torch.tensor([-1, 4, 4])], limit=9)
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
        heights = [_within(len(part), band) for part, band in parts]
        columns.append(Column(index[order], np.concatenate([[], *heights]), module[order]))
    return columns, bands


def inside_modules(E: Tensor, before: Tensor, after: Tensor) -> np.ndarray:
    """Tell which edges of a section lie inside a module.

    Args:
        E: Edges, shape ``(r_after, r_before)``.
        before: Modules of the features before, shape ``(r_before,)``.
        after: Modules of the features after, shape ``(r_after,)``.

    Returns:
        True where both ends are in the same module, shape of ``E``.

    Example:
        >>> import torch
        >>> inside_modules(torch.ones(1, 3), torch.tensor([0, 1, -1]), torch.tensor([0]))
        array([[ True, False, False]])
    """
    rows, columns = after.detach().cpu().numpy()[:, None], before.detach().cpu().numpy()[None]
    assert (len(rows), columns.size) == E.shape
    return np.asarray((rows == columns) & (rows >= 0))


def even_heights(count: int) -> np.ndarray:
    """Spread dots evenly, few of them around the middle.

    Args:
        count: How many there are.

    Returns:
        Heights from the top down, shape ``(count,)``.

    Example:
        >>> even_heights(12)[[0, -1]], even_heights(1)
        (array([1., 0.]), array([0.5]))
    """
    span = min(1.0, max(count - 1, 0) / _ROOMY)
    return np.linspace(0.5 + span / 2, 0.5 - span / 2, count) if count > 1 else np.full(count, 0.5)


def _most_important(basis: Basis, limit: int) -> np.ndarray:
    order = basis.importance.argsort(descending=True, stable=True)[:limit]
    return np.asarray((order.sort().values if basis.kind == "neuron" else order).cpu())


def _bands(members: Sequence[np.ndarray]) -> dict[int, Band]:
    everyone = np.concatenate([[], *members]).astype(int)
    found, sizes = np.unique(everyone[everyone >= 0], return_counts=True)
    ranked = [int(m) for m in found[np.argsort(-sizes, kind="stable")]]
    colors = dict(zip(ranked, MODULES, strict=False))
    ranked += [-1] if (everyone < 0).any() else []
    # The fullest column decides how high a band is; the others spread in it.
    places = [max(int((m == module).sum()) for m in members) for module in ranked]
    total = sum(places) + _GAP * max(len(places) - 1, 0)
    step = 1 / max(total - 1, _ROOMY)
    top, bands = 0.5 + step * total / 2, {}
    for module, count in zip(ranked, places, strict=True):
        color = NO_MODULE if module < 0 else colors.get(module, OTHER_MODULES)
        bands[module] = Band(module, color, top - count * step, top, count)
        top -= (count + _GAP) * step
    return bands


def _within(count: int, band: Band) -> np.ndarray:
    # Fewer features than places lie around the middle, a little looser, so that a band still reads as one group.
    place = (band.high - band.low) / band.places
    step = place * min(1.6, (band.places - 1) / (count - 1)) if count > 1 else 0.0
    return (band.low + band.high) / 2 + step * ((count - 1) / 2 - np.arange(count))
