"""Metric of ablation curves."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lib_lightning.metrics.average import GraphAverage
from lib_lightning.metrics.functional.ablation import min_edges_from_curve


class EdgesRequired(GraphAverage):
    """Number of edges that a model needs for its score; see `min_edges_from_curve`.

    Args:
        tolerance: Accepted loss of score, in units of the score.
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> EdgesRequired()(torch.tensor([1, 10, 100]), torch.tensor([0.2, 0.9, 0.9]), unablated=0.9)
        tensor(10., dtype=torch.float64)
    """

    higher_is_better = False
    aggregation = "sum"

    def __init__(self, tolerance: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(tolerance, **kwargs)
        self.tolerance = tolerance

    def update(self, counts: Tensor, scores: Tensor, unablated: float | Tensor) -> None:
        """Add the ablation curve of one section: numbers of edges and mean scores ``(k,)``, and the unablated score."""
        self._add(min_edges_from_curve(counts, scores, unablated, self.tolerance))
