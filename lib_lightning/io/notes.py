"""The user's notes on the features of a run: one JSON file, ``{"resid_post/17": "text"}``."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path

from lib_lightning.errors import LIBError, SettingError, SettingTypeError
from lib_lightning.io.basis_file import write_bytes

try:
    import fcntl
except ImportError:  # on Windows, where only the threads of one process wait for each other
    fcntl = None  # type: ignore[assignment]

MAX_CHARACTERS = 10_000
# How long to wait for another program that is writing, in seconds.
_PATIENCE = 5.0
_threads = threading.Lock()


def read_notes(path: str | PathLike[str]) -> dict[str, str]:
    """Read the notes of a run.

    Args:
        path: The file, `RunLayout.notes_file`; a symbolic link counts as missing.

    Returns:
        The notes by the ids of their features; none if there is no file.

    Raises:
        LIBError: If the file is not one of notes.
    """
    path = Path(path)
    try:
        notes = {} if path.is_symlink() else json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise LIBError(f"The notes in '{path}' cannot be read: {error}. Correct the file, or move it away.") from error
    if not isinstance(notes, dict) or not all(isinstance(text, str) for text in notes.values()):
        raise LIBError(
            f"'{path}' is not a file of notes, which is a JSON object of texts by the ids of features, such as "
            '{"resid_post/17": "closes brackets"}. Correct the file, or move it away.'
        )
    return notes


def write_note(path: str | PathLike[str], feature_id: str, text: str) -> None:
    """Write a note on a feature, in place of the one that it had; the other notes stay as they are.

    The file is complete at any time, and programs that write at the same time, such as a notebook and TensorBoard, wait
    for each other; on Windows, and on file systems without locks, only the threads of one process do.

    Args:
        path: The file, `RunLayout.notes_file`.
        feature_id: The feature's id, such as ``"resid_post/17"``.
        text: The note; "" to remove it. Spaces around it are left out.

    Raises:
        LIBError: If the file is not one of notes, which stays as it is; or if another program does not stop writing.
        SettingError: If the text is longer than 10,000 characters.
        SettingTypeError: If it is not a string.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_note(f"{folder}/notes.json", "fc/1", "edges")
        ...     write_note(f"{folder}/notes.json", "fc/0", "brightness")
        ...     write_note(f"{folder}/notes.json", "fc/1", "")
        ...     read_notes(f"{folder}/notes.json")
        {'fc/0': 'brightness'}
    """
    if not isinstance(text, str):
        raise SettingTypeError(f'A note is a text, or "" for none; got {text!r}.')
    if len(text) > MAX_CHARACTERS:
        raise SettingError(f"A note has {MAX_CHARACTERS:,} characters at most; got {len(text):,}.")
    change_notes(path, lambda notes: notes | {feature_id: text.strip()})


def change_notes(path: str | PathLike[str], change: Callable[[dict[str, str]], dict[str, str]]) -> None:
    """Replace the notes of a run, while nobody else does.

    Args:
        path: The file; its folder exists.
        change: Gets the notes and returns the new ones; those that are "" are left out.

    Raises:
        LIBError: As for `write_note`.
    """
    path = Path(path)
    with _locked(path.parent):
        before = read_notes(path)
        after = {name: text for name, text in change(dict(before)).items() if text}
        if after == before:
            return
        if after:
            write_bytes(path, (json.dumps(after, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode())
        else:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """A block that one thread of one process is in at a time. The lock is on the folder, so that no file is left."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_threads)
        if fcntl is not None:
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)  # which ends the lock
            _wait_for(descriptor, folder)
        yield


def _wait_for(descriptor: int, folder: Path) -> None:
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise LIBError(
                    f"Another program has been writing notes in '{folder}' for {_PATIENCE:.0f} seconds. Try again."
                ) from None
            time.sleep(0.01)
        except OSError:  # a file system without locks
            return
