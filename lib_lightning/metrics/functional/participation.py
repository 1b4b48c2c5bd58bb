"""How many entries a set of weights effectively has, by their squares."""

from __future__ import annotations

from torch import Tensor


def participation_ratio(weights: Tensor) -> Tensor:
    """Square of the sum over sum of the squares: ``(sum w)^2 / sum w^2``.

    Small weights count for less than in the perplexity.

    Args:
        weights: Non-negative, any shape.

    Returns:
        A scalar between 1 (one entry holds everything) and the number of entries (all equal); 0 without any weight.

    Note:
        Source: inverse participation ratio, Bell and Dean (1970), https://doi.org/10.1039/DF9705000055.

    Example:
        >>> import torch
        >>> participation_ratio(torch.tensor([3.0, 3.0, 0.0])), participation_ratio(torch.tensor([2.0, 1.0]))
        (tensor(2.), tensor(1.8000))
    """
    if weights.numel() == 0 or weights.amax() <= 0:
        return weights.new_zeros(())
    # The largest becomes 1, for squares of tiny weights would vanish.
    w = weights / weights.amax()
    return w.sum().square() / w.square().sum()
