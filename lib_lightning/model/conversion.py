"""Conversion of a model's tensors to the type that is computed in."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from lib_lightning.model.batch import map_tensors, tensors_in

# Attributes that every module has: flags, parameters, buffers, children and hooks.
_MODULE_NAMES = frozenset(vars(nn.Module()))


def target_dtype(t: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The type that a tensor is converted to, to compute in a floating-point type.

    Args:
        t: The tensor.
        dtype: The type that is computed in; None for that of the tensor.

    Returns:
        The type; for complex numbers the one of the same precision, for any others their own.

    Example:
        >>> target_dtype(torch.ones(1), torch.float64), target_dtype(torch.ones(1, dtype=torch.cfloat), torch.float64)
        (torch.float64, torch.complex128)
    """
    if dtype is None or not (t.is_floating_point() or (t.is_complex() and dtype != torch.bfloat16)):
        return t.dtype
    return dtype.to_complex() if t.is_complex() else dtype


def convert_attributes(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert the tensors in plain attributes of a model's modules, also those in lists, tuples, dicts and dataclasses.

    `torch.func.functional_call` replaces registered tensors only, and a product of two types is an error.

    Args:
        model: The model; its attributes are replaced.
        dtype: The type.
    """
    new: dict[int, tuple[Tensor, Tensor]] = {}

    def convert(t: Tensor) -> Tensor:
        if id(t) not in new:
            target = target_dtype(t, dtype)
            new[id(t)] = t, t if target == t.dtype else t.detach().to(target)
        return new[id(t)][1]

    for module in model.modules():
        for name, value in list(vars(module).items()):
            if name not in _MODULE_NAMES and isinstance(value, (Tensor, list, tuple, dict)):
                with contextlib.suppress(RecursionError):  # a container that contains itself
                    if any(convert(t) is not t for t in tensors_in(value)):
                        vars(module)[name] = map_tensors(value, convert)
