"""How similar features are by chance: with samples permuted in one network, and with a random basis of its subspace."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.special import betainc
from torch import Tensor

# Values that are multiplied at once.
_AT_ONCE = 1 << 24


def permuted_p_values(
    others: Tensor,
    features: Tensor,
    observed: Tensor,
    statistic: Callable[[Tensor], Tensor],
    block: int | None,
    count: int,
    generator: np.random.Generator,
) -> Tensor:
    """P-values of permutation tests, of the hypotheses that features have nothing to do with those of another network.

    Whole samples are permuted, so that values at positions of one sample stay together.

    Args:
        others: Of the other network, in columns with mean 0 and length 1, shape ``(N, r)``.
        features: The features, in columns with mean 0 and length 1, shape ``(N, m)``.
        observed: The statistic of each feature, shape ``(m,)``.
        statistic: From products with all columns of the other network, shape ``(r, ...)``, to the statistic:
            `strongest` or `total`.
        block: Number of rows of each sample; None if unknown, where rows are shifted cyclically instead.
        count: Number of permutations.
        generator: Random numbers.

    Returns:
        The p-values, shape ``(m,)``, float64: at least ``1 / (count + 1)``.

    Note:
        Source: Phipson and Smyth, "Permutation P-values should never be zero", Stat. Appl. Genet. Mol. Biol. 9(1),
        2010.

    Example:
        >>> x = torch.linspace(-1, 1, 1000).unsqueeze(1)
        >>> x /= x.norm()
        >>> permuted_p_values(x, x, torch.ones(1), strongest, 1, 199, np.random.default_rng(0))
        tensor([0.0050], dtype=torch.float64)
    """
    N, m = features.shape
    reached = torch.zeros(m, dtype=torch.float64, device="cpu")
    if not m:
        return reached
    others, features = others.T.float(), features.float()
    # A permutation that changes nothing reaches what is observed, up to rounding.
    needed = (observed * (1 - 1e-5)).float()
    step = max(1, _AT_ONCE // (m * max(others.shape)))
    for start in range(0, count, step):
        rows = permuted_rows(N, block, min(step, count - start), generator)
        products = others @ features[rows.T].flatten(1)
        reached += (statistic(products).unflatten(0, (-1, m)) >= needed).sum(0)
    return (1 + reached) / (1 + count)


def strongest(products: Tensor) -> Tensor:
    """The largest correlation, which accounts for the choice of the most similar feature.

    Args:
        products: Correlations with the features of the other network, shape ``(r, ...)``.

    Returns:
        The largest absolute value, shape ``(...)``.
    """
    return products.abs().amax(0)


def total(products: Tensor) -> Tensor:
    """The share of the variance that the other network's features explain together.

    Args:
        products: Products with an orthonormal basis of their span, shape ``(r, ...)``.

    Returns:
        The shares, shape ``(...)``.
    """
    return products.square().sum(0)


def permuted_rows(N: int, block: int | None, count: int, generator: np.random.Generator) -> Tensor:
    """Row numbers after permutations of whole samples.

    Args:
        N: Number of rows.
        block: Number of consecutive rows of each sample; None for cyclic shifts.
        count: Number of permutations.
        generator: Random numbers.

    Returns:
        Shape ``(count, N)``, int64.

    Example:
        >>> permuted_rows(6, 3, 1, np.random.default_rng(3)).tolist()
        [[3, 4, 5, 0, 1, 2]]
    """
    if block is None:
        shifts = torch.from_numpy(generator.integers(N, size=(count, 1)))
        return (torch.arange(N, device="cpu") + shifts) % N
    # Ten times as fast as sorting random numbers.
    samples = torch.from_numpy(generator.permuted(np.tile(np.arange(N // block), (count, 1)), axis=1))
    return (samples.unsqueeze(-1) * block + torch.arange(block, device="cpu")).flatten(1)


def rotated_p_values(squared: Tensor, explained: Tensor, num_features: int, dimension: int) -> Tensor:
    """P-values of the hypotheses that two networks share a subspace, but not the features in it.

    Features of two networks are functions of the same inputs. Where they span the same subspace, random ones of it are
    correlated, too. This is the probability that a random basis of the subspace has a feature that correlates with a
    given one at least as strongly: a coordinate of a random unit vector has a Beta distributed square, and no two
    coordinates can both have a square above one half, from where on the sum over coordinates is exact; below it is an
    upper bound.

    Args:
        squared: Squared correlations, shape ``(m,)``.
        explained: Share of the variance of each feature that the subspace explains, shape ``(m,)``.
        num_features: Number of features of the other network.
        dimension: Dimension of the subspace.

    Returns:
        The p-values, shape ``(m,)``, float64; 0 for a subspace of one dimension, whose only feature is itself.

    Example:
        >>> rotated_p_values(torch.tensor([0.5, 0.9]).double(), torch.ones(2).double(), 2, 2)
        tensor([1.0000, 0.4097], dtype=torch.float64)
    """
    if dimension < 2:
        return torch.zeros_like(squared)
    share = (squared / explained.clamp(min=torch.finfo(torch.float64).tiny)).clamp(0, 1)
    tail = torch.from_numpy(betainc((dimension - 1) / 2, 0.5, 1 - share.numpy()))
    return (num_features * tail).clamp(max=1)
