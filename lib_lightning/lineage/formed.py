"""Since when the final features of a run have been recognisable, read from its basis files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lib_lightning.export.files import BasisFileError, read_parts
from lib_lightning.graph import InteractionGraph
from lib_lightning.lineage.retrace import Retraced, retrace
from lib_lightning.lineage.tracker import IN_ORDER


def retrace_files(final: InteractionGraph, files: Sequence[tuple[int, Path]]) -> dict[str, Retraced]:
    """Look for the features of a final graph in the basis files of earlier snapshots.

    Args:
        final: The final graph, with values on probe samples.
        files: Step and basis file of each earlier snapshot, rising. Files that cannot be read, or whose values are of
            other samples, are passed over.

    Returns:
        For each node layer how like its features there have been; nothing for a graph without such values.
    """
    if set(final.probes) != set(final.node_layers):
        return {}
    steps: list[int] = []
    values: dict[str, list[torch.Tensor]] = {name: [] for name in final.node_layers}
    for step, path in files:
        try:
            tensors, header = read_parts(path, lambda key: key.startswith("probes."))
        except (BasisFileError, OSError):
            continue
        there = {name: tensors.get(f"probes.{i}") for i, name in enumerate(header.get("layers", []))}
        same = header.get("info", {}).get("probe_samples") == final.info.get("probe_samples")
        known = {name: x for name, x in there.items() if x is not None and _comparable(final, name, x.shape)}
        if same and set(known) == set(values):
            steps.append(step)
            for name, x in known.items():
                values[name].append(torch.from_numpy(x))
    return {
        name: retrace(probes, steps, values[name], final.bases[name].kind in IN_ORDER)
        for name, probes in final.probes.items()
    }


def _comparable(final: InteractionGraph, name: str, shape: tuple[int, ...]) -> bool:
    if name not in final.probes:
        return False
    in_order = final.bases[name].kind in IN_ORDER
    return shape == final.probes[name].shape if in_order else shape[0] == len(final.probes[name])


def formed(final: InteractionGraph, retraced: dict[str, Retraced]) -> dict[str, Any]:
    """Say of every final feature when it first became recognisable.

    Args:
        final: The final graph.
        retraced: What `retrace_files` has found for it.

    Returns:
        For each node layer ``formed``, the step since which features with most of the final importance have been
        recognisable, and ``features``: for each of them ``feature`` (its number), ``lineage``, ``label``,
        ``importance``, the step of the ``first`` snapshot in which it was recognisable, and the one ``since`` which it
        has been in all. None stands for never.
    """
    found: dict[str, Any] = {}
    for name, seen in retraced.items():
        importance = final.bases[name].importance
        first, since = ([None if step < 0 else step for step in x.tolist()] for x in (seen.first(), seen.since()))
        lineages = final.lineages[name].ids.tolist() if name in final.lineages else [None] * len(first)
        labels = final.labels.get(name, [""] * len(first))
        features = [
            {"feature": j, "lineage": lineage, "label": label, "importance": value, "first": a, "since": b}
            for j, (lineage, label, value, a, b) in enumerate(
                zip(lineages, labels, importance.tolist(), first, since, strict=True)
            )
        ]
        found[name] = {"formed": _most_since(importance, since), "features": features}
    return found


def _most_since(importance: torch.Tensor, since: Sequence[int | None]) -> int | None:
    """The step by which features with at least half of the importance are there for good."""
    reached = 0.0
    for step in sorted({step for step in since if step is not None}):
        reached = float(importance[[s is not None and s <= step for s in since]].sum())
        if reached >= importance.sum() / 2:
            return step
    return None
