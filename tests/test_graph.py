"""Interaction graphs: conversion, places of node layers, and metrics that share the search for modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.algorithm.basis import Basis, neuron_basis
from lib_lightning.errors import LIBError
from lib_lightning.graph import Lineages
from lib_lightning.metrics import find_modules
from lib_lightning.training.profiling import profile_snapshot


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


def tracked(ids: list[int], layer: str = "a/b:input") -> InteractionGraph:
    """A graph of two node layers, the first of which has lineages."""
    r = len(ids)
    C = torch.linalg.qr(torch.randn(r + 1, r, dtype=torch.float64)).Q * torch.arange(1.0, r + 1)
    basis = Basis(layer, "lib", torch.zeros(r + 1), C, torch.linalg.pinv(C), torch.linspace(2.0, 1.0, r).double())
    output = neuron_basis("output", torch.zeros(3).double(), torch.eye(3).double())
    lineages = Lineages(torch.tensor(ids), torch.full((r,), torch.nan), torch.full((r,), -1))
    labels = [f"label {k}" for k in range(r)]
    return InteractionGraph(
        {layer: basis, "output": output}, {(layer, "output"): torch.ones(3, r)}, labels={layer: labels},
        lineages={layer: lineages},
    )  # fmt: skip


@given(st.permutations(range(40)).flatmap(lambda ids: st.integers(1, 12).map(lambda r: list(ids[:r]))))
def test_ids_and_indices_are_inverse(ids: list[int]) -> None:
    graph = tracked(ids)
    for index, lineage in enumerate(ids):
        feature = graph.feature(("a/b:input", index))
        assert feature.id == f"a/b:input/{lineage}" == graph.feature_ids("a/b:input")[index]
        assert graph.feature(feature.id) == feature
        assert (graph.index(feature.id), feature.index, feature.lineage) == (index, index, lineage)
        assert (feature.label, feature.module) == (f"label {index}", None)
        basis = graph.bases["a/b:input"]
        assert feature.importance == float(basis.importance[index])
        # It reads its own value, and writes no other.
        values = torch.randn(len(ids), dtype=torch.float64)
        assert float(basis.decode(values) @ feature.to_feature) == pytest.approx(float(values[index]))
        torch.testing.assert_close(basis.encode(feature.from_feature), torch.eye(len(ids)).double()[index])
    for number in set(range(45)) - set(ids):
        with pytest.raises(LIBError, match=f"There is no feature 'a/b:input/{number}' in this graph") as error:
            graph.index(f"a/b:input/{number}")
        named = f"The feature with index {number} is 'a/b:input/{ids[number]}'." if number < len(ids) else ""
        assert str(error.value).endswith(named)


def test_features_that_are_not_tracked_have_their_index_in_their_id() -> None:
    feature = tracked([7, 5]).feature("output/2")
    assert (feature.index, feature.lineage, feature.label) == (2, None, "")


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("b/3", "no node layer 'b', only 'a/b:input', 'output'"),
        ("a/b:input", "no node layer 'a'|A feature's id is its node layer and a number"),
        ("a/b:input/x", "A feature's id is its node layer and a number, such as 'output/0'; got 'a/b:input/x'"),
        ("7", "A feature's id is its node layer and a number"),
        (("a/b:input", 2), "has 2 features, with indices from 0 to 1; got 2. To look a feature up by its id"),
        (("a/b:input", -1), "with indices from 0 to 1; got -1"),
    ],
)
def test_features_that_do_not_exist(which: Any, message: str) -> None:
    with pytest.raises(LIBError, match=message):
        tracked([7, 5]).feature(which)


def test_errors_of_metrics_include_that_sampled_edges_look_sparser() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, 24), nn.Softmax(-1))
    x = torch.randn(64, 24) * torch.linspace(0.3, 1.5, 24)
    layers, key = ["input", "2", "output"], "effective_edges/total"

    def measured(x: torch.Tensor, **options: Any) -> tuple[float, float, float]:
        graph = compute_interaction_graph(model, [x], layers, basis="pca", output_distribution="none", **options)
        value, error = graph.measure()[key], graph.info["metrics"][key]["error"]
        graph.info["settings"]["n_pushed"] = None
        graph.measure()
        return value, error, graph.info["metrics"][key]["error"]

    exact, with_bias, without = measured(x, effort="exact")
    assert with_bias == without
    repetitions = [measured(x[torch.randperm(64)], n_pushed=3) for _ in range(20)]
    assert all(value < exact for value, *_ in repetitions)
    assert all(exact - value < 2 * error for value, error, _ in repetitions)
    assert sum(exact - value < 2 * error for value, _, error in repetitions) < 10


def test_a_notebook_shows_graphs_figures_and_profiles_without_pyplot() -> None:
    model, batches = nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 3)), [torch.randn(60, 4)]
    graph = compute_interaction_graph(model, batches, ["input", "1", "output"])
    # The methods by which IPython asks an object how to show it.
    figures: list[Any] = [graph.plot(), graph.plot_spectrum()]
    assert all(figure._repr_png_().startswith(b"\x89PNG") for figure in figures)
    assert "<img" in graph._repr_html_()
    profile = profile_snapshot(model, batches, ["input", "1", "output"])
    shown = profile._repr_html_()
    assert "<caption>one snapshot of input -&gt; 1 -&gt; output on 60 samples</caption>" in shown
    assert shown.count("<tr>") == len(profile.rows) + 2, "a bar for each step, and the total"
    assert "edges from input to 1" in str(profile)


def test_a_figure_shows_twelve_features_and_says_how_many_there_are() -> None:
    graph = compute_interaction_graph(nn.Sequential(nn.Linear(30, 30)), [torch.randn(90, 30)], ["input", "output"])
    words = [text.get_text() for text in graph.plot().axes[0].texts]
    assert "12 of 30 features" in words
