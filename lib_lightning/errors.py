"""Exceptions of the package."""

from __future__ import annotations

import difflib
import logging
import numbers
import os
import shutil
import sys
import sysconfig
import textwrap
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any


class LIBError(Exception):
    """Base class of the errors of this package. The message says what was wrong, where, and what to do.

    Where nothing catches it, Python and notebooks print the message and the line of code that it is about, instead of
    a traceback through Lightning and torch. `shows_tracebacks` says how to see that.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        # Not if anything else, such as a crash reporter, has taken this place.
        if sys.excepthook is sys.__excepthook__:
            sys.excepthook = _print_uncaught

    def _render_traceback_(self) -> list[str]:
        """What notebooks print."""
        if shows_tracebacks():
            return traceback.format_exception(self)
        return on_screen(self)


class ComputationStopped(BaseException):
    """A signal has asked for the end of a computation. Not an Exception: no handler of errors may take it for one."""


class NodeLayerError(LIBError, ValueError):
    """A node layer that is not valid for the model: unknown, not called, out of order, or not a cut."""


class ActivationError(LIBError, ValueError):
    """Activations that no basis can be computed from: integers, NaN, infinite, or no samples."""


class SettingError(LIBError, ValueError):
    """A setting, or another argument, outside its range."""


class SettingTypeError(LIBError, TypeError):
    """A setting, or another argument, of a wrong type."""


class NotFiniteError(ActivationError):
    """Activations or derivatives that are NaN or infinite."""


class MissingFileError(LIBError, FileNotFoundError):
    """A file or folder that does not exist."""


# Lines of the screen that an error may take, and characters of one of them where there is no terminal.
_LINES, _WIDTH = 5, 100
_log = logging.getLogger("lib_lightning")


def shows_tracebacks() -> bool:
    """Whether errors are shown with tracebacks.

    Returns:
        True if the level of the logger ``lib_lightning`` is DEBUG, or the environment variable
        ``LIB_LIGHTNING_TRACEBACK`` is set, and neither empty nor 0.
    """
    return _log.isEnabledFor(logging.DEBUG) or os.environ.get("LIB_LIGHTNING_TRACEBACK", "0") not in ("", "0")


def log_traceback(error: BaseException) -> None:
    """Log the traceback of an error whose message is shown elsewhere, if tracebacks are wanted."""
    if shows_tracebacks():
        _log.log(max(logging.DEBUG, _log.getEffectiveLevel()), "Traceback of the error above:", exc_info=error)


def quoted(names: Iterable[str], limit: int = 8) -> str:
    """Join names, in quotation marks and separated by commas.

    Args:
        names: The names.
        limit: Number of names after which the others are only counted.

    Returns:
        The text.

    Example:
        >>> quoted(["a", "b"]), quoted("abcdef", limit=2)
        ("'a', 'b'", "'a', 'b' and 4 more")
    """
    all_names = list(names)
    rest = f" and {len(all_names) - limit} more" if len(all_names) > limit else ""
    return ", ".join(f"'{name}'" for name in all_names[:limit]) + rest


def counted(number: int, noun: str) -> str:
    """A number and a noun, in the plural unless it is one.

    Args:
        number: The number.
        noun: The noun in the singular, whose plural ends in s.

    Returns:
        The text.

    Example:
        >>> counted(1, "snapshot"), counted(2048, "sample"), counted(0, "batch")
        ('1 snapshot', '2,048 samples', '0 batches')
    """
    ending = "" if number == 1 else "es" if noun.endswith(("s", "ch", "sh", "x")) else "s"
    return f"{number:,} {noun}{ending}"


def did_you_mean(wrong: object, known: Iterable[str]) -> str:
    """Ask whether the most similar known name is meant, to be appended to a message; "" if none is similar.

    Args:
        wrong: The name that was given.
        known: The names that exist.

    Returns:
        The question, with a space before it.

    Example:
        >>> did_you_mean("max_epohcs", ["max_epochs", "max_steps"]), did_you_mean("x", ["max_epochs"])
        (" Did you mean 'max_epochs'?", '')
        >>> did_you_mean("PGD", ["random", "pgd"])
        " Did you mean 'pgd'?"
    """
    names = list(known)
    near = [*difflib.get_close_matches(str(wrong), names, n=1), *(x for x in names if x.lower() == str(wrong).lower())]
    return f" Did you mean '{near[0]}'?" if near else ""


def brief(error: BaseException, limit: int = 200) -> str:
    r"""Type and message of any error, in one line.

    Args:
        error: The error.
        limit: Largest number of characters.

    Returns:
        The text; without the lists of C++ functions that torch appends.

    Example:
        >>> brief(KeyError("x")), brief(ValueError("no\n  luck")), brief(RuntimeError("a" * 99), limit=20)
        ("KeyError: 'x'", 'ValueError: no luck', 'RuntimeError: aaa')
    """
    message = str(error).partition("Exception raised from")[0]
    return shortened(f"{type(error).__name__}: {message}" if message else type(error).__name__, limit).rstrip(".")


def shortened(text: str, limit: int) -> str:
    """A text in one line, cut to a largest number of characters."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def on_screen(error: BaseException) -> list[str]:
    """An error as it is shown without a traceback.

    Args:
        error: The error.

    Returns:
        At most five lines: the message, and the last line of the user's code that led to it.
    """
    width = min(shutil.get_terminal_size((_WIDTH, 24)).columns, 2 * _WIDTH)
    place = _place_of(error.__cause__) or _place_of(error)
    text = f"{type(error).__name__}: {error}"
    lines = [x for line in text.splitlines() for x in textwrap.wrap(line, max(width - 1, 40), break_on_hyphens=False)]
    room = _LINES - bool(place)
    if len(lines) > room:
        lines = [*lines[: room - 1], shortened(" ".join(lines[room - 1 :]), max(width - 1, 40))]
    return [*lines, *([shortened(place, width - 1)] if place else [])]


