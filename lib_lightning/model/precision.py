"""Products of single precision numbers as they are: rounded to TF32 or bfloat16 they would be a metric of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def full_precision() -> Callable[[], None]:
    """Switch off whatever rounds the factors of single precision products to fewer digits.

    Returns:
        Puts things back as they were.
    """
    backends: Any = torch.backends
    cuda, cudnn = backends.cuda.matmul, backends.cudnn
    try:
        before, allowed = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:  # the newer switches have been used, and the older ones must not be any more
        newer = [cuda, cudnn.conv, cudnn.rnn, backends.mkldnn.matmul]
        values = [switch.fp32_precision for switch in newer]
        for switch in newer:
            switch.fp32_precision = "ieee"

        def restore_newer() -> None:
            for switch, value in zip(newer, values, strict=True):
                switch.fp32_precision = value

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
    """Type to multiply and sum one batch in: half precision would overflow."""
    return torch.float32 if torch.finfo(dtype).bits < 32 else dtype
