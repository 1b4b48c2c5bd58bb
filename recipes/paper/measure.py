"""Measures a network in several bases: number of features, of edges, and of edges required."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lib_lightning import InteractionGraph, NodeLayer, compute_interaction_graph
from lib_lightning.ablation import edges_required
from lib_lightning.ablation.scored_model import Score
from lib_lightning.metrics.summary import graph_scalars, layer_keys, section_keys
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.model_spec import ModelSpec
from recipes.features_required import NodeAblations, features_required

# Options of `compute_interaction_graph` for each row. The basis of the output is its neurons by default.
BASES: dict[str, dict[str, Any]] = {
    "lib": {},
    "pca": {"basis": "pca"},
    "neuron": {"basis": "neuron"},
    "lib, centered": {"final_basis": "centered"},
    "lib, fisher": {"final_metric": "fisher"},
}


@dataclass(frozen=True)
class Network:
    """A trained network, and the data and settings for measuring it.

    Attributes:
        task: Name of its task.
        seed: Its seed.
        model: The network.
        node_layers: Where it is cut; the last one is the output.
        fit: Batches of the training split, for bases and edges.
        test: Batches of the test split, for scores.
        score: As for `edges_required`.
        tolerance: As for `edges_required`.
        search: As for `edges_required`.
        options: More options of `compute_interaction_graph`.
        ablation: More options of `edges_required`.
        notes: Further entries for the file of results.
    """

    task: str
    seed: int
    model: nn.Module
    node_layers: Sequence[str | NodeLayer]
    fit: Sequence[Any]
    test: Sequence[Any]
    score: Score
    tolerance: float
    search: Literal["scan", "bisection"] = "scan"
    options: dict[str, Any] = field(default_factory=dict)
    ablation: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


def measure(network: Network, basis: str) -> dict[str, Any]:
    """Measure a network in one basis.

    Args:
        network: The network.
        basis: One of `BASES`.

    Returns:
        ``features`` of each node layer, ``edges``, ``effective_edges``, ``modularity`` and ``edges_required`` of each
        section (None if not even all edges are sufficient), ``features_required`` of each node layer except the last
        (None if not even all features are), and in total: for ``features``, the sum over all node layers except the
        last. ``seconds`` are CPU times of the graph and of the ablations of edges.
    """
    start = time.process_time()
    options = {"effort": "exact", **network.options, **BASES[basis]}
    graph = compute_interaction_graph(network.model, network.fit, network.node_layers, **options)
    middle = time.process_time()
    required = edges_required(
        network.model, network.test, graph, network.score, network.tolerance, search=network.search, **network.ablation
    )
    seconds = {"graph": middle - start, "ablation": time.process_time() - middle}
    scores = {one.unablated for one in required.values()}
    return {
        **numbers_of(graph),
        "edges_required": _with_total(
            {key: one.count for section, one in required.items() for key in section_keys(section)}
        ),
        "features_required": required_features(network, graph),
        "unablated": _short(min(scores)),
        "samples": graph.info["n_samples"],
        "seconds": {key: round(value, 1) for key, value in seconds.items()},
    }


def required_features(network: Network, graph: InteractionGraph) -> dict[str, int | None]:
    """Count the features that a network needs in each node layer for its score, all others at their means.

    Args:
        network: The network.
        graph: Its graph.

    Returns:
        The number for each node layer except the last, which needs all of its logits, and in total.
    """
    spec = ModelSpec(dtype=network.ablation.get("dtype"))
    instrumented = InstrumentedModel(network.model, graph.node_layer_specs(), spec)
    counts: dict[str, int | None] = {}
    with model_session(instrumented):
        ablations = NodeAblations(instrumented, network.test, network.score)
        for i, (name, basis) in enumerate(list(graph.bases.items())[:-1]):
            changes = partial(ablations.changes, i, basis)
            counts[name] = features_required(changes, basis.importance, network.tolerance, network.search)["count"]
    return _with_total(counts)


def numbers_of(graph: InteractionGraph) -> dict[str, dict[str, float]]:
    """Compute the metrics of a graph, which need no model.

    Args:
        graph: The graph.

    Returns:
        Numbers by metric, then by node layer or section, and ``"total"``.
    """
    scalars = graph_scalars(list(graph.bases.values()), list(graph.edges.values()))
    numbers: dict[str, dict[str, float]] = {}
    for metric in ("features", "edges", "effective_edges", "modularity"):
        found = {key.split("/", 1)[1]: value for key, value in scalars.items() if key.split("/", 1)[0] == metric}
        if metric == "features":
            found["total"] -= found[layer_keys(graph.node_layers)[-1]]
        numbers[metric] = {key: _short(value) for key, value in found.items()}
    return numbers


def results_of(task: str, seed: int, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Read the file of results of a network.

    Args:
        task: Name of its task.
        seed: Its seed.
        folder: Folder of the results.

    Returns:
        The path of the file, and its contents; empty if it does not exist.
    """
    path = folder / f"{task.replace(' ', '_').lower()}_seed{seed}.json"
    return path, json.loads(path.read_text()) if path.exists() else {}


def remaining(task: str, seed: int, folder: Path, bases: Sequence[str] = tuple(BASES)) -> list[str]:
    """The bases in which a network has not been measured yet."""
    _, results = results_of(task, seed, folder)
    return [basis for basis in bases if basis not in results.get("bases", {})]


def measure_all(network: Network, folder: Path, bases: Sequence[str] = tuple(BASES)) -> Path:
    """Measure a network in the bases that its file of results does not contain yet.

    Args:
        network: The network.
        folder: Folder of the results.
        bases: Names in `BASES`.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, results = results_of(network.task, network.seed, folder)
    for basis in remaining(network.task, network.seed, folder, bases):
        found = {**results.get("bases", {}), basis: measure(network, basis)}
        results = {**described(network), "bases": {name: found[name] for name in BASES if name in found}}
        part = path.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        part.replace(path)
    return path


def described(network: Network) -> dict[str, Any]:
    """Describe a network and its settings for its file of results."""
    settings = {**network.options, **network.ablation}
    if "sections" in settings:
        settings["sections"] = [key for section in settings["sections"] for key in section_keys(section)]
    return {
        "task": network.task,
        "seed": network.seed,
        "score": network.score.__name__,
        "tolerance": network.tolerance,
        "search": network.search,
        "scored": sum(len(batch[0]) for batch in network.test),
        "settings": {key: _plain(value) for key, value in settings.items()},
        **network.notes,
    }


def _with_total(counts: dict[str, int | None]) -> dict[str, int | None]:
    known = [count for count in counts.values() if count is not None]
    return {**counts, "total": sum(known) if len(known) == len(counts) else None}


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _plain(value: Any) -> Any:
    return str(value).split(".")[-1] if isinstance(value, torch.dtype) else value
