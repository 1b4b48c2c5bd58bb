"""Exceptions of the package."""

from __future__ import annotations

from collections.abc import Iterable


class LIBError(Exception):
    """Base class of the errors of this package. The message says what was wrong, where, and what to do."""


class NodeLayerError(LIBError, ValueError):
    """A node layer that is not valid for the model: unknown, not called, out of order, or not a cut."""


class ActivationError(LIBError, ValueError):
    """Activations that no basis can be computed from: integers, NaN, infinite, or no samples."""


class SettingError(LIBError, ValueError):
    """A setting outside its range."""


class SettingTypeError(LIBError, TypeError):
    """A setting, or another argument, of a wrong type."""


class NotFiniteError(ActivationError):
    """Activations or derivatives that are NaN or infinite."""


def quoted(names: Iterable[str]) -> str:
    """Join names, in quotation marks and separated by commas."""
    return ", ".join(f"'{name}'" for name in names)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on an accelerator or on the CPU.

    Args:
        error: Any exception.

    Returns:
        True if so.

    Example:
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(ValueError("too large"))
        (True, False)
    """
    # The error of torch, by its name: this module does not import torch.
    if isinstance(error, MemoryError) or any(cls.__name__ == "OutOfMemoryError" for cls in type(error).__mro__):
        return True
    messages = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(message in str(error) for message in messages)
