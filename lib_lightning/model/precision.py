"""Full precision of float32 products: rounding to TF32 or bfloat16 would dominate small eigenvalues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


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
