"""What the copy of a LightningModule sees of its trainer and loggers: everything to read, and nothing to write to.

Classes of Lightning are recognised by name, so that this works for both of its packages, ``lightning`` and
``pytorch_lightning``, and without either of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_PACKAGES = frozenset({"lightning", "pytorch_lightning", "lightning_fabric"})
# What logs or prints, of a LightningModule.
_LOGGING = ("log", "log_dict", "print")
# Properties of a logger that have no side effects; `experiment`, for example, opens files.
_READABLE = frozenset({"name", "version", "save_dir", "log_dir", "root_dir", "group_separator"})


def is_lightning(value: Any, *names: str) -> bool:
    """Whether an object's class is, or is derived from, a class of Lightning.

    Args:
        value: Any object.
        names: Names of classes, such as ``"Trainer"``.

    Returns:
        True if so, for either of Lightning's packages.
    """
    return any(cls.__name__ in names and cls.__module__.split(".")[0] in _PACKAGES for cls in value.__class__.__mro__)


def view_of(value: Any, copy_of: Callable[[Any], Any] = lambda x: x) -> Any:
    """A view of a trainer or a logger.

    Args:
        value: The trainer or logger.
        copy_of: From a module that the trainer holds to its copy.

    Returns:
        The view.
    """
    return TrainerView(value, copy_of) if is_lightning(value, "Trainer") else SilentLogger(value)


def silence(module: nn.Module, trainer: Any) -> Callable[[], None]:
    """Let a LightningModule read its trainer's state, but not log.

    Args:
        module: The module; nothing happens if it is not a LightningModule.
        trainer: The view of its trainer; None if it has no trainer.

    Returns:
        A function that undoes it.
    """
    if not is_lightning(module, "LightningModule"):
        return lambda: None
    attributes = vars(module)
    changes: dict[str, Any] = {**dict.fromkeys(_LOGGING, _do_nothing), "_trainer": trainer}
    before = {name: attributes[name] for name in changes if name in attributes}
    attributes.update(changes)

    def undo() -> None:
        for name in changes:
            attributes.pop(name, None)
        attributes.update(before)

    return undo


class TrainerView:
    """A trainer to read from. What is assigned to it stays in the view; loggers are silent.

    Args:
        trainer: The trainer, or a proxy of it.
        copy_of: From a module that the trainer holds to its copy.
    """

    def __init__(self, trainer: Any, copy_of: Callable[[Any], Any]) -> None:
        vars(self).update(_trainer=trainer, _copy_of=copy_of)

    # For isinstance().
    __class__ = property(lambda self: vars(self)["_trainer"].__class__)

    def __getattr__(self, name: str) -> Any:
        value = getattr(vars(self)["_trainer"], name)
        if isinstance(value, nn.Module):
            return self._copy_of(value)
        if is_lightning(value, "Logger"):
            return SilentLogger(value)
        if type(value) is list:
            return [SilentLogger(x) if is_lightning(x, "Logger") else x for x in value]
        return dict(value) if type(value) is dict else value


class SilentLogger:
    """A logger of which only name and folders can be read: every call does nothing.

    Args:
        logger: The logger.
    """

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    # For isinstance().
    __class__ = property(lambda self: vars(self)["_logger"].__class__)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(vars(self)["_logger"], name) if name in _READABLE else Inert()


class Inert:
    """Takes the place of a file, queue, thread or connection: every call is accepted and does nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing."""

    def __enter__(self) -> Inert:
        return self

    def __exit__(self, *error: object) -> None:
        return None


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Takes the place of a method that logs."""
