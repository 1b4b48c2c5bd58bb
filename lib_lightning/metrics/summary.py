"""Scalars of an interaction graph: all metrics under stable names."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lib_lightning._deprecated import renamed_arguments
from lib_lightning.algorithm.basis import Basis
from lib_lightning.metrics.ablation import EdgesRequired
from lib_lightning.metrics.edges import EffectiveEdges, NumberOfEdges, ShareOfEdges
from lib_lightning.metrics.features import EffectiveFeatures, NumberOfFeatures, ParticipationRatio
from lib_lightning.metrics.inputs import ARGUMENTS, InputKind, aggregation_of, evaluate, input_kind, local_copy
from lib_lightning.metrics.modules import LargestModule, Modularity, ModuleMetric, NumberOfModules, Partitions
from lib_lightning.metrics.sparsity import Gini, Hoyer

# Numbers of edges kept, the score with each, and the score of the unablated model.
EdgeCurve = tuple[Tensor, Tensor, float]


def default_metrics(tolerance: float = 1e-3) -> MetricCollection:
    """The metrics that are computed by default.

    Args:
        tolerance: For `EdgesRequired`: how far the score may fall.

    Returns:
        A new collection. Its keys are the names under which the values are logged.

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
            # Not "modules", which is a method of the collection, an nn.Module.
            "number_of_modules": NumberOfModules(),
            "largest_module": LargestModule(),
            "edges_required": EdgesRequired(tolerance),
        }
    )


@renamed_arguments(like="modules_from")
def graph_scalars(
    bases: Sequence[Basis],
    edges: Sequence[Tensor],
    metrics: MetricCollection | None = None,
    curves: Sequence[EdgeCurve | None] | None = None,
    modules_from: Sequence[Tensor] | None = None,
) -> dict[str, float]:
    """Compute metrics of each node layer and section of a graph, and of the whole graph.

    Args:
        bases: One basis for each node layer, in forward order.
        edges: One matrix ``(r_out, r_in)`` for each section.
        metrics: The metrics, `default_metrics` if None. They are not changed, and not synchronized across processes.
        curves: An ablation curve for each section, as `min_edges_from_curve` takes it: counts, scores and the unablated
            score; None for a section without one. If there are none at all, metrics of curves are skipped.
        modules_from: Edges of the same shapes whose modules the metrics of modules use; ``edges`` if None.

    Returns:
        ``<metric>/<layer>`` for metrics with ``update(importance)``, ``<metric>/<section>`` for metrics with
        ``update(edges)`` or ``update(counts, scores, unablated)``, and ``<metric>/total`` for each: the sum, the mean
        or the joint value of the parts, by the metric's ``aggregation``.

    Raises:
        LIBError: If the `update` of a metric requires anything else.

    Example:
        >>> import torch
        >>> from lib_lightning.algorithm.basis import neuron_basis
        >>> layers = [neuron_basis(name, torch.zeros(2), torch.eye(2)) for name in ("fc:input", "output")]
        >>> graph_scalars(layers, [torch.eye(2)])["edges/fc.input-to-output"]
        2.0
    """
    partitions = Partitions(edges if modules_from is None else modules_from)
    return GraphMetrics(metrics).compute(bases, edges, curves, partitions)


class GraphMetrics:
    """Metrics prepared for several graphs.

    Args:
        metrics: As for `graph_scalars`.
        on_error: Called with the name of a metric that fails and its error; the metric's values are then NaN. By
            default the error is raised.
    """

    def __init__(
        self, metrics: MetricCollection | None = None, on_error: Callable[[str, Exception], object] | None = None
    ) -> None:
        self._on_error = on_error
        self._metrics = [(name, local_copy(metric), kind) for name, metric, kind in _by_input_kind(metrics)]

    def compute(
        self,
        bases: Sequence[Basis],
        edges: Sequence[Tensor],
        curves: Sequence[EdgeCurve | None] | None = None,
        partitions: Partitions | None = None,
    ) -> dict[str, float]:
        """Compute the metrics of one graph.

        Args:
            bases: As for `graph_scalars`.
            edges: As for `graph_scalars`.
            curves: As for `graph_scalars`.
            partitions: Modules for the metrics of modules; None to search in ``edges``.

        Returns:
            The scalars by name, as `graph_scalars` returns them.
        """
        partitions = Partitions(edges) if partitions is None else partitions
        names = [basis.name for basis in bases]
        layers, sections = layer_keys(names), section_keys(names)
        parts: dict[InputKind, dict[str, dict[str, Any]]] = {
            "importance": {key: {"importance": basis.importance} for key, basis in zip(layers, bases, strict=True)},
            "edges": {section: {"edges": E} for section, E in zip(sections, edges, strict=True)},
        }
        if curves is not None:
            parts["curve"] = {
                section: {} if curve is None else dict(zip(("counts", "scores", "unablated"), curve, strict=True))
                for section, curve in zip(sections, curves, strict=True)
            }
        scalars: dict[str, float] = {}
        for name, metric, kind in self._metrics:
            if kind not in parts:
                continue
            try:
                values = [
                    evaluate(metric, **inputs, **_modules(metric, partitions, i)) if inputs else math.nan
                    for i, inputs in enumerate(parts[kind].values())
                ]
                values.append(_total(metric, values, edges, partitions))
            except Exception as error:
                if self._on_error is None:
                    raise
                self._on_error(name, error)
                values = [math.nan] * (len(parts[kind]) + 1)
            scalars |= {f"{name}/{key}": x for key, x in zip((*parts[kind], "total"), values, strict=True)}
        return scalars


