"""How much is computed at once under a memory limit."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lib_lightning import compute_interaction_graph
from lib_lightning.algorithm.memory_plan import Workload, plan_memory, split_batches
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.node_layer import as_node_layers


def test_less_memory_means_fewer_jackknife_groups() -> None:
    model = nn.Sequential(nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 200)).double()
    instrumented = InstrumentedModel(model, as_node_layers(["input", "1", "output"]))
    x = torch.randn(16, 200).double()
    with_limit = {mib: plan_memory(instrumented, x, mib * 2**20).groups for mib in (5, 14, 20, 28, 200)}
    assert with_limit == {5: 1, 14: 1, 20: 2, 28: 4, 200: 8}
    assert plan_memory(instrumented, x, 28 * 2**20, Workload(fisher=True)).groups == 4
    graph = compute_interaction_graph(model, [x], ["input", "1", "output"], memory_limit=5 / 2**10)
    assert graph.edge_errors == {}
    assert all(b.importance_error is None and b.degenerate is None for b in graph.bases.values())
    assert all(len(r) == 0 for r in graph.replicates.edges.values())


@given(st.integers(1, 40), st.integers(1, 40))
def test_chunks_are_as_few_as_fit_and_about_equal(n: int, size: int) -> None:
    instrumented, x = InstrumentedModel(nn.Linear(1, 1), as_node_layers(["input", "output"])), torch.randn(n, 1)
    chunks = split_batches(instrumented, [x], size)
    assert torch.equal(torch.cat(chunks), x)
    assert max(map(len, chunks)) <= size
    assert len(chunks) == -(-n // size)
    assert max(map(len, chunks)) == -(-n // len(chunks))
