"""Metrics of the edges of a section."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lib_lightning.metrics.average import GraphAverage
from lib_lightning.metrics.functional.edges import check_share, effective_edges, number_of_edges, share_of_edges


class NumberOfEdges(GraphAverage):
    """Number of edges above a fraction of the strongest one; see `number_of_edges`.

    Args:
        rtol: The fraction.
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> NumberOfEdges()(torch.eye(3))
        tensor(3., dtype=torch.float64)
    """

    higher_is_better = False
    aggregation = "sum"

    def __init__(self, rtol: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(rtol, **kwargs)
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
    aggregation = "sum"

    def update(self, edges: Tensor) -> None:
        """Add the edges ``(r_out, r_in)`` of one section."""
        self._add(effective_edges(edges))


class ShareOfEdges(GraphAverage):
    """Smallest fraction of the edges that has a given share of the total strength; see `share_of_edges`.

    Args:
        share: The share, above 0 and at most 1.
        kwargs: Options of `torchmetrics.Metric`.

    Raises:
        LIBError: If the share is out of range.

    Example:
        >>> import torch
        >>> ShareOfEdges(share=0.9)(torch.tensor([[8.0, 1.0], [0.5, 0.5]]))
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, share: float = 0.99, **kwargs: Any) -> None:
        super().__init__(share, **kwargs)
        check_share(share)
        self.share = share

    def update(self, edges: Tensor) -> None:
        """Add the edges ``(r_out, r_in)`` of one section."""
        self._add(share_of_edges(edges, self.share))
