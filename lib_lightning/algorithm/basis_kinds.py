"""Kinds of bases; importable without torch."""

from __future__ import annotations

# Kinds whose features are identified by their index, such as a neuron or a class.
FIXED_ORDER = ("neuron", "centered")
# Kinds that are the LIB with its whitened activations rotated differently; see `lib_lightning.algorithm.rotations`.
ROTATED = ("random", "ica", "dictionary", "varimax")
# Kinds whose node layers are measured by a metric.
WITH_METRIC = ("lib", *ROTATED)
# Kinds whose directions are those of distinct importances, so that equal ones leave them undetermined.
BY_IMPORTANCE = ("lib", "pca")
# All kinds that a graph may be computed in.
ALL = ("lib", "pca", "neuron", *ROTATED)
# The graph of the same architecture with re-initialised weights.
REINIT = "reinit"
# Latents of a dictionary with an encoder and a decoder of its own.
LATENTS = "latents"
