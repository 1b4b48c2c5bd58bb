"""The state that all metrics of a graph share: an average over the graphs seen."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchmetrics import Metric


class GraphAverage(Metric):
    """Average of a number over the graphs it was updated with, and over processes.

    Args:
        settings: All that makes two metrics of the same class differ.
        kwargs: Options of `torchmetrics.Metric`.

    Attributes:
        total_is: What stands for a whole graph beside the numbers of its parts: their ``"sum"`` (counts), their
            ``"mean"`` (shares), or the number of the ``"whole"``, computed from all sections at once.
    """

    is_differentiable = False
    full_state_update = False
    total_is: ClassVar[Literal["sum", "mean", "whole"]] = "mean"
    count: Tensor

    def __init__(self, *settings: object, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        # A MetricCollection takes two metrics for the same one, and updates only the first of them, if their states
        # have equal names and, after the first update, equal values. Our metrics often agree on one graph and not on
        # the next: so the name says what is summed.
        self._sum = f"sum of {type(self).__qualname__}{settings}"
        self.add_state(self._sum, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def _add(self, value: Tensor) -> None:
        if (seen := self.__dict__.get("_seen")) is not None:
            seen.append(value)
            return
        so_far: Tensor = getattr(self, self._sum)
        setattr(self, self._sum, so_far + value.detach().to(so_far))
        self.count += 1

    def of_one(self, **inputs: Any) -> float:
        """The number of a single graph, without a trace in the average.

        What torchmetrics does around `update` and `compute` takes several times as long as most numbers themselves.

        Args:
            inputs: Arguments of `update`.

        Returns:
            What `compute` would give after this one update.

        Example:
            >>> from lib_lightning.metrics.edges import NumberOfEdges
            >>> metric = NumberOfEdges()
            >>> metric.of_one(edges=torch.eye(3)), int(metric.count)
            (3.0, 0)
        """
        seen: list[Tensor] = []
        self.__dict__["_seen"] = seen
        try:
            type(self).update(self, **inputs)
        finally:
            del self.__dict__["_seen"]
        return sum(float(value) for value in seen) / len(seen)

    def compute(self) -> Tensor:
        """Average so far, a float64 scalar; NaN before the first graph."""
        so_far: Tensor = getattr(self, self._sum)
        return so_far / self.count
