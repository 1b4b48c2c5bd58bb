"""Viewing runs: `Run`, the TensorBoard tab, and the film as one HTML file. Does not import torch."""

from lib_lightning.viewer.run import Run

__all__ = ["Run"]