def scalar_keys(names: Sequence[str], metrics: MetricCollection | None = None, causal: bool = False) -> list[str]:
    """The keys that `graph_scalars` returns for node layers with these names.

    Args:
        names: Names of the node layers, in forward order.
        metrics: The metrics, `default_metrics` if None.
        causal: Return the keys of metrics of ablation curves, instead of all others.

    Returns:
        The keys.

    Raises:
        LIBError: If the `update` of a metric requires anything that a graph does not have.

    Example:
        >>> scalar_keys(["a", "b"])[:3], scalar_keys(["a", "b"], causal=True)
        (['effective_features/a', 'effective_features/b', 'effective_features/total'],
         ['edges_required/a-to-b', 'edges_required/total'])
    """
    layers, sections = layer_keys(names), section_keys(names)
    return [
        f"{metric}/{key}"
        for metric, _, kind in _by_input_kind(metrics)
        if (kind == "curve") == causal
        for key in (*(layers if kind == "importance" else sections), "total")
    ]


def layer_keys(names: Sequence[str]) -> list[str]:
    """Names of node layers as parts of scalars' names, in which loggers do not allow colons.

    Args:
        names: Names of all node layers of a graph.

    Returns:
        One for each, all different, also for loggers that know only letters, digits and ``-_./``, and different from
        the ``total`` of a metric. One that is not unique gets a number.

    Example:
        >>> layer_keys(["fc:input", "output"]), layer_keys(["a:input", "a.input", "total"])
        (['fc.input', 'output'], ['a.input_2', 'a.input', 'total_2'])
    """
    return _unique([name.replace(":", ".") for name in names], first=lambda i, key: key == names[i])


def section_keys(names: Sequence[str]) -> list[str]:
    """Names of the sections between node layers, as parts of scalars' names: all different, like `layer_keys`."""
    return _unique([f"{a}-to-{b}" for a, b in itertools.pairwise(layer_keys(names))], first=lambda i, key: True)


def _unique(keys: Sequence[str], first: Callable[[int, str], bool]) -> list[str]:
    """Append numbers to keys that would be the same as another one; those that come ``first`` keep theirs."""
    unique, taken = list(keys), {""}
    for i in sorted(range(len(keys)), key=lambda i: not first(i, keys[i])):
        number = 1
        while (key := _as_logged(unique[i])) in taken or key.split("/")[-1] == "total":
            number += 1
            unique[i] = f"{keys[i]}_{number}"
        taken.add(key)
    return unique


def _as_logged(key: str) -> str:
    """A key as loggers may change it: TensorBoard has a folder for each part, and other characters become ``_``."""
    return re.sub(r"[^-/\w.]", "_", key).strip("/")


def _by_input_kind(metrics: MetricCollection | None) -> list[tuple[str, Metric, InputKind]]:
    """Names, metrics and their kinds of input: metrics of node layers first, then those of sections."""
    # Reading the metrics of a collection links the states of its compute groups, so a copy is read.
    collection = default_metrics() if metrics is None else metrics.clone()
    found = [(name, metric, input_kind(name, metric)) for name, metric in collection.items()]
    order = list(ARGUMENTS)
    return sorted(found, key=lambda one: order.index(one[2]))


def _modules(metric: Metric, partitions: Partitions, section: int | None = None) -> dict[str, Any]:
    return {"modules": metric.partition(partitions, section)} if isinstance(metric, ModuleMetric) else {}


def _total(metric: Metric, values: Sequence[float], edges: Sequence[Tensor], partitions: Partitions) -> float:
    aggregation = aggregation_of(metric)
    if aggregation == "sum":
        return sum(values)
    if not values:
        return math.nan
    if aggregation == "joint":
        return evaluate(metric, edges=list(edges), **_modules(metric, partitions))
    return sum(values) / len(values)
