"""Precision of products and sums: full float32 instead of TF32, and float64 wherever there is a device for it.

Rounding float32 products to TF32 or bfloat16 would dominate small eigenvalues, and so would sums in float32. Some
devices have no float64 (Apple's MPS, some of Intel's XPU): what is computed there goes to the CPU to be summed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lib_lightning.errors import is_out_of_memory


def full_precision() -> Callable[[], None]:
    """Disable all settings of torch by which float32 products are computed with fewer digits.

    Returns:
        A function that restores the settings.
    """
    backends: Any = torch.backends
    cuda, cudnn = backends.cuda.matmul, backends.cudnn
    try:
        before, allowed = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:  # the caller has used the newer settings, after which the older ones raise an error
        newer = [cuda, cudnn.conv, cudnn.rnn, backends.mkldnn.matmul]
        values = [setting.fp32_precision for setting in newer]
        for setting in newer:
            setting.fp32_precision = "ieee"

        def restore_newer() -> None:
            for setting, value in zip(newer, values, strict=True):
                setting.fp32_precision = value

        return restore_newer
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = False

    def restore() -> None:
        if before != "highest":
            torch.set_float32_matmul_precision(before)
        cudnn.allow_tf32 = allowed

    return restore


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for products and sums over one batch: at least float32, because half precision would overflow."""
    return torch.float32 if torch.finfo(dtype).bits < 32 else dtype


@functools.lru_cache
def supports_float64(device: torch.device) -> bool:
    """Whether a device computes in float64. The device is asked once, with a small product.

    Args:
        device: The device.

    Returns:
        Whether the product was right.

    Example:
        >>> supports_float64(torch.device("cpu"))
        True
    """
    if device.type in ("cpu", "meta"):
        return True
    try:
        x = torch.full((2, 2), 1 / 3, dtype=torch.float64, device=device)
        return abs(float((x @ x).sum()) - 8 / 9) < 1e-12
    except (RuntimeError, TypeError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        return False


def for_sums(t: Tensor) -> Tensor:
    """A tensor on a device that computes in float64: its own, or else the CPU.

    Args:
        t: A tensor of any type.

    Returns:
        The tensor in its own type.
    """
    return t if supports_float64(t.device) else t.cpu()


def to_float64(t: Tensor) -> Tensor:
    """A tensor in float64, on the device of `for_sums`.

    Args:
        t: A tensor of real numbers.

    Returns:
        The same numbers.

    Example:
        >>> to_float64(torch.ones(1))
        tensor([1.], dtype=torch.float64)
    """
    # Two steps: a device without float64 cannot convert to it while copying.
    return for_sums(t).double()
