"""Base class of the metrics of interaction graphs: an average over the graphs seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lib_lightning.model.precision import for_sums, supports_float64

Aggregation = Literal["sum", "mean", "joint"]


class GraphAverage(Metric):
    """Average of a value over the graphs that the metric was updated with, on all processes.

    Subclasses define `update`, which passes the value of one graph to `_add`.

    Args:
        settings: Everything that two metrics of the same class may differ in.
        kwargs: Options of `torchmetrics.Metric`.

    Attributes:
        aggregation: How the value of a whole graph is obtained: as the ``"sum"`` of its parts (counts), as their
            ``"mean"`` (fractions), or by a ``"joint"`` update with all sections.
    """

    is_differentiable = False
    full_state_update = False
    aggregation: ClassVar[Aggregation] = "mean"
    count: Tensor

    def __init__(self, *settings: object, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # MetricCollection merges metrics whose states have the same names and equal values after the first update, and
        # updates only one of them. Different metrics often agree on one graph, so the name of the state identifies the
        # metric and its settings.
        self._sum = f"sum of {type(self).__qualname__}{settings}"
        self.add_state(self._sum, torch.zeros((), dtype=torch.float64, device="cpu"), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long, device="cpu"), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        """Move the states along with a module that contains the metric, unless the new device has no float64."""
        moved = supports_float64(fn(torch.zeros(1, device="cpu")).device)
        return super()._apply(fn, *args, **kwargs) if moved else self

    def _add(self, value: Tensor) -> None:
        if (values := self.__dict__.get("_single_values")) is not None:
            values.append(value)
            return
        total: Tensor = getattr(self, self._sum)
        setattr(self, self._sum, total + for_sums(value.detach()).to(total))
        self.count += 1

    def single_value(self, **inputs: Any) -> float:
        """Compute the value of a single graph without changing the average.

        Skips the bookkeeping that torchmetrics adds to `update` and `compute`, which takes several times as long as
        most of the values themselves.

        Args:
            inputs: Arguments of `update`.

        Returns:
            What `compute` would return after this update alone.

        Example:
            >>> from lib_lightning.metrics.edges import NumberOfEdges
            >>> metric = NumberOfEdges()
            >>> metric.single_value(edges=torch.eye(3)), int(metric.count)
            (3.0, 0)
        """
        values: list[Tensor] = []
        self.__dict__["_single_values"] = values
        try:
            type(self).update(self, **inputs)
        finally:
            del self.__dict__["_single_values"]
        return sum(float(value) for value in values) / len(values)

    def compute(self) -> Tensor:
        """Average over the graphs so far, a float64 scalar; NaN before the first graph."""
        total: Tensor = getattr(self, self._sum)
        return total / self.count
