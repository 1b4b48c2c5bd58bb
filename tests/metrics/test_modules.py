"""Modules: planted ones are found, the search is deterministic, and random states are preserved."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lib_lightning.algorithm.basis import neuron_basis
from lib_lightning.errors import LIBError
from lib_lightning.metrics import (
    LargestModule,
    Modularity,
    NumberOfModules,
    find_modules,
    largest_module,
    modularity,
    module_sizes,
    number_of_modules,
)
from lib_lightning.metrics.functional.leiden import leiden
from lib_lightning.metrics.modules import Partitions
from lib_lightning.metrics.summary import GraphMetrics


def planted(sizes: list[int], background: float = 0.05, n_modules: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """Sections in which features of one module act on each other, and the modules, numbered by size."""
    # Sizes of the modules are in proportion to 2, 3, 4, ..., so that they differ.
    shares = torch.arange(2, n_modules + 2).double()
    labels = [torch.multinomial(shares, r, replacement=True) for r in sizes]
    order = torch.cat(labels).bincount(minlength=n_modules).argsort(descending=True).argsort()
    labels = [order[x] for x in labels]
    edges = [
        torch.rand(len(b), len(a), dtype=torch.float64) * torch.where(b[:, None] == a[None], 1.0, background)
        for a, b in itertools.pairwise(labels)
    ]
    return edges, labels


def slow_modularity(A: list[list[float]], labels: list[int], resolution: float) -> float:
    """Sum over all pairs of nodes: ``1/2m sum_ij (A_ij - resolution k_i k_j / 2m) [same module]``."""
    k = [sum(row) for row in A]
    two_m = sum(k)
    n = range(len(A))
    return sum(
        A[i][j] - resolution * k[i] * k[j] / two_m for i in n for j in n if labels[i] == labels[j]
    ) / two_m  # fmt: skip


def adjacency(edges: list[Tensor]) -> Tensor:
    """The whole layered graph as one symmetric matrix, each section of total weight 1."""
    sizes = [edges[0].shape[1], *(len(E) for E in edges)]
    A = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    for k, E in enumerate(edges):
        a, b = sum(sizes[:k]), sum(sizes[: k + 1])
        A[b : b + len(E), a : a + E.shape[1]] = E / E.sum()
    return A + A.T


@pytest.mark.parametrize("weights", ["strength", "amplitude", "binary"])
@pytest.mark.parametrize("sizes", [[40, 50], [30, 20, 40], [70, 80, 90]], ids=str)
def test_planted_modules_are_found(weights: str, sizes: list[int]) -> None:
    edges, labels = planted(sizes, 0.01 if weights == "binary" else 0.05)
    found = find_modules(edges, weights, rtol=0.011)
    assert [x.tolist() for x in found] == [x.tolist() for x in labels]
    assert number_of_modules(found) == 3
    assert module_sizes(found).tolist() == torch.cat(labels).bincount().sort(descending=True).values.tolist()
    assert float(largest_module(found)) == float((torch.cat(labels) == 0).double().mean())


@pytest.mark.parametrize("resolution", [0.5, 1.0, 2.0])
def test_modularity_equals_newmans_formula(resolution: float) -> None:
    edges = [torch.rand(3, 4).double() ** 3, 1e6 * torch.rand(5, 3).double() ** 3]
    labels = [torch.randint(0, 3, (n,)) for n in (4, 3, 5)]
    for transform, weights in ((lambda E: E, "strength"), (lambda E: E**0.5, "amplitude")):
        A = adjacency([transform(E) for E in edges]).tolist()
        expected = slow_modularity(A, torch.cat(labels).tolist(), resolution)
        assert float(modularity(edges, labels, weights, resolution)) == pytest.approx(expected, abs=1e-12)
    binary = adjacency([E.gt(0.2 * E.max()).double() for E in edges]).tolist()
    expected = slow_modularity(binary, torch.cat(labels).tolist(), resolution)
    assert float(modularity(edges, labels, "binary", resolution, rtol=0.2)) == pytest.approx(expected, abs=1e-12)


def test_features_in_no_module_are_modules_of_one() -> None:
    E = torch.rand(3, 2).double()
    alone = modularity([E], [torch.tensor([-1, 0]), torch.tensor([0, -1, -1])])
    numbered = modularity([E], [torch.tensor([1, 0]), torch.tensor([0, 2, 3])])
    torch.testing.assert_close(alone, numbered)


def test_the_search_finds_the_best_of_all_partitions() -> None:
    def partitions(n: int) -> list[list[int]]:
        if n == 0:
            return [[]]
        return [[*p, k] for p in partitions(n - 1) for k in range(max(p, default=-1) + 2)]

    for _ in range(5):
        E = torch.rand(3, 3, dtype=torch.float64) ** 3
        best = max(float(modularity([E], list(torch.tensor(p).split([3, 3])))) for p in partitions(6))
        # The search is exact on graphs this small.
        assert float(modularity([E])) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("r", [20, 90])
def test_same_seed_same_modules(r: int) -> None:
    edges = [torch.rand(r, r).double() ** 6 for _ in range(2)]
    runs = []
    for k in range(2):
        random.seed(k)
        runs.append([x.tolist() for x in find_modules(edges, seed=4)])
    assert runs[0] == runs[1]


def test_partitions_are_those_of_find_modules_and_searched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []

    def counted(edges: Sequence[Tensor], *settings: Any) -> list[Tensor]:
        searches.append(len(edges))
        return find_modules(edges, *settings)

    monkeypatch.setattr("lib_lightning.metrics.modules.find_modules", counted)
    edges, _ = planted([30, 40, 30])
    bases = [neuron_basis(str(i), torch.zeros(r), torch.eye(r)) for i, r in enumerate((30, 40, 30))]
    partitions = Partitions(edges)
    scalars = GraphMetrics().compute(bases, edges, partitions=partitions)
    # Three metrics, and one search for each section and for the whole graph.
    assert sorted(searches) == [1, 1, 2]
    assert scalars["modularity/total"] == float(modularity(edges))
    assert scalars["number_of_modules/1-to-2"] == float(number_of_modules(find_modules(edges[1:])))
    torch.testing.assert_close(partitions.find(), find_modules(edges))
    torch.testing.assert_close(partitions.find(0), find_modules(edges[:1]))
    assert len(searches) == 3
    torch.testing.assert_close(partitions.find(resolution=2.0), find_modules(edges, resolution=2.0))
    assert len(searches) == 4


def test_metrics_use_the_modules_they_are_given() -> None:
    E, modules = torch.rand(3, 3).double(), [torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])]
    assert Modularity().single_value(edges=E, modules=modules) == float(modularity([E], modules))
    assert NumberOfModules().single_value(edges=E, modules=modules) == 2


@pytest.mark.parametrize("fails", [False, True])
def test_random_states_are_preserved(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import igraph

    if fails:
        monkeypatch.setattr(igraph.Graph, "community_leiden", lambda *_, **__: 1 / 0)
    random.seed(3)
    expected = igraph.Graph.Erdos_Renyi(n=30, p=0.3).get_edgelist()
    random.seed(3)
    before, torch_before = random.getstate(), torch.random.get_rng_state()
    if fails:
        with pytest.raises(ZeroDivisionError):
            find_modules([torch.rand(5, 5, generator=torch.Generator().manual_seed(0))])
    else:
        find_modules([torch.rand(5, 5, generator=torch.Generator().manual_seed(0))])
    assert random.getstate() == before
    assert torch.equal(torch.random.get_rng_state(), torch_before)
    # igraph draws from `random` again, as it does by default.
    assert igraph.Graph.Erdos_Renyi(n=30, p=0.3).get_edgelist() == expected


def test_features_without_edges_have_no_module() -> None:
    E = torch.zeros(3, 4)
    E[0, 1] = E[2, 3] = 1
    assert [x.tolist() for x in find_modules([E])] == [[-1, 0, -1, 1], [0, -1, 1]]
    weak = torch.tensor([[1.0, 1e-5]])
    assert [x.tolist() for x in find_modules([weak], "binary")] == [[0, -1], [0]]
    nothing = [torch.zeros(2, 3), torch.zeros(0, 2)]
    assert [x.tolist() for x in find_modules(nothing)] == [[-1] * 3, [-1] * 2, []]
    assert float(modularity(nothing)) == 0
    assert [float(f(find_modules(nothing))) for f in (number_of_modules, largest_module)] == [0, 0]


def test_sections_have_equal_weight() -> None:
    edges, labels = planted([30, 30, 30, 30])
    scaled = [E * s for E, s in zip(edges, (1e-200, 1.0, 1e100), strict=True)]
    assert [x.tolist() for x in find_modules(scaled)] == [x.tolist() for x in labels]
    torch.testing.assert_close(modularity(scaled), modularity(edges))


def test_metrics_of_one_section_and_of_a_graph() -> None:
    edges, _ = planted([30, 40, 30])
    for metric, function in (
        (Modularity(), lambda x: modularity(x)),
        (NumberOfModules(), lambda x: number_of_modules(find_modules(x))),
        (LargestModule(), lambda x: largest_module(find_modules(x))),
    ):
        assert float(metric(edges)) == float(function(edges))
        assert float(metric(edges[0])) == float(metric(edges[:1])) == float(function(edges[:1]))


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([], "not consecutive sections"),
        ([torch.ones(2, 3), torch.ones(2, 3)], "not consecutive sections"),
        ([torch.tensor([[1.0, float("nan")]])], "finite"),
        ([torch.tensor([[1.0, float("inf")]])], "finite"),
        ([torch.tensor([[1.0, -1.0]])], "not negative"),
    ],
)
def test_invalid_edges_are_refused(edges: list[Tensor], message: str) -> None:
    with pytest.raises(LIBError, match=message):
        find_modules(edges)


def test_unknown_weights_and_modules_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LIBError, match="strength, amplitude, binary"):
        find_modules([torch.eye(2)], "squared")
    with pytest.raises(LIBError, match="do not fit"):
        modularity([torch.eye(2)], [torch.zeros(2).long(), torch.zeros(3).long()])


def test_many_edges_most_of_them_weak() -> None:
    # More edges than `leiden.MANY_EDGES`: the search starts from the strong ones, which have nearly all of the weight.
    edges, labels = planted([80, 80], background=1e-3)
    strong = [torch.where(E < 0.002, E, E**4) for E in edges]
    pairs = strong[0].nonzero().flip(1) + torch.tensor([0, 80])
    parts = leiden(160, pairs, strong[0][strong[0] > 0])
    assert len(set(zip(parts.tolist(), torch.cat(labels).tolist(), strict=True))) == 3
