"""Logged scalars of a run, such as the loss: from event files, CSV files, and the state of Hugging Face's Trainer."""

from __future__ import annotations

import contextlib
import csv
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lib_lightning.viewer.run_discovery import TRAINER_STATE, FileStamp, regular_files

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

# Maximum number of points returned per scalar. More are stored, so that they remain evenly spaced as the series grows.
MAX_POINTS = 1000
_MAX_STORED_POINTS = 16 * MAX_POINTS
# Larger records contain images, not scalars.
_MAX_RECORD_BYTES = 1 << 20
# Larger tables are not logs.
_MAX_TABLE_BYTES = 256 << 20
# Logged by Lightning in addition to the user's scalars.
_IGNORED = {"epoch", "step", "hp_metric"}
# Lightning's CSVLogger writes it.
METRICS = "metrics.csv"


class ScalarSeries:
    """One scalar over steps, thinned evenly as it grows. The last point is always included.

    Example:
        >>> series = ScalarSeries()
        >>> for step in range(100_000):
        ...     series.add(step, step / 2)
        >>> steps, values = series.points()
        >>> len(steps), steps[:2], steps[-1], values[-1]
        (1000, [0, 104], 99999, 49999.5)

    Args:
        in_optimizer_steps: Whether its steps are numbers of optimizer steps, and not what Lightning counts.

    Attributes:
        in_optimizer_steps: The same.
    """

    def __init__(self, in_optimizer_steps: bool = False) -> None:
        self.in_optimizer_steps = in_optimizer_steps
        self._points: dict[int, float] = {}
        self._last: tuple[int, float] | None = None
        self._stride, self._seen = 1, 0

    def add(self, step: int, value: float) -> None:
        """Add a point. A resumed run may repeat steps; the later value replaces the earlier one."""
        self._last = step, value
        if self._seen % self._stride == 0 or step in self._points:
            self._points[step] = value
        self._seen += 1
        if len(self._points) > _MAX_STORED_POINTS:
            self._points = dict(list(self._points.items())[::2])
            self._stride *= 2

    def points(self) -> tuple[list[int], list[float]]:
        """Steps in increasing order and their values, at most `MAX_POINTS`."""
        points = sorted((self._points | dict([self._last] if self._last else [])).items())
        indices = np.linspace(0, len(points) - 1, min(len(points), MAX_POINTS)).round().astype(int)
        return [points[i][0] for i in indices], [points[i][1] for i in indices]


@dataclass
class _Progress:
    """What has been read of the event files of a log directory so far.

    Attributes:
        series: Scalars by name.
        files: For each file, its stamp when it was last read, and the position up to which it was read.
        tensors: Names of scalars that are written as tensors.
    """

    series: dict[str, ScalarSeries] = field(default_factory=dict)
    files: dict[Path, tuple[FileStamp, int]] = field(default_factory=dict)
    tensors: set[str] = field(default_factory=set)

    def add(self, tag: Any, step: int, value: float) -> None:
        self.series.setdefault(str(tag), ScalarSeries()).add(step, value)


