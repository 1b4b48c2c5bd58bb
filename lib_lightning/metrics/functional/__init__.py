"""The formulas, as pure functions of tensors."""

from lib_lightning.metrics.functional.edges import effective_edges, number_of_edges
from lib_lightning.metrics.functional.features import effective_features, number_of_features
from lib_lightning.metrics.functional.fourier import fourier_variance
from lib_lightning.metrics.functional.perplexity import perplexity

__all__ = [
    "effective_edges",
    "effective_features",
    "fourier_variance",
    "number_of_edges",
    "number_of_features",
    "perplexity",
]
