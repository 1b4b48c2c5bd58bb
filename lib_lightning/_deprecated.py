"""Names of version 0.1, which keep working for one version with a DeprecationWarning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# Modules that moved, within the package. An empty name stands for a folder that has no successor.
MODULES = {
    "callback": "training.callback",
    "cli": "training.cli",
    "compute": "api",
    "core": "",
    "core.basis": "algorithm.basis",
    "core.errors": "errors",
    "core.layers": "model.node_layer",
    "display": "plots",
    "display.curves": "plots.curves",
    "display.film": "plots.animated_layout",
    "display.graph": "plots.graph",
    "display.image": "plots.image",
    "display.over_time": "plots.over_time",
    "display.spectrum": "plots.spectrum",
    "display.spectrum_over_time": "plots.spectrum_over_time",
    "display.timeline": "plots.timeline",
    "export": "io",
    "export.files": "io.basis_file",
    "processes": "distributed.torch_group",
    "profiling": "training.profiling",
    "questions": "api",
    "schedule": "training.schedule",
    "values": "features",
    "version": "",
    "view": "viewer",
    "view.run": "viewer.run",
}
# Names that changed, by the module that one imported them from.
NAMES = {
    "ablation.EdgesRequired": "ablation.EdgesRequiredResult",
    "display.film.Film": "plots.animated_layout.AnimatedLayout",
    "lineage.Retraced": "lineage.FeatureHistory",
    "metrics.edges_required": "metrics.min_edges_from_curve",
    "metrics.functional.edges_required": "metrics.functional.min_edges_from_curve",
    "processes.Processes": "distributed.torch_group.TorchProcessGroup",
    "values.BatchValues": "features.FeatureBatch",
    "values.fingerprint": "model.batch.hash_batches",
    "values.probe_features": "lineage.reference_features",
    "version.__version__": "__version__",
}
_PACKAGE = "lib_lightning"


def _warn(old: str, new: str, stacklevel: int) -> None:
    warnings.warn(
        f"{_PACKAGE}.{old} is deprecated and will be removed in the next version: use {_PACKAGE}.{new}.",
        DeprecationWarning,
        stacklevel=stacklevel + 1,
    )


def _find(name: str) -> Any:
    module, _, attribute = f"{_PACKAGE}.{name}".rpartition(".")
    return getattr(import_module(module), attribute)


class _MovedModule(ModuleType):
    """A module of version 0.1: looks its names up where they are now."""

    def __getattr__(self, name: str) -> Any:
        module = self.__name__.removeprefix(f"{_PACKAGE}.")
        if new := NAMES.get(f"{module}.{name}"):
            _warn(f"{module}.{name}", new, stacklevel=2)
            return _find(new)
        if not MODULES[module] or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{_PACKAGE}.{MODULES[module]}"), name)


class MovedModules(MetaPathFinder, Loader):
    """Finds the modules in `MODULES`. It comes last in `sys.meta_path`, so that other imports never reach it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder.find_spec`."""
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self, is_package=True) if package == _PACKAGE and name in MODULES else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """See `importlib.abc.Loader.create_module`."""
        return _MovedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Warn, unless the module is a folder without a successor: one of its modules follows."""
        name = module.__name__.removeprefix(f"{_PACKAGE}.")
        if MODULES[name]:
            _warn(name, MODULES[name], stacklevel=2)


def renamed_names(package: str) -> Callable[[str], Any]:
    """Make the ``__getattr__`` of a package, for its rows of `NAMES`.

    Args:
        package: Its ``__name__``.

    Returns:
        A function that returns what an old name stands for, with a DeprecationWarning.
    """

    def find(name: str) -> Any:
        old = f"{package}.{name}".removeprefix(f"{_PACKAGE}.")
        if old not in NAMES:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        _warn(old, NAMES[old], stacklevel=2)
        return _find(NAMES[old])

    return find


def renamed_arguments(**renamed: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function take keyword arguments by their old names, with a DeprecationWarning.

    Args:
        renamed: New names by old names.

    Returns:
        A decorator that keeps the signature.

    Example:
        >>> @renamed_arguments(colour="color")
        ... def paint(color: str) -> str:
        ...     return color
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     paint(colour="red")
        'red'
        >>> str(caught[0].message)
        'paint(colour=...) is deprecated and will be removed in the next version: use paint(color=...).'
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> R:
            return function(*args, **_current(function.__name__, renamed, kwargs))

        return wrapper

    return decorate


def renamed_fields(**renamed: str) -> Callable[[type[T]], type[T]]:
    """Let a dataclass take, and show, fields by their old names, with a DeprecationWarning.

    Args:
        renamed: New names by old names.

    Returns:
        A decorator, to be applied to the finished dataclass.

    Example:
        >>> from dataclasses import dataclass
        >>> @renamed_fields(colour="color")
        ... @dataclass
        ... class Paint:
        ...     color: str
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     Paint(colour="red").colour
        'red'
        >>> [str(warning.message) for warning in caught]  # doctest: +NORMALIZE_WHITESPACE
        ['Paint(colour=...) is deprecated and will be removed in the next version: use Paint(color=...).',
         'Paint.colour is deprecated and will be removed in the next version: use Paint.color.']
    """

    def decorate(cls: type[T]) -> type[T]:
        plain_init = cls.__init__

        @functools.wraps(plain_init)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            plain_init(self, *args, **_current(cls.__name__, renamed, kwargs))

        setattr(cls, "__init__", init)  # noqa: B010
        for old, new in renamed.items():
            setattr(cls, old, _renamed_field(cls.__name__, old, new))
        return cls

    return decorate


def _current(name: str, renamed: Mapping[str, str], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments by their present names."""
    for old in renamed.keys() & kwargs.keys():
        new = renamed[old]
        warnings.warn(
            f"{name}({old}=...) is deprecated and will be removed in the next version: use {name}({new}=...).",
            DeprecationWarning,
            stacklevel=3,
        )
        kwargs[new] = kwargs.pop(old)
    return kwargs


def _renamed_field(name: str, old: str, new: str) -> property:
    message = f"{name}.{old} is deprecated and will be removed in the next version: use {name}.{new}."

    def get(self: Any) -> Any:
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return getattr(self, new)

    def put(self: Any, value: Any) -> None:
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        setattr(self, new, value)

    return property(get, put, doc=f"Deprecated name of `{new}`.")
