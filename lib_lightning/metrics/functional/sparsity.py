"""How unequal weights are: 0 if all are equal, towards 1 if few of many hold everything."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gini(weights: Tensor) -> Tensor:
    """Gini coefficient: mean difference between two weights, over twice their mean.

    Args:
        weights: Non-negative, any shape.

    Returns:
        A float64 scalar between 0 (all equal; so are a single weight, none at all, and zeros) and ``1 - 1/n`` (one of
        ``n`` holds everything).

    Note:
        Source: Hurley and Rickard, arXiv 0811.4706, who compare measures of sparsity.

    Example:
        >>> import torch
        >>> gini(torch.ones(2, 2)), gini(torch.tensor([0.0, 0.0, 0.0, 5.0]))
        (tensor(0., dtype=torch.float64), tensor(0.7500, dtype=torch.float64))
    """
    w = weights.detach().double().flatten().sort().values
    n, total = w.numel(), w.sum()
    if n == 0 or total <= 0:
        return w.new_zeros(())
    # Of all pairs, the k-th smallest (from 0) is the larger one in k and the smaller one in n - 1 - k.
    ranks = 2 * torch.arange(n, dtype=w.dtype, device=w.device) - (n - 1)
    return ((ranks * w).sum() / (n * total)).clamp(0, 1)


def hoyer(weights: Tensor) -> Tensor:
    """Hoyer's sparsity: ``(sqrt(n) - |w|_1 / |w|_2) / (sqrt(n) - 1)``.

    Args:
        weights: Non-negative, any shape; ``n`` of them.

    Returns:
        A float64 scalar between 0 (all equal; so are a single weight, none at all, and zeros) and 1 (one of several
        holds everything).

    Note:
        Source: Hoyer (2004), section 3.1, https://www.jmlr.org/papers/v5/hoyer04a.html.

    Example:
        >>> import torch
        >>> hoyer(torch.ones(2, 2)), hoyer(torch.tensor([0.0, 0.0, 0.0, 5.0]))
        (tensor(0., dtype=torch.float64), tensor(1., dtype=torch.float64))
    """
    w = weights.detach().double().flatten()
    if w.numel() < 2 or w.amax() <= 0:
        return w.new_zeros(())
    # The largest becomes 1, for squares of tiny weights would vanish.
    w = w / w.amax()
    root = math.sqrt(w.numel())
    ratio: Tensor = w.sum() / w.square().sum().sqrt()
    sparsity: Tensor = (root - ratio) / (root - 1)
    return sparsity.clamp(0, 1)
