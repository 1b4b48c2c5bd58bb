"""The state that all metrics of a graph share: an average over the graphs seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class GraphAverage(Metric):
    """Average of a number over the graphs it was updated with, and over processes.

    Args:
        kwargs: Options of `torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def _add(self, value: Tensor) -> None:
        self.total += value.detach().to(self.total)
        self.count += 1

    def compute(self) -> Tensor:
        """Average so far, a float64 scalar; NaN before the first graph."""
        return self.total / self.count
