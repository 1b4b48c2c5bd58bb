"""How sure a number is: sums over groups of samples, each left out once (the jackknife).

The samples of a run are taken in a few groups of consecutive ones. Leaving one group out of every sum gives a replicate
of each importance and each edge, without another pass; how far the replicates lie apart is their standard error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.distributed.process_group import Reducible
from lib_lightning.model.vjp import num_valid

# As many replicates show a standard error to about a quarter of itself, and cost as many copies of each sum.
GROUPS = 8


def group_slices(start: int, stop: int, n: int, groups: int) -> Iterator[tuple[int, slice]]:
    """The groups that a batch of consecutive samples lies in.

    Args:
        start: Number of its first sample among all.
        stop: Number after its last sample.
        n: Number of all samples.
        groups: Number of groups.

    Yields:
        The number of a group and the slice of the batch that belongs to it.

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
        counts: What it is a sum of, shape ``(G,)``, on the CPU; groups of nothing are passed over.

    Returns:
        One mean for each group that has something in it, shape ``(G', ...)``; none if there is only one.

    Example:
        >>> leave_one_out(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1, 1, 2]))
        tensor([2.6667, 2.3333, 1.5000])
    """
    there = [g for g, count in enumerate(counts.tolist()) if count > 0]
    if len(there) < 2:
        return sums[:0]
    sums, counts = sums[there], counts[there].to(sums)
    rest = (counts.sum() - counts).reshape(-1, *[1] * (sums.ndim - 1))
    return (sums.sum(0) - sums) / rest


def standard_error(replicates: Tensor) -> Tensor:
    """Standard error by the jackknife: ``sqrt((G - 1)/G sum_g (x_g - mean)^2)``.

    Args:
        replicates: ``x_g``, shape ``(G, ...)``: the number as it comes out if group ``g`` of ``G`` equally large groups
            of samples is left out. Floating point.

    Returns:
        The standard error of the number from all samples, shape ``(...)``; NaN if there are fewer than two groups.

    Note:
        Source: Efron and Stein (1981), "The jackknife estimate of variance", https://doi.org/10.1214/aos/1176345462,
        after Tukey (1958); with groups in the place of single samples.

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
    """Features whose direction these samples do not fix: two of one importance may be rotated into each other.

    Args:
        importance: ``Lambda``, descending, shape ``(r,)``.
        replicates: Replicates of it, shape ``(G, r)``.

    Returns:
        True for both of two neighbours that are less than two standard errors of their difference apart, shape
        ``(r,)``. (Two such features turn by about a quarter of a radian from one set of samples to another.)

    Example:
        >>> near_degenerate(torch.tensor([2.0, 1.1, 1.0]), torch.tensor([[2.1, 1.2, 1.0], [1.9, 1.0, 1.0]]))
        tensor([False,  True,  True])
    """
    error = standard_error(replicates[:, :-1] - replicates[:, 1:])
    close = importance[:-1] - importance[1:] < 2 * error
    no = torch.zeros(min(1, len(importance)), dtype=torch.bool, device=close.device)
    return torch.cat([no, close]) | torch.cat([close, no])


class FeatureVariances(Reducible):
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

    def update(self, fhat: Tensor, mask: Tensor | None, group_slices: list[tuple[int, slice]]) -> None:
        """Add one batch.

        Args:
            fhat: Features, zero at positions that do not count, shape ``(n, S, r)``, float64.
            mask: True at positions that count, shape ``(n, S)``; None where all do.
            group_slices: The groups, and which samples of the batch belong to each.
        """
        for group, span in group_slices:
            self._first[group] += fhat[span].sum((0, 1))
            self._second[group] += fhat[span].square().sum((0, 1))
            self.rows[group] += num_valid(fhat[span], None if mask is None else mask[span])

    def replicates(self) -> Tensor:
        """Variances with one group of samples left out at a time, ``(G, r)``; G is 0 where there is only one group."""
        return leave_one_out(self._second, self.rows) - leave_one_out(self._first, self.rows).square()
