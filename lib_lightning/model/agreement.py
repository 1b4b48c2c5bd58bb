"""Whether two computations of the same numbers agree up to rounding."""

from __future__ import annotations

import torch
from torch import Tensor

from lib_lightning.model.precision import product_dtype, to_float64

# Squares of smaller numbers would lose digits in float32.
_SMALL = 1e-15


def agree(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether the difference of two tensors is small, relative to the second one, in Euclidean length.

    Args:
        a: One result.
        b: The other one.
        tolerance: Length of the difference as a share of the length of ``b``, at most.

    Returns:
        False if the shapes differ or a number is NaN or infinite: sizes that cannot be compared are no agreement.

    Example:
        >>> agree(torch.tensor([1e30, 1.0]), torch.tensor([1e30, 0.0]), 1e-6)
        True
        >>> agree(torch.tensor([torch.inf]), torch.tensor([torch.inf]), 1e-6)
        False
    """
    if a.shape != b.shape:
        return False
    size = length(b)
    return bool(torch.isfinite(size)) and bool(length(to_float64(a) - to_float64(b)) <= tolerance * size)


def length(x: Tensor) -> Tensor:
    """Euclidean length of all entries of a tensor, without overflow of their squares.

    Args:
        x: Floating-point numbers of any shape and type.

    Returns:
        The length, float64, a scalar; infinite or NaN if an entry is.

    Example:
        >>> f"{length(torch.tensor([3e30, 4e30])):.3g}"
        '5e+30'
    """
    x = x.detach().to(product_dtype(x.dtype))
    size: Tensor = to_float64(x.norm())
    if _SMALL < size < torch.inf:
        return size
    # Squares leave the range of the type.
    x = to_float64(x)
    largest = x.abs().amax() if x.numel() else x.new_zeros(())
    if 0 < largest < torch.inf:
        largest = largest * (x / largest).norm()
    return largest
