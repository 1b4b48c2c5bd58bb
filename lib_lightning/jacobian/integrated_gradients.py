"""Sections of one batch, with the Jacobian at the activations or averaged along the integration path."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lib_lightning.jacobian.section import QuadraturePoint, Section
from lib_lightning.model.capture import CapturedLayer
from lib_lightning.model.instrumented import InstrumentedModel


def sections(
    instrumented: InstrumentedModel, batch: object, means: Sequence[Tensor], integration_steps: int, stack_elements: int
) -> list[Section]:
    """Run one batch through the model and return the section after each node layer but the last.

    Args:
        instrumented: The model and its node layers.
        batch: One batch.
        means: ``mu`` of each node layer, shape ``(d,)``: the start of the integration path.
        integration_steps: 0 for the Jacobian at the activations, else the number of Gauss-Legendre points on the
            straight path ``mu + alpha (a - mu)``.
        stack_elements: About how many numbers a batch of vectors may have.

    Returns:
        One section for each pair of neighbouring node layers.

    Note:
        Source: arXiv 2405.10928, integrated gradients as the measure of interaction. The path of each section starts
        at its own node layer, so one forward pass in which every node layer is replaced serves all sections.
    """
    if integration_steps == 0:
        return sections_between(instrumented.capture(batch), stack_elements)
    with torch.no_grad():
        found = instrumented.capture(batch)
    activations = [layer.a for layer in found]
    # The last node layer starts no section and is not replaced. A tap that is computed from another tap of its own
    # node layer must not see that one replaced: then even and odd node layers are replaced in two separate passes.
    starts = range(len(activations) - 1)
    turns = [starts] if all(len(layer.taps) == 1 for layer in instrumented.layers[1:]) else [starts[0::2], starts[1::2]]
    points: list[list[QuadraturePoint]] = [[] for _ in starts]
    for alpha, weight in gauss_legendre(integration_steps):
        path = [m.to(a) + alpha * (a - m.to(a)) for m, a in zip(means, activations, strict=True)]
        # Positions without features stay as they are.
        path = [
            new if layer.mask is None else torch.where(layer.mask[..., None], new, layer.a)
            for new, layer in zip(path, found, strict=True)
        ]
        for turn in turns:
            captured = instrumented.capture(batch, [a if i in turn else None for i, a in enumerate(path)])
            for i in turn:
                points[i].append(QuadraturePoint(weight, captured[i], captured[i + 1]))
    pairs = itertools.pairwise(activations)
    return [Section.between(a, a_out, p, stack_elements) for (a, a_out), p in zip(pairs, points, strict=True)]


def sections_between(captured: Sequence[CapturedLayer], stack_elements: int) -> list[Section]:
    """The section after each captured node layer but the last, with the Jacobian at the activations.

    Args:
        captured: Node layers of one forward pass.
        stack_elements: As for `sections`.

    Returns:
        One section for each pair of neighbours.
    """
    return [
        Section.between(before.a, after.a, [QuadraturePoint(1.0, before, after)], stack_elements)
        for before, after in itertools.pairwise(captured)
    ]


def gauss_legendre(k: int) -> Iterator[tuple[float, float]]:
    """Nodes and weights of Gauss-Legendre quadrature on the interval from 0 to 1.

    Args:
        k: Number of nodes; polynomials up to degree ``2k - 1`` are integrated exactly.

    Yields:
        A node and its weight; the weights sum to 1.

    Example:
        >>> [(round(x, 4), round(w, 4)) for x, w in gauss_legendre(2)]
        [(0.2113, 0.5), (0.7887, 0.5)]
    """
    nodes, weights = np.polynomial.legendre.leggauss(k)  # on the interval from -1 to 1
    yield from zip(((nodes + 1) / 2).tolist(), (weights / 2).tolist(), strict=True)
