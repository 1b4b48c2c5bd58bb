"""One snapshot as the view shows it: JSON from the parts of its basis file that it takes."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lib_lightning.errors import LIBError
from lib_lightning.io.basis_file import read_parts
from lib_lightning.io.basis_format import BASIS, EDGE_ERRORS, EDGES, LINEAGES, MODULES
from lib_lightning.viewer.json_text import dump, integers, number, numbers, object_
from lib_lightning.viewer.run_discovery import FileStamp

# What goes wrong with a file that is gone, half there, or of other content than a graph's.
UNREADABLE = (LIBError, OSError, AttributeError, IndexError, KeyError, TypeError, ValueError)
# Where files have what there is of each feature; {} is the number of the node layer.
_FEW = {
    "ids": LINEAGES["ids"],
    "importance": BASIS["importance"],
    "parents": LINEAGES["parents"],
    "modules": MODULES,
}
_MORE = {
    "error": BASIS["importance_error"],
    "similarity": LINEAGES["similarity"],
    "unsure": BASIS["degenerate"],
}
_SECTION = (EDGES, EDGE_ERRORS)
_WHOLE_NUMBERS = {"ids", "parents", "modules", "unsure"}


@dataclass(frozen=True)
class Outline:
    """What is told of a snapshot together with all others of its run.

    Attributes:
        layers: Names and kinds of its node layers.
        followed: Whether it says which features are those of the snapshots before, for each node layer.
        labels: For each node layer the names of its features, by lineage or else by index.
        json: Step, epoch, number of samples, metrics, and importances with their lineages.
    """

    layers: tuple[tuple[str, str], ...]
    followed: tuple[bool, ...]
    labels: tuple[dict[int, str], ...]
    json: str

    def size(self) -> int:
        """In bytes, about."""
        return len(self.json) + sum(500 + 150 * len(labels) for labels in self.labels)


def read_outline(file: FileStamp, step: int) -> Outline:
    """Read what is told of a snapshot together with all others of its run.

    Args:
        file: Its basis file.
        step: Its step.

    Returns:
        The outline.

    Raises:
        UNREADABLE: If it is no such file, or none any more.
    """
    tensors, header = _read(file, _FEW.values())
    layers = _layers(tensors, header, _FEW)
    labels = _labels(header, layers)
    info = header["info"]
    metrics = {
        key: object_({"value": number(metric["value"]), "error": number(metric.get("error"))})
        for key, metric in info.get("metrics", {}).items()
    }
    entries = {
        "step": dump(step),
        "epoch": dump(info.get("epoch")),
        "samples": dump(info.get("n_samples")),
        "layers": _list(_features(layer, _FEW) for layer in layers),
        "metrics": object_(metrics),
    }
    node_layers = zip(map(str, header["layers"]), map(str, header["kinds"]), strict=True)
    return Outline(
        tuple(node_layers),
        tuple("ids" in layer for layer in layers),
        tuple(_by_lineage(names, layer) for names, layer in zip(labels, layers, strict=True)),
        object_(entries),
    )


def read_detail(file: FileStamp, step: int, edges: int) -> str:
    """Read all that is told of one snapshot.

    Args:
        file: Its basis file.
        step: Its step.
        edges: Most edges of a section, the strongest.

    Returns:
        JSON.

    Raises:
        UNREADABLE: If it is no such file, or none any more.
    """
    tensors, header = _read(file, [*_FEW.values(), *_MORE.values(), *_SECTION])
    layers = _layers(tensors, header, _FEW | _MORE)
    named = [{"labels": dump(names or None)} for names in _labels(header, layers)]
    pairs = range(len(layers) - 1)
    entries = {
        "step": dump(step),
        "layers": _list(_features(layer, _FEW | _MORE, names) for layer, names in zip(layers, named, strict=True)),
        "sections": _list(_section(tensors[f"edges.{i}"], tensors.get(f"edge_errors.{i}"), edges) for i in pairs),
    }
    return object_(entries)


def _read(file: FileStamp, wanted: Iterable[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    places = set(wanted)
    return read_parts(file.path, lambda name: re.sub(r"\.\d+", ".{}", name) in places)


def _layers(
    tensors: dict[str, np.ndarray], header: dict[str, Any], wanted: dict[str, str]
) -> list[dict[str, np.ndarray]]:
    """What there is of the features of each node layer."""
    layers = []
    for i, name in enumerate(header["layers"]):
        layer = {key: tensors[place.format(i)] for key, place in wanted.items() if place.format(i) in tensors}
        if any(values.shape != layer["importance"].shape for values in layer.values()):
            raise ValueError(f"parts of node layer '{name}' differ in their number of features.")
        layers.append(layer)
    return layers


def _labels(header: dict[str, Any], layers: list[dict[str, np.ndarray]]) -> list[list[str]]:
    """A name for each feature of each node layer; none for layers without."""
    labels = [[str(label) for label in header.get("labels", {}).get(name, [])] for name in header["layers"]]
    if any(len(names) not in (0, len(layer["importance"])) for names, layer in zip(labels, layers, strict=True)):
        raise ValueError("there are not as many names as features.")
    return labels


def _by_lineage(labels: list[str], layer: dict[str, np.ndarray]) -> dict[int, str]:
    keys = layer["ids"].tolist() if "ids" in layer else range(len(labels))
    # Snapshots have much the same names as those before: one copy of each will do.
    return {key: sys.intern(label) for key, label in zip(keys, labels, strict=False) if label}


def _features(layer: dict[str, np.ndarray], keys: Iterable[str], more: Mapping[str, str] | None = None) -> str:
    found = {key: (integers if key in _WHOLE_NUMBERS else numbers)(layer.get(key)) for key in keys}
    return object_({**found, **(more or {})})


def _section(E: np.ndarray, errors: np.ndarray | None, most: int) -> str:
    weights = np.where(np.isfinite(E), E, 0.0).ravel()
    count = int(np.count_nonzero(weights))
    kept = min(count, most)
    # Finding the strongest takes a tenth of the time of sorting all; equal ones stand in the order of the matrix.
    places = np.argpartition(-weights, kept - 1)[:kept] if kept else np.zeros(0, dtype=np.int64)
    places = places[np.lexsort((places, -weights[places]))]
    target, source = np.divmod(places, E.shape[1])
    edges = {
        "source": integers(source),
        "target": integers(target),
        "weight": numbers(weights[places]),
        "error": numbers(None if errors is None else errors.ravel()[places]),
    }
    return object_(
        {
            "count": dump(count),
            "strength": number(float(weights.sum())),
            "strongest": number(float(weights.max(initial=0.0))),
            "edges": object_(edges),
        }
    )


def _list(items: Iterable[str]) -> str:
    return f"[{','.join(items)}]"
