"""Numbers that describe an interaction graph, as torchmetrics over pure functions."""

from lib_lightning.metrics.edges import EffectiveEdges, NumberOfEdges
from lib_lightning.metrics.features import EffectiveFeatures, NumberOfFeatures
from lib_lightning.metrics.functional import (
    effective_edges,
    effective_features,
    fourier_variance,
    number_of_edges,
    number_of_features,
    perplexity,
)

__all__ = [
    "EffectiveEdges",
    "EffectiveFeatures",
    "NumberOfEdges",
    "NumberOfFeatures",
    "effective_edges",
    "effective_features",
    "fourier_variance",
    "number_of_edges",
    "number_of_features",
    "perplexity",
]
