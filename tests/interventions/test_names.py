"""Features by id, by node layer and index, or by label."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.errors import LIBError, on_screen
from lib_lightning.graph import Lineages
from lib_lightning.interventions import edit_features, feature_effects, find_feature


@pytest.fixture
def graph() -> InteractionGraph:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    graph = compute_interaction_graph(model, [torch.randn(40, 4)], ["input", "1", "output"])
    ids = torch.tensor([17, 2, 0])
    graph.lineages = {"1": Lineages(ids, torch.ones(3), torch.full((3,), -1))}
    graph.labels = {
        "1": ["edges", "colour", "edges"],
        "input": ["1/17", "", "input/2"],
        "output": ["cat", "dog", "emu"],
    }
    return graph


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("1/2", ("1", 1)), ("1/0", ("1", 2)), (("1", 0), ("1", 0)), ("colour", ("1", 1)), ("dog", ("output", 1)),
        ("input/0", ("input", 0)), ("input/2", ("input", 2)), ("1/02", ("1", 1)),
    ],
)  # fmt: skip
def test_names(graph: InteractionGraph, name: Any, place: tuple[str, int]) -> None:
    assert find_feature(graph, name) == place


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("edges", "'edges' labels 2 features: write the id of one of them, '1/17', '1/0'"),
        ("1/17", r"'1/17' is the id of one feature and the label of another: '1/17', 'input/0'. Write node layer and"),
        ("1/1", "There is no feature '1/1' in this graph. Near matches: '1/17', '1/"),
        ("color", "Near matches: 'colour'"),
        ("2/17", "Near matches: '1/17'"),
        ("zzzz", "Near matches: 'input/0', 'input/1', 'input/2'"),
        (("1", 3), "'1' has 3 features"),
        (("2", 0), "no node layer '2', only 'input', '1', 'output'"),
        (17, "called by its id, such as 'layer/0'"),
        (("1", 0, 2), "called by its id, such as 'layer/0'"),
    ],
)
def test_names_that_are_none_or_ambiguous(graph: InteractionGraph, name: Any, match: str) -> None:
    with pytest.raises(LIBError, match=match) as caught:
        find_feature(graph, name)
    assert len(str(caught.value)) < 200  # two lines
    assert len(on_screen(caught.value)) <= 3
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    with pytest.raises(LIBError, match=match), edit_features(model, graph, {name: 0}):
        pass
    with pytest.raises(LIBError, match=match):
        feature_effects(model, [torch.randn(4, 4)], graph, lambda y, batch: y[:, 0], features=[name])
