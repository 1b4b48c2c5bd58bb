"""The plain implementation of the Local Interaction Basis: a loop over outputs, with one backward pass for each.

Source: arXiv 2405.10928. Works on a chain of plain functions, as `tests.reference` does, but on all samples at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]
# Outputs to iterate over: pairs of a position and a feature.
Outputs = Iterable[tuple[int, int]]


def covariance(a: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(d,)`` and covariance ``(d, d)`` of activations ``(n, S, d)``, over samples and positions."""
    rows = a.flatten(0, 1)
    mu = rows.mean(0)
    return mu, (rows - mu).T @ (rows - mu) / len(rows)


def gradients(F: Function, a: Tensor, C_next: Tensor, outputs: Outputs | None = None) -> Iterator[tuple[int, Tensor]]:
    """Gradients of the next layer's features ``fhat_{t,i}``, of every sample at once.

    Args:
        F: The section.
        a: Activations before it, ``(n, S, d)``.
        C_next: The next layer's map to features, ``(d_next, r_next)``.
        outputs: Which ``(t, i)``; all by default.

    Yields:
        The feature ``i``, and the gradient with respect to ``a``, ``(n, S, d)``.
    """
    a = a.detach().requires_grad_()
    fhat = F(a) @ C_next  # minus a constant, which has no gradient
    for t, i in all_outputs(fhat) if outputs is None else outputs:
        (g,) = torch.autograd.grad(fhat[:, t, i].sum(), a, retain_graph=True)
        yield i, g


def all_outputs(fhat: Tensor) -> list[tuple[int, int]]:
    """All positions and features of ``(n, S, r)``."""
    return [(t, i) for t in range(fhat.shape[1]) for i in range(fhat.shape[2])]


def metric(F: Function, a: Tensor, C_next: Tensor, outputs: Outputs | None = None) -> Tensor:
    """The Jacobian metric ``M`` of the node layer before a section, ``(d, d)``; arguments as for `gradients`."""
    n, S, d = a.shape
    M = a.new_zeros(d, d)
    for _, g in gradients(F, a, C_next, outputs):
        M += g.flatten(0, 1).T @ g.flatten(0, 1)
    return M / (n * S)


def edges(
    F: Function, a: Tensor, mu: Tensor, C: Tensor, C_pinv: Tensor, C_next: Tensor, outputs: Outputs | None = None
) -> Tensor:
    """The edges ``E`` of a section between two bases, ``(r_next, r)``.

    Args:
        F: The section.
        a: Activations before it, ``(n, S, d)``.
        mu: Their mean, ``(d,)``.
        C: Their map to features, ``(d, r)``.
        C_pinv: Their map back, ``(r, d)``.
        C_next: The next layer's map to features, ``(d_next, r_next)``.
        outputs: Which output positions and features to sum over; all by default.
    """
    n, S, _ = a.shape
    fhat = (a - mu) @ C
    E = a.new_zeros(C_next.shape[1], C.shape[1])
    for i, g in gradients(F, a, C_next, outputs):
        E[i] += ((g @ C_pinv.T) * fhat).sum(1).square().sum(0)
    return E / (n * S)
