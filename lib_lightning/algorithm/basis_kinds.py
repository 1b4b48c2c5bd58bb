"""Kinds of bases; importable without torch."""

from __future__ import annotations

# Kinds whose features are identified by their index, such as a neuron or a class.
FIXED_ORDER = ("neuron", "centered")
