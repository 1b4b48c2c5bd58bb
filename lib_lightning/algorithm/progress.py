"""How far a computation has come: code says which step it has just finished, to whoever wants to know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str], None]

_listener: ContextVar[Listener | None] = ContextVar("_listener", default=None)


def phase_done(step: str) -> None:
    """Say that a step, or one more part of it, is finished: all that was done since the last call belonged to it.

    Args:
        step: Its name.
    """
    listener = _listener.get()
    if listener is not None:
        listener(step)


@contextmanager
def on_phase(listener: Listener) -> Iterator[None]:
    """A block in which every finished step is told; one at a time listens.

    Args:
        listener: Called with the name of each step that is finished.

    Yields:
        Nothing.

    Example:
        >>> with on_phase(print):
        ...     phase_done("moments")
        moments
        >>> phase_done("nobody listens any more")
    """
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
