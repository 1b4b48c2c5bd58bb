"""Edges in forward and reverse mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_lightning import compute_interaction_graph
from lib_lightning.algorithm.edges import Edges
from lib_lightning.errors import ActivationError
from lib_lightning.jacobian.integrated_gradients import sections
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.node_layer import as_node_layers
from tests.cases import Case


def test_forward_and_reverse_mode_give_the_same_edges(case: Case) -> None:
    graph = compute_interaction_graph(case.model, [case.data], case.node_layers, input_fn=case.input_fn)
    bases = list(graph.bases.values())
    instrumented = InstrumentedModel(case.model, as_node_layers(case.node_layers), ModelSpec(case.input_fn))
    for before, after, section in zip(
        bases, bases[1:], sections(instrumented, case.data, [b.mean for b in bases], 0, 500), strict=False
    ):
        forward, reverse = Edges(before, after), Edges(before, after)
        for edges, update in ((forward, forward.update_forward), (reverse, reverse.update_reverse)):
            edges.rows += section.n * section.S_in
            update(section, before.encode(section.a))
        torch.testing.assert_close(forward.E, reverse.E, rtol=1e-9, atol=1e-12 * float(reverse.E.amax()))


def test_derivatives_must_be_finite() -> None:
    class Root(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sqrt()

    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), Root(), nn.Linear(3, 2)), torch.randn(20, 3)
    for basis in ("lib", "pca", "neuron"):
        with pytest.raises(ActivationError, match="Derivatives of '2' with respect to '1' are NaN or infinite"):
            compute_interaction_graph(model, [x], ["1", "2", "output"], basis=basis)
