"""The scalars of one interaction graph, under stable names."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lib_lightning.algorithm.basis import Basis
from lib_lightning.metrics.ablation import EdgesRequired
from lib_lightning.metrics.edges import EffectiveEdges, NumberOfEdges, ShareOfEdges
from lib_lightning.metrics.features import EffectiveFeatures, NumberOfFeatures, ParticipationRatio
from lib_lightning.metrics.inputs import Part, input_kind, local_copy, measure, total_of
from lib_lightning.metrics.modules import LargestModule, Modularity, NumberOfModules
from lib_lightning.metrics.sparsity import Gini, Hoyer


def default_metrics(tolerance: float = 1e-3) -> MetricCollection:
    """The metrics that are computed unless others are asked for.

    Args:
        tolerance: Loss of score that edges required may cost.

    Returns:
        A new collection; its names are those under which the numbers are logged.

    Example:
        >>> list(default_metrics())[:3]
        ['edges', 'edges_required', 'effective_edges']
    """
    return MetricCollection(
        {
            "features": NumberOfFeatures(),
            "effective_features": EffectiveFeatures(),
            "participation_ratio": ParticipationRatio(),
            "edges": NumberOfEdges(),
            "effective_edges": EffectiveEdges(),
            "share_of_edges": ShareOfEdges(),
            "gini": Gini(),
            "hoyer": Hoyer(),
            "modularity": Modularity(),
            # Not "modules": a collection is a torch module itself, and has that name already.
            "number_of_modules": NumberOfModules(),
            "largest_module": LargestModule(),
            "edges_required": EdgesRequired(tolerance),
        }
    )


def graph_scalars(
    bases: Sequence[Basis],
    edges: Sequence[Tensor],
    metrics: MetricCollection | None = None,
    curves: Sequence[tuple[Tensor, Tensor, float] | None] | None = None,
    like: Sequence[Tensor] | None = None,
) -> dict[str, float]:
    """Compute metrics of each part of a graph, and of all of it.

    Args:
        bases: One basis for each node layer, in forward order.
        edges: One matrix ``(r_out, r_in)`` for each pair of neighbouring node layers.
        metrics: What to compute, None for `default_metrics`; they stay as they are. Each process computes for itself.
        curves: An ablation curve for each section, as `min_edges_from_curve` takes it: counts, scores and the unablated
            score; None for a section that has none. Without any, metrics of such curves are left out.
        like: Edges of the same shapes for metrics whose update takes ``like``: those of modules then take the modules
            of these.

    Returns:
        ``<metric>/<layer>`` of metrics whose update takes ``importance``, ``<metric>/<section>`` of those whose update
        takes ``edges`` or ``counts, scores, unablated``, and ``<metric>/total`` of each: the sum, the mean or the
        number of all sections together, by the metric's ``total_is``.

    Raises:
        LIBError: If a metric takes anything else.

    Example:
        >>> import torch
        >>> from lib_lightning.algorithm.basis import neuron_basis
        >>> layers = [neuron_basis(name, torch.zeros(2), torch.eye(2)) for name in ("fc:input", "output")]
        >>> graph_scalars(layers, [torch.eye(2)])["edges/fc.input-to-output"]
        2.0
    """
    return GraphMetrics(metrics).numbers(bases, edges, curves, like)


class GraphMetrics:
    """Metrics made ready to be computed of several graphs.

    Args:
        metrics: As for `graph_scalars`.
    """

    def __init__(self, metrics: MetricCollection | None = None) -> None:
        self._by_part = [(name, local_copy(metric), part) for name, metric, part in _by_part(metrics)]

    def numbers(
        self,
        bases: Sequence[Basis],
        edges: Sequence[Tensor],
        curves: Sequence[tuple[Tensor, Tensor, float] | None] | None = None,
        like: Sequence[Tensor] | None = None,
    ) -> dict[str, float]:
        """Compute them, as `graph_scalars` does."""
        sections = section_keys([basis.name for basis in bases])
        parts: dict[Part, dict[str, dict[str, Any]]] = {
            "importance": {layer_key(basis.name): {"importance": basis.importance} for basis in bases},
            "edges": {section: {"edges": E} for section, E in zip(sections, edges, strict=True)},
        }
        if like is not None:
            for section, E in zip(sections, like, strict=True):
                parts["edges"][section] |= {"like": E}
        if curves is not None:
            parts["curve"] = {
                section: {} if curve is None else dict(zip(("counts", "scores", "unablated"), curve, strict=True))
                for section, curve in zip(sections, curves, strict=True)
            }
        values: dict[str, float] = {}
        for name, own, part in self._by_part:
            if part not in parts:
                continue
            numbers = {f"{name}/{key}": _number(own, inputs) for key, inputs in parts[part].items()}
            values |= numbers | {f"{name}/total": _total(own, numbers, edges, like)}
        return values


def scalar_keys(names: Sequence[str], metrics: MetricCollection | None = None, causal: bool = False) -> list[str]:
    """The keys that `graph_scalars` gives for node layers of these names, before there is a graph.

    Args:
        names: Names of the node layers, in forward order.
        metrics: What will be computed, None for `default_metrics`.
        causal: Give the keys that only ablation curves add, in place of those that are always there.

    Returns:
        The keys.

    Raises:
        LIBError: If a metric takes what is not of a graph.

    Example:
        >>> scalar_keys(["a", "b"])[:3], scalar_keys(["a", "b"], causal=True)
        (['effective_features/a', 'effective_features/b', 'effective_features/total'],
         ['edges_required/a-to-b', 'edges_required/total'])
    """
    layers, sections = [layer_key(name) for name in names], section_keys(names)
    return [
        f"{metric}/{key}"
        for metric, _, part in _by_part(metrics)
        if (part == "curve") == causal
        for key in (*(layers if part == "importance" else sections), "total")
    ]


def layer_key(name: str) -> str:
    """A node layer's name as part of a scalar's name: loggers do not take colons."""
    return name.replace(":", ".")


def section_keys(names: Sequence[str]) -> list[str]:
    """Names of the sections between node layers, as part of a scalar's name."""
    return [f"{layer_key(a)}-to-{layer_key(b)}" for a, b in itertools.pairwise(names)]


def _by_part(metrics: MetricCollection | None) -> list[tuple[str, Metric, Part]]:
    """Metrics, their names and what they take: those of node layers first, then those of sections."""
    # To ask a collection for its metrics ties those of one compute group together: only a copy is asked.
    collection = default_metrics() if metrics is None else metrics.clone()
    found = [(name, metric, input_kind(name, metric)) for name, metric in collection.items()]
    order: list[Part] = ["importance", "edges", "curve"]
    return sorted(found, key=lambda one: order.index(one[2]))


def _number(metric: Metric, inputs: dict[str, Any]) -> float:
    return measure(metric, **inputs) if inputs else math.nan


def _total(
    metric: Metric, numbers: Mapping[str, float], edges: Sequence[Tensor], like: Sequence[Tensor] | None
) -> float:
    kind = total_of(metric)
    if kind == "sum":
        return sum(numbers.values())
    if not numbers:
        return math.nan
    if kind == "whole":
        return measure(metric, edges=list(edges), **({} if like is None else {"like": list(like)}))
    return sum(numbers.values()) / len(numbers)
