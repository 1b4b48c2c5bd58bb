"""Metrics of the features of a node layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lib_lightning.metrics.average import GraphAverage
from lib_lightning.metrics.functional.features import effective_features, number_of_features
from lib_lightning.metrics.functional.participation import participation_ratio


class NumberOfFeatures(GraphAverage):
    """Number of features above a fraction of the most important one; see `number_of_features`.

    Args:
        rtol: The fraction.
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = NumberOfFeatures()
        >>> metric(torch.tensor([1.0, 0.5, 1e-9]))
        tensor(2., dtype=torch.float64)
    """

    higher_is_better = None
    aggregation = "sum"

    def __init__(self, rtol: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(rtol, **kwargs)
        self.rtol = rtol

    def update(self, importance: Tensor) -> None:
        """Add the importances ``(r,)`` of one node layer."""
        self._add(number_of_features(importance, self.rtol))


class EffectiveFeatures(GraphAverage):
    """Effective number of features; see `effective_features`.

    Args:
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> EffectiveFeatures()(torch.tensor([2.0, 2.0]))
        tensor(2., dtype=torch.float64)
    """

    higher_is_better = None
    aggregation = "sum"

    def update(self, importance: Tensor) -> None:
        """Add the importances ``(r,)`` of one node layer."""
        self._add(effective_features(importance))


class ParticipationRatio(GraphAverage):
    """Effective number of features, from the squares of their importances; see `participation_ratio`.

    Args:
        kwargs: Options of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> ParticipationRatio()(torch.tensor([2.0, 2.0]))
        tensor(2., dtype=torch.float64)
    """

    higher_is_better = None
    aggregation = "sum"

    def update(self, importance: Tensor) -> None:
        """Add the importances ``(r,)`` of one node layer."""
        self._add(participation_ratio(importance))
