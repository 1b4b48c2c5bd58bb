"""Numbers of interactions between two node layers."""

from __future__ import annotations

from torch import Tensor

from lib_lightning.errors import LIBError
from lib_lightning.metrics.functional.perplexity import perplexity
from lib_lightning.model.precision import to_float64


def number_of_edges(edges: Tensor, rtol: float = 1e-3) -> Tensor:
    """Count the edges above a fraction of the strongest one.

    Args:
        edges: ``E``, shape ``(r_out, r_in)``, non-negative.
        rtol: The fraction.

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


def share_of_edges(edges: Tensor, share: float = 0.99) -> Tensor:
    """Smallest fraction of the edges that has a given share of the total strength.

    Args:
        edges: ``E``, shape ``(r_out, r_in)``, non-negative.
        share: The share, above 0 and at most 1; 1 counts all non-zero edges.

    Returns:
        A float64 scalar between 0 (all edges are zero) and 1 (every edge is needed).

    Raises:
        LIBError: If the share is out of range.

    Example:
        >>> import torch
        >>> share_of_edges(torch.tensor([[8.0, 1.0], [0.5, 0.5]]), share=0.9)
        tensor(0.5000, dtype=torch.float64)
    """
    check_share(share)
    strengths = to_float64(edges.detach()).flatten()
    cumulative = strengths.sort(descending=True).values.cumsum(0)
    if strengths.numel() == 0 or cumulative[-1] <= 0:
        return strengths.new_zeros(())
    # With a margin for rounding, so that nine of ten equal edges have a share of 0.9.
    required = share * cumulative[-1] * (1 - 1e-12)
    return ((cumulative < required).sum() + 1).double() / strengths.numel()


def check_share(share: float) -> None:
    """Check that a share is above 0 and at most 1.

    Args:
        share: The share.

    Raises:
        LIBError: If it is out of range.
    """
    if not 0 < share <= 1:
        raise LIBError(f"share={share!r}: the share of the total strength must be above 0 and at most 1.")
