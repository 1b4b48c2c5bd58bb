"""How sure a number is: sums over groups of samples, each left out once (the jackknife).

The samples of a run are taken in a few groups of consecutive ones. Leaving one group out of every sum gives a replicate
of each importance and each edge, without another pass; how far the replicates lie apart is their standard error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# As many replicates show a standard error to about a quarter of itself, and cost as many copies of each sum.
GROUPS = 8


def spans(start: int, stop: int, n: int, groups: int) -> Iterator[tuple[int, slice]]:
    """The groups that a batch of consecutive samples lies in.

    Args:
        start: Number of its first sample among all.
        stop: Number after its last sample.
        n: Number of all samples.
        groups: Number of groups.

    Yields:
        The number of a group and the slice of the batch that belongs to it.

    Example:
        >>> list(spans(2, 6, 8, 2))
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


def too_close(importance: Tensor, replicates: Tensor) -> Tensor:
    """Features whose direction these samples do not fix: two of one importance may be rotated into each other.

    Args:
        importance: ``Lambda``, descending, shape ``(r,)``.
        replicates: Replicates of it, shape ``(G, r)``.

    Returns:
        True for both of two neighbours that are less than two standard errors of their difference apart, shape
        ``(r,)``. (Two such features turn by about a quarter of a radian from one set of samples to another.)

    Example:
        >>> too_close(torch.tensor([2.0, 1.1, 1.0]), torch.tensor([[2.1, 1.2, 1.0], [1.9, 1.0, 1.0]]))
        tensor([False,  True,  True])
    """
    error = standard_error(replicates[:, :-1] - replicates[:, 1:])
    close = importance[:-1] - importance[1:] < 2 * error
    no = torch.zeros(min(1, len(importance)), dtype=torch.bool, device=close.device)
    return torch.cat([no, close]) | torch.cat([close, no])
