"""One snapshot as JSON for the viewer, from the parts of its basis file that the viewer needs."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lib_lightning.errors import LIBError
from lib_lightning.io import basis_format
from lib_lightning.io.basis_file import read_parts
from lib_lightning.io.fingerprint import fingerprint
from lib_lightning.plots.module_numbers import Members
from lib_lightning.plots.palette import label_group
from lib_lightning.viewer.event_times import Measured, Shares
from lib_lightning.viewer.json_text import array, dump, integers, number, numbers, object_
from lib_lightning.viewer.run_discovery import FileStamp

# Kinds of basis whose features are the single activations of a layer.
OUTPUT_KINDS = ("neuron", "centered")
# Errors from a file that is missing, incomplete, or not an interaction graph.
UNREADABLE = (LIBError, OSError, AttributeError, IndexError, KeyError, TypeError, ValueError)
# Tensors of each feature, by key in the JSON: those for the outline, and those for a single snapshot.
_OUTLINE = {
    "ids": basis_format.LINEAGES["ids"],
    "importance": basis_format.BASIS["importance"],
    "parents": basis_format.LINEAGES["parents"],
    "modules": basis_format.MODULES,
}
_DETAIL = {
    "error": basis_format.BASIS["importance_error"],
    "similarity": basis_format.LINEAGES["similarity"],
    "degenerate": basis_format.BASIS["degenerate"],
    "nats": basis_format.BASIS["output_importance"],
    "nats_error": basis_format.BASIS["output_importance_error"],
    "label_score": basis_format.LABEL_SCORES,
}
# Matrices of each section, by key in the JSON.
_SECTION = {
    "weight": basis_format.EDGES,
    "error": basis_format.EDGE_ERRORS,
    "attribution": basis_format.ATTRIBUTIONS,
    "attribution_error": basis_format.ATTRIBUTION_ERRORS,
}
_INTEGERS = {"ids", "parents", "modules", "degenerate"}


@dataclass(frozen=True)
class Outline:
    """The part of a snapshot that is sent for all snapshots of a run at once.

    Attributes:
        layers: Name and kind of basis of each node layer.
        tracked: For each node layer, whether its features have lineage ids.
        labels: For each node layer, labels of features by lineage, or by index if there are none.
        groups: Importance of each group of labels, as a share of its node layer.
        members: Modules of the node layers whose features have lineages and modules, if the file was written by a
            version that numbered modules anew in each snapshot; else empty.
        output_names: Names of the features of the last node layer, if these are outputs of the model, such as classes.
        logging_step: Where Lightning logged the scalars of the snapshot; None in files of version 0.1.
        measured: Its metrics, and the features of each node layer with lineages.
        fingerprint: By which comparisons name the snapshot.
        json: Step, epoch, number of samples, metrics, importances and lineages.
    """

    layers: tuple[tuple[str, str], ...]
    tracked: tuple[bool, ...]
    labels: tuple[dict[int, str], ...]
    groups: dict[str, float]
    members: dict[str, Members]
    output_names: dict[int, str]
    logging_step: int | None
    measured: Measured
    fingerprint: str
    json: str

    def size(self) -> int:
        """Approximate size in bytes."""
        of_features = [*self.members.values(), *self.measured.shares.values()]
        arrays = sum(array.nbytes for arrays in of_features for array in arrays)
        return len(self.json) + arrays + sum(500 + 150 * len(labels) for labels in self.labels) + 100 * len(self.groups)


def read_outline(file: FileStamp, step: int) -> Outline:
    """Read the outline of a snapshot.

    Args:
        file: Basis file of the snapshot.
        step: Step of the snapshot.

    Returns:
        The outline.

    Raises:
        UNREADABLE: If the file is missing, incomplete, or not an interaction graph.
    """
    tensors, header = _read(file, _OUTLINE.values())
    layers = _layers(tensors, header, _OUTLINE)
    labels = _labels(header, layers)
    info = header[basis_format.INFO]
    metrics = info.get(basis_format.METRICS, {})
    entries = {
        "step": dump(step),
        "epoch": dump(info.get(basis_format.EPOCH)),
        "samples": dump(info.get(basis_format.NUM_SAMPLES)),
        "layers": array(_features(layer, _OUTLINE) for layer in layers),
        "metrics": object_(
            {
                key: object_({"value": number(metric["value"]), "error": number(metric.get("error"))})
                for key, metric in metrics.items()
            }
        ),
    }
    node_layers = tuple(zip(map(str, header[basis_format.LAYERS]), map(str, header[basis_format.KINDS]), strict=True))
    is_renumbered = bool(info.get(basis_format.MODULES_TRACKED))
    logging_step = info.get(basis_format.LOGGING_STEP)
    return Outline(
        node_layers,
        tuple("ids" in layer for layer in layers),
        tuple(_by_lineage(names, layer) for names, layer in zip(labels, layers, strict=True)),
        _groups(labels, layers),
        {} if is_renumbered else _members([name for name, _ in node_layers], layers),
        _output_names(info.get(basis_format.OUTPUT_NAMES), node_layers[-1][1], len(layers[-1]["importance"])),
        logging_step if isinstance(logging_step, int) else None,
        Measured(
            _shares([name for name, _ in node_layers], layers),
            {sys.intern(key): metric["value"] for key, metric in metrics.items()},
        ),
        _fingerprint(info, [name for name, _ in node_layers], layers),
        object_(entries),
    )


def _output_names(names: Any, kind: str, count: int) -> dict[int, str]:
    """Names of outputs by their number, if the features of a layer are single outputs."""
    if kind not in OUTPUT_KINDS:
        return {}
    if isinstance(names, list) and len(names) == count:
        return {i: sys.intern(str(name)) for i, name in enumerate(names)}
    # Of very many outputs, a file has the names of some.
    named = names.items() if isinstance(names, dict) else ()
    return {int(i): sys.intern(str(name)) for i, name in named if str(i).isdecimal() and int(i) < count}


def _fingerprint(info: Mapping[str, Any], names: list[str], layers: list[dict[str, np.ndarray]]) -> str:
    ids = [layer.get("ids", np.arange(len(layer["importance"]))) for layer in layers]
    features = zip(names, ids, (layer["importance"] for layer in layers), strict=True)
    return fingerprint(info.get(basis_format.STEP), info.get(basis_format.WEIGHTS_HASH), features)


def _groups(labels: list[list[str]], layers: list[dict[str, np.ndarray]]) -> dict[str, float]:
    groups: dict[str, float] = {}
    for names, layer in zip(labels, layers, strict=True):
        shares = layer["importance"] / (layer["importance"].sum() or 1.0)
        for label, share in zip(names, shares.tolist(), strict=False):
            group = sys.intern(label_group(label))
            groups[group] = groups.get(group, 0.0) + share
    return groups


def _shares(names: list[str], layers: list[dict[str, np.ndarray]]) -> dict[str, Shares]:
    return {
        sys.intern(name): Shares(
            layer["ids"],
            (layer["importance"] / (layer["importance"].sum() or 1.0)).astype(np.float32),
            layer.get("parents", np.full(layer["ids"].shape, -1)),
        )
        for name, layer in zip(names, layers, strict=True)
        if "ids" in layer
    }


def _members(names: list[str], layers: list[dict[str, np.ndarray]]) -> dict[str, Members]:
    return {
        name: Members(layer["ids"], layer["modules"], layer["importance"])
        for name, layer in zip(names, layers, strict=True)
        if {"ids", "modules"} <= layer.keys()
    }


def read_detail(file: FileStamp, step: int, edges: int) -> str:
    """Read all details of a snapshot.

    Args:
        file: Basis file of the snapshot.
        step: Step of the snapshot.
        edges: Maximum number of edges per section; the strongest are included.

    Returns:
        JSON.

    Raises:
        UNREADABLE: If the file is missing, incomplete, or not an interaction graph.
    """
    tensors, header = _read(file, [*_OUTLINE.values(), *_DETAIL.values(), *_SECTION.values()])
    layers = _layers(tensors, header, _OUTLINE | _DETAIL)
    label_entries = [{"labels": dump(names or None)} for names in _labels(header, layers)]
    sections = [
        {key: tensors[place.format(i)] for key, place in _SECTION.items() if place.format(i) in tensors}
        for i in range(len(layers) - 1)
    ]
    entries = {
        "step": dump(step),
        "layers": array(
            _features(layer, _OUTLINE | _DETAIL, labels) for layer, labels in zip(layers, label_entries, strict=True)
        ),
        "sections": array(_section(matrices, edges) for matrices in sections),
    }
    return object_(entries)


def _read(file: FileStamp, wanted: Iterable[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    positions = set(wanted)
    return read_parts(file.path, lambda name: re.sub(r"\.\d+", ".{}", name) in positions)


def _layers(
    tensors: dict[str, np.ndarray], header: dict[str, Any], wanted: dict[str, str]
) -> list[dict[str, np.ndarray]]:
    """The tensors of each node layer that the file contains."""
    layers = []
    for i, name in enumerate(header[basis_format.LAYERS]):
        layer = {key: tensors[place.format(i)] for key, place in wanted.items() if place.format(i) in tensors}
        if any(values.shape != layer["importance"].shape for values in layer.values()):
            raise ValueError(f"tensors of node layer '{name}' have different numbers of features.")
        layers.append(layer)
    return layers


def _labels(header: dict[str, Any], layers: list[dict[str, np.ndarray]]) -> list[list[str]]:
    """A label for each feature of each node layer; empty for layers without labels."""
    labels = [
        [str(label) for label in header.get(basis_format.LABELS, {}).get(name, [])]
        for name in header[basis_format.LAYERS]
    ]
    if any(len(names) not in (0, len(layer["importance"])) for names, layer in zip(labels, layers, strict=True)):
        raise ValueError("the number of labels differs from the number of features.")
    return labels


def _by_lineage(labels: list[str], layer: dict[str, np.ndarray]) -> dict[int, str]:
    keys = layer["ids"].tolist() if "ids" in layer else range(len(labels))
    # Most labels are the same in all snapshots: keep one copy of each.
    return {key: sys.intern(label) for key, label in zip(keys, labels, strict=False) if label}


def _features(layer: dict[str, np.ndarray], keys: Iterable[str], extra: Mapping[str, str] | None = None) -> str:
    encoded = {key: (integers if key in _INTEGERS else numbers)(layer.get(key)) for key in keys}
    return object_({**encoded, **(extra or {})})


def _section(matrices: Mapping[str, np.ndarray], limit: int) -> str:
    E = matrices["weight"]
    if any(values.shape != E.shape for values in matrices.values()):
        raise ValueError("matrices of a section have different shapes.")
    weights = np.where(np.isfinite(E), E, 0.0).ravel()
    count = int(np.count_nonzero(weights))
    kept = min(count, limit)
    # Partitioning takes a tenth of the time of sorting all edges. Ties are in the order of the matrix.
    positions = np.argpartition(-weights, kept - 1)[:kept] if kept else np.zeros(0, dtype=np.int64)
    positions = positions[np.lexsort((positions, -weights[positions]))]
    target, source = np.divmod(positions, E.shape[1])
    edges = {"source": integers(source), "target": integers(target), "weight": numbers(weights[positions])}
    for key in ("error", "attribution", "attribution_error"):
        edges[key] = numbers(matrices[key].ravel()[positions] if key in matrices else None)
    return object_(
        {
            "count": dump(count),
            "strength": number(float(weights.sum())),
            "strongest": number(float(weights.max(initial=0.0))),
            "edges": object_(edges),
        }
    )
