"""Checks of benchmark results that use none of the library's products with Jacobians."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from lib_lightning import InteractionGraph
from tests.benchmarks import plain
from tests.benchmarks.clock import pairs
from tests.benchmarks.subjects import Subject

# Number of leading features to check: the last ones may be noise.
LEADING = 3


def assert_right(subject: Subject, graph: InteractionGraph, tolerance: float) -> None:
    """Check the identities of the method on an exact graph, and compare some of its edges with the plain loop.

    A feature's variance is its importance; Jacobians between features are orthonormal (along a few of them, by
    `torch.func.jvp`); the first and last rows of edges are those of the plain loop.

    Args:
        subject: The model and data of the graph, in the dtype of the computation.
        graph: The graph.
        tolerance: Largest relative error.
    """
    a = subject.activations()
    dtype = a[0].dtype
    bases = [graph.bases[name] for name in subject.node_layers]
    for l, (F, E) in enumerate(zip(subject.chain, (graph.edges[pair] for pair in pairs(graph)), strict=True)):
        basis, C_next = bases[l], bases[l + 1].to_features.to(dtype)
        assert torch.isfinite(E).all()
        fhat = basis.encode(a[l])
        variance = fhat.square().mean((0, 1)).double()
        close(variance[:LEADING], basis.importance[:LEADING], tolerance)
        for j in range(LEADING):
            close(_gain(F, a[l], basis.from_features[j].to(dtype), C_next), torch.tensor(1.0), tolerance)
        rows = [0, C_next.shape[1] - 1]
        C, C_pinv = basis.to_features.to(dtype), basis.from_features.to(dtype)
        outputs = [(t, i) for t in range(a[l + 1].shape[1]) for i in rows]
        expected = plain.edges(F, a[l], basis.mean.to(dtype), C, C_pinv, C_next, outputs)[rows].double()
        assert (E[rows] - expected).norm() <= tolerance * E.norm()


def _gain(F: plain.Function, a: Tensor, v: Tensor, C_next: Tensor) -> Tensor:
    """``1/(n S) sum_x sum_s |C'^T J_s v|^2``: how far a step along ``v`` moves the next layer's features."""
    total = 0.0
    for s in range(a.shape[1]):
        tangent = torch.zeros_like(a)
        tangent[:, s] = v
        with warnings.catch_warnings():  # raised by torch.jit when torch.func is first used
            warnings.simplefilter("ignore", DeprecationWarning)
            moved = torch.func.jvp(F, (a,), (tangent,))[1].detach() @ C_next
        total += float(moved.double().square().sum())
    return torch.tensor(total / (a.shape[0] * a.shape[1]))


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal up to a relative error, in the norm."""
    assert (found.double() - expected.double()).norm() <= tolerance * expected.double().norm()


def edges_errors(graph: InteractionGraph, exact: InteractionGraph) -> list[float]:
    """Relative error of each section's edges in the Frobenius norm; features of only one of them are included."""
    errors = []
    for pair, E in exact.edges.items():
        rows, columns = (max(sizes) for sizes in zip(E.shape, graph.edges[pair].shape, strict=True))
        difference = E.new_zeros(rows, columns)
        difference[: E.shape[0], : E.shape[1]] = E
        found = graph.edges[pair]
        difference[: found.shape[0], : found.shape[1]] -= found
        errors.append(float(difference.norm() / E.norm()))
    return errors
