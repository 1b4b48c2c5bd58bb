"""What is shown of many runs at once: curves of one quantity, and the features that they have in common."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from lib_lightning.io.universal_file import NAME, read_universal
from lib_lightning.viewer.json_text import array, dump, numbers, object_
from lib_lightning.viewer.run_discovery import FileStamp, regular_file
from lib_lightning.viewer.run_view import RunView

# What a curve can be of: metrics of graphs are part of the snapshots, scalars have been logged.
METRIC, SCALAR = "metric", "scalar"


def curve_names(runs: Iterable[RunView]) -> str:
    """Say what there are curves of.

    Args:
        runs: The runs.

    Returns:
        JSON with the names of ``metric`` and ``scalar`` curves that any of the runs has.
    """
    found: dict[str, set[str]] = {METRIC: set(), SCALAR: set()}
    for run in runs:
        metrics, scalars = run.curves()
        found[METRIC].update(metrics)
        found[SCALAR].update(scalars)
    return dump({kind: sorted(names) for kind, names in found.items()})


def curves(runs: Iterable[RunView], kind: str, name: str) -> str:
    """Describe one curve of every run that has it. Nothing but headers of files is read.

    Args:
        runs: The runs.
        kind: `METRIC` or `SCALAR`.
        name: What the curve is of.

    Returns:
        JSON of a list with ``name``, ``steps`` and ``values`` of runs. Baselines share the logged scalars of the run
        that they are beside: the first run of a log directory has them.
    """
    found, seen = [], set[Path]()
    for run in runs:
        metrics, scalars = run.curves()
        curve = (metrics if kind == METRIC else scalars).get(name)
        if curve is None or (kind == SCALAR and run.logs in seen):
            continue
        seen.add(run.logs)
        found.append(
            object_({"name": dump(run.name), "steps": dump(list(curve.steps)), "values": numbers(curve.values)})
        )
    return array(found)


def universal_files(folders: Iterable[Path], roots: Sequence[Path] | None = None) -> list[FileStamp]:
    """Find the files with features that runs have in common, in the folders that contain the runs.

    Args:
        folders: Folders of runs.
        roots: Look only below these; None for all folders that contain a run.

    Returns:
        The files.
    """
    above = dict.fromkeys(
        parent
        for folder in folders
        for parent in folder.parents
        if roots is None or any(parent.is_relative_to(root) for root in roots)
    )
    return [file for parent in above if (file := regular_file(parent / NAME)) is not None]


def stamp(files: Iterable[FileStamp]) -> str:
    """A text that changes whenever one of the files does."""
    return hashlib.sha256(repr(list(files)).encode()).hexdigest()[:16]


def shared_features(runs: Sequence[RunView], files: Iterable[FileStamp]) -> str:
    """Describe the features that runs have in common, as ``lib-lightning universal`` has found them.

    Args:
        runs: The runs that are shown.
        files: The files, of `universal_files`.

    Returns:
        JSON of a list with the content of each file about at least two of these runs: ``runs`` are their names here,
        None for others, and ``newest`` the steps of their last snapshots.
    """
    by_folder = {str(run.folder): run for run in runs}
    found = []
    for file in files:
        content = read_universal(file.path)
        if content is None:
            continue
        paths = [os.path.normpath(file.path.parent / name) for name in content["runs"]]
        known = [by_folder.get(path) for path in paths]
        if sum(run is not None for run in known) < 2:
            continue
        newest = [None if run is None else max(run.snapshot_steps(), default=None) for run in known]
        with contextlib.suppress(ValueError):  # a NaN
            found.append(
                dump(
                    {
                        **{key: content[key] for key in ("names", "steps", "layers")},
                        "level": content.get("level"),
                        "runs": [run and run.name for run in known],
                        "newest": newest,
                    }
                )
            )
    return array(found)
