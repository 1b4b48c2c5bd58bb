"""Sums of outer products in the span of their vectors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lib_lightning import compute_interaction_graph
from lib_lightning.algorithm.gram import DenseGram
from lib_lightning.algorithm.low_rank_gram import LowRankGram
from lib_lightning.distributed.process_group import ProcessGroup, all_reduce
from tests.algorithm.two_threads import in_two


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rank", "dense"), [(1, False), (7, False), (100, False), (250, True)])
def test_sum_in_the_span_equals_the_dense_sum(rank: int, dense: bool, dtype: torch.dtype) -> None:
    # Directions of very different lengths, and batches with new directions.
    directions = torch.randn(rank, 400, dtype=torch.float64) * torch.logspace(0, -3, rank).double()[:, None]
    gram, plain = LowRankGram(400, parts=2, dense_width=0), DenseGram(400, parts=2)
    expected = torch.zeros(2, 400, 400).double()
    for k, width in enumerate((1, rank // 2 + 1, rank)):
        g = (torch.randn(300, width, dtype=torch.float64) @ directions[:width]).to(dtype)
        gram.add(g, k % 2)
        plain.add(g, k % 2)
        expected[k % 2] += g.double().T @ g.double()
    assert gram.dense == dense
    assert gram.rank == (400 if dense else rank)
    tolerance = 1000 * torch.finfo(dtype).eps  # the tolerance of the span, 10 sqrt(d) eps, squared
    for part in (0, 1):
        assert (gram.matrix(part) - expected[part]).norm() < tolerance * expected[part].norm()
        torch.testing.assert_close(plain.matrix(part), expected[part], rtol=1e-12, atol=1e-12)
    B = gram.factor(1e-14 if dtype == torch.float64 else 1e-7)
    assert (B.T @ B - expected.sum(0)).norm() < tolerance * expected.norm()
    v = torch.randn(3, 400).double()
    lengths = [sums.squared_lengths(v) for sums in (gram, plain)]
    assert (lengths[0] - lengths[1]).abs().max() < tolerance * lengths[1].max()


@pytest.mark.parametrize("other", ["same", "rotated", "fewer", "nothing", "dense"])
def test_sums_of_two_processes_are_aligned(other: str) -> None:
    directions = torch.randn(40, 400).double()
    mine = torch.randn(60, 40).double() @ directions
    theirs = {
        "same": mine,
        "rotated": torch.randn(60, 40).double() @ torch.randn(40, 400).double(),
        "fewer": torch.randn(60, 5).double() @ directions[:5],
        "nothing": torch.zeros(0, 400).double(),
        "dense": torch.randn(600, 400).double(),
    }[other]

    def work(process_group: ProcessGroup) -> LowRankGram:
        gram = LowRankGram(400, dense_width=0)
        gram.add((mine, theirs)[process_group.rank])
        gram.align(process_group)
        all_reduce([gram], process_group)
        return gram

    expected = mine.T @ mine + theirs.T @ theirs
    for gram in in_two(work):
        assert gram.rank == {"same": 40, "rotated": 80, "dense": 400}.get(other, 40)
        assert (gram.matrix() - expected).norm() < 1e-12 * expected.norm()


def test_zeros_have_no_span_and_nan_makes_the_sum_dense() -> None:
    gram = LowRankGram(300, dense_width=0)
    gram.add(torch.zeros(5, 300))
    assert gram.factor(1e-7).shape == (0, 300)
    gram.add(torch.ones(5, 300))
    assert gram.rank == 1
    gram.add(torch.full((5, 300), math.nan))
    assert not torch.isfinite(gram.matrix()).all()


def test_graph_is_the_same_with_and_without_dense_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = nn.Sequential(nn.Linear(400, 12), nn.Tanh(), nn.Linear(12, 5)).double(), torch.randn(500, 400).double()
    dense = compute_interaction_graph(model, [x], ["input", "1", "output"])
    monkeypatch.setattr(LowRankGram.__init__, "__defaults__", (1, 0))
    narrow = compute_interaction_graph(model, [x], ["input", "1", "output"])
    for pair, E in dense.edges.items():
        torch.testing.assert_close(narrow.edges[pair], E, rtol=1e-9, atol=1e-12)


def test_sum_of_float32_vectors_has_float64_accuracy() -> None:
    # Directions outside the span of the vectors have only the squared rounding error of the vectors.
    g = (torch.randn(20000, 4) @ torch.randn(4, 12)).float()
    gram = LowRankGram(12)
    gram.add(g)
    values = torch.linalg.eigvalsh(gram.matrix())
    assert values[:8].abs().max() < 1e-12 * values[-1]


def test_products_are_added_to_each_sum_and_the_total_is_factored() -> None:
    V, X = torch.randn(5, 300).double(), torch.randn(2, 5, 5).double()
    X = X @ X.mT
    low, dense = LowRankGram(300, parts=2, dense_width=0), DenseGram(300, parts=2)
    for gram in (low, dense):
        gram.add_product(V, iter(X))
    assert low.rank == 5
    for part in (0, 1, None):
        torch.testing.assert_close(low.matrix(part), dense.matrix(part), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(low.squared_lengths(V), dense.squared_lengths(V), rtol=1e-10, atol=1e-10)
    for B in (low.factor(1e-12), dense.factor(1e-12)):
        assert B.shape == (5, 300)
        torch.testing.assert_close(B.T @ B, dense.matrix(), rtol=1e-10, atol=1e-10)
