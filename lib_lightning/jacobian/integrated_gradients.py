"""Sections of one batch, with derivatives at the activations or averaged along the integration path."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lib_lightning.jacobian.section import QuadraturePoint, Section
from lib_lightning.model.capture import CapturedLayer
from lib_lightning.model.instrumented import InstrumentedModel


def sections(
    instrumented: InstrumentedModel, batch: object, means: Sequence[Tensor], integration_steps: int, stack_elements: int
) -> list[Section]:
    """Run one batch through the live model and return the section after each node layer but the last.

    Args:
        instrumented: The model and its node layers.
        batch: One batch.
        means: ``mu`` of each node layer, shape ``(d,)``; where the integration path starts.
        integration_steps: 0 for the gradient at the activations, else the number of Gauss-Legendre points on the
            straight path ``mu + alpha (a - mu)``.
        stack_elements: About how many numbers one stack of vectors may hold.

    Returns:
        One section for each pair of neighbouring node layers.

    Note:
        Source: arXiv 2405.10928, integrated gradients as the measure of interaction. The path of each section starts
        from its own node layer, so one forward pass with every node layer replaced serves all of them.
    """
    if integration_steps == 0:
        return sections_between(instrumented.capture(batch), stack_elements)
    activations = instrumented.activations(batch)
    # The last node layer starts no section: it stays as it is. A tap that is computed from another one of its layer
    # must not see that one replaced: then neighbours take turns, in two passes.
    starts = range(len(activations) - 1)
    turns = [starts] if all(len(layer.taps) == 1 for layer in instrumented.layers[1:]) else [starts[0::2], starts[1::2]]
    points: list[list[QuadraturePoint]] = [[] for _ in starts]
    for alpha, weight in gauss_legendre(integration_steps):
        path = [m.to(a) + alpha * (a - m.to(a)) for m, a in zip(means, activations, strict=True)]
        for turn in turns:
            cuts = instrumented.capture(batch, [a if i in turn else None for i, a in enumerate(path)])
            for i in turn:
                points[i].append(QuadraturePoint(weight, cuts[i], cuts[i + 1]))
    pairs = itertools.pairwise(activations)
    return [Section(a, a_out, p, stack_elements) for (a, a_out), p in zip(pairs, points, strict=True)]


def sections_between(cuts: Sequence[CapturedLayer], stack_elements: int) -> list[Section]:
    """The section after each cut but the last, with the gradient at the activations.

    Args:
        cuts: Node layers of one forward pass.
        stack_elements: As for `sections`.

    Returns:
        One section for each pair of neighbours.
    """
    return [Section(b.a, c.a, [QuadraturePoint(1.0, b, c)], stack_elements) for b, c in itertools.pairwise(cuts)]


def gauss_legendre(k: int) -> Iterator[tuple[float, float]]:
    """Points and weights of Gauss-Legendre quadrature on the interval from 0 to 1.

    Args:
        k: Number of points; polynomials up to degree ``2k - 1`` are integrated exactly.

    Yields:
        A point and its weight; the weights sum to 1.

    Note:
        Source: Golub and Welsch (1969), eigenvalues of the tridiagonal recurrence matrix.

    Example:
        >>> [(round(x, 4), round(w, 4)) for x, w in gauss_legendre(2)]
        [(0.2113, 0.5), (0.7887, 0.5)]
    """
    i = torch.arange(1, k, dtype=torch.float64)
    off = i / (4 * i * i - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    yield from zip(((nodes + 1) / 2).tolist(), vectors[0].square().tolist(), strict=True)
