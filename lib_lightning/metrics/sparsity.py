"""Metrics of the sparsity of a section."""

from __future__ import annotations

from torch import Tensor

from lib_lightning.metrics.average import GraphAverage
from lib_lightning.metrics.functional.sparsity import gini, hoyer


class Gini(GraphAverage):
    """Gini coefficient of the edges; see `gini`.

    Args:
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> Gini()(torch.eye(4))
        tensor(0.7500, dtype=torch.float64)
    """

    higher_is_better = True

    def update(self, edges: Tensor) -> None:
        """Add the edges ``(r_out, r_in)`` of one section."""
        self._add(gini(edges))


class Hoyer(GraphAverage):
    """Hoyer's sparsity of the edges; see `hoyer`.

    Args:
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> Hoyer()(torch.eye(4))
        tensor(0.6667, dtype=torch.float64)
    """

    higher_is_better = True

    def update(self, edges: Tensor) -> None:
        """Add the edges ``(r_out, r_in)`` of one section."""
        self._add(hoyer(edges))