def _place_of(error: BaseException | None) -> str:
    """The last line of code in a traceback that is in no installed package."""
    if error is None:
        return ""
    paths = sysconfig.get_paths()
    folders = [Path(__file__).parent, *(paths[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib"))]
    installed = ("<frozen", "<string", *(f"{folder}{os.sep}" for folder in folders))
    frames = [x for x in traceback.extract_tb(error.__traceback__) if not x.filename.startswith(installed)]
    if not frames:
        return ""
    file, last = Path(frames[-1].filename), frames[-1]
    place = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else Path(*file.parts[-2:])
    return f"at {place}, line {last.lineno}: {last.line or last.name}"


def _print_uncaught(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    if isinstance(error, LIBError) and not shows_tracebacks():
        sys.stderr.write("".join(f"{line}\n" for line in on_screen(error)))
    else:
        sys.__excepthook__(kind, error, where)


def check_list(name: str, value: object, of: str, is_one: Callable[[Any], bool]) -> list[Any]:
    """Check a setting that is a list.

    Args:
        name: Its name.
        value: Its value.
        of: What is in it, for the message.
        is_one: Whether an entry is one of these.

    Returns:
        The list.

    Raises:
        SettingTypeError: If it is not such a list.

    Example:
        >>> check_list("baselines", "pca", "strings", lambda x: isinstance(x, str))
        Traceback (most recent call last):
        lib_lightning.errors.SettingTypeError: baselines must be a list of strings; got 'pca'.
    """
    if (
        isinstance(value, (str, bytes))
        or not isinstance(value, Iterable)
        or not all(map(is_one, entries := list(value)))
    ):
        raise SettingTypeError(f"{name} must be a list of {of}; got {shortened(repr(value), 80)}.")
    return entries


def check_number(
    name: str, value: object, is_valid: Callable[[Any], bool], expected: str, integer: bool = False
) -> None:
    """Check a setting that is a number.

    Args:
        name: Its name.
        value: Its value.
        is_valid: Whether a number is in its range.
        expected: The rest of the sentence that says what it must be.
        integer: Whether it must be an integer.

    Raises:
        SettingTypeError: If it is not a number, or not an integer where it must be one.
        SettingError: If it is outside its range.

    Example:
        >>> check_number("rtol", 0.1, lambda x: x >= 0, "must be at least 0")
        >>> check_number("rtol", "0.1", lambda x: x >= 0, "must be at least 0")
        Traceback (most recent call last):
        lib_lightning.errors.SettingTypeError: rtol must be at least 0; got '0.1'.
    """
    is_number = isinstance(value, numbers.Integral if integer else numbers.Real) and not isinstance(value, bool)
    if not is_number or not is_valid(value):
        error = SettingError if is_number else SettingTypeError
        raise error(f"{name} {expected}; got {shortened(str(value) if is_number else repr(value), 80)}.")


def check_bool(name: str, value: object) -> None:
    """Check a setting that is True or False.

    Args:
        name: Its name.
        value: Its value.

    Raises:
        SettingTypeError: If it is neither.

    Example:
        >>> check_bool("follow", "no")
        Traceback (most recent call last):
        lib_lightning.errors.SettingTypeError: follow must be True or False; got 'no'.
    """
    if not isinstance(value, bool):
        raise SettingTypeError(f"{name} must be True or False; got {shortened(repr(value), 80)}.")


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
