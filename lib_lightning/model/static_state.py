"""State that objects of a class have in common, and that a model shares with its copy: class attributes and globals.

What a forward pass can reach is found from the names in its code: beginning with the methods that a snapshot calls and
the functions that the model holds, through methods of the same classes and functions and classes of the same files.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any

from lib_lightning.model.process_state import in_turn
from lib_lightning.model.replica import EMPTY, contents_of
from lib_lightning.model.saved_value import Saver

# Saves the contents of an object, and returns the function that restores them; None if nothing can change.
Save = Callable[[Any], Callable[[], object] | None]

_ENTRIES = ("forward", "training_step", "validation_step", "test_step", "predict_step")
# Packages whose classes hold no state of a model.
_LIBRARIES = frozenset(
    {*sys.stdlib_module_names, "torch", "numpy", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics"}
) - {"__main__"}
_WRAPPERS = (property, classmethod, staticmethod, types.MethodType, cached_property, partial)
_CODE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)


def save_static_state(
    kinds: Iterable[type], functions: Iterable[types.FunctionType], saver: Saver, entries: Iterable[str] = _ENTRIES
) -> Callable[[], None]:
    """Save class attributes, default arguments and global variables that code may write to.

    Args:
        kinds: The classes of a model's modules and other objects.
        functions: Functions that the model holds, such as hooks.
        saver: Saves contents; it knows the objects that are saved already.
        entries: Names of the methods that are called.

    Returns:
        A function that restores them in place.
    """
    code = _Code(entries)
    for kind in kinds:
        code.add_class(kind)
    for function in functions:
        code.add_function(function)
    code.follow()
    restores: list[Callable[[], object] | None] = []
    for function in code.functions:
        save = _save_of(function.__globals__, saver)
        held = (function.__closure__, function.__defaults__, function.__kwdefaults__, function.__dict__)
        restores += [save(x) for x in held if x]
    for cls in code.classes:
        save = _save_of(getattr(sys.modules.get(cls.__module__), "__dict__", {}), saver)
        own = partial(_attributes, cls)
        restores.append(_save_names(vars(cls), partial(setattr, cls), partial(delattr, cls), own, save))
    for variables, names in code.used.values():
        data = tuple(name for name in names if not isinstance(variables.get(name), _CODE))
        known, save = partial(tuple, data), _save_of(variables, saver)
        restores.append(_save_names(variables, variables.__setitem__, variables.__delitem__, known, save))
    return in_turn([restore for restore in restores if restore])


class _Code:
    """The classes and functions that may run when a model is called.

    Attributes:
        classes: The classes.
        functions: The functions.
        used: The global variables of each file, and the names that these functions use.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        self.classes: dict[type, None] = {}
        self.functions: dict[types.FunctionType, None] = {}
        self.used: dict[int, tuple[dict[str, Any], set[str]]] = {}
        self._methods: dict[str, list[types.FunctionType]] = {}
        self._names: dict[str, None] = dict.fromkeys(entries)
        self._todo: list[types.FunctionType] = []

    def add_class(self, kind: type) -> None:
        """Add a class and those that it is derived from."""
        for cls in kind.__mro__:
            if cls in self.classes or cls.__module__.split(".")[0] in _LIBRARIES:
                continue
            self.classes[cls] = None
            for name, value in vars(cls).items():
                if (function := _function_in(value)) is not None:
                    self._methods.setdefault(name, []).append(function)
                    if name in self._names or name.startswith("__"):
                        self.add_function(function)

    def add_function(self, function: types.FunctionType) -> None:
        """Add a function."""
        if function not in self.functions:
            self.functions[function] = None
            self._todo.append(function)

    def follow(self) -> None:
        """Add what is reached from what has been added so far."""
        while self._todo:
            function = self._todo.pop()
            variables = function.__globals__
            files = {function.__module__, *(cls.__module__ for cls in self.classes)}
            names = set(_names(function.__code__))
            self.used.setdefault(id(variables), (variables, set()))[1].update(names)
            for name in names - self._names.keys():
                self._names[name] = None
                for method in self._methods.get(name, []):
                    self.add_function(method)
            held = [contents_of(cell) for cell in function.__closure__ or ()]
            for value in (*held, *(variables.get(name, EMPTY) for name in names)):
                inner = _function_in(value)
                if isinstance(value, type) and value.__module__ in files:
                    self.add_class(value)
                elif inner is not None and inner.__module__ in files:
                    self.add_function(inner)


def _save_of(variables: Mapping[str, Any], saver: Saver) -> Save:
    """How the contents of a file's variables are saved: those of installed packages are tables, large and nested."""
    path = variables.get("__file__") or ""
    return saver.save_shallow if "site-packages" in path or "dist-packages" in path else saver.save


def _save_names(
    holder: Mapping[str, Any],
    assign: Callable[[str, Any], object],
    delete: Callable[[str], object],
    names: Callable[[], Iterable[str]],
    save: Save,
) -> Callable[[], None]:
    """Save what some names stand for, in a class or in a module's globals.

    Args:
        holder: The names and values.
        assign: Gives a name another value.
        delete: Removes a name.
        names: Which names to save; called again to find new ones.
        save: Saves the values' contents.
    """
    before = {name: holder[name] for name in names() if name in holder}
    contents = [saved for value in before.values() if (saved := save(value))]

    def restore() -> None:
        for name in names():
            if name in holder and name not in before:
                delete(name)
        for name, value in before.items():
            if holder.get(name, EMPTY) is not value:
                assign(name, value)
        for restore_contents in contents:
            restore_contents()

    return restore


def _attributes(cls: type) -> list[str]:
    """The class's own attributes that hold data."""
    return [
        name
        for name, value in vars(cls).items()
        if not (name.startswith(("__", "_abc_")) or isinstance(value, _CODE) or hasattr(type(value), "__get__"))
    ]


def _function_in(value: Any) -> types.FunctionType | None:
    """The function of a method, property, class method or decorated function."""
    for name in ("fget", "__func__", "func"):
        if not isinstance(value, types.FunctionType) and isinstance(value, _WRAPPERS):
            value = getattr(value, name, value)
    return value if isinstance(value, types.FunctionType) else None


def _names(code: types.CodeType) -> Iterator[str]:
    """Names of globals and attributes in some code, and in the functions that it defines."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)
