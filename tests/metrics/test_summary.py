"""Scalars of a graph: stable keys, totals by aggregation, metrics of users, metrics unchanged."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.errors import LIBError
from lib_lightning.metrics import (
    EffectiveEdges,
    Gini,
    Modularity,
    NumberOfEdges,
    NumberOfFeatures,
    check_metrics,
    default_metrics,
    effective_edges,
    effective_features,
    gini,
    modularity,
    number_of_edges,
    number_of_features,
)
from lib_lightning.metrics.summary import graph_scalars, scalar_keys

CURVE = (torch.tensor([1, 2, 3]), torch.tensor([0.1, 0.9, 0.9]), 0.9)


class Largest(Metric):
    """A metric that a user would write, without our base class."""

    full_state_update = False

    def __init__(self, result: Any = None) -> None:
        super().__init__()
        self.result = result
        self.add_state("largest", torch.zeros(()), dist_reduce_fx="max")

    def update(self, edges: Tensor, scale: float = 1.0) -> None:
        self.largest = torch.maximum(self.largest, scale * edges.amax().to(self.largest))

    def compute(self) -> Any:
        return self.largest if self.result is None else self.result


class Both(Largest):
    def update(self, importance: Tensor, edges: Tensor) -> None:
        pass


class Fails(Largest):
    def update(self, edges: Tensor) -> None:
        raise ValueError("this metric always fails")


class UnknownAggregation(Largest):
    aggregation = "product"


class JointFeatures(NumberOfFeatures):
    aggregation = "joint"


class SumOfVersion01(Largest):
    total_is = "sum"


class WholeOfVersion01(Modularity):
    total_is = "whole"


@pytest.fixture(scope="module")
def graph() -> InteractionGraph:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    return compute_interaction_graph(model, [torch.randn(30, 3)], ["0:input", "1", "output"])


def scalars_of(graph: InteractionGraph, *args: Any, **kwargs: Any) -> dict[str, float]:
    return graph_scalars(list(graph.bases.values()), list(graph.edges.values()), *args, **kwargs)


def test_every_node_layer_and_section_has_a_stable_key(graph: InteractionGraph) -> None:
    scalars = scalars_of(graph)
    assert list(scalars) == scalar_keys(graph.node_layers)
    assert scalars["features/0.input"] == graph.bases["0:input"].n_features
    assert scalars["effective_edges/1-to-output"] == pytest.approx(float(effective_edges(graph.edges["1", "output"])))
    assert scalars["edges/total"] == scalars["edges/0.input-to-1"] + scalars["edges/1-to-output"]
    assert not any(math.isnan(value) for value in scalars.values())


def test_names_of_the_default_metrics() -> None:
    assert set(default_metrics()) == {
        "features", "effective_features", "participation_ratio", "edges", "effective_edges", "share_of_edges", "gini",
        "hoyer", "modularity", "number_of_modules", "largest_module", "edges_required",
    }  # fmt: skip
    check_metrics(default_metrics())


def test_scalars_equal_their_functions_to_the_last_bit(graph: InteractionGraph) -> None:
    scalars = scalars_of(graph)
    layers = {name.replace(":", "."): basis.importance for name, basis in graph.bases.items()}
    sections = {f"{a}-to-{b}".replace(":", "."): E for (a, b), E in graph.edges.items()}
    for kind, function, parts in (
        ("features", number_of_features, layers),
        ("effective_features", effective_features, layers),
        ("edges", number_of_edges, sections),
        ("effective_edges", effective_edges, sections),
    ):
        values = {f"{kind}/{key}": float(function(value)) for key, value in parts.items()}
        values[f"{kind}/total"] = sum(values.values())
        assert {key: scalars[key] for key in values} == values


def test_totals_are_sums_means_or_joint_values(graph: InteractionGraph) -> None:
    scalars, edges = scalars_of(graph), list(graph.edges.values())
    assert scalars["gini/total"] == pytest.approx(sum(float(gini(E)) for E in edges) / 2)
    assert scalars["modularity/total"] == float(modularity(edges))
    assert scalars["modularity/1-to-output"] == float(modularity(edges[1:]))


def test_total_is_of_version_0_1_still_works(graph: InteractionGraph) -> None:
    metrics = MetricCollection({"largest": SumOfVersion01(), "modularity": WholeOfVersion01()})
    with pytest.warns(DeprecationWarning, match="total_is is now called aggregation"):
        check_metrics(metrics)
    with pytest.warns(DeprecationWarning, match="total_is is now called aggregation"):
        scalars = scalars_of(graph, metrics)
    edges = list(graph.edges.values())
    assert scalars["largest/total"] == pytest.approx(sum(float(E.amax()) for E in edges))
    assert scalars["modularity/total"] == float(modularity(edges))


def test_metrics_of_ablation_curves_are_added_only_with_curves(graph: InteractionGraph) -> None:
    without, both = scalars_of(graph), scalars_of(graph, curves=[CURVE, CURVE])
    added = scalar_keys(graph.node_layers, causal=True)
    assert set(both) == {*without, *added}
    assert {key: both[key] for key in added} == {
        "edges_required/0.input-to-1": 2, "edges_required/1-to-output": 2, "edges_required/total": 4,
    }  # fmt: skip
    one = scalars_of(graph, curves=[CURVE, None])
    assert one["edges_required/0.input-to-1"] == 2
    assert math.isnan(one["edges_required/1-to-output"])
    assert math.isnan(one["edges_required/total"])


@pytest.mark.parametrize("compute_groups", [True, False, [["edges"], ["effective"]]])
def test_a_collection_keeps_its_names(graph: InteractionGraph, compute_groups: Any) -> None:
    metrics = MetricCollection(
        {"edges": NumberOfEdges(rtol=0.1), "effective": EffectiveEdges()},
        compute_groups=compute_groups,
        prefix="my_",
        postfix="_now",
    )
    scalars = scalars_of(graph, metrics)
    assert list(scalars) == scalar_keys(graph.node_layers, metrics)
    assert {key.rpartition("/")[0] for key in scalars} == {"my_edges_now", "my_effective_now"}


def test_metrics_are_not_changed(graph: InteractionGraph) -> None:
    metrics = MetricCollection({"a": NumberOfEdges(), "b": NumberOfEdges(), "c": Gini(), "d": Largest()})
    metrics.update(edges=torch.eye(3))
    expected = metrics.clone()
    check_metrics(metrics)
    scalars = scalars_of(graph, metrics)
    assert scalars["a/total"] == scalars["b/total"] == scalars_of(graph)["edges/total"]
    assert metrics.compute_groups == expected.compute_groups
    for collection in (metrics, expected):
        collection.update(edges=torch.ones(2, 2))
    assert metrics.compute() == expected.compute()


def test_metric_of_a_user(graph: InteractionGraph) -> None:
    metrics = MetricCollection({"largest": Largest()})
    check_metrics(metrics)
    scalars = scalars_of(graph, metrics)
    largest = [float(E.amax()) for E in graph.edges.values()]
    assert list(scalars.values()) == pytest.approx([*largest, sum(largest) / 2])


def test_nothing_is_gathered_from_other_processes(graph: InteractionGraph) -> None:
    def gather(*_: Any) -> None:
        raise AssertionError("a metric was synchronized")

    metrics = MetricCollection(
        {
            "edges": NumberOfEdges(distributed_available_fn=lambda: True, dist_sync_fn=gather),
            "modularity": Modularity(distributed_available_fn=lambda: True, dist_sync_fn=gather),
        }
    )
    check_metrics(metrics)
    assert scalars_of(graph, metrics)["edges/total"] > 0


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (MeanMetric(), r"'mine' has update\(value.*update\(counts, scores, unablated\)"),
        (Both(), r"'mine' has update\(importance: .*, edges: .*a metric of a graph has update\(importance\)"),
        (Fails(), "'mine' fails on a small graph. ValueError: this metric always fails"),
        (Largest(torch.zeros(2)), r"'mine' returns a tensor of shape \(2,\); a metric of a graph returns one number"),
        (Largest({"a": 1.0}), "'mine' returns dict"),
        (UnknownAggregation(), "'mine' has aggregation='product'"),
        (JointFeatures(), "'mine' has aggregation='joint'"),
    ],
)
def test_unsuitable_metrics_are_refused(metric: Metric, message: str) -> None:
    with pytest.raises(LIBError, match=message):
        check_metrics(MetricCollection({"edges": NumberOfEdges(), "mine": metric}))


def test_a_graph_without_sections_has_no_modularity(graph: InteractionGraph) -> None:
    scalars = graph_scalars(list(graph.bases.values())[:1], [])
    assert scalars["edges/total"] == 0
    assert math.isnan(scalars["modularity/total"])
