"""The formulas, as pure functions of tensors."""

from lib_lightning._deprecated import renamed_names
from lib_lightning.algorithm.jackknife import standard_error
from lib_lightning.metrics.functional.ablation import min_edges_from_curve
from lib_lightning.metrics.functional.edges import effective_edges, number_of_edges, share_of_edges
from lib_lightning.metrics.functional.features import effective_features, number_of_features
from lib_lightning.metrics.functional.fourier import fourier_variance
from lib_lightning.metrics.functional.modules import (
    find_modules,
    largest_module,
    modularity,
    module_sizes,
    number_of_modules,
)
from lib_lightning.metrics.functional.participation import participation_ratio
from lib_lightning.metrics.functional.perplexity import perplexity
from lib_lightning.metrics.functional.sparsity import gini, hoyer

__all__ = [
    "effective_edges",
    "effective_features",
    "find_modules",
    "fourier_variance",
    "gini",
    "hoyer",
    "largest_module",
    "min_edges_from_curve",
    "modularity",
    "module_sizes",
    "number_of_edges",
    "number_of_features",
    "number_of_modules",
    "participation_ratio",
    "perplexity",
    "share_of_edges",
    "standard_error",
]

__getattr__ = renamed_names(__name__)
