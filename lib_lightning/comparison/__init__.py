"""Which features and edges of one network are in another: across seeds, widths, runs, fine-tuning and layers."""

from lib_lightning.comparison.comparison import Comparison, compare
from lib_lightning.comparison.layers import FeatureMatch, LayerComparison, SideOfLayer
from lib_lightning.comparison.sections import EdgeChange, SectionComparison
from lib_lightning.comparison.universal import (
    UniversalFeature,
    UniversalFeatures,
    UniversalLayer,
    universal_features,
)

__all__ = [
    "Comparison",
    "EdgeChange",
    "FeatureMatch",
    "LayerComparison",
    "SectionComparison",
    "SideOfLayer",
    "UniversalFeature",
    "UniversalFeatures",
    "UniversalLayer",
    "compare",
    "universal_features",
]
