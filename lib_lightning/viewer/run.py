"""A run on disk: its snapshots, events and film."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_lightning.algorithm.basis_kinds import ALL, DRAWN, REINIT
from lib_lightning.errors import LIBError, MissingFileError, quoted
from lib_lightning.io.basis_format import MODULES_TRACKED
from lib_lightning.io.notes import read_notes
from lib_lightning.io.run_layout import RunLayout
from lib_lightning.viewer.run_discovery import find_runs, read_events, run_title, snapshot_files

if TYPE_CHECKING:
    from lib_lightning.graph import InteractionGraph
    from lib_lightning.viewer.feature_page import FeaturePage
    from lib_lightning.viewer.run_view import RunView

# Maximum size of cached data, in bytes.
_CACHE_BYTES = 256 << 20
# Maximum number of snapshots, and of edges per section, of the film in a notebook.
_NOTEBOOK_SNAPSHOTS, _NOTEBOOK_EDGES = 60, 200
# Of the pages of features in it, since a notebook keeps what it shows.
_NOTEBOOK_FEATURE_BYTES = 1_000_000
_BESIDE = (*ALL, REINIT)


class Run:
    """A run on disk: its snapshots and the events of its features. In a notebook, it is displayed as a film.

    Args:
        path: Folder of the run, such as ``lightning_logs/version_0/lib``; or its log directory, or any other folder
            that contains a single run. Runs of baselines and standalone validations in the same folder are ignored.

    Attributes:
        folder: Folder of the run, which contains the folder of its snapshots.
        name: Last two parts of the folder's path, such as ``version_0/lib``.

    Raises:
        MissingFileError: If the folder does not exist.
        LIBError: If there is no run in the folder, or more than one.

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
        """Steps of the snapshots in increasing order: numbers of optimizer steps before each."""
        return list(snapshot_files(self.folder))

    def graph(self, step: int | None = None) -> InteractionGraph:
        """Load the graph of a snapshot.

        Args:
            step: One of `steps`; None for the last.

        Returns:
            The graph.

        Raises:
            LIBError: If there is no such snapshot.
            BasisFileError: If its file is truncated or altered.
        """
        from lib_lightning.graph import InteractionGraph

        files = snapshot_files(self.folder)
        if not files:
            raise LIBError(f"Run '{self.name}' no longer has any snapshots.")
        step = next(reversed(files)) if step is None else step
        if step not in files:
            nearest = sorted(sorted(files, key=lambda other: abs(other - step))[:2])
            nearest_steps = " and ".join(f"{other:,}" for other in nearest)
            raise LIBError(
                f"Run '{self.name}' has no snapshot at step {step:,}; the nearest are at {nearest_steps}. "
                f"There are {_summary(list(files))}, listed by the attribute steps."
            )
        graph = InteractionGraph.load(files[step].path)
        graph.notes = self.notes
        # The film gives modules of version 0.1 the same numbers in all snapshots.
        number_of = None if graph.info.get(MODULES_TRACKED) else _views([self])[0].module_numbers().get(step)
        if number_of is not None:
            for name, modules in graph.modules.items():
                graph.modules[name] = modules.new_tensor([number_of.get(m, -1) for m in modules.tolist()])
        return graph

    def events(self) -> list[dict[str, Any]]:
        """Read the events of features and metrics.

        Returns:
            Events with ``step``, ``kind``, ``text``, ``layer`` and ``lineage``; empty if features were not tracked.
        """
        return read_events(self.folder)

    def scalars(self) -> dict[str, tuple[list[int], list[float]]]:
        r"""Read what was measured over training, as the tab shows it.

        Returns:
            By name, steps in increasing order and the values at them, NaN where one is unknown. Those that a logger, or
            another tool, has written into the log directory have the names that it gave them; at most 1,000 points of
            each. The metrics of the snapshots are called ``lib/...``.

        Raises:
            NotFoundError: If no snapshot can be read.

        Example:
            >>> import tempfile
            >>> import torch
            >>> from lib_lightning import compute_interaction_graph
            >>> graph = compute_interaction_graph(torch.nn.Linear(3, 2), [torch.randn(9, 3)], ["input", "output"])
            >>> graph.info["metrics"] = {"features/total": {"value": 2.0}}
            >>> with tempfile.TemporaryDirectory() as logs:
            ...     graph.save(f"{logs}/lib/snapshots/step-00000010.safetensors")
            ...     _ = Path(logs, "probe.csv").write_text("step,accuracy\n0,0.5\n10,0.75\n")
            ...     Run(logs).scalars()
            {'probe/accuracy': ([0, 10], [0.5, 0.75]), 'lib/features/total': ([10], [2])}
        """
        return read_scalars(json.loads(_views([self])[0].run()), self.folder.name)

    def feature(self, feature_id: str, step: int | None = None) -> FeaturePage:
        """What is known about a feature: examples, interactions, effects. A notebook shows it as the tab does.

        Args:
            feature_id: Its id, such as ``"resid_post/17"``.
            step: One of `steps`; None for the last at which the feature is present.

        Returns:
            Its page, with the numbers as attributes.

        Raises:
            LIBError: If there is no such feature, or not at this step.

        Example:
            >>> import tempfile
            >>> import torch
            >>> from lib_lightning import compute_interaction_graph
            >>> graph = compute_interaction_graph(torch.nn.Linear(3, 2), [torch.randn(9, 3)], ["input", "output"])
            >>> with tempfile.TemporaryDirectory() as logs:
            ...     graph.save(f"{logs}/lib/snapshots/step-00000010.safetensors")
            ...     feature = Run(logs).feature("input/1")
            >>> feature.id, feature.step, [one["id"].startswith("output/") for one in feature.outputs]
            ('input/1', 10, [True, True])
        """
        from lib_lightning.viewer.feature_page import feature_of

        return feature_of(_views([self])[0], feature_id, step)

    @property
    def notes(self) -> dict[str, str]:
        """Your notes on features, by their ids; see `annotate`.

        Raises:
            LIBError: If the file of the notes has been damaged.
        """
        return read_notes(RunLayout(self.folder).notes_file)

    def annotate(self, feature_id: str, text: str) -> None:
        """Write a note on a feature, in place of the one that it had.

        The note belongs to the feature's lineage: it is shown at all snapshots that have the feature. All notes of a
        run are in its ``notes.json``.

        Args:
            feature_id: The feature's id, such as ``"resid_post/17"``.
            text: The note; "" to remove it.

        Raises:
            LIBError: If no snapshot has this feature, with similar ids; or if the features of the run are not tracked,
                so that an id is another feature in each snapshot.

        Example:
            >>> import tempfile
            >>> import torch
            >>> from lib_lightning import compute_interaction_graph
            >>> graph = compute_interaction_graph(torch.nn.Linear(3, 2), [torch.randn(9, 3)], ["input", "output"])
            >>> with tempfile.TemporaryDirectory() as logs:
            ...     graph.save(f"{logs}/lib/snapshots/step-00000010.safetensors")
            ...     run = Run(logs)
            ...     run.annotate("input/1", "what the second output reads")
            ...     run.notes
            {'input/1': 'what the second output reads'}
        """
        from lib_lightning.viewer.notes import annotate

        annotate(self.folder, feature_id, text)

    def view(self, output: str | PathLike[str] | None = None, edges: int | None = None, every: int = 1) -> Path:
        """Export the film of the run as one HTML file, which a browser opens without server or network.

        Args:
            output: File to write; by default ``film.html`` in the run's folder.
            edges: Maximum number of edges per section and snapshot; the strongest are included. 400 by default.
            every: Include every n-th snapshot, and the last one.

        Returns:
            Path of the file.

        Raises:
            LIBError: If a number is below 1, or the run has no readable snapshot.
        """
        return write_film([self], output, edges, every)

    def __repr__(self) -> str:
        return f"Run({self.name}: {_summary(self.steps)})"

    def _repr_html_(self) -> str:
        """The film in a frame, with fewer snapshots if there are many."""
        from lib_lightning.viewer.html_export import film_page

        steps = self.steps
        if not steps:
            return html.escape(repr(self))
        every = -(-len(steps) // _NOTEBOOK_SNAPSHOTS)
        page = film_page(
            _views([self]),
            run_title(self.name, self.folder),
            _NOTEBOOK_EDGES,
            every,
            feature_bytes=_NOTEBOOK_FEATURE_BYTES,
        )
        thinned = f" One in {every} snapshots is shown; <code>view()</code> exports all of them." if every > 1 else ""
        return (
            f'<iframe srcdoc="{html.escape(page)}" sandbox="allow-scripts allow-downloads" '
            f'style="width: 100%; height: 760px; border: 0"></iframe><p>{html.escape(repr(self))}.{thinned}</p>'
        )


def write_film(
    runs: Sequence[Run], output: str | PathLike[str] | None = None, edges: int | None = None, every: int = 1
) -> Path:
    """Export the film of runs side by side as one HTML file, which a browser opens without server or network.

    Args:
        runs: The runs.
        output: File to write; by default ``film.html`` in the folder of the first run.
        edges: Maximum number of edges per section and snapshot; the strongest are included. 400 by default.
        every: Include every n-th snapshot of a run, and the last one.

    Returns:
        Path of the file.

    Raises:
        LIBError: If a number is below 1, or a run has no readable snapshot.
    """
    from lib_lightning.io.basis_file import write_bytes
    from lib_lightning.viewer.html_export import MAX_EDGES, film_page

    edges = MAX_EDGES if edges is None else edges
    if edges < 1 or every < 1:
        raise LIBError(f"edges and every must be at least 1; got {edges} and {every}.")
    views = _views(runs)
    path = RunLayout(runs[0].folder).view_file if output is None else Path(output)
    write_bytes(
        path, film_page(views, ", ".join(run_title(view.name, view.folder) for view in views), edges, every).encode()
    )
    return path


def described_runs(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """What the viewer gets of runs.

    Args:
        runs: The runs.

    Returns:
        Results of `RunView.run`, by names that differ.

    Raises:
        NotFoundError: If a run has no readable snapshot.
    """
    return {view.name: json.loads(view.run()) for view in _views(runs)}


def read_scalars(described: dict[str, Any], prefix: str) -> dict[str, tuple[list[int], list[float]]]:
    """The scalars in what the viewer gets of a run.

    Args:
        described: Result of `RunView.run`.
        prefix: First part of the names of metrics.

    Returns:
        As `Run.scalars`.
    """
    series = {name: (line["steps"], line["values"]) for name, line in described["scalars"].items()}
    snapshots = described["snapshots"]
    for name in dict.fromkeys(key for snapshot in snapshots for key in snapshot["metrics"]):
        found = [(snapshot["step"], snapshot["metrics"].get(name, {}).get("value")) for snapshot in snapshots]
        series[f"{prefix}/{name}"] = ([step for step, _ in found], [value for _, value in found])
    return {
        name: (steps, [math.nan if value is None else value for value in values])
        for name, (steps, values) in series.items()
    }


def _views(runs: Sequence[Run]) -> list[RunView]:
    from lib_lightning.viewer.cache import Cache
    from lib_lightning.viewer.run_view import RunView

    folders = list(dict.fromkeys(run.folder for run in runs))
    # The shortest path ends that are distinct, with at least the log directory and the folder.
    deepest = max(len(folder.parts) for folder in folders)
    length = next(n for n in range(2, deepest + 2) if len({folder.parts[-n:] for folder in folders}) == len(folders))
    cache = Cache(_CACHE_BYTES)
    return [RunView(folder, "/".join(folder.parts[-length:]), cache) for folder in folders]


def runs_below(path: str | PathLike[str]) -> list[Run]:
    """Find all runs in a folder, without those of baselines and standalone validations beside them.

    Args:
        path: The folder of a run, or one that contains any number of them, at any depth.

    Returns:
        The runs, by path.

    Raises:
        MissingFileError: If the folder does not exist.
        LIBError: If there is no run in it.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from lib_lightning import compute_interaction_graph
        >>> graph = compute_interaction_graph(torch.nn.Linear(3, 2), [torch.randn(9, 3)], ["input", "output"])
        >>> with tempfile.TemporaryDirectory() as logs:
        ...     for name in ("seed0/lib", "seed1/lib", "seed1/pca"):
        ...         graph.save(f"{logs}/{name}/snapshots/step-00000010.safetensors")
        ...     runs_below(logs)
        [Run(seed0/lib: 1 snapshot, step 10), Run(seed1/lib: 1 snapshot, step 10)]
    """
    return [Run(folder) for folder in _primary(Path(path)).values()]


def _folder(path: Path) -> Path:
    primary = _primary(path)
    if len(primary) > 1:
        raise LIBError(f"There are {len(primary)} runs in '{path}': {quoted(primary)}. Give the folder of one of them.")
    return next(iter(primary.values()))


def _primary(path: Path) -> dict[str, Path]:
    """Folders of runs, by name: this one, or those below it that are not of a baseline or a standalone validation."""
    if not path.is_dir():
        raise MissingFileError(f"Folder '{path}' does not exist.")
    real = Path(os.path.realpath(path))
    real = real.parent if real.name == RunLayout.SNAPSHOTS else real
    if snapshot_files(real):
        return {real.name: real}
    found = find_runs(real)
    primary = {name: folder for name, folder in found.items() if not _is_secondary(folder, set(found.values()))}
    if not primary:
        raise LIBError(
            f"No run in '{path}': neither this folder nor any below it contains files snapshots/step-*.safetensors. "
            "LIBCallback writes them to the trainer's log directory, such as lightning_logs/version_0."
        )
    return primary


def _is_secondary(folder: Path, others: set[Path]) -> bool:
    """Whether a run is a baseline or a standalone validation of one of the others."""
    if folder.name == RunLayout.VALIDATION and folder.parent in others:
        return True
    siblings = {other.name for other in others if other.parent == folder.parent}
    baselines = {f"{other}_{kind}" for other in siblings for kind in _BESIDE}
    if "lib" in siblings:
        baselines |= {*_BESIDE[1:]}
    # Further draws of a baseline are beside the first one.
    first, _, number = folder.name.rpartition("_")
    is_draw = first.endswith(DRAWN) and first in siblings & baselines and number.isdecimal() and int(number) > 1
    return is_draw or folder.name in baselines


def _summary(steps: list[int]) -> str:
    if len(steps) < 2:
        return f"{len(steps)} snapshot{'' if steps else 's'}{f', step {steps[0]:,}' if steps else ''}"
    return f"{len(steps)} snapshots, steps {steps[0]:,} to {steps[-1]:,}"
