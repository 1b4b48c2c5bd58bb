"""Variances of features, group of samples by group: what is left of an importance when some samples are."""

from __future__ import annotations

import torch
from torch import Tensor

from lib_lightning.core.basis import Basis
from lib_lightning.core.groups import leave_one_out
from lib_lightning.core.section import count_rows
from lib_lightning.core.together import Summed


class FeatureVariances(Summed):
    """Streaming mean and mean square of the features of one node layer, over groups of samples.

    Args:
        basis: Basis of the node layer.
        groups: Number of groups.
    """

    sums = ("rows", "_first", "_second")

    def __init__(self, basis: Basis, groups: int) -> None:
        self.rows = torch.zeros(groups, dtype=torch.float64)
        shape = (groups, basis.n_features)
        self._first, self._second = (
            torch.zeros(shape, dtype=torch.float64, device=basis.mean.device) for _ in range(2)
        )

    def update(self, fhat: Tensor, mask: Tensor | None, spans: list[tuple[int, slice]]) -> None:
        """Add one batch.

        Args:
            fhat: Features, zero at positions that do not count, shape ``(n, S, r)``, float64.
            mask: True at positions that count, shape ``(n, S)``; None where all do.
            spans: The groups, and which samples of the batch belong to each.
        """
        for group, span in spans:
            self._first[group] += fhat[span].sum((0, 1))
            self._second[group] += fhat[span].square().sum((0, 1))
            self.rows[group] += count_rows(fhat[span], None if mask is None else mask[span])

    def replicates(self) -> Tensor:
        """Variances with one group of samples left out at a time, ``(G, r)``; G is 0 where there is only one group."""
        return leave_one_out(self._second, self.rows) - leave_one_out(self._first, self.rows).square()
