"""How many interactions there are between two node layers."""

from __future__ import annotations

from torch import Tensor

from lib_lightning.errors import LIBError
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


def share_of_edges(edges: Tensor, share: float = 0.99) -> Tensor:
    """Fraction of all edges, the strongest first, that is needed to hold a share of their total strength.

    Args:
        edges: ``E``, shape ``(r_out, r_in)``, non-negative.
        share: The share, above 0 and at most 1; at 1, all edges that are not zero are needed.

    Returns:
        A float64 scalar between 0 (there is no strength to hold) and 1 (every edge is needed).

    Raises:
        LIBError: If the share lies outside.

    Example:
        >>> import torch
        >>> share_of_edges(torch.tensor([[8.0, 1.0], [0.5, 0.5]]), share=0.9)
        tensor(0.5000, dtype=torch.float64)
    """
    check_share(share)
    strengths = edges.detach().double().flatten()
    held = strengths.sort(descending=True).values.cumsum(0)
    if strengths.numel() == 0 or held[-1] <= 0:
        return strengths.new_zeros(())
    # Nine of ten equal edges hold 0.9, whichever way their sum is rounded.
    enough = share * held[-1] * (1 - 1e-12)
    return ((held < enough).sum() + 1).double() / strengths.numel()


def check_share(share: float) -> None:
    """Refuse what is no share.

    Args:
        share: Should lie above 0 and be at most 1.

    Raises:
        LIBError: If it does not.
    """
    if not 0 < share <= 1:
        raise LIBError(f"share={share!r}: the share of the strength must lie above 0 and be at most 1.")
