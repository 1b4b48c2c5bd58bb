"""The Fisher metric of logits: how far a step moves the distribution that they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from lib_lightning.algorithm.jackknife import leave_one_out
from lib_lightning.algorithm.linalg import eigh_psd
from lib_lightning.distributed.process_group import Reducible


class FisherMetric(Reducible):
    """Streaming ``E[diag(p) - p p^T]`` with ``p = softmax(a)``, over samples and positions.

    To second order, a step ``v`` in the logits changes the distribution by a Kullback-Leibler divergence of
    ``v^T (diag(p) - p p^T) v / 2`` nats. A step common to all logits changes nothing.

    Args:
        d: Number of logits.
        groups: Number of groups of samples to sum apart.

    Note:
        Source: Amari (1998), the Fisher information of a categorical distribution in its natural parameters. Taking it
        for the metric of the last node layer goes beyond arXiv 2405.10928, which leaves that layer in neurons.

    Example:
        >>> fisher = FisherMetric(2)
        >>> fisher.update(torch.zeros(5, 2), 0)
        >>> fisher.M
        tensor([[ 0.2500, -0.2500],
                [-0.2500,  0.2500]], dtype=torch.float64)
    """

    sums = ("rows", "_total")

    def __init__(self, d: int, groups: int = 1) -> None:
        self.rows = torch.zeros(groups, dtype=torch.float64)
        self._total = torch.zeros(groups, d, d, dtype=torch.float64)

    def update(self, rows: Tensor, group: int) -> None:
        """Add logits of one group of samples, one vector a row: ``(m, d)``."""
        p = rows.detach().double().softmax(-1)
        self._total = self._total.to(p.device)
        self.rows[group] += rows.shape[0]
        self._total[group] += torch.diag(p.sum(0)) - p.T @ p

    @property
    def relative_error(self) -> float:
        """Error of sampling: this metric is exact."""
        return 0.0

    @property
    def M(self) -> Tensor:
        """The metric, shape ``(d, d)``, float64."""
        return self._total.sum(0) / self.rows.sum()

    def replicates(self, directions: Tensor) -> Tensor:
        """Squared length of directions in the metric, with one group of samples left out at a time.

        Args:
            directions: One a row, shape ``(r, d)``, float64.

        Returns:
            ``v M v^T`` of each direction and replicate, shape ``(G, r)``; G is 0 where there is only one group.
        """
        return leave_one_out(((directions @ self._total) * directions).sum(-1), self.rows)

    def factor(self, cutoff: float) -> Tensor:
        """Square-root factor ``B`` with ``B^T B = M``.

        Args:
            cutoff: Directions with an eigenvalue up to this share of the largest are dropped.

        Returns:
            ``B`` of shape ``(k, d)``, float64.
        """
        values, vectors = eigh_psd(self.M, cutoff)
        return values.sqrt()[:, None] * vectors.T
