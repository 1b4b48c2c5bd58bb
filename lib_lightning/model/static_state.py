"""State that objects of a class have in common, and that a model shares with its copy: class attributes and globals.

What a forward pass can reach is found from the names in its code: beginning with the methods that a snapshot calls,
through methods of the same classes and functions of the same files.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from lib_lightning.model.process_state import in_turn
from lib_lightning.model.saved_value import save_value

_ENTRIES = ("forward", "training_step", "validation_step", "test_step", "predict_step")
# Packages whose classes hold no state of a model.
_LIBRARIES = frozenset(
    {*sys.stdlib_module_names, "torch", "numpy", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics"}
) - {"__main__"}
_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)


def save_static_state(kinds: Iterable[type], seen: set[int]) -> Callable[[], None]:
    """Save class attributes, default arguments and global variables that code may write to.

    Args:
        kinds: The classes of a model's modules and other objects.
        seen: ``id`` of objects that are not to be saved.

    Returns:
        A function that restores them in place.
    """
    classes = {cls for kind in kinds for cls in kind.__mro__ if cls.__module__.split(".")[0] not in _LIBRARIES}
    restores: list[Callable[[], object] | None] = []
    for cls in classes:
        restores.append(_save_names(vars(cls), partial(setattr, cls), partial(delattr, cls), _attributes(cls), seen))
    functions = list(_reachable(classes))
    for function in functions:
        held = (function.__closure__, function.__defaults__, function.__kwdefaults__, function.__dict__)
        restores += [save_value(x, seen) for x in held if x]
    used: dict[int, tuple[dict[str, Any], set[str]]] = {}
    for function in functions:
        used.setdefault(id(function.__globals__), (function.__globals__, set()))[1].update(_names(function.__code__))
    for variables, names in used.values():
        data = tuple(name for name in names if not isinstance(variables.get(name), _CODE))
        restores.append(
            _save_names(variables, variables.__setitem__, variables.__delitem__, partial(tuple, data), seen)
        )
    return in_turn([restore for restore in restores if restore])


def _save_names(
    holder: Mapping[str, Any],
    assign: Callable[[str, Any], object],
    delete: Callable[[str], object],
    names: Callable[[], Iterable[str]],
    seen: set[int],
) -> Callable[[], None]:
    """Save what some names stand for, in a class or in a module's globals.

    Args:
        holder: The names and values.
        assign: Gives a name another value.
        delete: Removes a name.
        names: Which names to save; called again to find new ones.
        seen: As for `save_value`.
    """
    before = {name: holder[name] for name in names() if name in holder}
    contents = [saved for value in before.values() if (saved := save_value(value, seen))]

    def restore() -> None:
        for name in names():
            if name in holder and name not in before:
                delete(name)
        for name, value in before.items():
            if holder.get(name, restore) is not value:
                assign(name, value)
        for restore_contents in contents:
            restore_contents()

    return restore


def _attributes(cls: type) -> Callable[[], Iterable[str]]:
    """The class's own attributes that hold data."""

    def names() -> list[str]:
        return [
            name
            for name, value in vars(cls).items()
            if not (name.startswith(("__", "_abc_")) or isinstance(value, _CODE) or hasattr(type(value), "__get__"))
        ]

    return names


def _reachable(classes: Iterable[type]) -> Iterator[types.FunctionType]:
    """The functions that may run when a model is called."""
    methods: dict[str, list[types.FunctionType]] = {}
    for cls in classes:
        for name, value in vars(cls).items():
            if (function := _function_in(value)) is not None:
                methods.setdefault(name, []).append(function)
    files = {cls.__module__ for cls in classes}
    todo = [f for name, found in methods.items() if name in _ENTRIES or name.startswith("__") for f in found]
    seen: set[int] = set()
    while todo:
        function = todo.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        yield function
        for inner in (_function_in(cell.cell_contents) for cell in function.__closure__ or () if _is_assigned(cell)):
            if inner is not None:
                todo.append(inner)
        for name in _names(function.__code__):
            todo += methods.get(name, [])
            other = _function_in(function.__globals__.get(name))
            if other is not None and other.__module__ in files:
                todo.append(other)


def _function_in(value: Any) -> types.FunctionType | None:
    """The function of a method, property, class method or decorated function."""
    for name in ("fget", "__func__", "func"):
        value = value if isinstance(value, types.FunctionType) else getattr(value, name, value)
    return value if isinstance(value, types.FunctionType) else None


def _is_assigned(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _names(code: types.CodeType) -> Iterator[str]:
    """Names of globals and attributes in some code, and in the functions that it defines."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
