"""The folder of a run: a basis file and a figure for each snapshot, the samples, and the last basis file."""

from __future__ import annotations

import contextlib
from pathlib import Path

from lib_lightning.display.image import PNG, render_png
from lib_lightning.export.files import TEMPORARY, write_bytes
from lib_lightning.graph import InteractionGraph


class SnapshotFolder:
    """Where the snapshots of one run are written. Every file is there whole, or not at all.

    Args:
        path: The folder; made when something is written to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, graph: InteractionGraph, step: int) -> PNG:
        """Write the basis file and the figure of a snapshot; those of an earlier try at this step are replaced.

        Args:
            graph: The snapshot.
            step: Number of optimizer steps before it.

        Returns:
            The figure.
        """
        graph.save(self.basis_file(step))
        png = render_png(graph.plot())
        write_bytes(self.path / "figures" / f"{_name(step)}.png", png.data)
        return png

    def finish(self, step: int) -> None:
        """Write the snapshot of a step once more, as ``final.safetensors``."""
        if self.basis_file(step).exists():
            write_bytes(self.path / "final.safetensors", self.basis_file(step).read_bytes())

    def clean(self) -> None:
        """Remove what a killed process has left half written."""
        with contextlib.suppress(OSError):  # what cannot be removed does no harm
            for half in self.path.rglob(f"*{TEMPORARY}"):
                half.unlink(missing_ok=True)

    def basis_file(self, step: int) -> Path:
        """Basis file of the snapshot of a step."""
        return self.path / "snapshots" / f"{_name(step)}.safetensors"

    def samples_file(self, rank: int, size: int) -> Path:
        """File with the samples that one of several processes computes on."""
        return self.path / "samples" / f"{rank + 1}-of-{size}.pt"

    def contents(self) -> list[str]:
        """What there is, in lines of text."""
        places = {"basis files": "snapshots", "last one": "final.safetensors", "figures": "figures"}
        return [f"  {what:<13} {self.path / p}" for what, p in places.items() if (self.path / p).exists()]


def _name(step: int) -> str:
    return f"step-{step:08d}"
