"""A stand-in for an accelerator, with or without float64: CPU memory that torch says is on another device.

Tensors are ordinary ones. Inside a `StandInDevice` block, those whose memory was created on the device are remembered
by it, their ``device`` reads ``hpu:0``, and an operation raises an error as on a real device if it also takes a tensor
of more than one number from the CPU. Without float64, as on Apple's MPS, so does an operation whose result would be
float64 there, or that MPS lacks.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from lib_lightning.model.precision import supports_float64

DEVICE = torch.device("hpu", 0)
# Operations that MPS lacks.
_NO_KERNEL = ("linalg_eigh", "_linalg_eigh", "linalg_qr", "linalg_svd", "_linalg_svd", "geqrf", "linalg_cholesky_ex")
aten = torch.ops.aten
# Operations for which the host waits.
_WAITING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim")
_WIDE = (torch.float64, torch.complex128)


class StandInDevice:
    """Inside the block, ``model.to(DEVICE)`` and the like put tensors on the device.

    Args:
        float64: Whether the device has it.

    Attributes:
        operations: How many operations have run on the device.
        waits: How often the host has waited for the device: for a number, a size that depends on numbers, or a tensor
            copied from or to the CPU.
    """

    def __init__(self, float64: bool = False) -> None:
        self.float64 = float64
        self.operations = self.waits = 0
        # A weak reference also keeps the address from being used again.
        self._memory: dict[int, StorageWeakRef] = {}
        self._next_purge = 1000
        # Whether a function of tensors on the device runs, which makes new ones there (masks of attention).
        self.inside = False
        self._stack = ExitStack()

    def __enter__(self) -> StandInDevice:
        supports_float64.cache_clear()
        self._stack.enter_context(_Operations(self))
        self._stack.enter_context(_Functions(self))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*exception)
        supports_float64.cache_clear()

    def holds(self, t: Tensor) -> bool:
        """Whether a tensor is on the device."""
        return t.layout == torch.strided and t.untyped_storage()._cdata in self._memory

    def place(self, tensors: Iterable[Any]) -> None:
        """Remember that the memory of new tensors is on the device."""
        for t in tensors:
            if isinstance(t, Tensor) and t.layout == torch.strided:
                if t.dtype in _WIDE and not self.float64:
                    raise TypeError("Cannot convert a tensor to float64 on a device that does not support it.")
                self._memory[t.untyped_storage()._cdata] = StorageWeakRef(t.untyped_storage())
        if len(self._memory) > self._next_purge:
            self._memory = {address: memory for address, memory in self._memory.items() if not memory.expired()}
            self._next_purge = 1000 + 2 * len(self._memory)

    def copied(self, t: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A tensor on either device and in a type: the type changes first, where the tensor is."""
        on_device = device.type == DEVICE.type
        converted = Tensor.to(t, dtype)
        if self.holds(converted) == on_device:
            return converted
        self.waits += 1
        with torch._C.DisableTorchFunction(), _disable_current_modes():
            moved = converted.detach().clone()
        if on_device:
            self.place([moved])
        return moved


class _Operations(TorchDispatchMode):
    """Every operation, also those of backward passes."""

    def __init__(self, device: StandInDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        here = [self.device.holds(t) for t in inputs]
        name = func._schema.name.removeprefix("aten::")
        if any(here):
            self.device.operations += 1
            elsewhere = [t for t, held in zip(inputs, here, strict=True) if not held and t.ndim]
            if elsewhere and name not in ("index", "index_put", "index_put_", "_index_put_impl_", "copy_"):
                raise RuntimeError(f"Expected all tensors to be on the same device ({name}).")
            masks = (i for i in args[1] if i is not None and i.dtype == torch.bool) if name == "index" else iter(())
            self.device.waits += name in _WAITING or next(masks, None) is not None
            if name in _NO_KERNEL and not self.device.float64:
                raise NotImplementedError(f"The operator 'aten::{name}' is not implemented for the device.")
        found = func(*args, **(kwargs or {}))
        if any(here) or (self.device.inside and not inputs and func is not aten.lift_fresh.default):
            self.device.place(tree_leaves(found))
        return found


class _Functions(TorchFunctionMode):
    """What Python calls: where tensors say they are, moves, and new tensors."""

    def __init__(self, device: StandInDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        owner = getattr(getattr(func, "__self__", None), "__name__", "")
        if name == "__get__" and owner in ("device", "is_cpu"):
            held = self.device.holds(args[0])
            if owner == "is_cpu":
                return not held
            return DEVICE if held else func(*args)
        if func is Tensor.cpu:
            return self.device.copied(args[0], torch.device("cpu"), args[0].dtype)
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        asked = kwargs.get("device")
        if asked is not None:
            asked = torch.device(asked)
            if asked.type == DEVICE.type:
                kwargs["device"] = torch.device("cpu")
        before = self.device.inside
        if asked is None:
            self.device.inside = any(
                isinstance(t, Tensor) and self.device.holds(t) for t in tree_leaves((args, kwargs))
            )
        try:
            found = func(*args, **kwargs)
        finally:
            self.device.inside = before
        if asked is not None and asked.type == DEVICE.type:
            self.device.place(tree_leaves(found))
        return found

    def _to(self, t: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
        device = DEVICE if self.device.holds(t) else torch.device("cpu")
        dtype = t.dtype
        for x in (*args, kwargs.get("device"), kwargs.get("dtype"), kwargs.get("other")):
            if isinstance(x, Tensor):
                device, dtype = DEVICE if self.device.holds(x) else torch.device("cpu"), x.dtype
            elif isinstance(x, torch.dtype):
                dtype = x
            elif isinstance(x, (torch.device, str)):
                device = torch.device(x)
        refused = dtype in _WIDE and not self.device.float64
        if device.type == "cpu" and refused and self.device.holds(t) and dtype != t.dtype:
            raise TypeError("Cannot convert a tensor to float64 on a device that does not support it.")
        found = self.device.copied(t, device, dtype)
        return found.clone() if copy and found is t else found


def batches_on_device(batches: Any) -> Any:
    """Copies of all tensors of a batch on the device; call it inside the block."""
    return tree_map(lambda t: t.to(DEVICE) if isinstance(t, Tensor) else t, batches)


__all__ = ["DEVICE", "StandInDevice", "batches_on_device"]
