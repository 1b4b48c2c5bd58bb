"""Effective number of entries of a set of weights, from their entropy."""

from __future__ import annotations

import torch
from torch import Tensor


def perplexity(weights: Tensor) -> Tensor:
    """Exponential of the entropy of normalized weights: ``exp(-sum p log p)``, ``p = w / sum w``.

    Args:
        weights: Non-negative, any shape.

    Returns:
        A scalar between 1 (one non-zero entry) and the number of entries (all equal); 0 if all are zero.

    Example:
        >>> perplexity(torch.tensor([1.0, 1.0, 0.0])), perplexity(torch.tensor([5.0, 0.0]))
        (tensor(2.), tensor(1.))
    """
    total = weights.sum()
    if weights.numel() == 0 or total <= 0:
        return total.new_zeros(())
    entropy: Tensor = torch.special.entr(weights / total).sum()
    return entropy.exp()
