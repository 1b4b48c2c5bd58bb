"""Metrics of the interactions between two node layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lib_lightning.metrics.average import GraphAverage
from lib_lightning.metrics.functional.edges import effective_edges, number_of_edges


class NumberOfEdges(GraphAverage):
    """Number of edges above a share of the strongest one; see `number_of_edges`.

    Args:
        rtol: The share.
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> NumberOfEdges()(torch.eye(3))
        tensor(3., dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, rtol: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rtol = rtol

    def update(self, edges: Tensor) -> None:
        """Add the edges ``(r_out, r_in)`` of one section."""
        self._add(number_of_edges(edges, self.rtol))


class EffectiveEdges(GraphAverage):
    """Effective number of edges; see `effective_edges`.

    Args:
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> EffectiveEdges()(torch.eye(3))
        tensor(3., dtype=torch.float64)
    """

    higher_is_better = False

    def update(self, edges: Tensor) -> None:
        """Add the edges ``(r_out, r_in)`` of one section."""
        self._add(effective_edges(edges))
