"""Saving the contents of any object that can change, and restoring them in place."""

from __future__ import annotations

import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lib_lightning.model.process_state import in_turn
from lib_lightning.model.replica import EMPTY, NOT_STATE, contents_of
from lib_lightning.model.trainer_view import is_lightning

_NO_CONTENTS = (type, types.ModuleType, types.CodeType, str, bytes, int, float, bool, complex, type(None))


def save_value(value: Any, seen: set[int]) -> Callable[[], object] | None:
    """Save the contents of an object, and of those that it refers to.

    Args:
        value: Any object.
        seen: ``id`` of the objects that are not to be saved (again); those saved now are added.

    Returns:
        A function that restores the contents, which may be called several times; None if nothing can change.
    """
    if isinstance(value, _NO_CONTENTS) or id(value) in seen:
        return None
    numpy: Any = sys.modules.get("numpy")
    if isinstance(value, Tensor):
        seen.add(id(value))
        return save_tensor(value)
    if numpy and isinstance(value, numpy.ndarray) and value.flags.writeable:
        return partial(numpy.copyto, value, value.copy())
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if numpy and isinstance(value, numpy.random.RandomState):
        return partial(value.set_state, value.get_state())
    if numpy and isinstance(value, numpy.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, NOT_STATE) or is_lightning(value, "Trainer", "Logger", "Fabric", "LightningDataModule"):
        return None
    seen.add(id(value))
    if isinstance(value, (list, tuple, deque, dict, set)):
        return _save_container(value, seen)
    if isinstance(value, types.FunctionType):
        held = (*(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__, value.__dict__)
        return _all(save_value(x, seen) for x in held)
    if isinstance(value, types.CellType):
        return _save_cell(value, seen)
    if isinstance(value, types.MethodType):
        return _all(save_value(x, seen) for x in (value.__func__, value.__self__))
    return _all([save_value(getattr(value, "__dict__", None), seen), _save_slots(value, seen)])


def _save_slots(value: Any, seen: set[int]) -> Callable[[], object] | None:
    names = [name for cls in type(value).__mro__ for name in _names(vars(cls).get("__slots__", ()))]
    held = {name: getattr(value, name) for name in names if hasattr(value, name)}
    nested = [save_value(x, seen) for x in held.values()]
    assign = [partial(object.__setattr__, value, name, x) for name, x in held.items()]
    return _all([*assign, *nested])


def _names(slots: Any) -> tuple[str, ...]:
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if not name.startswith("__"))


def _all(saved: Iterable[Callable[[], object] | None]) -> Callable[[], object] | None:
    restores = [restore for restore in saved if restore is not None]
    return in_turn(restores) if restores else None


def _save_container(value: Any, seen: set[int]) -> Callable[[], object]:
    entries = entries_of(value)
    nested = [saved for entry in entries if (saved := save_value(entry, seen))]

    def restore() -> None:
        if not isinstance(value, tuple) and list(map(id, entries_of(value))) != list(map(id, entries)):
            value.clear()
            if isinstance(value, dict):
                for key, entry in zip(entries[::2], entries[1::2], strict=True):
                    value[key] = entry  # not update(), which adds up in a Counter
            elif isinstance(value, set):
                value.update(entries)
            else:
                value.extend(entries)
        for restore_entry in nested:
            restore_entry()

    return restore


def _save_cell(cell: types.CellType, seen: set[int]) -> Callable[[], object]:
    value = contents_of(cell)
    restore_value = save_value(value, seen)

    def restore() -> None:
        if value is not EMPTY:
            cell.cell_contents = value
        if restore_value:
            restore_value()

    return restore


def save_tensor(t: Tensor) -> Callable[[], None]:
    """Save the memory and the values of a tensor.

    Args:
        t: The tensor.

    Returns:
        A function that restores them in place.
    """
    restore_memory, copy = save_memory(t), t.detach().clone()

    def restore() -> None:
        restore_memory()
        try:
            is_same = torch.equal(t, copy)
        except (NotImplementedError, RuntimeError):  # sparse tensors cannot be compared
            is_same = False
        if not is_same:
            with torch.no_grad():
                t.copy_(copy)

    return restore


def save_memory(t: Tensor) -> Callable[[], None]:
    """Save the memory of a tensor, which ``t.data = ...`` replaces."""
    data, address = t.data, _address(t)

    def restore() -> None:
        if _address(t) != address:
            t.data = data

    return restore


def _address(t: Tensor) -> int | None:
    return t.data_ptr() if has_address(t) else None


def has_address(t: Tensor) -> bool:
    """Whether a tensor is an ordinary one in strided memory, unlike sparse and sharded tensors, for example."""
    return type(t.data) is Tensor and t.layout == torch.strided


def entries_of(container: Any) -> list[Any]:
    """The entries of a container; keys and values of a dict in turn."""
    return [x for pair in container.items() for x in pair] if isinstance(container, dict) else list(container)
