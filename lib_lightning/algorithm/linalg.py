"""Positive semi-definite matrices: Gram sums, eigendecompositions, and the numerical rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lib_lightning.errors import NotFiniteError
from lib_lightning.model.precision import product_dtype

# Up to this width, threads are faster if each takes some of the rows. Measured on two cores: by a fifth at 128, not at
# all at 512.
_NARROW = 256


@dataclass(frozen=True)
class Cutoff:
    """The share of the largest eigenvalue up to which eigenvalues are treated as zero.

    Args:
        rtol: Requested relative truncation; 0 truncates to the numerical rank, which depends on rounding.
        size: Number of rows of the matrices.
        dtype: Type in which activations and gradients were computed.

    Example:
        >>> Cutoff(1e-6, 100, torch.float64).variance
        1e-06
        >>> Cutoff(0.0, 4, torch.float64).metric == 4 * torch.finfo(torch.float64).eps
        True
    """

    rtol: float
    size: int
    dtype: torch.dtype

    @property
    def variance(self) -> float:
        """Cutoff for variances that are importances, as in PCA."""
        return max(self.rtol, self.rounding)

    @property
    def rounding(self) -> float:
        """Cutoff for variances that are only rounding error: of sums in float64, and of activations, squared."""
        return max(self.size * torch.finfo(torch.float64).eps, torch.finfo(self.dtype).eps ** 2)

    @property
    def metric(self) -> float:
        """Cutoff for the metric and for importances: products of gradients are rounded to the type of the gradients."""
        eps = max(torch.finfo(product_dtype(self.dtype)).eps, torch.finfo(torch.float64).eps)
        return max(self.rtol, self.size * torch.finfo(torch.float64).eps, 4 * eps)


def add_gram(total: Tensor, rows: Tensor) -> None:
    """Add ``rows^T rows`` to a matrix, in place.

    Args:
        total: The matrix, shape ``(d, d)``, float64.
        rows: Shape ``(m, d)``, float64.

    Example:
        >>> total = torch.zeros(2, 2, dtype=torch.float64)
        >>> add_gram(total, torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64))
        >>> total
        tensor([[1., 2.],
                [2., 5.]], dtype=torch.float64)
    """
    m, d = rows.shape
    # Threads that share a narrow result would wait for each other.
    threads = torch.get_num_threads() if rows.device.type == "cpu" and d <= _NARROW else 1
    shares = min(threads, m // max(1, d))
    if shares > 1:
        each = m // shares
        parts = rows[: each * shares].unflatten(0, (shares, each))
        total += torch.bmm(parts.mT, parts).sum(0)
        rows = rows[each * shares :]
    total.addmm_(rows.T, rows)


def eigh_psd(matrix: Tensor, cutoff: float, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """Eigendecomposition ``A = U D U^T`` of a positive semi-definite matrix, without its null space.

    Args:
        matrix: ``A``, symmetric, shape ``(d, d)``, float64.
        cutoff: Eigenvalues up to this share of the largest one are dropped.
        floor: Eigenvalues up to this size are dropped as well.

    Returns:
        Eigenvalues ``(r,)``, descending, and eigenvectors ``(d, r)``.

    Raises:
        NotFiniteError: If an entry is NaN or infinite.

    Example:
        >>> values, vectors = eigh_psd(torch.diag(torch.tensor([1.0, 0.0, 4.0])), 1e-9)
        >>> values, vectors.abs()
        (tensor([4., 1.]), tensor([[0., 1.],
                [0., 0.],
                [1., 0.]]))
    """
    if not torch.isfinite(matrix).all():
        raise NotFiniteError(
            "A sum of squares of activations or gradients exceeds the range of float64. Scale the model's numbers."
        )
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    keep = values > max(float(cutoff * values.clamp(min=0).amax()), floor)
    return values[keep], vectors[:, keep]
