"""The folder of a run: a basis file and a figure for each snapshot, the samples, and the last basis file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from lib_lightning.algorithm.progress import phase_done
from lib_lightning.graph import InteractionGraph
from lib_lightning.io.basis_file import TEMPORARY, write_bytes
from lib_lightning.lineage.first_seen import first_seen, retrace_files
from lib_lightning.plots.animated_layout import AnimatedLayout
from lib_lightning.plots.image import PNG, render_png

EVENTS, RETRACED = "events.jsonl", "retraced.json"


class SnapshotDirectory:
    """Where the snapshots of one run are written. Every file is there whole, or not at all.

    Args:
        path: The folder; made when something is written to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, graph: InteractionGraph, step: int, film: AnimatedLayout | None = None) -> PNG:
        """Write the basis file and the figure of a snapshot; those of an earlier try at this step are replaced.

        Args:
            graph: The snapshot.
            step: Number of optimizer steps before it.
            film: The snapshots before, for features to keep their places.

        Returns:
            The figure.
        """
        graph.save(self.basis_file(step))
        phase_done("files")
        png = render_png(graph.plot(layout=film))
        phase_done("figures")
        write_bytes(self.path / "figures" / f"{_name(step)}.png", png.data)
        phase_done("files")
        return png

    def write_spectrum(self, graph: InteractionGraph, baselines: Sequence[InteractionGraph], step: int) -> PNG:
        """Write the figure of the importances of a snapshot, beside those of other bases.

        Args:
            graph: The snapshot.
            baselines: Graphs of other bases on the same samples.
            step: Number of optimizer steps before it.

        Returns:
            The figure.
        """
        png = render_png(graph.plot_spectrum(baselines))
        phase_done("figures")
        write_bytes(self.path / "spectra" / f"{_name(step)}.png", png.data)
        phase_done("files")
        return png

    def write_figure(self, name: str, figure: Figure) -> PNG:
        """Write a figure of the whole run so far, in place of the one before.

        Args:
            name: What to call it.
            figure: The figure.

        Returns:
            It, encoded.
        """
        png = render_png(figure)
        write_bytes(self.path / f"{name}.png", png.data)
        return png

    def write_events(self, lines: Sequence[str]) -> None:
        """Write all events of the run so far, one a line; those of another run in this place are gone."""
        if lines or (self.path / EVENTS).exists():
            write_bytes(self.path / EVENTS, "".join(f"{line}\n" for line in lines).encode())

    def finish(self, step: int) -> None:
        """Write the snapshot of a step once more, as ``final.safetensors``."""
        if self.basis_file(step).exists():
            write_bytes(self.path / "final.safetensors", self.basis_file(step).read_bytes())

    def retrace(
        self, final: InteractionGraph, step: int, earlier: Sequence[SnapshotDirectory]
    ) -> dict[str, int | None]:
        """Write ``retraced.json``: since when each feature of the last snapshot has been recognisable.

        Args:
            final: The last snapshot.
            step: Its step.
            earlier: Folders of the same run before it was interrupted, the earliest first.

        Returns:
            For each node layer the step since which most of its final importance has been; None for never.
        """
        files = {at: path for folder in (*earlier, self) for at, path in folder.basis_files().items() if at <= step}
        found = first_seen(final, retrace_files(final, sorted(files.items())))
        if found:
            write_bytes(self.path / RETRACED, json.dumps(found, indent=1).encode())
        return {name: of_layer["formed"] for name, of_layer in found.items()}

    def discard(self, step: int) -> None:
        """Remove what has been written of a snapshot."""
        for file in self._files_of_snapshots():
            if _step(file) == step:
                file.unlink(missing_ok=True)

    def set_aside(self, steps: Collection[int]) -> None:
        """Move snapshots of any other steps to ``before``: another run has been here, or this one went on from there.

        Args:
            steps: Steps of the snapshots that belong to the run.
        """
        for file in self._files_of_snapshots():
            if _step(file) not in steps:
                place = self.path / "before" / file.parent.name / file.name
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)

    def _files_of_snapshots(self) -> list[Path]:
        return [file for kind in ("snapshots", "figures", "spectra") for file in (self.path / kind).glob("step-*")]

    def clean(self) -> None:
        """Remove what a killed process has left half written."""
        with contextlib.suppress(OSError):  # what cannot be removed does no harm
            for half in self.path.rglob(f"*{TEMPORARY}"):
                half.unlink(missing_ok=True)

    def basis_file(self, step: int) -> Path:
        """Basis file of the snapshot of a step."""
        return self.path / "snapshots" / f"{_name(step)}.safetensors"

    def basis_files(self) -> dict[int, Path]:
        """Basis files of all snapshots, by step."""
        return {_step(path): path for path in (self.path / "snapshots").glob("step-*")}

    def samples_file(self, rank: int, size: int, kind: str = "") -> Path:
        """File with the samples that one of several processes computes on, or with those of another kind."""
        return self.path / "samples" / f"{kind}{'-' * bool(kind)}{rank + 1}-of-{size}.pt"

    def contents(self) -> list[str]:
        """What there is, in lines of text."""
        places = {
            "basis files": "snapshots",
            "last one": "final.safetensors",
            "figures": "figures",
            "spectra": "spectra",
            "timeline": "timeline.png",
            "events": EVENTS,
            "retraced": RETRACED,
        }
        return [f"  {what:<13} {self.path / p}" for what, p in places.items() if (self.path / p).exists()]


class RunDirectory:
    """The folders of a run, one for each basis that is computed.

    Args:
        root: The log directory; None for a run that leaves nothing behind.
        prefixes: Names of the folders in it, the main one first.
        part: Folder within each of them; empty for none.
    """

    def __init__(self, root: Path | None, prefixes: Iterable[str], part: str = "") -> None:
        self._folders = {} if root is None else {prefix: SnapshotDirectory(root / prefix / part) for prefix in prefixes}
        self.main = next(iter(self._folders.values()), None)

    def discard(self, step: int) -> None:
        """Remove what has been written of a snapshot."""
        for folder in self._folders.values():
            folder.discard(step)

    def set_aside(self, steps: Collection[int]) -> None:
        """Move snapshots of any other steps out of the way."""
        for folder in self._folders.values():
            folder.set_aside(steps)

    def clean(self) -> None:
        """Remove what a killed process has left half written."""
        for folder in self._folders.values():
            folder.clean()

    def write(
        self, graphs: Mapping[str, InteractionGraph], step: int, films: Mapping[str, AnimatedLayout]
    ) -> dict[str, PNG]:
        """Write a snapshot.

        Args:
            graphs: The graph of each folder, the main one first.
            step: Number of optimizer steps before it.
            films: For each folder the snapshots before.

        Returns:
            The figures, by the tag to show each under; none where nothing is to be left behind.
        """
        if self.main is None:
            return {}
        return {
            f"{prefix}/graph": self._folders[prefix].write(graph, step, films[prefix])
            for prefix, graph in graphs.items()
        }

    def finish(self, step: int) -> None:
        """Write the snapshot of a step once more, as ``final.safetensors``."""
        for folder in self._folders.values():
            folder.finish(step)

    def contents(self) -> list[str]:
        """What there is, in lines of text."""
        return [line for folder in self._folders.values() for line in folder.contents()]


def _step(file: Path) -> int:
    return int(file.stem.removeprefix("step-"))


def _name(step: int) -> str:
    return f"step-{step:08d}"
