"""Edge ablations of the paper's transformer for addition modulo 113, with recorded operations and by forward passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lib_lightning import compute_interaction_graph
from lib_lightning.ablation import accuracy, edges_required, interventions, model_part
from lib_lightning.ablation.curves import EdgesRequiredResult
from tests.benchmarks.clock import seconds
from tests.benchmarks.subjects import modular_addition
from tests.test_published import published_model

# Test pairs: one batch of those of tests/test_published_ablations.py.
_SCORED = 1000


def test_bisection(benchmark: Any, published: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = modular_addition(published)
    graph = compute_interaction_graph(subject.model, subject.batches, subject.node_layers, rtol=0)
    if published is None:
        tokens = torch.cat(list(subject.batches))[:_SCORED]
        with torch.no_grad():
            labels = subject.model(tokens).argmax(-1)
    else:
        _, data = published_model(published, 0)
        tokens, labels = (t[data.n_train :][:_SCORED] for t in (data.tokens, data.answers))
    batches = list(zip(tokens.split(1000), labels.split(1000), strict=True))
    found: list[dict[tuple[str, str], EdgesRequiredResult]] = []

    def count() -> None:
        found.append(
            edges_required(subject.model, batches, graph, accuracy, 1e-3, search="bisection", dtype=torch.float32)
        )

    recorded = benchmark.pedantic(lambda: seconds(count), rounds=1, iterations=1)
    never: Callable[..., bool] = lambda *_: False  # noqa: E731
    for module in (interventions, model_part):
        monkeypatch.setattr(module, "is_recordable", never)
    passes = seconds(count)
    benchmark.extra_info |= {
        "seconds": f"{recorded:.3g}",
        "times faster than a forward pass for each set of kept edges": f"{passes / recorded:.1f}",
    }
    first, plain = found
    for section, one in first.items():
        # Sums in another order may change the answer of a sample whose logits are equal up to rounding.
        assert one.curve == pytest.approx(plain[section].curve, abs=1e-3)
        assert one.count == plain[section].count
