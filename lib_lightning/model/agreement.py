"""Whether two computations of the same numbers agree up to rounding, and how large that may be.

All tolerances are here. Each follows from what differs between the two computations, in units of the precision ``eps``
of the numbers:

- one operation on the same numbers: the last digit, `LAST_DIGIT` of them;
- the same operations, which an accelerator may sum in another order: 1,000 ``eps``, and never more than half of the
  digits (in half precision 1,000 ``eps`` would exceed the numbers);
- other kernels, such as those for another number of samples, also along several layers: half of the digits. What is
  told apart by it (rows of other samples, a path around a node layer) differs by more than that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lib_lightning.model.precision import product_dtype, to_float64

# Units of precision by which the results of one operation on the same numbers may differ.
LAST_DIGIT = 2
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


def half_of_the_digits(dtype: torch.dtype) -> float:
    """The tolerance for results of other kernels, relative to the largest number.

    Example:
        >>> f"{half_of_the_digits(torch.float32):.1e}"
        '3.5e-04'
    """
    return float(torch.finfo(dtype).eps ** 0.5)


def other_order(dtype: torch.dtype) -> float:
    """The tolerance for the same operations with sums in another order, relative to the largest number.

    Example:
        >>> f"{other_order(torch.float64):.1e} {other_order(torch.bfloat16):.1e}"
        '2.2e-13 8.8e-02'
    """
    return min(1000 * torch.finfo(dtype).eps, half_of_the_digits(dtype))


def same_numbers(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether two tensors are equal entry by entry, up to a tolerance.

    Args:
        a: One result.
        b: The other one.
        tolerance: Largest difference of two entries, as a share of the largest entry of ``b``.

    Returns:
        False if the shapes differ. Entries that are infinite or NaN have to be the same, and so have integers.

    Example:
        >>> same_numbers(torch.tensor([1.0, torch.nan]), torch.tensor([1.0 + 1e-6, torch.nan]), 1e-5)
        True
        >>> same_numbers(torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.inf]), 1e-5)
        False
    """
    if a.shape != b.shape or not b.is_floating_point():
        return a.shape == b.shape and torch.equal(a, b)
    finite = torch.isfinite(b)
    if not torch.equal(torch.nan_to_num(a[~finite], nan=0.5), torch.nan_to_num(b[~finite], nan=0.5)):
        return False
    a, b = to_float64(a[finite]), to_float64(b[finite])
    return not len(b) or bool((a - b).abs().max() <= tolerance * b.abs().max())


def any_differs(rows: Tensor, first: Tensor) -> Tensor:
    """Whether any of several results of one operation differs from another by more than its last digit.

    Args:
        rows: Results, one a row, shape ``(m, d)``.
        first: The other one, shape ``(1, d)``.

    Returns:
        A boolean scalar on their device, which is not waited for.

    Example:
        >>> any_differs(torch.tensor([[1.0], [1.0 + 1e-7]]), torch.ones(1, 1)).item()
        False
    """
    return (rows - first).abs().max() > LAST_DIGIT * torch.finfo(rows.dtype).eps * first.abs().max()


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
