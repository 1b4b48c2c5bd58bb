"""The folder of a run: a basis file and a figure for each snapshot, figures over the whole run, events."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from matplotlib.figure import Figure

from lib_lightning.algorithm.progress import phase_done
from lib_lightning.errors import brief, check_number, counted
from lib_lightning.graph import InteractionGraph
from lib_lightning.io.basis_file import TEMPORARY, write_bytes
from lib_lightning.io.notes import change_notes, read_notes
from lib_lightning.io.run_layout import RunLayout
from lib_lightning.lineage.first_seen import first_seen, retrace_files
from lib_lightning.plots.animated_layout import AnimatedLayout
from lib_lightning.plots.image import PNG, render_png

KeepSnapshots = Literal["all", "log_spaced"] | int
# What a folder must have room for at the start of a run.
_TRIAL_BYTES = 2**20
# Of log-spaced snapshots, this many are kept per tenfold increase of the step.
_KEPT_PER_DECADE = 10


def check_keep(keep: object) -> KeepSnapshots:
    """Check which snapshots are to be kept.

    Args:
        keep: ``"all"``, ``"log_spaced"``, or a number.

    Returns:
        The same.

    Raises:
        SettingError: If it is none of these.
    """
    if keep == "all" or keep == "log_spaced":
        return keep
    expected = "is 'all', 'log_spaced', or a number of snapshots of at least 1"
    check_number("keep_snapshots", keep, lambda n: n >= 1, expected, integer=True)
    return int(keep)  # type: ignore[call-overload, no-any-return]


def steps_to_keep(steps: Iterable[int], keep: KeepSnapshots) -> set[int]:
    """Which of the snapshots of a run stay on disk.

    Args:
        steps: Their steps.
        keep: Which: ``"all"``; a number for the latest; ``"log_spaced"`` for the first ones of each tenth of a decade,
            step 0, and the latest.

    Returns:
        The steps of those.

    Example:
        >>> sorted(steps_to_keep(range(0, 100, 10), 3))
        [70, 80, 90]
        >>> len(steps_to_keep(range(100_000), "log_spaced"))
        49
    """
    ordered = sorted(steps)
    if keep == "all":
        return set(ordered)
    if keep == "log_spaced":
        # The same snapshots whenever this is asked: the first one of each part of the axis stays the first.
        firsts: dict[int, int] = {}
        for step in ordered:
            firsts.setdefault(math.floor(_KEPT_PER_DECADE * math.log10(step) + 1e-9) if step else -1, step)
        return {*firsts.values(), *ordered[-1:]}
    return set(ordered[-keep:])


class SnapshotDirectory:
    """Writes the snapshots of one basis of a run. Every file is written completely or not at all.

    Args:
        path: The folder; created when something is written to it.
    """

    def __init__(self, path: Path) -> None:
        self.layout = RunLayout(path)

    def write(self, graph: InteractionGraph, step: int, layout: AnimatedLayout | None = None) -> PNG:
        """Write basis file and figure of a snapshot, in place of any from an earlier attempt at this step.

        Args:
            graph: The snapshot.
            step: Number of optimizer steps before it.
            layout: The layout of the snapshots before, in which features keep their places; updated with this one.

        Returns:
            The figure.
        """
        graph.save(self.layout.basis_file(step))
        phase_done("files")
        png = render_png(graph.plot(layout=layout))
        phase_done("figures")
        write_bytes(self.layout.figure_file(step), png.data)
        phase_done("files")
        return png

    def write_spectrum(self, graph: InteractionGraph, baselines: Sequence[InteractionGraph], step: int) -> PNG:
        """Write the figure of the importances of a snapshot beside those of baselines.

        Args:
            graph: The snapshot.
            baselines: Graphs in other bases on the same samples.
            step: Number of optimizer steps before it.

        Returns:
            The figure.
        """
        png = render_png(graph.plot_spectrum(baselines))
        phase_done("figures")
        write_bytes(self.layout.spectrum_file(step), png.data)
        phase_done("files")
        return png

    def write_figure(self, name: str, figure: Figure) -> PNG:
        """Write a figure over the whole run so far, in place of the previous one.

        Args:
            name: Its name.
            figure: The figure.

        Returns:
            The encoded figure.
        """
        png = render_png(figure)
        write_bytes(self.layout.run_figure(name), png.data)
        return png

    def write_events(self, lines: Sequence[str]) -> None:
        """Write all events of the run so far, one per line; those of another run in this folder are overwritten."""
        if lines or self.layout.events_file.exists():
            write_bytes(self.layout.events_file, "".join(f"{line}\n" for line in lines).encode())

    def write_final(self, step: int) -> None:
        """Write the snapshot of a step again, as ``final.safetensors``."""
        basis_file = self.layout.basis_file(step)
        if basis_file.exists():
            write_bytes(self.layout.final_file, basis_file.read_bytes())

    def write_first_seen(
        self, final: InteractionGraph, step: int, earlier_folders: Sequence[str]
    ) -> dict[str, int | None]:
        """Write when each feature of the last snapshot was first seen.

        Args:
            final: The last snapshot.
            step: Its step.
            earlier_folders: Folders of the same run before it was interrupted, the earliest first.

        Returns:
            For each node layer the step since which most of its final importance has been present; None for never.
        """
        layouts = [*map(RunLayout, earlier_folders), self.layout]
        files = {at: path for layout in layouts for at, path in layout.basis_files().items() if at <= step}
        found = first_seen(final, retrace_files(final, sorted(files.items())))
        if found:
            write_bytes(self.layout.history_file, json.dumps(found, indent=1).encode())
        return {name: of_layer["formed"] for name, of_layer in found.items()}

    def discard(self, step: int) -> None:
        """Remove the files of a snapshot."""
        for at, file in self.layout.snapshot_files():
            if at == step:
                file.unlink(missing_ok=True)

    def keep(self, keep: KeepSnapshots) -> None:
        """Remove the files of snapshots that are not to be kept."""
        files = self.layout.snapshot_files() if keep != "all" else []
        kept = steps_to_keep({at for at, _ in files}, keep)
        for at, file in files:
            if at not in kept:
                file.unlink(missing_ok=True)

    def problem(self) -> str:
        """Why nothing can be written to the folder; empty if something can."""
        trial = self.layout.path / f"trial{TEMPORARY}"
        try:
            trial.parent.mkdir(parents=True, exist_ok=True)
            trial.write_bytes(bytes(_TRIAL_BYTES))
            trial.unlink()
        except OSError as error:
            with contextlib.suppress(OSError):
                trial.unlink(missing_ok=True)
            return error.strerror or brief(error)
        return ""

    def archive_stale(self, steps: Collection[int]) -> None:
        """Move snapshots of all other steps to ``stale``: those of another run, or from beyond a resumed checkpoint.

        Args:
            steps: Steps of the snapshots that belong to the run.
        """
        for at, file in self.layout.snapshot_files():
            if at not in steps:
                place = self.layout.stale_file(file)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)

    def keep_notes(self, num_lineages: Mapping[str, int], earlier_folders: Sequence[str]) -> int:
        """Keep the user's notes on lineages that the run has had, also from earlier folders; move others to ``stale``.

        Args:
            num_lineages: Number of lineages of each node layer before the first snapshot in this folder. Later ones are
                other features than those of the same ids in an interrupted run.
            earlier_folders: Folders of the same run before it was interrupted, the earliest first.

        Returns:
            Number of notes that were moved.

        Raises:
            LIBError: If notes cannot be read.
        """
        path = self.layout.notes_file
        files = [path, *(RunLayout(folder).notes_file for folder in reversed(earlier_folders))]
        source = next((file for file in files if file.exists()), None)
        if source is None:
            return 0
        notes = read_notes(source)
        kept = {name: text for name, text in notes.items() if _is_one_of(name, num_lineages)}
        moved = {name: text for name, text in read_notes(path).items() if name not in kept}
        if moved:
            stale = self.layout.stale_file(path)
            stale.parent.mkdir(parents=True, exist_ok=True)
            change_notes(stale, lambda before: before | moved)
        change_notes(path, lambda now: {name: text for name, text in (kept | now).items() if name not in moved})
        return len(moved)

    def clean(self) -> None:
        """Remove files that a killed process has left unfinished."""
        with contextlib.suppress(OSError):  # they do no harm if they cannot be removed
            for unfinished in self.layout.path.rglob(f"*{TEMPORARY}"):
                unfinished.unlink(missing_ok=True)

    def contents(self, n_events: int) -> str:
        """The folder and what is in it, in one line; "" for nothing.

        Args:
            n_events: Number of events in its file.
        """
        layout = self.layout
        places = {
            layout.final_file: "",
            layout.snapshots: "/",
            layout.figures: "/",
            layout.spectra: "/",
            layout.timeline: "",
            layout.events_file: f" with {counted(n_events, 'event')}",
            layout.notes_file: "",
            layout.history_file: "",
        }
        found = [f"{path.name}{ending}" for path, ending in places.items() if path.exists()]
        return f"{layout.path}: {', '.join(found)}" if found else ""


def _is_one_of(feature_id: str, num_lineages: Mapping[str, int]) -> bool:
    layer, _, number = feature_id.rpartition("/")
    return number.isdecimal() and int(number) < num_lineages.get(layer, 0)


class RunDirectory:
    """The folders of a run, one for each basis that is computed.

    Args:
        root: The log directory; None for a run that writes nothing.
        prefixes: Names of the folders in it, that of the basis itself first.
        part: Folder within each of them; empty for none.

    Attributes:
        folders: The folders by prefix; none for a run that writes nothing.
        main: The folder of the basis itself.
    """

    def __init__(self, root: Path | None, prefixes: Iterable[str], part: str = "") -> None:
        self.folders = {} if root is None else {prefix: SnapshotDirectory(root / prefix / part) for prefix in prefixes}
        self.main = next(iter(self.folders.values()), None)

    def write(
        self, graphs: Mapping[str, InteractionGraph], step: int, layouts: Mapping[str, AnimatedLayout]
    ) -> dict[str, PNG]:
        """Write a snapshot to all folders, or to none if any fails.

        Args:
            graphs: The graph of each folder, that of the basis itself first.
            step: Number of optimizer steps before it.
            layouts: For each folder the layout of the snapshots before; updated with this one.

        Returns:
            The figures, by the tag to show each under; none for a run that writes nothing.
        """
        if self.main is None:
            return {}
        try:
            return {
                f"{prefix}/graph": self.folders[prefix].write(graph, step, layouts[prefix])
                for prefix, graph in graphs.items()
            }
        except BaseException:
            # The next snapshot may give the lineages of this one to other features.
            for folder in self.folders.values():
                folder.discard(step)
            raise
