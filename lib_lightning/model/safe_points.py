"""Ctrl-C and SIGTERM in the middle of a computation: obeyed at the next point at which everything can be undone.

Python runs the handler of a signal between any two instructions: also between those that put a user's weights, modes
and random states back. Long computations therefore note signals, and run their handlers at `safe_point`: before each
forward pass, each product with a Jacobian, and after each phase; and at any instruction of a block that is
`interruptible`, such as a forward pass of a copy of the model.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

from lib_lightning.errors import ComputationStopped

_SIGNALS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)


class _Deferred:
    """The signals that have come since `safe_point` was last called, and their own handlers."""

    def __init__(self, is_stopped: Callable[[], bool]) -> None:
        self.pending: list[int] = []
        self.handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self.is_interruptible = False
        self._is_stopped = is_stopped

    def note(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal: wait for a safe point, or, if one of its kind is waiting already, do not."""
        if signum in self.pending:
            self.pending.remove(signum)
            self.handlers[signum](signum, frame)
        else:
            self.pending.append(signum)
            if self.is_interruptible:
                self.obey()

    def run(self) -> None:
        """Run the handlers of all signals that have come."""
        while self.pending:
            signum = self.pending.pop(0)
            self.handlers[signum](signum, None)

    def obey(self) -> None:
        """Run the handlers of all signals that have come, and end the computation if one of them has asked for it."""
        self.run()
        if self._is_stopped():
            raise ComputationStopped


_deferred: _Deferred | None = None


def safe_point() -> None:
    """End the computation here if Ctrl-C or SIGTERM has asked for it within `signals_at_safe_points`.

    Raises:
        KeyboardInterrupt: After Ctrl-C, by Python's handler.
        ComputationStopped: If a handler that raises nothing has asked for the end.
    """
    if _deferred is not None and _deferred.pending and threading.current_thread() is threading.main_thread():
        _deferred.obey()


@contextmanager
def interruptible() -> Iterator[None]:
    """A block that may end at any instruction, as nothing that is used afterwards changes in it.

    Example:
        >>> import os, signal
        >>> try:
        ...     with signals_at_safe_points(), interruptible():
        ...         os.kill(os.getpid(), signal.SIGINT)
        ...         print("this is not done")
        ... except KeyboardInterrupt:
        ...     print("interrupted")
        interrupted
    """
    deferred = _deferred
    if deferred is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    deferred.is_interruptible = True
    try:
        yield
    finally:
        deferred.is_interruptible = False


@contextmanager
def signals_at_safe_points(is_stopped: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Run Python's handlers of SIGINT and SIGTERM at safe points only, as long as the context lasts.

    A second signal of a kind, while the first one is waiting, is handled at once. Signals whose handlers are not
    Python's end the process as ever, and other threads than the main one never handle signals.

    Args:
        is_stopped: Called after a handler, and tells whether it has asked for the end of the computation.

    Raises:
        ComputationStopped: If the end has been asked for before.

    Yields:
        Nothing. Within another such context nothing changes.

    Example:
        >>> import os, signal
        >>> try:
        ...     with signals_at_safe_points():
        ...         os.kill(os.getpid(), signal.SIGINT)
        ...         print("this is still done")
        ...         safe_point()
        ...         print("this is not")
        ... except KeyboardInterrupt:
        ...     print("interrupted")
        this is still done
        interrupted
    """
    global _deferred
    if _deferred is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    deferred = _Deferred(is_stopped)
    deferred.obey()
    for signum in _SIGNALS:
        handler = signal.getsignal(signum)
        if callable(handler):
            deferred.handlers[signum] = handler
    _deferred = deferred
    try:
        for signum in deferred.handlers:
            signal.signal(signum, deferred.note)
        yield
    finally:
        for signum, handler in deferred.handlers.items():
            # A handler that was set in the meantime stays.
            if signal.getsignal(signum) == deferred.note:
                with contextlib.suppress(TypeError):
                    signal.signal(signum, handler)
        _deferred = None
        deferred.run()


_vector_listener: ContextVar[Callable[[int], None] | None] = ContextVar("_vector_listener", default=None)


def vectors_multiplied(count: int) -> None:
    """Report that some vectors have been multiplied with a Jacobian."""
    if (listener := _vector_listener.get()) is not None:
        listener(count)


@contextmanager
def on_vectors(listener: Callable[[int], None]) -> Iterator[None]:
    """Call a function with each number of vectors that are multiplied with a Jacobian, as long as the context lasts."""
    token = _vector_listener.set(listener)
    try:
        yield
    finally:
        _vector_listener.reset(token)
