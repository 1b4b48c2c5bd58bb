"""Saving the contents of any object that can change, and restoring them in place."""

from __future__ import annotations

import random
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lib_lightning.model.autograd_graph import version_of
from lib_lightning.model.process_state import in_turn
from lib_lightning.model.replica import EMPTY, NOT_STATE, contents_of
from lib_lightning.model.torch_internals import has_memory
from lib_lightning.model.trainer_view import is_lightning

_NO_CONTENTS = (type, types.ModuleType, types.CodeType, str, bytes, int, float, bool, complex, type(None))


class Saver:
    """Saves the contents of objects, and of those that they refer to, each of them once.

    Args:
        seen: Objects that are not to be saved.

    Attributes:
        kinds: The classes of all objects that have been saved.
        functions: All functions among them.
    """

    def __init__(self, seen: Iterable[Any] = ()) -> None:
        self.kinds: set[type] = set()
        self.functions: list[types.FunctionType] = []
        self._seen = {id(x): x for x in seen}  # keeps them alive, so that each id means one object

    def save(self, value: Any) -> Callable[[], object] | None:
        """Save the contents of an object.

        Args:
            value: Any object.

        Returns:
            A function that restores the contents in place, which may be called several times; None if nothing can
            change.
        """
        if isinstance(value, _NO_CONTENTS) or id(value) in self._seen:
            return None
        self._seen[id(value)] = value
        numpy: Any = sys.modules.get("numpy")
        if isinstance(value, Tensor):
            return save_tensor(value) if has_memory(value) else None
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
        # Process groups and sharded parameters, whose memory is freed between uses.
        if type(value).__module__.startswith("torch.distributed."):
            return None
        if isinstance(value, (list, tuple, deque, dict, set)):
            return self._container(value)
        if isinstance(value, types.FunctionType):
            self.functions.append(value)
            held = (value.__closure__, value.__defaults__, value.__kwdefaults__, value.__dict__)
            return _together(map(self.save, held))
        if isinstance(value, types.CellType):
            return self._cell(value)
        if isinstance(value, types.MethodType):
            return _together(map(self.save, (value.__func__, value.__self__)))
        if isinstance(value, partial):
            return _together(map(self.save, (value.func, value.args, value.keywords, value.__dict__)))
        if isinstance(value, weakref.ref):
            return self.save(value())
        self.kinds.add(type(value))
        return _together([self.save(getattr(value, "__dict__", None)), self._slots(value)])

    def save_shallow(self, value: Any) -> Callable[[], object] | None:
        """As `save`, but of a container only which entries it has, and of an object nothing."""
        if isinstance(value, (list, deque, dict, set)) and id(value) not in self._seen:
            return self._container(value, deep=False)
        return self.save(value) if isinstance(value, (Tensor, torch.Generator, random.Random)) else None

    def _container(self, value: Any, deep: bool = True) -> Callable[[], object]:
        entries = entries_of(value)
        nested = [saved for entry in entries if (saved := self.save(entry))] if deep else []

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

    def _cell(self, cell: types.CellType) -> Callable[[], object]:
        value = contents_of(cell)
        restore_contents = self.save(value)

        def restore() -> None:
            if value is not EMPTY:
                cell.cell_contents = value
            if restore_contents:
                restore_contents()

        return restore

    def _slots(self, value: Any) -> Callable[[], object] | None:
        names = [name for cls in type(value).__mro__ for name in _names(vars(cls).get("__slots__", ()))]
        held = {name: getattr(value, name) for name in names if hasattr(value, name)}
        assign = [partial(object.__setattr__, value, name, x) for name, x in held.items()]
        return _together([*assign, *map(self.save, held.values())])


def _together(saved: Iterable[Callable[[], object] | None]) -> Callable[[], object] | None:
    restores = [restore for restore in saved if restore is not None]
    return in_turn(restores) if restores else None


def _names(slots: Any) -> tuple[str, ...]:
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if not name.startswith("__"))


def save_tensor(t: Tensor) -> Callable[[], None]:
    """Save the memory and the values of a tensor.

    Args:
        t: The tensor.

    Returns:
        A function that restores them in place.
    """
    restore_memory, copy, version = save_memory(t), t.detach().clone(), version_of(t)

    def restore() -> None:
        restore_memory()
        with torch.no_grad(), version:
            try:
                is_same = torch.equal(t, copy)
            except (NotImplementedError, RuntimeError):  # sparse tensors cannot be compared
                is_same = False
            if not is_same:
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
