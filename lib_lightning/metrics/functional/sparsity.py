"""Sparsity of weights: 0 if all are equal, close to 1 if few of many are non-zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lib_lightning.model.precision import to_float64


def gini(weights: Tensor) -> Tensor:
    """Gini coefficient: mean absolute difference of two weights, divided by twice their mean.

    Args:
        weights: Non-negative, any shape.

    Returns:
        A float64 scalar between 0 (all weights are equal, or there is at most one) and ``1 - 1/n`` (one of ``n`` is
        non-zero).

    Note:
        Source: Hurley and Rickard, arXiv 0811.4706, a comparison of measures of sparsity.

    Example:
        >>> import torch
        >>> gini(torch.ones(2, 2)), gini(torch.tensor([0.0, 0.0, 0.0, 5.0]))
        (tensor(0., dtype=torch.float64), tensor(0.7500, dtype=torch.float64))
    """
    w = to_float64(weights.detach()).flatten().sort().values
    n, total = w.numel(), w.sum()
    if n == 0 or total <= 0:
        return w.new_zeros(())
    # In all pairs, the k-th smallest weight (from 0) is k times the larger and n - 1 - k times the smaller one.
    ranks = 2 * torch.arange(n, dtype=w.dtype, device=w.device) - (n - 1)
    return ((ranks * w).sum() / (n * total)).clamp(0, 1)


def hoyer(weights: Tensor) -> Tensor:
    """Hoyer's sparsity: ``(sqrt(n) - |w|_1 / |w|_2) / (sqrt(n) - 1)``.

    Args:
        weights: ``n`` non-negative weights, any shape.

    Returns:
        A float64 scalar between 0 (all weights are equal, or there is at most one) and 1 (one of several is non-zero).

    Note:
        Source: Hoyer (2004), section 3.1, https://www.jmlr.org/papers/v5/hoyer04a.html.

    Example:
        >>> import torch
        >>> hoyer(torch.ones(2, 2)), hoyer(torch.tensor([0.0, 0.0, 0.0, 5.0]))
        (tensor(0., dtype=torch.float64), tensor(1., dtype=torch.float64))
    """
    w = to_float64(weights.detach()).flatten()
    if w.numel() < 2 or w.amax() <= 0:
        return w.new_zeros(())
    # Scaled to a largest weight of 1, because squares of tiny weights underflow.
    w = w / w.amax()
    root = math.sqrt(w.numel())
    ratio: Tensor = w.sum() / w.square().sum().sqrt()
    sparsity: Tensor = (root - ratio) / (root - 1)
    return sparsity.clamp(0, 1)
