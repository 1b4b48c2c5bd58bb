"""Progress of a computation: code reports each phase that it has finished, to listeners further up the call stack."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from lib_lightning.model.safe_points import safe_point

Listener = Callable[[str], None]

_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("_listeners", default=())


def phase_done(phase: str) -> None:
    """Report that a phase, or a part of it such as one batch, is finished.

    The time since the previous report, of whatever phase, belongs to it.

    Args:
        phase: Name of the phase.

    Raises:
        KeyboardInterrupt: After Ctrl-C; see `safe_point`.
    """
    safe_point()
    for listener in _listeners.get():
        listener(phase)


@contextmanager
def on_phase(listener: Listener) -> Iterator[None]:
    """Call a function for each finished phase, as long as the context lasts. Contexts may be nested.

    Args:
        listener: Called with the name of the phase.

    Yields:
        Nothing.

    Example:
        >>> with on_phase(print):
        ...     phase_done("moments")
        moments
        >>> phase_done("ignored: no listener")
    """
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)
