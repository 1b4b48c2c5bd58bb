"""Features over training time: what a figure must know of a snapshot, and the lives of lineages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class LayerSnapshot:
    """The features of one node layer in one snapshot.

    Attributes:
        ids: The lineage of each feature, shape ``(r,)``, int64.
        importance: Shape ``(r,)``.
        modules: The module of each, -1 for none, shape ``(r,)``; numbers need not mean the same in other snapshots.
        labels: A name for each, "" for none.
        parents: For features of new lineages the lineage that it has split from, -1 for none, shape ``(r,)``.
    """

    ids: Tensor
    importance: Tensor
    modules: Tensor | None = None
    labels: Sequence[str] | None = None
    parents: Tensor | None = None

    def shares(self) -> np.ndarray:
        """Each feature's share of the sum of importances, shape ``(r,)``; 0 where the sum is."""
        importance = as_array(self.importance)
        total = importance.sum()
        return importance / total if total > 0 else np.zeros(len(importance))


@dataclass(frozen=True)
class LineageTable:
    """The lineages of one node layer over all snapshots, in the order of their numbers.

    Attributes:
        ids: Their numbers, shape ``(L,)``.
        share: Their shares of the importance in each snapshot, 0 where they are not, shape ``(T, L)``.
        place: Which feature of the snapshot each one is, -1 for none, shape ``(T, L)``.
        first: The first snapshot of each, shape ``(L,)``.
        last: The last snapshot of each, shape ``(L,)``.
        parents: Which of these each has split from, -1 for none, shape ``(L,)``.
    """

    ids: np.ndarray
    share: np.ndarray
    place: np.ndarray
    first: np.ndarray
    last: np.ndarray
    parents: np.ndarray


def lineage_table(moments: Sequence[LayerSnapshot]) -> LineageTable:
    """Follow the lineages of a node layer from snapshot to snapshot.

    Args:
        moments: The node layer in each snapshot.

    Returns:
        Their lives; one that is missing in between lives on.

    Example:
        >>> import torch
        >>> one, both = torch.ones(1), torch.tensor([3.0, 1.0])
        >>> moments = [LayerSnapshot(torch.tensor([0]), one), LayerSnapshot(torch.tensor([4, 0]), both)]
        >>> lives = lineage_table(moments)
        >>> lives.ids, lives.first
        (array([0, 4]), array([0, 1]))
        >>> lives.share
        array([[1.  , 0.  ], [0.25, 0.75]])
    """
    all_ids = [as_array(moment.ids).astype(int) for moment in moments]
    ids = np.unique(np.concatenate([[], *all_ids])).astype(int)
    share = np.zeros((len(moments), len(ids)))
    place = np.full(share.shape, -1)
    parents, seen = np.full(len(ids), -1), np.zeros(len(ids), dtype=bool)
    for t, (moment, own) in enumerate(zip(moments, all_ids, strict=True)):
        where = np.searchsorted(ids, own)
        share[t, where], place[t, where] = moment.shares(), np.arange(len(own))
        if moment.parents is not None:
            new = ~seen[where]
            parents[where[new]] = _find(ids, as_array(moment.parents).astype(int)[new])
        seen[where] = True
    there = place >= 0
    first, last = there.argmax(0), len(there) - 1 - there[::-1].argmax(0)
    return LineageTable(ids, share, place, first, last, parents)


def as_array(tensor: Tensor) -> np.ndarray:
    """Read a tensor of any device and type as float64.

    Args:
        tensor: Real numbers.

    Returns:
        An array of its shape.

    Example:
        >>> import torch
        >>> as_array(torch.tensor([1, 2]))
        array([1., 2.])
    """
    return np.asarray(tensor.detach().cpu().double().numpy())


def _find(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    where = np.searchsorted(ids, wanted).clip(max=len(ids) - 1)
    return np.where(ids[where] == wanted, where, -1)
