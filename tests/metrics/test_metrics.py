"""Metric classes against their functions, in collections and across processes; functions against closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lib_lightning.errors import LIBError
from lib_lightning.metrics import (
    EdgesRequired,
    EffectiveEdges,
    EffectiveFeatures,
    Gini,
    Hoyer,
    LargestModule,
    Modularity,
    NumberOfEdges,
    NumberOfFeatures,
    NumberOfModules,
    ParticipationRatio,
    ShareOfEdges,
    effective_edges,
    effective_features,
    find_modules,
    gini,
    hoyer,
    largest_module,
    min_edges_from_curve,
    modularity,
    number_of_edges,
    number_of_features,
    number_of_modules,
    participation_ratio,
    perplexity,
    share_of_edges,
    standard_error,
)


def importance() -> tuple[Tensor]:
    return (torch.rand(7) ** 4,)


def section() -> tuple[Tensor]:
    return (torch.rand(4, 5) ** 4,)


def curve() -> tuple[Tensor, Tensor, float]:
    # The largest count must be sufficient, or the value is NaN.
    return torch.cat([torch.randperm(50)[:6], torch.tensor([50])]), torch.tensor([0.1, *[0.9] * 6]), 0.9


PAIRS = [
    (NumberOfFeatures(rtol=0.1), lambda x: number_of_features(x, 0.1), importance),
    (EffectiveFeatures(), effective_features, importance),
    (ParticipationRatio(), participation_ratio, importance),
    (NumberOfEdges(rtol=0.1), lambda x: number_of_edges(x, 0.1), section),
    (EffectiveEdges(), effective_edges, section),
    (ShareOfEdges(share=0.8), lambda x: share_of_edges(x, 0.8), section),
    (Gini(), gini, section),
    (Hoyer(), hoyer, section),
    (Modularity("amplitude", 1.2), lambda x: modularity([x], None, "amplitude", 1.2), section),
    (NumberOfModules(resolution=1.5), lambda x: number_of_modules(find_modules([x], resolution=1.5)), section),
    (LargestModule("binary", rtol=0.1), lambda x: largest_module(find_modules([x], "binary", rtol=0.1)), section),
    (EdgesRequired(tolerance=0.1), lambda *x: min_edges_from_curve(*x, tolerance=0.1), curve),
]
NAMES = [type(metric).__name__ for metric, _, _ in PAIRS]


@pytest.mark.parametrize(("metric", "function", "make"), PAIRS, ids=NAMES)
def test_class_averages_its_function(metric: Metric, function: Any, make: Any) -> None:
    graphs = [make() for _ in range(3)]
    values = [float(metric(*graph)) for graph in graphs]
    assert values == pytest.approx([float(function(*graph)) for graph in graphs])
    assert float(metric.compute()) == pytest.approx(sum(values) / 3)


@pytest.mark.parametrize(("metric", "function", "make"), PAIRS, ids=NAMES)
def test_states_of_processes_merge(metric: Metric, function: Any, make: Any) -> None:
    parts, whole = [metric.clone(), metric.clone()], metric.clone()
    for metric_part in (*parts, whole):
        metric_part.reset()
    for k in range(5):
        graph = make()
        parts[k % 2].update(*graph)
        whole.update(*graph)
    parts[0].merge_state(parts[1])
    torch.testing.assert_close(parts[0].compute(), whole.compute())


def test_collection() -> None:
    metrics = MetricCollection([NumberOfEdges(), EffectiveEdges()])
    assert {k: float(v) for k, v in metrics(torch.eye(3)).items()} == {"NumberOfEdges": 3.0, "EffectiveEdges": 3.0}


def test_metrics_that_agree_once_are_not_merged() -> None:
    rough, fine = NumberOfEdges(rtol=0.6), NumberOfEdges(rtol=0.1)
    metrics = MetricCollection({"rough": rough, "fine": fine, "effective": EffectiveEdges()})
    for E in (torch.eye(3), torch.tensor([[1.0, 0.5]])):
        metrics.update(edges=E)
    values = {name: float(value) for name, value in metrics.compute().items()}
    effective = (3 + float(effective_edges(torch.tensor([1.0, 0.5])))) / 2
    assert values == pytest.approx({"rough": 2.0, "fine": 2.5, "effective": effective})


def test_one_collection_takes_features_edges_and_curves_by_name() -> None:
    metrics = MetricCollection([metric.clone() for metric, _, _ in PAIRS])
    counts, scores, unablated = curve()
    metrics.update(importance=importance()[0], edges=section()[0], counts=counts, scores=scores, unablated=unablated)
    assert sorted(metrics.compute()) == sorted(NAMES)


def test_perplexity_of_a_known_distribution() -> None:
    assert float(perplexity(torch.tensor([0.5, 0.25, 0.25]))) == pytest.approx(2**1.5)
    assert float(perplexity(torch.zeros(3))) == 0
    assert float(perplexity(torch.zeros(0))) == 0
    assert [int(f(torch.zeros(0))) for f in (number_of_features, number_of_edges)] == [0, 0]


def test_participation_ratio_of_a_geometric_series() -> None:
    # (1 / (1 - q))^2 over 1 / (1 - q^2), for infinitely many.
    q = 0.5
    w = q ** torch.arange(200, dtype=torch.float64)
    assert float(participation_ratio(w)) == pytest.approx((1 + q) / (1 - q))
    assert float(participation_ratio(torch.full((3,), 1e-30))) == pytest.approx(3)


def slow_gini(w: list[float]) -> float:
    """Mean absolute difference of two weights, divided by twice the mean."""
    n = len(w)
    return sum(abs(a - b) for a in w for b in w) / n**2 / (2 * sum(w) / n)


def slow_hoyer(w: list[float]) -> float:
    n = len(w)
    return (n**0.5 - sum(w) / sum(a * a for a in w) ** 0.5) / (n**0.5 - 1)


def slow_share(w: list[float], share: float) -> float:
    ordered = sorted(w, reverse=True)
    return next(k for k in range(len(w) + 1) if sum(ordered[:k]) >= share * sum(w)) / len(w)


def test_sparsities_equal_their_definitions() -> None:
    for _ in range(5):
        E = torch.rand(3, 6, dtype=torch.float64) ** 5
        w = E.flatten().tolist()
        assert float(gini(E)) == pytest.approx(slow_gini(w), abs=1e-12)
        assert float(hoyer(E)) == pytest.approx(slow_hoyer(w), abs=1e-12)
        assert all(float(share_of_edges(E, s)) == slow_share(w, s) for s in (0.1, 0.5, 0.9, 0.99))


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("k", [1, 3, 9, 10])
def test_sparsities_of_k_equal_edges_among_ten(k: int, scale: float) -> None:
    w = torch.cat([torch.full((k,), scale), torch.zeros(10 - k)]).reshape(2, 5)
    assert float(gini(w)) == pytest.approx(1 - k / 10, abs=1e-12)
    assert float(hoyer(w)) == pytest.approx((10**0.5 - k**0.5) / (10**0.5 - 1), abs=1e-7)  # float32 squares
    assert float(share_of_edges(w, 1.0)) == k / 10
    assert float(participation_ratio(w)) == pytest.approx(k)


def test_share_of_equal_edges_is_exact() -> None:
    for value in (0.1, 0.3, 7.0):
        assert float(share_of_edges(torch.full((10,), value), 0.9)) == 0.9


@pytest.mark.parametrize("function", [gini, hoyer, share_of_edges, participation_ratio])
def test_empty_zero_and_single_weights(function: Any) -> None:
    one = 0.0 if function in (gini, hoyer) else 1.0
    assert [float(function(torch.tensor(w))) for w in ([], [0.0, 0.0], [0.0], [3.0])] == [0, 0, 0, one]


@pytest.mark.parametrize("share", [0.0, -1.0, 1.1, math.nan])
def test_invalid_shares_are_refused(share: float) -> None:
    with pytest.raises(LIBError, match="share="):
        share_of_edges(torch.eye(2), share)
    with pytest.raises(LIBError, match="share="):
        ShareOfEdges(share)


def slow_edges_required(counts: list[int], scores: list[float], unablated: float, tolerance: float) -> float:
    passing = [
        c for c in counts if all(s >= unablated - tolerance for k, s in zip(counts, scores, strict=True) if k >= c)
    ]
    return min(passing, default=math.nan)


def test_edges_required_equals_its_definition() -> None:
    for _ in range(50):
        counts, scores = torch.randint(0, 9, (6,)), (torch.rand(6, dtype=torch.float64) > 0.3).double()
        expected = slow_edges_required(counts.tolist(), scores.tolist(), 1.0, 1e-3)
        assert float(min_edges_from_curve(counts, scores, torch.tensor(1.0))) == pytest.approx(expected, nan_ok=True)


def test_edges_required_at_the_limits() -> None:
    counts = torch.tensor([1, 2, 3])
    assert float(min_edges_from_curve(counts, torch.tensor([0.5, 0.5, 0.75]), 0.75, tolerance=0.25)) == 1
    assert math.isnan(min_edges_from_curve(counts, torch.tensor([1.0, 1.0, 0.0]), 1.0))
    assert math.isnan(min_edges_from_curve(counts, torch.tensor([1.0, 1.0, math.nan]), 1.0))
    assert math.isnan(min_edges_from_curve(counts[:0], torch.zeros(0), 1.0))


def test_standard_error_of_a_mean() -> None:
    x = torch.randn(11, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(standard_error((x.sum(0) - x) / 10), x.std(0) / 11**0.5)
    assert standard_error(x[:1]).isnan().all()
    assert standard_error(x[:0]).shape == (2, 3)
