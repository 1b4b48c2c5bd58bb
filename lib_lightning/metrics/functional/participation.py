"""Effective number of entries of a set of weights, from their squares."""

from __future__ import annotations

from torch import Tensor


def participation_ratio(weights: Tensor) -> Tensor:
    """Participation ratio: ``(sum w)^2 / sum w^2``.

    Small weights contribute less than to the perplexity.

    Args:
        weights: Non-negative, any shape.

    Returns:
        A scalar between 1 (one non-zero entry) and the number of entries (all equal); 0 if all are zero.

    Note:
        Source: inverse participation ratio, Bell and Dean (1970), https://doi.org/10.1039/DF9705000055.

    Example:
        >>> import torch
        >>> participation_ratio(torch.tensor([3.0, 3.0, 0.0])), participation_ratio(torch.tensor([2.0, 1.0]))
        (tensor(2.), tensor(1.8000))
    """
    if weights.numel() == 0 or weights.amax() <= 0:
        return weights.new_zeros(())
    # Scaled to a largest weight of 1, because squares of tiny weights underflow.
    w = weights / weights.amax()
    return w.sum().square() / w.square().sum()
