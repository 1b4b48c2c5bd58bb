"""What the view shows of a run, as JSON, put together from its files."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from pathlib import Path
from typing import Any

import numpy as np

from lib_lightning.errors import LIBError
from lib_lightning.viewer.cache import Cache
from lib_lightning.viewer.json_text import dump, numbers, object_
from lib_lightning.viewer.run_discovery import (
    FileStamp,
    holds_curves,
    log_directory,
    plain_files,
    read_events,
    snapshot_files,
)
from lib_lightning.viewer.scalars import Scalars
from lib_lightning.viewer.snapshot import UNREADABLE, Outline, read_detail, read_outline

# Most edges of a section that a snapshot has.
EDGES = 2000
_EVENT = ("step", "kind", "text", "layer", "lineage")


class NotThereError(LIBError, LookupError):
    """A run or a snapshot that is not there."""


class RunView:
    """A run as the view shows it. Whatever is gone or broken when it is read is left out. Any thread may ask.

    Args:
        folder: The run's folder, without links in its path.
        name: What to call it.
        cache: Where to keep what was read.
        below: Read nothing outside this folder; by default, curves are in the run's log directory wherever it is.
    """

    def __init__(self, folder: Path, name: str, cache: Cache, below: Path | None = None) -> None:
        self.folder, self.name = folder, name
        self._cache = cache
        logs = log_directory(folder)
        self._scalars = Scalars(logs) if below is None or logs.is_relative_to(below) else None
        self._lock = threading.Lock()

    def entry(self) -> dict[str, Any]:
        """Name, version and number of snapshots: enough to see whether there is something new."""
        return self._entry(snapshot_files(self.folder))

    def run(self, every: int = 1) -> str:
        """Tell what the whole run is.

        Args:
            every: Take each so-manieth snapshot, and the last one.

        Returns:
            JSON with the run's layers, snapshots, labels, events and scalars.

        Raises:
            NotThereError: If no snapshot can be read.
        """
        files = snapshot_files(self.folder)
        outlines = list(self._outlines(files, every).values())
        if not outlines:
            raise NotThereError(f"Run '{self.name}' has no snapshot that can be read.")
        layers = outlines[-1].layers
        events = [{key: event.get(key) for key in _EVENT} for event in read_events(self.folder)]
        return object_(
            {
                "name": dump(self.name),
                "every": dump(every),
                "version": dump(self._entry(files)["version"]),
                "layers": dump([{"name": name, "kind": kind} for name, kind in layers]),
                "snapshots": f"[{','.join(outline.json for outline in outlines)}]",
                "labels": dump([_newest_labels(outlines, i) for i in range(len(layers))]),
                "events": dump(events),
                "scalars": self._curves(),
            }
        )

    def steps(self, every: int = 1) -> list[int]:
        """Steps of the snapshots that `run` tells of."""
        return list(self._outlines(snapshot_files(self.folder), every))

    def snapshot(self, step: int, edges: int = EDGES) -> str:
        """Tell all of one snapshot.

        Args:
            step: Number of optimizer steps before it.
            edges: Most edges of a section, the strongest.

        Returns:
            JSON with its layers and sections.

        Raises:
            NotThereError: If there is no such snapshot, or it cannot be read.
        """
        file = snapshot_files(self.folder).get(step)
        if file is None:
            raise NotThereError(f"Run '{self.name}' has no snapshot at step {step:,}.")
        try:
            return self._cache.get((file, edges), lambda: read_detail(file, step, edges), size=len)
        except UNREADABLE as error:
            raise NotThereError(f"The snapshot of '{self.name}' at step {step:,} cannot be read: {error}") from error

    def _entry(self, files: dict[int, FileStamp]) -> dict[str, Any]:
        # Curves and events grow between snapshots, and after the last one.
        beside = plain_files(self.folder)
        if self._scalars is not None:
            beside += [file for file in plain_files(self._scalars.folder) if holds_curves(file)]
        everything = repr([*((step, file[1:]) for step, file in files.items()), *(file[1:] for file in beside)])
        version = f"{len(files)}-{hashlib.sha256(everything.encode()).hexdigest()[:16]}"
        return {"name": self.name, "version": version, "snapshots": len(files)}

    def _outlines(self, files: dict[int, FileStamp], every: int) -> dict[int, Outline]:
        """Outlines of the snapshots that can be read and have the node layers of the newest."""
        steps = list(files)
        taken = [step for i, step in enumerate(steps) if i % every == 0 or step == steps[-1]]
        read = {step: self._outline(files[step], step) for step in taken}
        readable = {step: outline for step, outline in read.items() if outline is not None}
        return {
            step: outline
            for step, outline in readable.items()
            if outline.layers == next(reversed(readable.values())).layers
        }

    def _outline(self, file: FileStamp, step: int) -> Outline | None:
        def read() -> Outline | None:
            with contextlib.suppress(*UNREADABLE):
                return read_outline(file, step)
            return None

        return self._cache.get(file, read, size=lambda outline: outline.size() if outline else 100)

    def _curves(self) -> str:
        if self._scalars is None:
            return "{}"
        with self._lock:
            points = {tag: curve.points() for tag, curve in self._scalars.curves().items()}
        # The graphs' own numbers are told with the snapshots; a user's come before what else there is of theirs.
        own = {path.parent.name for path in self._scalars.folder.glob("*/snapshots")}
        ratios = tuple(f"{name}_over_" for name in own)
        return object_(
            {
                tag: object_({"steps": dump(steps), "values": numbers(np.array(values))})
                for tag, (steps, values) in sorted(points.items(), key=lambda p: (p[0].startswith(ratios), p[0]))
                if tag.split("/")[0] not in own
            }
        )


def _newest_labels(outlines: list[Outline], layer: int) -> dict[int, str]:
    """The newest name of each lineage; where they are not followed, the names in the newest snapshot."""
    if not outlines[-1].followed[layer]:
        return outlines[-1].labels[layer]
    followed = [outline.labels[layer] for outline in outlines if outline.followed[layer]]
    return {key: label for labels in followed for key, label in labels.items()}
