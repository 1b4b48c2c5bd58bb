"""Numbers of features of a node layer."""

from __future__ import annotations

from torch import Tensor

from lib_lightning.metrics.functional.perplexity import perplexity


def number_of_features(importance: Tensor, rtol: float = 1e-6) -> Tensor:
    """Count the features with an importance above a fraction of the largest one.

    Args:
        importance: ``Lambda``, shape ``(r,)``.
        rtol: The fraction.

    Returns:
        The count, a scalar of type int64.

    Example:
        >>> import torch
        >>> number_of_features(torch.tensor([1.0, 0.5, 1e-9]))
        tensor(2)
    """
    return (importance > rtol * importance.amax()).sum() if importance.numel() else importance.new_zeros(()).long()


def effective_features(importance: Tensor) -> Tensor:
    """Effective number of features: the perplexity of their importances.

    Args:
        importance: ``Lambda``, shape ``(r,)``, non-negative.

    Returns:
        A scalar between 1 and ``r``.

    Example:
        >>> import torch
        >>> effective_features(torch.tensor([3.0, 3.0, 3.0]))
        tensor(3.)
    """
    return perplexity(importance)
