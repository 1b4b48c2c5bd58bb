"""The paper's transformer for addition modulo 113 on 3,830 pairs: with default settings, and exact."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from lib_lightning import compute_interaction_graph
from tests.benchmarks.agreement import assert_right, edges_errors
from tests.benchmarks.clock import fastest, note_ratios, plain_seconds, reference_seconds
from tests.benchmarks.subjects import modular_addition


def test_default_settings(benchmark: Any, published: Path | None) -> None:
    subject = modular_addition(published)
    model = copy.deepcopy(subject.model).float()

    def ours() -> Any:
        return compute_interaction_graph(model, subject.batches, subject.node_layers)

    graph, own = fastest(benchmark, ours)
    double, exact = (
        compute_interaction_graph(subject.model, subject.batches, subject.node_layers, rtol=rtol) for rtol in (1e-6, 0)
    )
    # Errors of float32, and of float32 with truncation, which is a setting rather than an error.
    rounding, all_in_all = edges_errors(graph, double), edges_errors(graph, exact)
    assert max(rounding) < 1e-3
    benchmark.extra_info |= {
        "error of edges, by rounding": ", ".join(f"{x:.0e}" for x in rounding),
        "and truncation, section by section": ", ".join(f"{x:.0e}" for x in all_in_all),
    }
    note_ratios(
        benchmark, own, plain_loop=plain_seconds(subject, exact), transcription=reference_seconds(subject, exact)
    )


def test_exact(benchmark: Any, published: Path | None) -> None:
    subject = modular_addition(published)

    def ours() -> Any:
        return compute_interaction_graph(subject.model, subject.batches, subject.node_layers, rtol=0)

    graph, own = fastest(benchmark, ours)
    assert_right(subject, graph, tolerance=1e-8)
    note_ratios(
        benchmark, own, plain_loop=plain_seconds(subject, graph), transcription=reference_seconds(subject, graph)
    )
