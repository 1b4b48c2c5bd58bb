"""Runs as they are looked at: a run on disk, the film of its graphs, TensorBoard's tab. No torch is imported."""

from lib_lightning.viewer.run import Run

__all__ = ["Run"]
