"""What features are: their values, the samples on which they are largest and smallest, and how these look."""

from lib_lightning.algorithm.examples import FeatureExamples
from lib_lightning.features.render import render_samples
from lib_lightning.features.renderers import (
    ImageRenderer,
    Renderer,
    SeriesRenderer,
    TableRenderer,
    TextRenderer,
    TokenRenderer,
)
from lib_lightning.features.sample import Sample
from lib_lightning.features.values import FeatureBatch, feature_values

__all__ = [
    "FeatureBatch",
    "FeatureExamples",
    "ImageRenderer",
    "Renderer",
    "Sample",
    "SeriesRenderer",
    "TableRenderer",
    "TextRenderer",
    "TokenRenderer",
    "feature_values",
    "render_samples",
]
