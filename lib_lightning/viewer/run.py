"""A run on disk, as users hold it."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_lightning.errors import LIBError, quoted
from lib_lightning.viewer.run_discovery import find_runs, read_events, snapshot_files

if TYPE_CHECKING:
    from lib_lightning.graph import InteractionGraph
    from lib_lightning.viewer.run_view import RunView

# Bytes that what was read of a run may take up.
_ROOM = 256 << 20
# In a notebook, a film of this many snapshots and edges of a section.
_SHOWN_SNAPSHOTS, _SHOWN_EDGES = 60, 200
_KINDS = ("lib", "pca", "neuron")


class Run:
    """A run on disk: its snapshots, and what happened to its features. A notebook shows its film.

    Args:
        path: Its folder, such as ``lightning_logs/version_0/lib``; or the log directory, or any other folder with just
            one run below. Beside baselines, the run itself is meant, and so it is beside looks from outside.

    Attributes:
        folder: The folder that holds its snapshots.
        name: Names of the log directory and the folder, such as ``version_0/lib``.

    Raises:
        FileNotFoundError: If there is no such folder.
        LIBError: If there is no run below, or more than one.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from lib_lightning import compute_interaction_graph
        >>> graph = compute_interaction_graph(torch.nn.Linear(3, 2), [torch.randn(9, 3)], ["input", "output"])
        >>> with tempfile.TemporaryDirectory() as logs:
        ...     graph.save(f"{logs}/version_0/lib/snapshots/step-00000010.safetensors")
        ...     run = Run(logs)
        ...     run, run.graph(10)
        (Run(version_0/lib: 1 snapshot, step 10), InteractionGraph(input: 2 lib -> output: 2 neuron, 9 samples))
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.folder = _folder(Path(path))
        self.name = "/".join(self.folder.parts[-2:])

    @property
    def steps(self) -> list[int]:
        """Steps of its snapshots: numbers of optimizer steps before each, in order."""
        return list(snapshot_files(self.folder))

    def graph(self, step: int | None = None) -> InteractionGraph:
        """Load the graph of a snapshot.

        Args:
            step: One of `steps`; None for the newest.

        Returns:
            The graph.

        Raises:
            LIBError: If there is no such snapshot.
            BasisFileError: If its file is truncated or altered.
        """
        from lib_lightning.graph import InteractionGraph

        files = snapshot_files(self.folder)
        if not files:
            raise LIBError(f"Run '{self.name}' has no snapshots any more.")
        step = next(reversed(files)) if step is None else step
        if step not in files:
            nearest = sorted(sorted(files, key=lambda other: abs(other - step))[:2])
            nearest_steps = " and ".join(f"{other:,}" for other in nearest)
            raise LIBError(
                f"Run '{self.name}' has no snapshot at step {step:,}; nearest: {nearest_steps}. "
                f"{_extent(list(files))}; steps lists them."
            )
        return InteractionGraph.load(files[step].path)

    def events(self) -> list[dict[str, Any]]:
        """Read what happened to features.

        Returns:
            Events with ``step``, ``kind``, ``text``, ``layer`` and ``lineage``; none where features are not followed.
        """
        return read_events(self.folder)

    def view(self, output: str | PathLike[str] | None = None, edges: int | None = None, every: int = 1) -> Path:
        """Write the film of the run: one HTML file to look at in a browser, without a server or a network.

        Args:
            output: Where to write; by default ``film.html`` in the run's folder.
            edges: Most edges of a section in each snapshot, the strongest; 400 by default.
            every: Take each so-manieth snapshot, and the last one.

        Returns:
            The file.
        """
        return write_film([self], output, edges, every)

    def __repr__(self) -> str:
        return f"Run({self.name}: {_extent(self.steps)})"

    def _repr_html_(self) -> str:
        """The film itself, thinned where it is long."""
        from lib_lightning.viewer.html_export import film_page

        steps = self.steps
        if not steps:
            return html.escape(repr(self))
        every = -(-len(steps) // _SHOWN_SNAPSHOTS)
        page = film_page(_films([self]), self.name, _SHOWN_EDGES, every)
        thinned = f" One snapshot in {every} is shown; <code>view()</code> writes all of them." if every > 1 else ""
        return (
            f'<iframe srcdoc="{html.escape(page)}" sandbox="allow-scripts allow-downloads" '
            f'style="width: 100%; height: 760px; border: 0"></iframe><p>{html.escape(repr(self))}.{thinned}</p>'
        )


def write_film(
    runs: Sequence[Run], output: str | PathLike[str] | None = None, edges: int | None = None, every: int = 1
) -> Path:
    """Write the film of runs, side by side: one HTML file to look at in a browser, without a server or a network.

    Args:
        runs: The runs.
        output: Where to write; by default ``film.html`` in the folder of the first.
        edges: Most edges of a section in each snapshot, the strongest; 400 by default.
        every: Take each so-manieth snapshot of a run, and its last one.

    Returns:
        The file.

    Raises:
        LIBError: If a number is below 1, or a run has no snapshot that can be read.
    """
    from lib_lightning.io.basis_file import write_bytes
    from lib_lightning.viewer.html_export import EDGES, film_page

    edges = EDGES if edges is None else edges
    if edges < 1 or every < 1:
        raise LIBError(f"edges and every are numbers from 1 on; got {edges} and {every}.")
    films = _films(runs)
    path = runs[0].folder / "film.html" if output is None else Path(output)
    write_bytes(path, film_page(films, ", ".join(film.name for film in films), edges, every).encode())
    return path


def _films(runs: Sequence[Run]) -> list[RunView]:
    from lib_lightning.viewer.cache import Cache
    from lib_lightning.viewer.run_view import RunView

    folders = list(dict.fromkeys(run.folder for run in runs))
    # As much of the path as tells them apart, log directory and folder at least.
    deepest = max(len(folder.parts) for folder in folders)
    length = next(n for n in range(2, deepest + 2) if len({folder.parts[-n:] for folder in folders}) == len(folders))
    cache = Cache(_ROOM)
    return [RunView(folder, "/".join(folder.parts[-length:]), cache) for folder in folders]


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"There is no folder '{path}'.")
    real = Path(os.path.realpath(path))
    real = real.parent if real.name == "snapshots" else real
    if snapshot_files(real):
        return real
    found = find_runs(real)
    meant = {name: folder for name, folder in found.items() if not _stands_beside(folder, set(found.values()))}
    if not meant:
        raise LIBError(
            f"There are no snapshots in '{path}': no files snapshots/step-*.safetensors in it or in folders below. "
            "LIBCallback writes them to the log directory, such as lightning_logs/version_0."
        )
    if len(meant) > 1:
        few = quoted(list(meant)[:10]) + (" and others" if len(meant) > 10 else "")
        raise LIBError(f"There are {len(meant)} runs in '{path}': {few}. Say which, with its folder.")
    return next(iter(meant.values()))


def _stands_beside(folder: Path, others: set[Path]) -> bool:
    """Whether a folder is of a baseline of another run there, or of a look at it from outside."""
    if folder.name == "validate" and folder.parent in others:
        return True
    beside = {other.name for other in others if other.parent == folder.parent}
    baselines = {f"{other}_{kind}" for other in beside for kind in _KINDS}
    return folder.name in baselines or ("lib" in beside and folder.name in ("pca", "neuron"))


def _extent(steps: list[int]) -> str:
    if len(steps) < 2:
        return f"{len(steps)} snapshot{'' if steps else 's'}{f', step {steps[0]:,}' if steps else ''}"
    return f"{len(steps)} snapshots, steps {steps[0]:,} to {steps[-1]:,}"
