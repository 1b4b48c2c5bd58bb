"""The Fisher metric of a model's output: how much a step changes what it predicts."""

from __future__ import annotations

import torch
from torch import Tensor

from lib_lightning.algorithm.jackknife import leave_one_out
from lib_lightning.algorithm.linalg import eigh_psd
from lib_lightning.algorithm.section_cache import SectionCache
from lib_lightning.distributed.process_group import ProcessGroup, Reducible, all_reduce
from lib_lightning.model.output_distribution import OutputDistribution

LOGITS = OutputDistribution("categorical")


class FisherMetric(Reducible):
    """Streaming ``E[F]`` over samples and positions, with the Fisher information ``F`` of what the output stands for.

    For logits of classes, ``F = diag(p) - p p^T`` with ``p = softmax(a)``: a step that is common to all logits changes
    nothing. See `OutputDistribution` for the others.

    See `lib_lightning.algorithm.metric.Metric` for the methods.

    Args:
        d: Number of logits, or of other outputs.
        groups: Number of jackknife groups.
        distribution: What the output stands for.

    Note:
        Source: Amari (1998), https://doi.org/10.1162/089976698300017746, the Fisher information of a categorical
        distribution in its natural parameters. Its use as the metric of the last node layer is an addition to arXiv
        2405.10928, which keeps that layer in the neuron basis.

    Example:
        >>> fisher = FisherMetric(2)
        >>> fisher.update(torch.zeros(5, 2), 0)
        >>> fisher.M
        tensor([[ 0.2500, -0.2500],
                [-0.2500,  0.2500]], dtype=torch.float64)
    """

    sums = ("rows", "_total")

    def __init__(self, d: int, groups: int = 1, distribution: OutputDistribution = LOGITS) -> None:
        self._distribution = distribution
        self.rows = torch.zeros(groups, dtype=torch.float64, device="cpu")
        self._total = torch.zeros(groups, d, d, dtype=torch.float64, device="cpu")

    def add_batches(self, cache: SectionCache, index: int, phase: str) -> None:
        """See `Metric`."""
        for rows, group in cache.rows(phase, index):
            self.update(rows, group)

    def update(self, rows: Tensor, group: int) -> None:
        """Add logits of one group of samples.

        Args:
            rows: Outputs, one a row: ``(m, d)``.
            group: Number of the group.
        """
        found = self._distribution.fisher_sum(rows)
        self._total = self._total.to(found.device)
        self.rows[group] += rows.shape[0]
        self._total[group] += found

    def reduce(self, process_group: ProcessGroup) -> None:
        """See `Metric`."""
        all_reduce([self], process_group)

    def is_finite(self) -> bool:
        """See `Metric`."""
        return bool(torch.isfinite(self._total).all())

    def factor(self, cutoff: float) -> Tensor:
        """See `Metric`."""
        values, vectors = eigh_psd(self.M, cutoff)
        return values.sqrt()[:, None] * vectors.T

    def replicates(self, directions: Tensor) -> Tensor:
        """See `Metric`."""
        return leave_one_out(((directions @ self._total) * directions).sum(-1), self.rows)

    @property
    def M(self) -> Tensor:
        """See `Metric`."""
        return self._total.sum(0) / self.rows.sum()

    @property
    def relative_error(self) -> float:
        """See `Metric`: this metric is exact."""
        return 0.0
