"""Features over training time: one node layer in one snapshot, and its lineages across snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lib_lightning.algorithm.basis import Basis


@dataclass(frozen=True)
class LayerSnapshot:
    """The features of one node layer in one snapshot.

    Attributes:
        ids: Lineage id of each feature, shape ``(r,)``, int64.
        importance: Importance of each feature, shape ``(r,)``.
        modules: Module of each feature, -1 for none, shape ``(r,)``. Numbers are not comparable across snapshots.
        labels: Label of each feature, "" for none.
        parents: For a feature whose lineage is new, the lineage it split from; -1 for none, shape ``(r,)``.
    """

    ids: Tensor
    importance: Tensor
    modules: Tensor | None = None
    labels: Sequence[str] | None = None
    parents: Tensor | None = None

    def shares(self) -> np.ndarray:
        """Importance of each feature divided by the sum over the layer, shape ``(r,)``; 0 if the sum is 0."""
        importance = as_array(self.importance)
        total = importance.sum()
        return importance / total if total > 0 else np.zeros(len(importance))


@dataclass(frozen=True)
class LineageTable:
    """The ``L`` lineages of one node layer in ``T`` snapshots, sorted by id.

    Attributes:
        ids: Lineage ids, shape ``(L,)``.
        share: Share of the layer's importance in each snapshot, 0 where absent, shape ``(T, L)``.
        feature: Index of the lineage's feature in each snapshot, -1 where absent, shape ``(T, L)``.
        first: Index of the first snapshot with the lineage, shape ``(L,)``.
        last: Index of the last snapshot with the lineage, shape ``(L,)``.
        parents: Position in this table of the lineage that each split from, -1 for none, shape ``(L,)``.
    """

    ids: np.ndarray
    share: np.ndarray
    feature: np.ndarray
    first: np.ndarray
    last: np.ndarray
    parents: np.ndarray


def lineage_table(snapshots: Sequence[LayerSnapshot]) -> LineageTable:
    """Collect the lineages of a node layer from its snapshots.

    Args:
        snapshots: The node layer in each snapshot.

    Returns:
        A table of all lineages. A lineage may be absent from snapshots between its first and its last.

    Example:
        >>> import torch
        >>> one, both = torch.ones(1), torch.tensor([3.0, 1.0])
        >>> table = lineage_table([LayerSnapshot(torch.tensor([0]), one), LayerSnapshot(torch.tensor([4, 0]), both)])
        >>> table.ids, table.first
        (array([0, 4]), array([0, 1]))
        >>> table.share
        array([[1.  , 0.  ], [0.25, 0.75]])
    """
    all_ids = [as_array(snapshot.ids).astype(int) for snapshot in snapshots]
    ids = np.unique(np.concatenate([[], *all_ids])).astype(int)
    share = np.zeros((len(snapshots), len(ids)))
    feature = np.full(share.shape, -1)
    parents, seen = np.full(len(ids), -1), np.zeros(len(ids), dtype=bool)
    for t, (snapshot, snapshot_ids) in enumerate(zip(snapshots, all_ids, strict=True)):
        row = np.searchsorted(ids, snapshot_ids)
        share[t, row], feature[t, row] = snapshot.shares(), np.arange(len(snapshot_ids))
        if snapshot.parents is not None:
            new = ~seen[row]
            parents[row[new]] = _positions(ids, as_array(snapshot.parents).astype(int)[new])
        seen[row] = True
    present = feature >= 0
    first, last = present.argmax(0), len(present) - 1 - present[::-1].argmax(0)
    return LineageTable(ids, share, feature, first, last, parents)


def as_array(tensor: Tensor) -> np.ndarray:
    """Convert a tensor of any device and dtype to a float64 array.

    Args:
        tensor: Real numbers.

    Returns:
        An array of the same shape.

    Example:
        >>> import torch
        >>> as_array(torch.tensor([1, 2]))
        array([1., 2.])
    """
    return np.asarray(tensor.detach().cpu().double().numpy())


def degenerate_mask(basis: Basis) -> np.ndarray:
    """True for the features whose direction the samples do not determine, shape ``(r,)``; False if that is unknown."""
    if basis.degenerate is None:
        return np.zeros(basis.n_features, dtype=bool)
    return np.asarray(basis.degenerate.detach().cpu())


def _positions(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    position = np.searchsorted(ids, wanted).clip(max=len(ids) - 1)
    return np.where(ids[position] == wanted, position, -1)
