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


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, on an accelerator or on the CPU.

    Args:
        error: Any exception.

    Returns:
        True if so.

    Example:
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(ValueError("too large"))
        (True, False)
    """
    # By its name: torch itself need not be imported here.
    if isinstance(error, MemoryError) or any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__):
        return True
    signs = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
