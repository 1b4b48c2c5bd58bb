"""The two packages that Lightning is distributed as, ``lightning.pytorch`` and ``pytorch_lightning``.

Their classes have the same names and are unrelated, so an ``isinstance`` against one misses objects of the other. Only
what is already imported is used here: importing the second package would redirect the log messages of the first.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

PACKAGES = ("lightning.pytorch", "pytorch_lightning")

_Class = TypeVar("_Class", bound=type)


def imported_packages() -> list[str]:
    """Those of the two packages that have been imported, or are being imported."""
    return [package for package in PACKAGES if package in sys.modules]


def member(package: str, name: str) -> Any:
    """A member of a package, which is imported if it has not been.

    Args:
        package: One of the two packages.
        name: Dotted name within it.

    Returns:
        The class or function; None if this version of the package does not have it.

    Example:
        >>> member("lightning.pytorch", "loggers.CSVLogger").__name__
        'CSVLogger'
    """
    found: Any = importlib.import_module(package)
    path = package
    for part in name.split("."):
        path = f"{path}.{part}"
        if not hasattr(found, part) and isinstance(found, ModuleType) and importlib.util.find_spec(path) is not None:
            importlib.import_module(path)
        found = getattr(found, part, None)
    return found


def is_instance(obj: object, *names: str) -> bool:
    """Whether an object is an instance of a class of either package.

    Args:
        obj: Any object.
        names: Dotted names of the classes within the packages, such as ``loggers.TensorBoardLogger``.

    Returns:
        Whether it is an instance of one of them.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> logger = CSVLogger("logs")
        >>> is_instance(logger, "loggers.CSVLogger"), is_instance(logger, "loggers.TensorBoardLogger")
        (True, False)
    """
    classes = [member(package, name) for package in imported_packages() for name in names]
    return isinstance(obj, tuple(cls for cls in classes if isinstance(cls, type)))


def package_of(obj: object) -> str:
    """The package that an object or class comes from, or that it extends.

    Args:
        obj: A trainer, module, logger or other object of Lightning, or a class.

    Returns:
        The name of the package; the default one for other objects.

    Example:
        >>> import lightning.pytorch as pl
        >>> package_of(pl.Trainer), package_of("any other object")
        ('lightning.pytorch', 'lightning.pytorch')
    """
    for base in (obj if isinstance(obj, type) else type(obj)).__mro__:
        for package in PACKAGES:
            if base.__module__ == package or base.__module__.startswith(f"{package}."):
                return package
    return PACKAGES[0]


# What the callback is built on: the package that the user has imported, or the first of the two.
OWN_PACKAGE = (imported_packages() or PACKAGES)[0]

if TYPE_CHECKING:
    from lightning.pytorch import Callback as Callback
    from lightning.pytorch.utilities import rank_zero_info as rank_zero_info
else:
    Callback = member(OWN_PACKAGE, "Callback")
    # The same function in both packages.
    rank_zero_info = member(OWN_PACKAGE, "utilities.rank_zero_info")


def callback_of_both_packages(cls: _Class) -> _Class:
    """Decorate a subclass of `Callback`: it becomes a callback of the other package too, once that is imported.

    Args:
        cls: The class.

    Returns:
        The same class.
    """

    def join(package: str) -> None:
        base = member(package, "Callback")
        if base is not None and not issubclass(cls, base):
            cls.__bases__ = (*cls.__bases__, base)

    for package in PACKAGES:
        if package in sys.modules:
            join(package)
        else:
            sys.meta_path.insert(0, _WhenImported(package, join))
    return cls


class _WhenImported(importlib.abc.MetaPathFinder):
    """Calls a function once a package has been imported, and leaves the import itself to the other finders.

    Args:
        package: The package, not imported yet.
        then: Called with its name.
    """

    def __init__(self, package: str, then: Callable[[str], None]) -> None:
        self._package, self._then = package, then
        self._is_looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the package as without this finder; running its code also calls the function."""
        if fullname != self._package or self._is_looking:
            return None
        self._is_looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._is_looking = False
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_call(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self._then(fullname)

        spec.loader.exec_module = run_and_call  # type: ignore[method-assign]
        return spec
