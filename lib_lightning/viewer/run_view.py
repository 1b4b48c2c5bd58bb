"""The content of a run for the viewer: JSON assembled from the files of its folder."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lib_lightning.errors import LIBError
from lib_lightning.io.notes import read_notes
from lib_lightning.io.rendering_file import read_renderings
from lib_lightning.io.run_layout import RunLayout
from lib_lightning.plots.module_numbers import ModuleNumbers
from lib_lightning.plots.palette import label_colors
from lib_lightning.viewer.cache import Cache
from lib_lightning.viewer.comparisons import comparison_files, read_comparison
from lib_lightning.viewer.event_times import lifetimes, placed_events
from lib_lightning.viewer.feature import (
    Curves,
    SnapshotFeature,
    SnapshotFeatures,
    feature_history,
    latest_effect,
    read_curves,
)
from lib_lightning.viewer.json_text import array, dump, numbers, object_
from lib_lightning.viewer.run_discovery import (
    FileStamp,
    is_log_file,
    log_directory,
    read_events,
    read_final_forms,
    regular_file,
    regular_files,
    run_title,
    snapshot_files,
)
from lib_lightning.viewer.scalars import ScalarReader
from lib_lightning.viewer.snapshot import UNREADABLE, Outline, read_detail, read_outline
from lib_lightning.viewer.snapshot_metrics import Curve, SnapshotMetrics, metric_curves, read_metrics
from lib_lightning.viewer.step_axis import StepAxis

# Default for the maximum number of edges per section.
MAX_EDGES = 2000


class NotFoundError(LIBError, LookupError):
    """A run or a snapshot that does not exist or cannot be read."""


class RunView:
    """The content of a run as JSON, for the viewer. Thread-safe.

    Files may be missing, incomplete or replaced at any time while a training writes them; unreadable ones are skipped.

    Args:
        folder: Folder of the run, without symbolic links in its path.
        name: Name of the run.
        cache: Cache for what is read.
        root: Read no files outside this folder. By default, the logged scalars are read from the run's log directory
            wherever it is.

    Attributes:
        folder: Folder of the run.
        logs: Log directory of the run, which baselines beside it share.
        name: Name of the run.
    """

    def __init__(self, folder: Path, name: str, cache: Cache, root: Path | None = None) -> None:
        self.folder, self.name = folder, name
        self._cache = cache
        self.logs = log_directory(folder)
        self._reader = ScalarReader(self.logs) if root is None or self.logs.is_relative_to(root) else None
        self._lock = threading.Lock()

    def entry(self) -> dict[str, Any]:
        """Name, version and number of snapshots. The version changes whenever the content does."""
        return self._entry(snapshot_files(self.folder))

    def comparison(self) -> str:
        """The page of the comparison with other runs, as HTML.

        Raises:
            NotFoundError: If there is none.
        """
        file = regular_file(RunLayout(self.folder).comparison_page)
        if file is None:
            raise NotFoundError(
                f"Run '{self.name}' has not been compared with others: lib-lightning compare does that."
            )
        return file.path.read_text("utf-8", errors="replace")

    def run(self, every: int = 1) -> str:
        """Describe the whole run.

        Args:
            every: Include every n-th snapshot, and the last one.

        Returns:
            JSON with the run's layers, snapshots, labels, events, comparisons and scalars.

        Raises:
            NotFoundError: If no snapshot can be read.
        """
        files = snapshot_files(self.folder)
        by_step, all_by_step = self._outlines(files, every), self._outlines(files, 1)
        outlines = list(by_step.values())
        if not outlines:
            raise NotFoundError(f"Run '{self.name}' has no readable snapshots.")
        layers = outlines[-1].layers
        # These are over all snapshots, so that a film of some of them has the same.
        module_numbers = self.module_numbers() if any(outline.members for outline in outlines) else {}
        events, measured = read_events(self.folder), {step: one.measured for step, one in all_by_step.items()}
        return object_(
            {
                "name": dump(self.name),
                "every": dump(every),
                "version": dump(self._entry(files)["version"]),
                "layers": dump([{"name": name, "kind": kind} for name, kind in layers]),
                "snapshots": array(outline.json for outline in outlines),
                "labels": dump([_newest_labels(outlines, i) for i in range(len(layers))]),
                "output_names": dump(outlines[-1].output_names),
                "label_colors": dump(list(label_colors([outline.groups for outline in outlines]).items())),
                "module_numbers": dump([module_numbers.get(step) for step in by_step]),
                "events": dump(placed_events(events, measured)),
                "lifetimes": dump(lifetimes(events, measured)),
                **self._comparisons(),
                "scalars": self._scalars(all_by_step),
            }
        )

    def _comparisons(self) -> dict[str, str]:
        """Comparisons with other runs, the newest first, and the names of this run's snapshots in such."""
        read = [
            self._cache.get((file, "comparison"), lambda file=file: dump(read_comparison(file)), size=len)  # type: ignore[misc]
            for file in comparison_files(self.folder)
        ]
        # Of all snapshots, as a film of some of them may lack the one that was compared.
        outlines = self._outlines(snapshot_files(self.folder), 1)
        return {
            "comparisons": array(text for text in read if text != "null"),
            "fingerprints": dump({outline.fingerprint: step for step, outline in outlines.items()}),
        }

    def steps(self, every: int = 1) -> list[int]:
        """Steps of the snapshots that `run` includes."""
        return list(self._outlines(snapshot_files(self.folder), every))

    def snapshot_steps(self) -> list[int]:
        """Steps of all snapshots, readable or not."""
        return list(snapshot_files(self.folder))

    def curves(self) -> tuple[dict[str, Curve], dict[str, Curve]]:
        """Curves of the metrics of the snapshots, and of the logged scalars, by name. No tensor is read."""
        found = self._metrics()
        scalars = self._scalar_curves(
            {step: one.logging_step for step, one in found.items()}, {step: one.metrics for step, one in found.items()}
        )
        return metric_curves(found), scalars

    def module_numbers(self) -> dict[int, dict[int, int] | None]:
        """Numbers that modules have over the run, for files of version 0.1, which numbered them anew in each snapshot.

        Returns:
            For each snapshot, by step, the number of each module by its number in the file; None for one that has the
            numbers of the run already.
        """
        over_run, outlines = ModuleNumbers(), self._outlines(snapshot_files(self.folder), 1)
        return {step: over_run.update(one.members) if one.members else None for step, one in outlines.items()}

    def snapshot(self, step: int, edges: int = MAX_EDGES) -> str:
        """Describe one snapshot.

        Args:
            step: Number of optimizer steps before the snapshot.
            edges: Maximum number of edges per section; the strongest are included.

        Returns:
            JSON with its layers and sections.

        Raises:
            NotFoundError: If there is no such snapshot, or its file cannot be read.
        """
        file = self._file(step)
        with self._reading(step):
            return self._cache.get((file, edges), lambda: read_detail(file, step, edges), size=len)

    def feature(self, step: int, layer: int, which: int) -> str:
        """Describe one feature in a snapshot, with its numbers over the run.

        Args:
            step: Number of optimizer steps before the snapshot.
            layer: Index of the feature's node layer.
            which: The number in the feature's id.

        Returns:
            JSON. Whatever the files do not contain is null.

        Raises:
            NotFoundError: If there is no such snapshot or feature, or the file cannot be read.
        """
        file = self._file(step)
        with self._reading(step):
            page = self._cache.get(
                (file, "feature", layer, which),
                lambda: SnapshotFeatures(file, step, layer).page(layer, which),
                size=lambda found: found.size() if found else 100,
            )
        if page is None:
            raise NotFoundError(f"Run '{self.name}' has no feature {which} of node layer {layer} at step {step:,}.")
        history = self.feature_history(page.id)
        return object_(
            {
                **page.entries,
                "renderings": object_(self.renderings(page.samples, page.of)),
                "effect": dump(latest_effect(history, step)),
                "final_since": dump(self.final_forms().get(page.id)),
                "note": dump(self.notes().get(page.id, "")),
                "history": dump(history),
            }
        )

    def feature_pages(self, step: int, limit: int) -> list[SnapshotFeature]:
        """What a snapshot says about the most important features of each node layer.

        Args:
            step: Number of optimizer steps before the snapshot.
            limit: Maximum number of features per node layer.

        Returns:
            Their pages.

        Raises:
            NotFoundError: If there is no such snapshot, or its file cannot be read.
        """
        file = self._file(step)
        with self._reading(step):
            features = SnapshotFeatures(file, step)
            pages = (
                features.page(layer, which)
                for layer in range(len(features.layers))
                for which in features.most_important(layer, limit)
            )
            return [page for page in pages if page is not None]

    def final_forms(self) -> dict[str, int]:
        """Since which step features of the last snapshot have been recognisable, by id."""
        return self._parsed(RunLayout(self.folder).history_file, read_final_forms)

    def feature_history(self, feature_id: str) -> dict[str, list[Any]]:
        """Numbers of a feature, by its id, in all snapshots; see `lib_lightning.viewer.feature.feature_history`."""
        layer, _, which = feature_id.rpartition("/")
        return feature_history(self._curves(), layer, int(which))

    def renderings(self, samples: Iterable[int], of: str) -> dict[str, str]:
        """How samples look, as JSON by their numbers; without those that the run has not kept.

        Args:
            samples: Their numbers.
            of: Hash of the samples that have these numbers.
        """
        found = self._parsed(RunLayout(self.folder).renderings_file, read_renderings)
        known = {**found.get("", {}), **found.get(of, {})}
        return {str(sample): dump(known[sample]) for sample in samples if sample in known}

    def notes(self) -> dict[str, str]:
        """The user's notes on features, by id; empty if they cannot be read."""
        return self._parsed(RunLayout(self.folder).notes_file, read_notes)

    def _parsed(self, path: Path, read: Callable[[Path], dict[Any, Any]]) -> dict[Any, Any]:
        """What a function reads in a file, which is read again if it changes; empty if it cannot be read."""
        file = regular_file(path)
        if file is None:
            return {}
        with contextlib.suppress(*UNREADABLE):
            # Objects take several times as much memory as their text.
            return self._cache.get((file, read), lambda: read(path), size=lambda _: 200 + 4 * file.size)
        return {}

    def _file(self, step: int) -> FileStamp:
        file = snapshot_files(self.folder).get(step)
        if file is None:
            raise NotFoundError(f"Run '{self.name}' has no snapshot at step {step:,}.")
        return file

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        try:
            yield
        except UNREADABLE as error:
            raise NotFoundError(f"Cannot read the snapshot of run '{self.name}' at step {step:,}: {error}") from error

    def _curves(self) -> dict[int, Curves]:
        """The numbers of all features, by step, of the readable snapshots."""

        def read(file: FileStamp) -> Curves | None:
            with contextlib.suppress(*UNREADABLE):
                return read_curves(file)
            return None

        found = {
            step: self._cache.get(
                (file, "curves"), partial(read, file), size=lambda curves: curves.size() if curves else 100
            )
            for step, file in snapshot_files(self.folder).items()
        }
        return {step: curves for step, curves in found.items() if curves is not None}

    def _entry(self, files: dict[int, FileStamp]) -> dict[str, Any]:
        # Scalars and events are also written between snapshots and after the last one.
        others = [*regular_files(self.folder), *comparison_files(self.folder)]
        if self._reader is not None:
            others += [file for file in regular_files(self._reader.folder) if is_log_file(file)]
        stamps = repr([*((step, file[1:]) for step, file in files.items()), *(file[1:] for file in others)])
        version = f"{len(files)}-{hashlib.sha256(stamps.encode()).hexdigest()[:16]}"
        compared = regular_file(RunLayout(self.folder).comparison_page) is not None
        return {
            "name": self.name,
            "title": run_title(self.name, self.folder),
            "version": version,
            "snapshots": len(files),
            "comparison": compared,
        }

    def _outlines(self, files: dict[int, FileStamp], every: int) -> dict[int, Outline]:
        """Outlines of the readable snapshots that have the same node layers as the newest."""
        steps = list(files)
        selected = [step for i, step in enumerate(steps) if i % every == 0 or step == steps[-1]]
        read = {step: self._outline(files[step], step) for step in selected}
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

    def _metrics(self) -> dict[int, SnapshotMetrics]:
        """The metrics of the readable snapshots, by step."""

        def read(file: FileStamp) -> SnapshotMetrics | None:
            with contextlib.suppress(*UNREADABLE):
                return read_metrics(file)
            return None

        found = {
            step: self._cache.get((file, "metrics"), partial(read, file), size=lambda one: one.size() if one else 100)
            for step, file in snapshot_files(self.folder).items()
        }
        return {step: one for step, one in found.items() if one is not None}

    def _scalars(self, outlines: dict[int, Outline]) -> str:
        curves = self._scalar_curves(
            {step: outline.logging_step for step, outline in outlines.items()},
            {step: outline.measured.metrics for step, outline in outlines.items()},
        )
        return object_(
            {
                tag: object_({"steps": dump(curve.steps), "values": numbers(curve.values)})
                for tag, curve in curves.items()
            }
        )

    def _scalar_curves(
        self, logging_steps: Mapping[int, int | None], metrics: Mapping[int, Mapping[str, float | None]]
    ) -> dict[str, Curve]:
        """The logged scalars at numbers of optimizer steps, by what the snapshots say."""
        if self._reader is None:
            return {}
        with self._lock:
            read = dict(self._reader.read())
            points = {tag: series.points() for tag, series in read.items()}
        # The metrics of graphs are part of the snapshots. Ratios between bases come after the user's scalars.
        prefixes = {path.parent.name for path in self._reader.folder.glob(f"*/{RunLayout.SNAPSHOTS}")}
        ratios = tuple(f"{prefix}_over_" for prefix in prefixes)
        axis = StepAxis(logging_steps)
        scalars = {}
        for tag, (logged_at, values) in sorted(points.items(), key=lambda p: (p[0].startswith(ratios), p[0])):
            group, _, metric = tag.partition("/")
            if group in prefixes:
                continue
            steps = logged_at if read[tag].in_optimizer_steps else axis.steps(logged_at)
            found = list(zip(steps, values, strict=True))
            if group.startswith(ratios) and axis.is_known:
                # Between measurements, the latest value is logged again.
                found = [(step, x) for step, x in found if metrics.get(step, {}).get(metric) is not None]
            scalars[tag] = Curve([step for step, _ in found], np.array([x for _, x in found], dtype=float))
        return scalars


def _newest_labels(outlines: list[Outline], layer: int) -> dict[int, str]:
    """The newest label of each lineage; without lineages, the labels in the newest snapshot by index."""
    if not outlines[-1].tracked[layer]:
        return outlines[-1].labels[layer]
    tracked = [outline.labels[layer] for outline in outlines if outline.tracked[layer]]
    return {key: label for labels in tracked for key, label in labels.items()}
