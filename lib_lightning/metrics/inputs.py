"""How the metrics of a graph are recognised and evaluated: by the arguments of their `update`."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lib_lightning.errors import LIBError, brief
from lib_lightning.metrics.average import Aggregation, GraphAverage

# What a metric is updated with: the importances of a node layer, the edges of a section, or its ablation curve.
InputKind = Literal["importance", "edges", "curve"]
ARGUMENTS: dict[InputKind, frozenset[str]] = {
    "importance": frozenset({"importance"}),
    "edges": frozenset({"edges"}),
    "curve": frozenset({"counts", "scores", "unablated"}),
}
_SUPPORTED = "update(importance), update(edges) or update(counts, scores, unablated)"


def input_kind(name: str, metric: Metric) -> InputKind:
    """Determine what a metric is updated with.

    Args:
        name: The metric's name, for the error message.
        metric: Any metric.

    Returns:
        ``"importance"``, ``"edges"`` or ``"curve"``.

    Raises:
        LIBError: If its `update` requires anything else.

    Example:
        >>> from lib_lightning.metrics.edges import NumberOfEdges
        >>> input_kind("edges", NumberOfEdges())
        'edges'
    """
    parameters = inspect.signature(metric.update).parameters.values()
    accepted = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    required = {p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    for kind, arguments in ARGUMENTS.items():
        if required <= arguments <= accepted:
            return kind
    signature = ", ".join(str(p) for p in parameters)
    raise LIBError(f"Metric '{name}' has update({signature}); a metric of a graph has {_SUPPORTED}.")


def aggregation_of(metric: Metric) -> str:
    """How a metric obtains the value of a whole graph: see `GraphAverage.aggregation`. The default is the mean.

    Args:
        metric: Any metric. One of version 0.1 may define ``total_is``, with ``"whole"`` for ``"joint"``.

    Returns:
        Its `aggregation`, unchecked.
    """
    for owner in (metric, *type(metric).__mro__):
        if "aggregation" in vars(owner):
            return str(metric.aggregation)
        if "total_is" in vars(owner):
            warnings.warn(
                f"{type(metric).__name__}.total_is is now called aggregation, and 'whole' is 'joint'.",
                DeprecationWarning,
                stacklevel=2,
            )
            return "joint" if metric.total_is == "whole" else str(metric.total_is)
    return "mean"


def local_copy(metric: Metric) -> Metric:
    """Copy a metric, without its state, for use within one process.

    Args:
        metric: Any metric; it is not changed.

    Returns:
        The copy. It never synchronizes with other processes, for all of them hold the same graph.
    """
    local = copy.deepcopy(metric)
    local.reset()
    local.distributed_available_fn = _not_distributed
    return local


def _not_distributed() -> bool:
    return False


def evaluate(metric: Metric, **inputs: Any) -> float:
    """Value of a metric for one part of a graph, or for several sections jointly.

    Args:
        metric: A metric from `local_copy`; its state is overwritten.
        inputs: Arguments of its `update`.

    Returns:
        The value.

    Example:
        >>> from lib_lightning.metrics.edges import NumberOfEdges
        >>> evaluate(NumberOfEdges(), edges=torch.eye(3))
        3.0
    """
    if isinstance(metric, GraphAverage) and type(metric).compute is GraphAverage.compute:
        return metric.single_value(**inputs)
    metric.reset()
    metric.update(**inputs)
    return float(metric.compute())


def check_metrics(metrics: MetricCollection) -> None:
    """Check that metrics can be computed from a graph, by evaluating them on a tiny one.

    Args:
        metrics: Metrics by name; they are not changed.

    Raises:
        LIBError: If a metric needs anything that a graph does not have, fails, returns anything but one number, or has
            an unknown `aggregation`.

    Example:
        >>> from torchmetrics import MeanMetric
        >>> check_metrics(MetricCollection({"mean": MeanMetric()}))
        Traceback (most recent call last):
        lib_lightning.errors.LIBError: Metric 'mean' has update(value: ..., weight: ...); a metric of a graph has
        update(importance), update(edges) or update(counts, scores, unablated).
    """
    E = torch.tensor([[1.0, 0.5], [0.0, 0.25]], dtype=torch.float64, device="cpu")
    examples: dict[InputKind, dict[str, Any]] = {
        "importance": {"importance": torch.tensor([2.0, 1.0], dtype=torch.float64, device="cpu")},
        "edges": {"edges": E},
        "curve": {
            "counts": torch.tensor([1, 2, 3], device="cpu"),
            "scores": torch.tensor([0.1, 0.9, 0.9], device="cpu"),
            "unablated": 0.9,
        },
    }
    for name, metric in metrics.clone().items():
        kind, aggregation = input_kind(name, metric), aggregation_of(metric)
        if aggregation not in get_args(Aggregation) or (aggregation == "joint" and kind != "edges"):
            raise LIBError(
                f"Metric '{name}' has aggregation={aggregation!r}; it is 'sum' or 'mean', or 'joint' for metrics with "
                "update(edges) that accepts one matrix or a list of them."
            )
        local = local_copy(metric)
        _try(name, local, examples[kind])
        if aggregation == "joint":
            _try(name, local, {"edges": [E, E]})


def _try(name: str, metric: Metric, inputs: dict[str, Any]) -> None:
    try:
        metric.reset()
        metric.update(**inputs)
        value = metric.compute()
    except Exception as error:
        raise LIBError(f"Metric '{name}' fails on a small graph. {brief(error)}") from error
    if not (isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)):
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"
        raise LIBError(f"Metric '{name}' returns {what}; a metric of a graph returns one number.")
