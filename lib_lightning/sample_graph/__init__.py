"""The graph of one sample: what its features contribute to each other and to the outputs, and its file for a viewer."""

from lib_lightning.sample_graph.sample_graph import SampleGraph, SampleNode

__all__ = ["SampleGraph", "SampleNode"]
