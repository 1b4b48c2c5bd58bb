"""Metric classes over their functions, alone, in a collection and across processes."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics import Metric, MetricCollection

from lib_lightning import compute_interaction_graph
from lib_lightning.metrics import (
    EffectiveEdges,
    EffectiveFeatures,
    NumberOfEdges,
    NumberOfFeatures,
    effective_edges,
    effective_features,
    number_of_edges,
    number_of_features,
    perplexity,
)
from lib_lightning.metrics.summary import graph_scalars, scalar_keys

PAIRS = [
    (NumberOfFeatures(rtol=0.1), lambda x: number_of_features(x, 0.1), (7,)),
    (EffectiveFeatures(), effective_features, (7,)),
    (NumberOfEdges(rtol=0.1), lambda x: number_of_edges(x, 0.1), (4, 5)),
    (EffectiveEdges(), effective_edges, (4, 5)),
]


@pytest.mark.parametrize(("metric", "function", "shape"), PAIRS)
def test_class_averages_its_function(metric: Metric, function: object, shape: tuple[int, ...]) -> None:
    graphs = [torch.rand(shape) ** 4 for _ in range(3)]
    values = [float(metric(graph)) for graph in graphs]
    assert values == pytest.approx([float(function(graph)) for graph in graphs])
    assert float(metric.compute()) == pytest.approx(sum(values) / 3)


@pytest.mark.parametrize(("metric", "function", "shape"), PAIRS)
def test_states_of_processes_add_up(metric: Metric, function: object, shape: tuple[int, ...]) -> None:
    parts, whole = [metric.clone(), metric.clone()], metric.clone()
    for metric_part in (*parts, whole):
        metric_part.reset()
    for k in range(5):
        graph = torch.rand(shape) ** 4
        parts[k % 2].update(graph)
        whole.update(graph)
    parts[0].merge_state(parts[1])
    torch.testing.assert_close(parts[0].compute(), whole.compute())


def test_collection() -> None:
    metrics = MetricCollection([NumberOfEdges(), EffectiveEdges()])
    assert {k: float(v) for k, v in metrics(torch.eye(3)).items()} == {"NumberOfEdges": 3.0, "EffectiveEdges": 3.0}


def test_perplexity_of_a_known_distribution() -> None:
    assert float(perplexity(torch.tensor([0.5, 0.25, 0.25]))) == pytest.approx(2**1.5)
    assert float(perplexity(torch.zeros(3))) == 0
    assert float(perplexity(torch.zeros(0))) == 0
    assert [int(f(torch.zeros(0))) for f in (number_of_features, number_of_edges)] == [0, 0]


def test_every_part_of_a_graph_has_a_stable_name() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    graph = compute_interaction_graph(model, [torch.randn(30, 3)], ["0:input", "1", "output"])
    scalars = graph_scalars(list(graph.bases.values()), list(graph.edges.values()))
    assert sorted(scalars) == sorted(scalar_keys(graph.node_layers))
    assert scalars["features/0.input"] == graph.bases["0:input"].n_features
    assert scalars["effective_edges/1-to-output"] == pytest.approx(float(effective_edges(graph.edges["1", "output"])))
    assert scalars["edges/total"] == scalars["edges/0.input-to-1"] + scalars["edges/1-to-output"]
    assert not any(math.isnan(value) for value in scalars.values())
