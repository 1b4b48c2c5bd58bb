"""How many interactions there are between two node layers."""

from __future__ import annotations

from torch import Tensor

from lib_lightning.metrics.functional.perplexity import perplexity


def number_of_edges(edges: Tensor, rtol: float = 1e-3) -> Tensor:
    """Count the edges that are stronger than a share of the strongest one.

    Args:
        edges: ``E``, shape ``(r_out, r_in)``, non-negative.
        rtol: The share.

    Returns:
        The count, a scalar of type int64.

    Example:
        >>> import torch
        >>> number_of_edges(torch.tensor([[1.0, 1e-4], [0.1, 0.0]]))
        tensor(2)
    """
    return (edges > rtol * edges.amax()).sum() if edges.numel() else edges.new_zeros(()).long()


def effective_edges(edges: Tensor) -> Tensor:
    """Effective number of edges: the perplexity of their strengths.

    Args:
        edges: ``E``, shape ``(r_out, r_in)``, non-negative.

    Returns:
        A scalar between 1 and ``r_out * r_in``.

    Example:
        >>> import torch
        >>> effective_edges(torch.eye(4))
        tensor(4.)
    """
    return perplexity(edges)
