"""The CIFAR-10 perceptron (3072-100-100-10, 4,660 images): exact, in float64, truncated to the numerical rank only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lib_lightning import compute_interaction_graph
from tests.benchmarks.agreement import assert_right
from tests.benchmarks.by_hand import perceptron_edges
from tests.benchmarks.clock import fastest, note_ratios, plain_seconds, reference_seconds, seconds
from tests.benchmarks.subjects import perceptron


def test_exact(benchmark: Any, published: Path | None) -> None:
    subject = perceptron(published)

    def ours() -> Any:
        return compute_interaction_graph(subject.model, subject.batches, subject.node_layers, rtol=0)

    graph, own = fastest(benchmark, ours)
    # The covariance of 3,072 pixels has many eigenvalues near zero.
    assert_right(subject, graph, tolerance=1e-6)
    assert isinstance(subject.model, torch.nn.Sequential)
    with torch.no_grad():
        by_hand = seconds(lambda: perceptron_edges(subject.model, subject.data), 5)
    benchmark.extra_info |= {"by hand (s)": round(by_hand, 3), "times by hand": round(own / by_hand, 2)}
    note_ratios(
        benchmark, own, plain_loop=plain_seconds(subject, graph), transcription=reference_seconds(subject, graph)
    )
