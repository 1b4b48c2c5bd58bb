"""What can go wrong, in words for people."""

from __future__ import annotations

from collections.abc import Iterable


class LIBError(Exception):
    """Anything this package refuses or cannot do; its message says what, where and what to do."""


class NodeLayerError(LIBError, ValueError):
    """A node layer that does not fit the model: unknown, never run, out of order, or not a cut."""


class ActivationError(LIBError, ValueError):
    """Activations that no basis can be computed from: integers, NaN, infinite, or none at all."""


class NotFiniteError(ActivationError):
    """Activations, or derivatives between them, that are NaN or infinite."""


def quoted(names: Iterable[str]) -> str:
    """Names in quotation marks, separated by commas."""
    return ", ".join(f"'{name}'" for name in names)
