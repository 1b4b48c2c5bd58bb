"""Sampling with unequal probabilities: which features each sample is pushed forward for."""

from __future__ import annotations

import torch
from torch import Tensor


def inclusion_probabilities(size: Tensor, count: int) -> Tensor:
    """Probabilities proportional to some sizes, at most 1, whose sum is the number of items to choose.

    Args:
        size: Non-negative sizes of the items, shape ``(r,)``, floating point.
        count: Number of items to choose.

    Returns:
        One probability for each item, shape ``(r,)``, float64; all of them 1 if no more than ``count`` sizes are
        positive. Items of size zero have probability zero.

    Note:
        Source: Horvitz and Thompson (1952), https://doi.org/10.1080/01621459.1952.10483446, section 4. Items whose
        probability would exceed 1 are always chosen, and the rest is divided among the others.

    Example:
        >>> inclusion_probabilities(torch.tensor([6.0, 1.0, 1.0]), 2)
        tensor([1.0000, 0.5000, 0.5000], dtype=torch.float64)
    """
    size = size.double().clamp(min=0)
    order = size.argsort(descending=True)
    ordered = size[order]
    positive = int((ordered > 0).sum())
    if count >= positive:
        return (size > 0).double()
    # The k largest are certain: k is the first number for which the next probability is at most 1.
    rest = ordered.flip(0).cumsum(0).flip(0)[:count]
    certain = int(((count - torch.arange(count, device=size.device)) * ordered[:count] > rest).long().cumprod(0).sum())
    share = (count - certain) / ordered[certain:].sum()
    probabilities = torch.empty_like(size)
    probabilities[order] = torch.cat([torch.ones_like(ordered[:certain]), ordered[certain:] * share])
    return probabilities


def systematic_sample(probabilities: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Choose items with given probabilities, the same number in every draw.

    Points at distance 1, with a random start in each draw, are laid over the cumulated probabilities. Items are taken
    in a random order, so that the choice of one says little about that of any other. Starts are spread evenly over the
    draws: an item is chosen in as many of them as its probability says, up to two more or less. Left to chance, that
    number would be most of the error of a sum.

    Args:
        probabilities: Probability of each item, at most 1, with a whole number as their sum; shape ``(r,)``, float64.
        draws: Number of draws ``n``.
        generator: Source of randomness, on the CPU.

    Returns:
        Indices of the chosen items, each at most once in a draw; shape ``(n, k)``, int64, with ``k`` the sum of the
        probabilities.

    Note:
        Source: Madow (1949), "On the theory of systematic sampling, II", https://doi.org/10.1214/aoms/1177729988.

    Example:
        >>> systematic_sample(torch.tensor([1.0, 0.0, 1.0]), 1, torch.Generator().manual_seed(0)).sort().values
        tensor([[0, 2]])
    """
    count = round(float(probabilities.sum()))
    order = torch.randperm(len(probabilities), generator=generator, device="cpu").to(probabilities.device)
    ends = probabilities[order].cumsum(0)
    start = torch.rand(draws, 1, dtype=torch.float64, generator=generator, device="cpu")
    start = (start + torch.randperm(draws, generator=generator, device="cpu")[:, None]) / draws
    points = start.to(ends) + torch.arange(count, dtype=torch.float64, device=ends.device)
    # Rounding may leave the last point beyond the last end, or on an item of probability zero.
    last = int(probabilities[order].nonzero()[-1]) if count else 0
    return order[torch.searchsorted(ends, points.contiguous(), right=True).clamp(max=last)]
