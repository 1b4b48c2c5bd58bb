"""Finding runs and their files below a log directory. Symbolic links are not followed."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from lib_lightning.io.run_layout import RunLayout

# Where the callback writes by default, below the log directory.
DEFAULT_FOLDER = "lib"
# Hugging Face's Trainer writes it, with all that it has logged.
TRAINER_STATE = "trainer_state.json"


class FileStamp(NamedTuple):
    """A file and the properties that change with its content: a cache key for anything read from it.

    Attributes:
        path: Path of the file.
        mtime_ns: Modification time, in nanoseconds.
        size: Size in bytes.
        inode: Inode number, which differs for a file that replaces this one.
    """

    path: Path
    mtime_ns: int
    size: int
    inode: int


def regular_files(folder: Path) -> list[FileStamp]:
    """List the regular files of a folder, sorted by name, without symbolic links.

    Args:
        folder: Path of the folder. If it does not exist or contains a symbolic link, the list is empty.

    Returns:
        The files.
    """
    files = []
    with contextlib.suppress(OSError):
        if os.path.realpath(folder) != str(folder):
            return []
        for entry in os.scandir(folder):
            # A training in progress replaces its files, so any of them may be missing by now.
            with contextlib.suppress(OSError):
                if entry.is_file(follow_symlinks=False):
                    stat = entry.stat(follow_symlinks=False)
                    files.append(FileStamp(Path(entry.path), stat.st_mtime_ns, stat.st_size, stat.st_ino))
    return sorted(files)


def snapshot_files(folder: Path) -> dict[int, FileStamp]:
    """Find the basis files of a run.

    Args:
        folder: Folder of the run, without symbolic links in its path.

    Returns:
        Basis files by step, in increasing order.
    """
    layout = RunLayout(folder)
    suffix = layout.basis_file(0).suffix
    files = [file for file in regular_files(layout.snapshots) if file.path.suffix == suffix]
    steps = ((layout.step_of(file.path), file) for file in files)
    return dict(sorted((step, file) for step, file in steps if step is not None))


def find_runs(root: Path) -> dict[str, Path]:
    """Find all runs below a folder.

    Args:
        root: Any folder; it may be a run itself.

    Returns:
        Folders of runs, with resolved symbolic links in ``root``, by path relative to it.
    """
    found = {}
    real = Path(os.path.realpath(root))
    for path, folders, _ in os.walk(real):
        folder = Path(path)
        is_run = RunLayout.SNAPSHOTS in folders and bool(snapshot_files(folder))
        if is_run:
            found[folder.relative_to(real).as_posix() if folder != real else real.name] = folder
        skipped = RunLayout.NO_RUNS if is_run else ()
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
    return dict(sorted(found.items(), key=lambda item: _natural_key(item[0])))


def run_title(name: str, folder: Path) -> str:
    """What a run is called where people read it: by its log directory, and by its own folder only if that says more.

    Args:
        name: Path of the run's folder relative to where it was searched for.
        folder: The folder.

    Returns:
        The path without the folder that the callback makes by default; with the folder above it, if nothing else is
        left.

    Example:
        >>> run_title("version_0/lib", Path("/logs/version_0/lib")), run_title("lib", Path("/logs/version_0/lib"))
        ('version_0', 'version_0')
        >>> run_title("version_0/pca", Path("/logs/version_0/pca")), run_title("pca", Path("/logs/version_0/pca"))
        ('version_0/pca', 'version_0/pca')
    """
    parts = name.split("/")
    if len(parts) == 1 and folder.parent.name and folder.name == name:
        parts = [folder.parent.name, name]
    return "/".join(parts[:-1] if len(parts) > 1 and parts[-1] == DEFAULT_FOLDER else parts)


def log_directory(folder: Path) -> Path:
    """Find the trainer's log directory of a run.

    Args:
        folder: Folder of the run.

    Returns:
        Its parent folder; for a standalone validation in ``validate``, the parent of that, unless the validation has
        log files of its own.
    """
    nested = folder.name == RunLayout.VALIDATION and not any(map(is_log_file, regular_files(folder.parent)))
    return folder.parent.parent if nested else folder.parent


def regular_file(path: Path) -> FileStamp | None:
    """A file, if it is a regular one; None if it is missing, or a symbolic link.

    Args:
        path: Its path.

    Returns:
        The file.
    """
    return next((file for file in regular_files(path.parent) if file.path == path), None)


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Read the events of a run: features and metrics that changed.

    Args:
        folder: Folder of the run.

    Returns:
        Events with ``step``, ``kind``, ``text``, ``layer`` and ``lineage``, in the order of the file. Incomplete lines
        are skipped.
    """
    path = RunLayout(folder).events_file
    events = []
    if regular_file(path):
        with contextlib.suppress(OSError):
            for line in path.read_text("utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    event = json.loads(line, parse_constant=lambda _: None)
                    if isinstance(event, dict) and isinstance(event.get("step"), int):
                        events.append(event)
    return events


def read_final_forms(path: Path) -> dict[str, int]:
    """Read since when the features of the last snapshot have been recognisable.

    Args:
        path: The file that the run has written at its end, ``retraced.json``.

    Returns:
        The step, by id of the feature; nothing for those that are not.
    """
    found = dict[str, int]()
    with contextlib.suppress(OSError, ValueError, RecursionError, AttributeError, TypeError, KeyError):
        for layer, of_layer in json.loads(path.read_text("utf-8", errors="replace")).items():
            for one in of_layer["features"]:
                if isinstance(one["since"], int) and isinstance(one["lineage"], int):
                    found[f"{layer}/{one['lineage']}"] = one["since"]
    return found


def is_log_file(file: FileStamp) -> bool:
    """Whether a file contains scalars written by a logger.

    Args:
        file: Any file.

    Returns:
        True for TensorBoard's event files, CSV files, and the state of Hugging Face's Trainer.
    """
    return "tfevents" in file.path.name or file.path.suffix == ".csv" or file.path.name == TRAINER_STATE


def _natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key by which version_2 comes before version_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]
