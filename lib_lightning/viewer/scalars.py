"""Curves of a run, such as its loss: from event files, or from metrics.csv where there are none."""

from __future__ import annotations

import contextlib
import csv
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib_lightning.viewer.run_discovery import FileStamp, plain_files

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

# Most points of a curve that are handed on. Many more are kept, so that their places stay even as the curve grows.
MOST_POINTS = 1000
_KEPT = 16 * MOST_POINTS
# Records above this many bytes hold images, not scalars.
_LARGEST_RECORD = 1 << 20
# What Lightning logs beside a user's numbers.
_OF_NO_INTEREST = {"epoch", "step", "hp_metric"}


class ScalarSeries:
    """Points of one curve, evenly thinned as they become too many; the last one is always there.

    Example:
        >>> curve = ScalarSeries()
        >>> for step in range(100_000):
        ...     curve.add(step, step / 2)
        >>> steps, values = curve.points()
        >>> len(steps), steps[:2], steps[-1], values[-1]
        (1000, [0, 104], 99999, 49999.5)
    """

    def __init__(self) -> None:
        self._points: dict[int, float] = {}
        self._last: tuple[int, float] | None = None
        self._stride, self._seen = 1, 0

    def add(self, step: int, value: float) -> None:
        """Add a point; a resumed run writes some steps anew, and then the last one holds."""
        self._last = step, value
        if self._seen % self._stride == 0 or step in self._points:
            self._points[step] = value
        self._seen += 1
        if len(self._points) > _KEPT:
            self._points = dict(list(self._points.items())[::2])
            self._stride *= 2

    def points(self) -> tuple[list[int], list[float]]:
        """Steps in order, and the values there; at most `MOST_POINTS`."""
        points = sorted((self._points | dict([self._last] if self._last else [])).items())
        places = np.linspace(0, len(points) - 1, min(len(points), MOST_POINTS)).round().astype(int)
        return [points[i][0] for i in places], [points[i][1] for i in places]


class Scalars:
    """Curves of one log directory, read on as its files grow.

    TensorBoard's own reader checks every byte in Python, figures and all, which takes seconds for what is read here in
    a hundredth of that: records are passed over by their length, and those of images never read.

    Args:
        folder: The log directory, without links in its path.

    Attributes:
        folder: The same.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._forget()

    def _forget(self) -> None:
        self._curves: dict[str, ScalarSeries] = {}
        self._read: dict[Path, tuple[FileStamp, int]] = {}  # as it was, and how far
        self._tensors: set[str] = set()

    def curves(self) -> dict[str, ScalarSeries]:
        """Read what is new.

        Returns:
            Curves by name. Those of folders in the log directory have the folder's name before theirs.
        """
        files = {file: prefix for file, prefix in self._files() if "tfevents" in file.path.name}
        table = next((file for file in plain_files(self.folder) if file.path.name == "metrics.csv"), None)
        if not files and table is not None:
            files = {table: ""}
        now = {file.path: file for file in files}
        if any(path not in now or not _grown(old, now[path]) for path, (old, _) in self._read.items()):
            self._forget()
        for file, prefix in files.items():
            old, place = self._read.get(file.path, (None, 0))
            if old == file:
                continue
            with contextlib.suppress(OSError):
                place = self._read_table(file) if file is table else self._read_events(file, place, prefix)
                self._read[file.path] = file, place
        return {tag: curve for tag, curve in self._curves.items() if tag not in _OF_NO_INTEREST}

    def _files(self) -> Iterator[tuple[FileStamp, str]]:
        for file in plain_files(self.folder):
            yield file, ""
        # A SummaryWriter's add_scalars writes each curve to a folder of its own.
        with contextlib.suppress(OSError):
            for folder in sorted(self.folder.iterdir()):
                for file in plain_files(folder):
                    yield file, f"{folder.name}/"

    def _read_events(self, file: FileStamp, place: int, prefix: str) -> int:
        from tensorboard.compat.proto.event_pb2 import Event

        for end, record in _records(file, place):
            place = end
            with contextlib.suppress(Exception):  # a record that is no event is passed over
                event = Event.FromString(record)
                for value in event.summary.value:
                    number = self._number(value, prefix)
                    if number is not None:
                        self._add(prefix + value.tag, event.step, number)
        return place

    def _number(self, value: Summary.Value, prefix: str) -> float | None:
        """The number of an entry: writers of old have a field for it, and new ones a tensor."""
        if value.HasField("simple_value"):
            return float(value.simple_value)
        if value.HasField("tensor"):
            from tensorboard.util.tensor_util import make_ndarray

            # Only the first entry of a name says whose it is.
            if value.metadata.plugin_data.plugin_name == "scalars":
                self._tensors.add(prefix + value.tag)
            if prefix + value.tag in self._tensors:
                array = make_ndarray(value.tensor)
                return float(array.item()) if array.size == 1 else None
        return None

    def _read_table(self, file: FileStamp) -> int:
        self._forget()
        with file.path.open(newline="", encoding="utf-8", errors="replace") as lines:
            for row in csv.DictReader(lines):
                for tag, value in row.items():
                    with contextlib.suppress(ValueError, TypeError, KeyError):  # blank cells, a half written line
                        self._add(tag, int(float(row["step"])), float(value))
        return file.size

    def _add(self, tag: Any, step: int, value: float) -> None:
        self._curves.setdefault(str(tag), ScalarSeries()).add(step, value)


def _grown(old: FileStamp, new: FileStamp) -> bool:
    return old.inode == new.inode and old.size <= new.size


def _records(file: FileStamp, place: int) -> Iterator[tuple[int, bytes]]:
    """Whole records of an event file from a place on, each with the place behind it.

    A record is its length, a checksum of that, the content, and a checksum of it.
    """
    with file.path.open("rb") as stream:
        while True:
            stream.seek(place)
            head = stream.read(12)
            if len(head) < 12:
                return
            (length,) = struct.unpack("<Q", head[:8])
            if place + 12 + length + 4 > file.size:  # half written
                return
            place += 12 + length + 4
            yield place, stream.read(length) if length <= _LARGEST_RECORD else b""
