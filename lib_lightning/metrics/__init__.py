"""Metrics of interaction graphs: torchmetrics classes, each with a pure function."""

from lib_lightning._deprecated import renamed_names
from lib_lightning.metrics.ablation import EdgesRequired
from lib_lightning.metrics.average import GraphAverage
from lib_lightning.metrics.edges import EffectiveEdges, NumberOfEdges, ShareOfEdges
from lib_lightning.metrics.features import EffectiveFeatures, NumberOfFeatures, ParticipationRatio
from lib_lightning.metrics.functional import (
    effective_edges,
    effective_features,
    find_modules,
    fourier_variance,
    gini,
    hoyer,
    largest_module,
    min_edges_from_curve,
    modularity,
    module_sizes,
    number_of_edges,
    number_of_features,
    number_of_modules,
    participation_ratio,
    perplexity,
    share_of_edges,
    standard_error,
)
from lib_lightning.metrics.inputs import check_metrics
from lib_lightning.metrics.modules import LargestModule, Modularity, NumberOfModules
from lib_lightning.metrics.sparsity import Gini, Hoyer
from lib_lightning.metrics.summary import default_metrics, graph_scalars

__all__ = [
    "EdgesRequired",
    "EffectiveEdges",
    "EffectiveFeatures",
    "Gini",
    "GraphAverage",
    "Hoyer",
    "LargestModule",
    "Modularity",
    "NumberOfEdges",
    "NumberOfFeatures",
    "NumberOfModules",
    "ParticipationRatio",
    "ShareOfEdges",
    "check_metrics",
    "default_metrics",
    "effective_edges",
    "effective_features",
    "find_modules",
    "fourier_variance",
    "gini",
    "graph_scalars",
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
