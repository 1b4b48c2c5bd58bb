"""Where runs are: folders of snapshots below a log directory, links left aside."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

_STEP = re.compile(r"step-(\d+)\.safetensors")
# Folders within that of a run, none of which is one.
_NO_RUNS_IN = {"snapshots", "figures", "spectra", "samples", "before"}


class FileStamp(NamedTuple):
    """A file and what changes when it does: together, the key of whatever is made of its content.

    Attributes:
        path: Where it is.
        mtime_ns: When it was written, in nanoseconds.
        size: In bytes.
        inode: Its number; a file that takes its place has another.
    """

    path: Path
    mtime_ns: int
    size: int
    inode: int


def plain_files(folder: Path) -> list[FileStamp]:
    """List the files of a folder, by name. Links are no files, and a folder reached through one has none.

    Args:
        folder: Any path without links in it; the folder need not exist.

    Returns:
        Its files.
    """
    files = []
    with contextlib.suppress(OSError):
        if os.path.realpath(folder) != str(folder):
            return []
        for entry in os.scandir(folder):
            # A training that still runs replaces its files: each may be gone by now.
            with contextlib.suppress(OSError):
                if entry.is_file(follow_symlinks=False):
                    stat = entry.stat(follow_symlinks=False)
                    files.append(FileStamp(Path(entry.path), stat.st_mtime_ns, stat.st_size, stat.st_ino))
    return sorted(files)


def snapshot_files(folder: Path) -> dict[int, FileStamp]:
    """Find the basis files of a run.

    Args:
        folder: The run's folder, which holds a folder ``snapshots``; without links in its path.

    Returns:
        Basis files by step, in order.
    """
    files = ((_STEP.fullmatch(file.path.name), file) for file in plain_files(folder / "snapshots"))
    return dict(sorted((int(match[1]), file) for match, file in files if match))


def find_runs(root: Path) -> dict[str, Path]:
    """Find all runs below a folder.

    Args:
        root: Any folder; it may be a run itself.

    Returns:
        Folders that hold snapshots, without links in their paths, by their place below the root.
    """
    found = {}
    real = Path(os.path.realpath(root))
    for place, folders, _ in os.walk(real):
        folder = Path(place)
        is_run = "snapshots" in folders and bool(snapshot_files(folder))
        if is_run:
            found[folder.relative_to(real).as_posix() if folder != real else real.name] = folder
        skipped = _NO_RUNS_IN if is_run else ()
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def log_directory(folder: Path) -> Path:
    """The log directory of a run: that of the trainer, in which its folder lies.

    Args:
        folder: The run's folder.

    Returns:
        The folder around it; the one around that for a look from outside, which is in ``validate``.
    """
    looked = folder.name == "validate" and not any(map(holds_curves, plain_files(folder.parent)))
    return folder.parent.parent if looked else folder.parent


def read_events(folder: Path) -> list[dict[str, Any]]:
    """Read what happened to features in a run.

    Args:
        folder: The run's folder.

    Returns:
        Events with ``step``, ``kind``, ``text``, ``layer`` and ``lineage``, in the order of the file. A line that is
        only half there is left out.
    """
    events = []
    if any(file.path.name == "events.jsonl" for file in plain_files(folder)):
        with contextlib.suppress(OSError):
            for line in (folder / "events.jsonl").read_text("utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    event = json.loads(line, parse_constant=lambda _: None)
                    if isinstance(event, dict) and isinstance(event.get("step"), int):
                        events.append(event)
    return events


def holds_curves(file: FileStamp) -> bool:
    """Whether a file is one that loggers write numbers to."""
    return "tfevents" in file.path.name or file.path.name == "metrics.csv"


def _natural(name: str) -> list[tuple[int, str]]:
    """Version_2 comes before version_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]
