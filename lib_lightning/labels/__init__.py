"""Labels of features: short names, from their values and the model's inputs."""

from lib_lightning.labels.fourier import FourierLabels
from lib_lightning.labels.labeller import Labeller, label_features

__all__ = ["FourierLabels", "Labeller", "label_features"]