class ScalarReader:
    """Reads the scalars of one log directory, continuing where the last call stopped.

    TensorBoard's own reader verifies checksums of all bytes in Python, including figures, which takes about a hundred
    times as long. This reader skips large records by their length.

    Besides event files, also those in subfolders, it reads in the log directory itself

    - ``metrics.csv`` of Lightning;
    - other CSV files with a column ``step``, the number of optimizer steps, as another tool may write them: the column
      ``mean`` of ``probe.csv`` is called ``probe/mean``;
    - ``trainer_state.json`` of Hugging Face's Trainer, with the names that it uses in event files.

    A scalar that is in several of them is read from the event files, or else the first of these.

    Args:
        folder: The log directory, without symbolic links in its path.

    Attributes:
        folder: The log directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._progress = _Progress()
        self._tables: dict[FileStamp, dict[str, ScalarSeries]] = {}

    def read(self) -> dict[str, ScalarSeries]:
        """Read new points.

        Returns:
            All scalars read so far, by name. Scalars in a subfolder are prefixed with its name.
        """
        self._read_event_files({file: prefix for file, prefix in self._files() if "tfevents" in file.path.name})
        tables = [file for file in regular_files(self.folder) if file.size <= _MAX_TABLE_BYTES]
        read = sorted((_order(file), file) for file in tables if _order(file) is not None)
        self._tables = {file: self._tables[file] if file in self._tables else _read_table(file) for _, file in read}
        found: dict[str, ScalarSeries] = {}
        for series in (self._progress.series, *self._tables.values()):
            found |= {tag: one for tag, one in series.items() if tag not in found and tag not in _IGNORED}
        return found

    def _read_event_files(self, files: Mapping[FileStamp, str]) -> None:
        current = {file.path: file for file in files}
        previous = self._progress.files
        if any(path not in current or not _grown(old, current[path]) for path, (old, _) in previous.items()):
            self._progress = _Progress()
        for file, prefix in files.items():
            old, position = self._progress.files.get(file.path, (None, 0))
            if old == file:
                continue
            with contextlib.suppress(OSError):
                self._progress.files[file.path] = file, _read_events(self._progress, file, position, prefix)

    def _files(self) -> Iterator[tuple[FileStamp, str]]:
        for file in regular_files(self.folder):
            yield file, ""
        # SummaryWriter.add_scalars writes each scalar to a folder of its own.
        with contextlib.suppress(OSError):
            for folder in sorted(self.folder.iterdir()):
                for file in regular_files(folder):
                    yield file, f"{folder.name}/"


def _order(file: FileStamp) -> int | None:
    """Which tables come first, where several have a scalar; None for other files."""
    name = file.path.name
    return 0 if name == METRICS else 1 if name == TRAINER_STATE else 2 if name.endswith(".csv") else None


def _event_decoder() -> tuple[Any, Callable[[Any], np.ndarray]] | None:
    """TensorBoard's class of events and its function to decode tensors; None if this version does not have them.

    They are not part of its documented interface. Without them a run is shown without the scalars in event files.
    """
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError:
        return None
    return Event, make_ndarray


def _read_events(progress: _Progress, file: FileStamp, position: int, prefix: str) -> int:
    """Read an event file from a position on, and return the position of its first unread record."""
    if (decoder := _event_decoder()) is None:
        return position
    event_type, decode_tensor = decoder
    for end, record in _records(file, position):
        position = end
        with contextlib.suppress(Exception):  # skip records that are not events
            event = event_type.FromString(record)
            for value in event.summary.value:
                scalar = _scalar(progress, value, prefix, decode_tensor)
                if scalar is not None:
                    progress.add(prefix + value.tag, event.step, scalar)
    return position


def _scalar(
    progress: _Progress, value: Summary.Value, prefix: str, decode_tensor: Callable[[Any], np.ndarray]
) -> float | None:
    """The scalar in an entry of an event: a field of its own in the older format, a tensor in the newer one."""
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if value.HasField("tensor"):
        # Only the first entry of a tag names its plugin.
        if value.metadata.plugin_data.plugin_name == "scalars":
            progress.tensors.add(prefix + value.tag)
        if prefix + value.tag in progress.tensors:
            array = decode_tensor(value.tensor)
            return float(array.item()) if array.size == 1 else None
    return None


def _read_table(file: FileStamp) -> dict[str, ScalarSeries]:
    """The scalars in a table; nothing if it cannot be read."""
    found: dict[str, ScalarSeries] = {}
    with contextlib.suppress(OSError, csv.Error, ValueError, RecursionError):
        if file.path.name == TRAINER_STATE:
            _read_trainer_state(file, found)
        else:
            _read_csv(file, found)
    return found


def _read_csv(file: FileStamp, found: dict[str, ScalarSeries]) -> None:
    is_lightnings = file.path.name == METRICS
    prefix = "" if is_lightnings else f"{file.path.stem}/"
    with file.path.open(newline="", encoding="utf-8-sig", errors="replace") as lines:
        rows = csv.DictReader(lines)
        if "step" not in (rows.fieldnames or ()):
            return
        for row in rows:
            for tag, value in row.items():
                if tag in _IGNORED:
                    continue
                # Empty cells, text, an incomplete line.
                with contextlib.suppress(ValueError, TypeError, OverflowError):
                    step, number = int(float(row["step"])), float(value)
                    found.setdefault(f"{prefix}{tag}", ScalarSeries(not is_lightnings)).add(step, number)


def _read_trainer_state(file: FileStamp, found: dict[str, ScalarSeries]) -> None:
    state = json.loads(file.path.read_text("utf-8", errors="replace"))
    history = state.get("log_history") if isinstance(state, dict) else None
    for entry in history if isinstance(history, list) else ():
        # The last entry sums up the training.
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int) or "train_runtime" in entry:
            continue
        for key, value in entry.items():
            if key not in _IGNORED and isinstance(value, (int, float)) and not isinstance(value, bool):
                # As the Trainer's own callback for TensorBoard names them.
                group = next((one for one in ("eval", "test") if key.startswith(f"{one}_")), None)
                tag = f"{group}/{key.removeprefix(f'{group}_')}" if group else f"train/{key}"
                found.setdefault(tag, ScalarSeries(True)).add(entry["step"], float(value))


def _grown(old: FileStamp, new: FileStamp) -> bool:
    return old.inode == new.inode and old.size <= new.size


def _records(file: FileStamp, position: int, max_bytes: int = _MAX_RECORD_BYTES) -> Iterator[tuple[int, bytes]]:
    """Complete records of an event file from a position on, each with the position of its end.

    A record consists of its length, a checksum of the length, its content, and a checksum of the content.
    """
    with file.path.open("rb") as stream:
        while True:
            stream.seek(position)
            head = stream.read(12)
            if len(head) < 12:
                return
            (length,) = struct.unpack("<Q", head[:8])
            if position + 12 + length + 4 > file.size:  # incomplete
                return
            position += 12 + length + 4
            yield position, stream.read(length) if length <= max_bytes else b""


def logged_points(folder: Path) -> set[tuple[str, int, bool]]:
    """What event files have: scalars, images and texts.

    What a writer has declared to be replaced, when it went on before some of it (``purge_step``), is not among them.

    Args:
        folder: The log directory, without symbolic links in its path.

    Returns:
        For each its name, its step, and whether it is a scalar that is NaN; none if this version of TensorBoard cannot
        be asked.
    """
    points: set[tuple[str, int, bool]] = set()
    if (decoder := _event_decoder()) is None:
        return points
    for file in regular_files(folder):  # their names begin with the time at which they were begun
        if "tfevents" not in file.path.name:
            continue
        for _, record in _records(file, 0, max_bytes=file.size):
            with contextlib.suppress(Exception):  # skip records that are not events
                event = decoder[0].FromString(record)
                if event.HasField("session_log") and event.session_log.status == event.session_log.START:
                    points = {point for point in points if point[1] < event.step}
                else:
                    points |= {(x.tag, event.step, bool(np.isnan(x.simple_value))) for x in event.summary.value}
    return points
