"""A metric of a node layer that is a mean of outer products of gradients, all of them or a random sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lib_lightning.algorithm.gram import Gram
from lib_lightning.algorithm.jackknife import leave_one_out
from lib_lightning.algorithm.low_rank_gram import LowRankGram
from lib_lightning.distributed.process_group import ProcessGroup, Reducible, all_reduce
from lib_lightning.model.agreement import length
from lib_lightning.model.vjp import num_valid

# Jackknife groups of a batch: number of the group, and slice of its samples.
GroupSlices = Sequence[tuple[int, slice]]


class GradientMetric(Reducible):
    """Streaming ``M = 1/(n S) sum g g^T`` over gradients ``g`` with respect to the activations of a node layer.

    See `lib_lightning.algorithm.metric.Metric` for the methods.

    Args:
        d: Width of the node layer.
        n_probes: Number of random combinations of gradients for each sample, the mean over which is ``M`` in
            expectation; None if every gradient is added.
        groups: Number of jackknife groups.
        gram: Makes the sums ``sum g g^T``: `LowRankGram`, or its plain twin `lib_lightning.algorithm.gram.DenseGram`.

    Attributes:
        rows: Number of samples times valid positions in each group, shape ``(G,)``.
        halves: How many of the random combinations are added to each of two sums, whose difference shows the sampling
            error; ``[1]`` if there are none.
    """

    sums = ("rows", "_sampled")

    def __init__(
        self, d: int, n_probes: int | None, groups: int = 1, gram: Callable[[int, int], Gram] = LowRankGram
    ) -> None:
        self.n_probes = n_probes
        self.rows = torch.zeros(groups, dtype=torch.float64, device="cpu")
        self.halves = [1] if n_probes is None else [n_probes - n_probes // 2, n_probes // 2]
        self._sampled = torch.zeros(1, device="cpu")
        self._gram = gram(d, len(self.halves) * groups)

    def count(self, a: Tensor, mask: Tensor | None, group_slices: GroupSlices) -> None:
        """Count the samples and positions of one batch.

        Args:
            a: Activations of the node layer, shape ``(n, S, d)``.
            mask: True at valid positions, shape ``(n, S)``; None if all are valid.
            group_slices: Jackknife groups of the batch.
        """
        count_rows(self.rows, a, mask, group_slices)

    def add(self, group_slices: GroupSlices, g: Tensor, half: int = 0) -> None:
        """Add gradients, or random combinations of them, of one batch.

        Args:
            group_slices: Jackknife groups of the batch.
            g: Shape ``(k, n, S, d)``.
            half: Which of the ``halves`` they belong to.
        """
        self._sampled += self.n_probes is not None
        for group, samples in group_slices:
            self._gram.add(g[:, samples].flatten(0, 2), len(self.halves) * group + half)

    @property
    def gram(self) -> Gram:
        """The sums, one part for each half of the probes in each group."""
        return self._gram

    def reduce(self, process_group: ProcessGroup) -> None:
        """See `Metric`."""
        self.gram.align(process_group)
        all_reduce([self, self._gram], process_group)

    def is_finite(self) -> bool:
        """See `Metric`."""
        return bool(torch.isfinite(self.gram.N).all())

    def factor(self, cutoff: float) -> Tensor:
        """See `Metric`: without forming ``M``."""
        return self.gram.factor(cutoff) / math.sqrt(self.rows.sum() * (self.n_probes or 1))

    def replicates(self, directions: Tensor) -> Tensor:
        """See `Metric`."""
        lengths = self.gram.squared_lengths(directions).unflatten(0, (-1, len(self.halves))).sum(1)
        return leave_one_out(lengths, self.rows) / (self.n_probes or 1)

    @property
    def M(self) -> Tensor:
        """See `Metric`."""
        return self.gram.matrix() / (self.rows.sum() * (self.n_probes or 1))

    @property
    def relative_error(self) -> float | None:
        """See `Metric`: 0 without random combinations; None for a single one, whose spread is unknown."""
        if self.n_probes is None or not self._sampled.any():
            return 0.0
        if self.n_probes == 1:
            return None
        # Frobenius norms are the same in every orthonormal basis.
        first, second = self.gram.N[0::2].sum(0), self.gram.N[1::2].sum(0)
        k_1, k_2 = self.halves
        # Var(pooled mean) = sigma^2 / k and Var(mean of one half - mean of the other) = sigma^2 (1/k_1 + 1/k_2).
        spread = length(first / k_1 - second / k_2) * (k_1 * k_2) ** 0.5 / self.n_probes
        size = length((first + second) / self.n_probes)
        return float(spread / size) if size > 0 else 0.0


def count_rows(rows: Tensor, a: Tensor, mask: Tensor | None, group_slices: GroupSlices) -> None:
    """Add the numbers of samples times valid positions of one batch to those of the groups.

    Args:
        rows: The numbers, shape ``(G,)``; modified.
        a: Activations, shape ``(n, S, d)``.
        mask: True at valid positions, shape ``(n, S)``; None if all are valid.
        group_slices: Jackknife groups of the batch.

    Example:
        >>> rows = torch.zeros(2)
        >>> count_rows(rows, torch.ones(5, 3, 1), None, [(0, slice(0, 2)), (1, slice(2, 5))])
        >>> rows
        tensor([6., 9.])
    """
    for group, samples in group_slices:
        rows[group] += num_valid(a[samples], None if mask is None else mask[samples])
