"""What features are: their values on samples, and the samples on which they are largest and smallest."""

from lib_lightning.algorithm.examples import FeatureExamples
from lib_lightning.features.values import FeatureBatch, feature_values

__all__ = ["FeatureBatch", "FeatureExamples", "feature_values"]
