"""Standard errors by the jackknife, from sums over groups of samples.

The samples of a run are divided into a few groups of consecutive ones, and every sum is kept for each group. Leaving
out one group at a time gives replicates of each importance and each edge without another pass over the data; their
spread is the standard error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.distributed.process_group import Reducible
from lib_lightning.model.vjp import num_valid

# This many replicates give a standard error to about a quarter of itself, and cost as many copies of each sum.
GROUPS = 8


def group_slices(start: int, stop: int, n: int, groups: int) -> Iterator[tuple[int, slice]]:
    """The groups to which a batch of consecutive samples belongs.

    Args:
        start: Index of its first sample among all samples.
        stop: Index after its last sample.
        n: Number of all samples.
        groups: Number of groups.

    Yields:
        The number of a group, and the slice of the batch that belongs to it.

    Example:
        >>> list(group_slices(2, 6, 8, 2))
        [(0, slice(0, 2, None)), (1, slice(2, 4, None))]
    """
    for g in range(groups):
        first, last = max(start, -(-g * n // groups)), min(stop, -(-(g + 1) * n // groups))
        if first < last:
            yield g, slice(first - start, last - start)


def leave_one_out(sums: Tensor, counts: Tensor) -> Tensor:
    """Means with one group left out at a time.

    Args:
        sums: Sum over each group, shape ``(G, ...)``.
        counts: Number of terms in each sum, shape ``(G,)``, on the CPU. Empty groups are skipped.

    Returns:
        One mean for each group that is not empty, shape ``(G', ...)``; G' is 0 if there is only one.

    Example:
        >>> leave_one_out(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1, 1, 2]))
        tensor([2.6667, 2.3333, 1.5000])
    """
    present = [g for g, count in enumerate(counts.tolist()) if count > 0]
    if len(present) < 2:
        return sums[:0]
    sums, counts = sums[present], counts[present].to(sums)
    remaining = (counts.sum() - counts).reshape(-1, *[1] * (sums.ndim - 1))
    return (sums.sum(0) - sums) / remaining


def standard_error(replicates: Tensor) -> Tensor:
    """Standard error by the jackknife: ``sqrt((G - 1)/G sum_g (x_g - mean)^2)``.

    Args:
        replicates: ``x_g``, shape ``(G, ...)``: the statistic without group ``g`` of ``G`` groups of equal size.
            Floating point.

    Returns:
        The standard error of the statistic of all samples, shape ``(...)``; NaN if there are fewer than two groups.

    Note:
        Source: Efron and Stein (1981), "The jackknife estimate of variance", https://doi.org/10.1214/aos/1176345462,
        after Tukey (1958); with groups of samples in place of single ones.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0, 6.0])
        >>> standard_error((x.sum() - x) / 3), x.std() / 2
        (tensor(1.0801), tensor(1.0801))
    """
    G = replicates.shape[0]
    if G < 2:
        return replicates.new_full(replicates.shape[1:], math.nan)
    deviations = replicates - replicates.mean(0)
    return (deviations.square().sum(0) * ((G - 1) / G)).sqrt()


def near_degenerate(importance: Tensor, replicates: Tensor) -> Tensor:
    """Find features whose direction the samples do not determine: features of equal importance can be rotated.

    Args:
        importance: ``Lambda``, descending, shape ``(r,)``.
        replicates: Jackknife replicates of it, shape ``(G, r)``.

    Returns:
        True for each of two neighbours whose importances differ by less than two standard errors of their difference,
        shape ``(r,)``. (Such features rotate by about a quarter of a radian from one set of samples to another.)

    Example:
        >>> near_degenerate(torch.tensor([2.0, 1.1, 1.0]), torch.tensor([[2.1, 1.2, 1.0], [1.9, 1.0, 1.0]]))
        tensor([False,  True,  True])
    """
    error = standard_error(replicates[:, :-1] - replicates[:, 1:])
    close = importance[:-1] - importance[1:] < 2 * error
    no_neighbour = torch.zeros(min(1, len(importance)), dtype=torch.bool, device=close.device)
    return torch.cat([no_neighbour, close]) | torch.cat([close, no_neighbour])


class FeatureVariances(Reducible):
    """Streaming mean and mean square of the features of one node layer, for each jackknife group.

    Args:
        basis: Basis of the node layer.
        groups: Number of groups.
    """

    sums = ("rows", "_first", "_second")

    def __init__(self, basis: Basis, groups: int) -> None:
        self.rows = torch.zeros(groups, dtype=torch.float64, device="cpu")
        shape = (groups, basis.n_features)
        self._first, self._second = (
            torch.zeros(shape, dtype=torch.float64, device=basis.mean.device) for _ in range(2)
        )

    def update(self, fhat: Tensor, mask: Tensor | None, groups: Sequence[tuple[int, slice]]) -> None:
        """Add one batch.

        Args:
            fhat: Features, zero at masked positions, shape ``(n, S, r)``, float64.
            mask: True at valid positions, shape ``(n, S)``; None if all are valid.
            groups: Jackknife groups of the batch: number of the group, and slice of its samples.
        """
        for group, samples in groups:
            self._first[group] += fhat[samples].sum((0, 1))
            self._second[group] += fhat[samples].square().sum((0, 1))
            self.rows[group] += num_valid(fhat[samples], None if mask is None else mask[samples])

    def replicates(self) -> Tensor:
        """Jackknife replicates of the variances, shape ``(G, r)``; G is 0 if there is only one group."""
        return leave_one_out(self._second, self.rows) - leave_one_out(self._first, self.rows).square()

    def mean_square(self) -> Tensor:
        """Mean squares over all groups, shape ``(r,)``, float64."""
        return self._second.sum(0) / self.rows.sum()

    def mean_square_replicates(self) -> Tensor:
        """Jackknife replicates of the mean squares, shape ``(G, r)``; G is 0 if there is only one group."""
        return leave_one_out(self._second, self.rows)
