"""A GPT-Neo-shaped model (8 blocks, width 64), cut at the residual stream: exact edges, sampled metric.

Edges need one product with the Jacobian for each feature before a section, whatever the number of output positions; the
plain loop needs one for each output position and feature.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lib_lightning import compute_interaction_graph
from tests import reference
from tests.benchmarks.clock import edges_seconds, pairs, plain_seconds, seconds
from tests.benchmarks.subjects import Subject, language_model

SEQUENCES, TOKENS, PROBES = 64, 128, 4
CURVE_SEQUENCES = 8


def graph_of(subject: Subject) -> Any:
    """The computation that is measured."""
    return compute_interaction_graph(
        subject.model, subject.batches, subject.node_layers, n_probes=PROBES, effort="exact"
    )


def backward_seconds(subject: Subject) -> list[float]:
    """Seconds of one plain backward pass through each section."""
    found = []
    for F, a in zip(subject.chain, subject.activations(), strict=False):
        leaf = a.requires_grad_()
        end = F(leaf)
        u = torch.randn_like(end)
        found.append(seconds(lambda x=(end, leaf, u): torch.autograd.grad(*x, retain_graph=True), 5))
    return found


def assert_right() -> None:
    """Compare a small model with dense Jacobians, in float32, the dtype of GPT-Neo's attention."""
    small = language_model(3, 6, n_layers=2, width=16)
    graph = graph_of(small)
    a = small.activations()
    for l, (F, pair) in enumerate(zip(small.chain, pairs(graph), strict=True)):
        before, after = (graph.bases[name] for name in pair)
        counts = torch.ones(a[l].shape[:2], dtype=torch.bool)
        maps = (m.float() for m in (before.mean, before.to_features, before.from_features, after.to_features))
        expected = reference.edges(F, a[l], *maps, counts, counts)
        assert (graph.edges[pair] - expected).norm() < 1e-4 * expected.norm()


def test_edges_and_graph(benchmark: Any) -> None:
    assert_right()
    subject = language_model(SEQUENCES, TOKENS)
    graph_of(language_model(2, TOKENS))  # to warm up
    kept: list[Any] = []
    times: list[tuple[float, float]] = []

    def ours() -> None:
        times.append(edges_seconds(lambda: kept.append(graph_of(subject))))

    benchmark.pedantic(ours, rounds=1, iterations=1)
    graph, (edges, whole) = kept[-1], min(times)
    assert all(torch.isfinite(E).all() for E in graph.edges.values())
    slow = plain_seconds(subject, graph, part=2)
    benchmark.extra_info |= {
        "edges (s)": round(edges, 2),
        "edges of the plain loop (s)": f"{slow['edges']:,.0f}",
        "edges: times the plain loop": round(slow["edges"] / edges, 1),
        "graph, its metric sampled: times the plain loop, its metric exact": round(sum(slow.values()) / whole, 1),
    }


@pytest.mark.parametrize("tokens", [16, 32, 64, 128, 256])
def test_tokens(benchmark: Any, tokens: int) -> None:
    subject = language_model(CURVE_SEQUENCES, tokens, batch_size=CURVE_SEQUENCES)
    kept: list[Any] = []
    times: list[tuple[float, float]] = []
    graph_of(subject)

    def ours() -> None:
        times.append(edges_seconds(lambda: kept.append(graph_of(subject))))

    benchmark.pedantic(ours, rounds=2, iterations=1)
    edges, _ = min(times)
    slow = plain_seconds(subject, kept[-1], part=2)["edges"]
    features = [basis.n_features for basis in kept[-1].bases.values()]
    backward = backward_seconds(subject)
    in_backward = sum(r * own for r, own in zip(features, backward, strict=False))
    benchmark.extra_info |= {
        "edges (s)": round(edges, 3),
        "edges (ms) per token": round(1e3 * edges / (tokens * CURVE_SEQUENCES), 3),
        "one backward pass (ms)": round(1e3 * sum(backward), 2),
        "edges, of one backward pass for each product": round(edges / in_backward, 2),
        "products with Jacobians": sum(features[:-1]),
        "those of the plain loop": tokens * sum(features[1:]),
        "edges: times the plain loop": round(slow / edges, 1),
    }
