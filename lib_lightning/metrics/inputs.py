"""What a metric takes of a graph, by the arguments of its update, and the number that it makes of it."""

from __future__ import annotations

import copy
import inspect
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lib_lightning.errors import LIBError
from lib_lightning.metrics.average import GraphAverage

# What can be given to a metric's update: something of each node layer, or one of two things of each section.
Part = Literal["importance", "edges", "curve"]
ARGUMENTS: dict[Part, frozenset[str]] = {
    "importance": frozenset({"importance"}),
    "edges": frozenset({"edges"}),
    "curve": frozenset({"counts", "scores", "unablated"}),
}
_MAY_TAKE = "update(importance), update(edges) or update(counts, scores, unablated)"


def input_kind(name: str, metric: Metric) -> Part:
    """Tell what a metric is updated with.

    Args:
        name: The metric's name, for what is said about it.
        metric: Any metric.

    Returns:
        ``"importance"``, ``"edges"`` or ``"curve"``.

    Raises:
        LIBError: If it takes anything else.

    Example:
        >>> from lib_lightning.metrics.edges import NumberOfEdges
        >>> input_kind("edges", NumberOfEdges())
        'edges'
    """
    parameters = inspect.signature(metric.update).parameters.values()
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    required = {p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    for part, arguments in ARGUMENTS.items():
        if required <= arguments <= named:
            return part
    taken = ", ".join(str(p) for p in parameters)
    raise LIBError(f"Metric '{name}' has update({taken}); a metric of a graph has {_MAY_TAKE}.")


def total_of(metric: Metric) -> str:
    """What a metric says its total is: see `GraphAverage.total_is`; for metrics that say nothing, the mean."""
    return str(getattr(metric, "total_is", "mean"))


def local_copy(metric: Metric) -> Metric:
    """Copy a metric, empty, to be used by one process for itself.

    Args:
        metric: Any metric; it stays as it is.

    Returns:
        The copy.
    """
    own = copy.deepcopy(metric)
    own.reset()
    # All processes hold the same graph: nothing is to be gathered, and nobody to be waited for.
    own.distributed_available_fn = _alone
    return own


def _alone() -> bool:
    return False


def measure(metric: Metric, **inputs: Any) -> float:
    """The number that a metric gives for one part of a graph, or for all at once.

    Args:
        metric: A metric of ours to use; what it knew is forgotten.
        inputs: Arguments of its update; ``like`` only counts where it takes that.

    Returns:
        The number.

    Example:
        >>> from lib_lightning.metrics.edges import NumberOfEdges
        >>> measure(NumberOfEdges(), edges=torch.eye(3))
        3.0
    """
    if "like" in inputs and not _takes_like(type(metric)):
        inputs.pop("like")
    if isinstance(metric, GraphAverage) and type(metric).compute is GraphAverage.compute:
        return metric.of_one(**inputs)
    metric.reset()
    metric.update(**inputs)
    return float(metric.compute())


@cache
def _takes_like(kind: type[Metric]) -> bool:
    return "like" in inspect.signature(kind.update).parameters


def check_metrics(metrics: MetricCollection) -> None:
    """Refuse metrics that cannot be computed from a graph: they are tried on a tiny one.

    Args:
        metrics: Metrics under their names; they stay as they are.

    Raises:
        LIBError: If one of them takes something else than a graph has, fails, gives something else than one number, or
            has an unknown `total_is`.

    Example:
        >>> from torchmetrics import MeanMetric
        >>> check_metrics(MetricCollection({"mean": MeanMetric()}))
        Traceback (most recent call last):
        lib_lightning.errors.LIBError: Metric 'mean' has update(value: ..., weight: ...); a metric of a graph has
        update(importance), update(edges) or update(counts, scores, unablated).
    """
    E = torch.tensor([[1.0, 0.5], [0.0, 0.25]], dtype=torch.float64)
    curve = {"counts": torch.tensor([1, 2, 3]), "scores": torch.tensor([0.1, 0.9, 0.9]), "unablated": 0.9}
    tiny: dict[Part, dict[str, Any]] = {
        "importance": {"importance": torch.tensor([2.0, 1.0], dtype=torch.float64)},
        "edges": {"edges": E},
        "curve": curve,
    }
    for name, metric in metrics.clone().items():
        part = input_kind(name, metric)
        total = total_of(metric)
        if total not in ("sum", "mean", "whole") or (total == "whole" and part != "edges"):
            raise LIBError(
                f"Metric '{name}' has total_is={total!r}; it is 'sum' or 'mean', or 'whole' for metrics with "
                "update(edges) that takes one matrix or a list of them."
            )
        own = local_copy(metric)
        _try(name, own, tiny[part])
        if total == "whole":
            _try(name, own, {"edges": [E, E]})


def _try(name: str, metric: Metric, inputs: dict[str, Any]) -> None:
    try:
        metric.reset()
        metric.update(**inputs)
        value = metric.compute()
    except Exception as error:
        raise LIBError(f"Metric '{name}' fails on a small graph. {type(error).__name__}: {error}") from error
    if not (isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1)):
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"
        raise LIBError(f"Metric '{name}' gives {what}; a metric of a graph gives one number.")
