"""Labels of features: short names, from their values and the model's inputs."""

from lib_lightning.labels.example_labels import ExampleLabels
from lib_lightning.labels.fourier import FourierLabels
from lib_lightning.labels.labeller import (
    FeatureSamples,
    Labeller,
    Labels,
    ScoringLabeller,
    find_labels,
    label_features,
)

__all__ = [
    "ExampleLabels",
    "FeatureSamples",
    "FourierLabels",
    "Labeller",
    "Labels",
    "ScoringLabeller",
    "find_labels",
    "label_features",
]
