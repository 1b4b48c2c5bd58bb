"""Interaction graphs: conversion, places of node layers, and metrics that share the search for modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.errors import LIBError
from lib_lightning.metrics import find_modules


@pytest.fixture
def graph() -> InteractionGraph:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return compute_interaction_graph(model, [torch.randn(40, 4)], ["input", "1", "output"])


def test_networkx_has_features_and_edges(graph: InteractionGraph) -> None:
    nx_graph = graph.to_networkx()
    assert nx_graph.number_of_nodes() == sum(basis.n_features for basis in graph.bases.values())
    importance = float(graph.bases["1"].importance[0])
    assert nx_graph.nodes["1", 0] == {"id": "1/0", "label": "", "importance": importance, "layer": 1}
    E = graph.edges["1", "output"]
    assert nx_graph.edges[("1", 0), ("output", 2)]["weight"] == float(E[2, 0])
    assert nx_graph.number_of_edges() == sum(int((E > 0).sum()) for E in graph.edges.values())


def test_node_layer_specs_need_their_places(graph: InteractionGraph) -> None:
    assert [layer.name for layer in graph.node_layer_specs()] == graph.node_layers
    with pytest.raises(LIBError, match="info has no 'node_layers'"):
        InteractionGraph(graph.bases, graph.edges).node_layer_specs()


def test_metrics_and_modules_share_searches(graph: InteractionGraph) -> None:
    partitions = graph.partitions()
    scalars = graph.measure(partitions=partitions)
    errors = {key: metric["error"] for key, metric in graph.info["metrics"].items()}
    assert graph.measure() == scalars
    assert {key: metric["error"] for key, metric in graph.info["metrics"].items()} == errors
    assert all(error is not None for key, error in errors.items() if key.startswith("modularity"))
    modules = graph.find_modules(partitions)
    assert list(modules) == graph.node_layers
    for expected in (find_modules(list(graph.edges.values())), list(graph.find_modules().values())):
        torch.testing.assert_close(list(modules.values()), expected)
    torch.testing.assert_close(
        list(graph.find_modules(resolution=2.0).values()), find_modules(list(graph.edges.values()), resolution=2.0)
    )
