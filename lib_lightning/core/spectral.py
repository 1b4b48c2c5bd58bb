"""Symmetric positive semi-definite matrices: eigenvectors, numerical rank and square-root factors."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_cutoff(rtol: float, size: int, dtype: torch.dtype) -> float:
    """Say below which share of the largest eigenvalue an eigenvalue counts as zero.

    Args:
        rtol: Relative truncation asked for; 0 asks for the numerical rank only.
        size: Number of rows of the matrix.
        dtype: Type that the matrix entries were computed in; its rounding sets the least cutoff.

    Returns:
        The cutoff, a share between 0 and 1.

    Example:
        >>> relative_cutoff(1e-6, 100, torch.float64)
        1e-06
        >>> relative_cutoff(0.0, 4, torch.float64) == 4 * torch.finfo(torch.float64).eps
        True
    """
    return max(rtol, size * torch.finfo(dtype).eps)


def eigh_psd(matrix: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """Eigendecomposition ``A = U D U^T`` of a positive semi-definite matrix, without its null space.

    Args:
        matrix: ``A``, symmetric, shape ``(d, d)``, float64.
        cutoff: Eigenvalues up to this share of the largest one are dropped.

    Returns:
        Eigenvalues ``(r,)``, descending, and eigenvectors ``(d, r)``.

    Example:
        >>> values, vectors = eigh_psd(torch.diag(torch.tensor([1.0, 0.0, 4.0])), 1e-9)
        >>> values, vectors.abs()
        (tensor([4., 1.]), tensor([[0., 1.],
                [0., 0.],
                [1., 0.]]))
    """
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    keep = values > cutoff * values.clamp(min=0).amax()
    return values[keep], vectors[:, keep]


def factor_psd(matrix: Tensor, cutoff: float) -> Tensor:
    """Square-root factor ``B`` with ``B^T B = A``, one row for each direction that is not (relatively) zero.

    Args:
        matrix: ``A``, symmetric positive semi-definite, shape ``(d, d)``, float64.
        cutoff: Eigenvalues up to this share of the largest one are dropped.

    Returns:
        ``B`` of shape ``(k, d)``.

    Example:
        >>> factor_psd(torch.diag(torch.tensor([9.0, 0.0])), 1e-9).abs()
        tensor([[3., 0.]])
    """
    values, vectors = eigh_psd(matrix, cutoff)
    return values.sqrt()[:, None] * vectors.T
