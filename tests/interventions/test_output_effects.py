"""Outputs that chosen features raise and lower."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_lightning import compute_interaction_graph
from lib_lightning.errors import LIBError
from lib_lightning.interventions import output_effects


def model_of(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 40), *more).double()


def test_the_same_as_in_a_graph_and_of_chosen_features_alone() -> None:
    model, x = model_of(), torch.randn(30, 6).double()
    graph = compute_interaction_graph(model, [x], ["input", "1", "output"], output_distribution="categorical")
    assert graph.info["effects_by"] == "steps"
    every = output_effects(model, [x[:11], x[11:]], graph, by="steps")
    assert list(every) == list(graph.output_effects) == ["input", "1"]
    for layer, one in every.items():
        assert torch.equal(one.outputs, graph.output_effects[layer].outputs)
        assert torch.allclose(one.changes, graph.output_effects[layer].changes, equal_nan=True)
    for by in ("steps", "derivatives"):
        full = output_effects(model, [x], graph, by=by)["1"]
        some = output_effects(model, [x], graph, ["1/2", ("1", 5)], by=by)
        assert list(some) == ["1"]
        assert (some["1"].outputs >= 0).any(1).nonzero()[:, 0].tolist() == [2, 5]
        assert torch.allclose(some["1"].changes[[2, 5]], full.changes[[2, 5]], equal_nan=True)


def test_the_way_with_fewer_passes_is_taken() -> None:
    """Of two features by steps, of all by derivatives; these differ by what is of higher order."""
    model, x = model_of(), torch.randn(30, 6).double()
    graph = compute_interaction_graph(model, [x], ["1", "output"], output_distribution="categorical")
    ways = {by: output_effects(model, [x], graph, by=by)["1"].changes for by in ("steps", "derivatives")}
    assert not torch.allclose(ways["steps"][:2], ways["derivatives"][:2])
    assert torch.allclose(ways["steps"], ways["derivatives"], rtol=0.2, atol=0.05, equal_nan=True)
    assert torch.equal(output_effects(model, [x], graph, ["1/0"])["1"].changes[0], ways["steps"][0])
    assert torch.equal(output_effects(model, [x], graph)["1"].changes, ways["derivatives"])


def test_errors_say_what_to_do() -> None:
    model, x = model_of(nn.Tanh()), torch.randn(30, 6).double()
    graph = compute_interaction_graph(model, [x], ["1", "output"], output_distribution="gaussian")
    with pytest.raises(LIBError, match="Use by='steps'"):
        output_effects(model, [x], graph, by="derivatives")
    assert torch.equal(  # all features, and still by steps
        output_effects(model, [x], graph)["1"].changes, output_effects(model, [x], graph, by="steps")["1"].changes
    )
    with pytest.raises(LIBError, match="Ask for those of other node layers"):
        output_effects(model, [x], graph, ["output/0"])
    with pytest.raises(LIBError, match="all batches are empty"):
        output_effects(model, [x[:0]], graph)
    with pytest.raises(LIBError, match="by must be"):
        output_effects(model, [x], graph, by="gradients")  # type: ignore[arg-type]
    unknown = compute_interaction_graph(model, [x], ["1", "output"], output_distribution="none")
    with pytest.raises(LIBError, match="output_distribution="):
        output_effects(model, [x], unknown)
