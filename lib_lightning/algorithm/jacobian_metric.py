"""The Jacobian metric of a node layer: how far a step in activation space moves the next layer's features."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lib_lightning.algorithm.hutchinson import OrthogonalSigns
from lib_lightning.algorithm.jackknife import leave_one_out
from lib_lightning.algorithm.low_rank_gram import LowRankGram
from lib_lightning.distributed.process_group import ProcessGroup, Reducible, all_reduce
from lib_lightning.jacobian.closed_form import ClosedMetric
from lib_lightning.jacobian.section import Section


class JacobianMetric(Reducible):
    """Streaming ``M = 1/(n S) sum_x sum_{t,i} sum_s g g^T`` with ``g = d fhat^{l+1}_{t,i} / d a^l_s``.

    Args:
        d: Width of the node layer.
        C_next: The next node layer's map to features ``C^{l+1}``, shape ``(d_out, r_out)``, float64.
        n_probes: None sums over every output position ``t`` and feature ``i``; a number ``k`` draws that many vectors
            of random signs over ``(t, i)`` for each sample instead, which gives the same ``M`` on average. Sections in
            closed form are summed exactly in any case.
        generator: Source of the random signs, on the CPU.
        groups: Number of groups of samples to sum apart.

    Note:
        Source: arXiv 2405.10928, the Jacobian step of the transformation into the LIB. Random signs: Hutchinson (1990).
    """

    sums = ("rows", "_sampled")

    def __init__(
        self, d: int, C_next: Tensor, n_probes: int | None, generator: torch.Generator, groups: int = 1
    ) -> None:
        self.C_next, self.n_probes = C_next, n_probes
        self.rows = torch.zeros(groups, dtype=torch.float64)
        # Two halves of the probes, independent of each other, are summed apart: their spread is the error of sampling.
        self._probes = [1] if n_probes is None else [n_probes - n_probes // 2, n_probes // 2]
        self._signs = [OrthogonalSigns(generator) for _ in self._probes]
        self._halves = len(self._probes)
        self._sampled = torch.zeros(1)
        self._gram = LowRankGram(d, parts=self._halves * groups)
        self._closed: ClosedMetric | None = None

    def update(self, section: Section) -> None:
        """Add one batch.

        Args:
            section: The section after the node layer, at that batch.
        """
        for group, span in section.spans:
            self.rows[group] += section.rows_of(span)
        if section.closed is not None:
            weights = section.closed.weights
            if self._closed is None or self._closed.weights is not weights:
                self._finish_closed()
                self._closed = ClosedMetric(weights, self.C_next, len(self.rows))
            for group, span in section.spans:
                self._closed.add(section.closed, group, span)
            return
        C = self.C_next.to(section.a)
        if self.n_probes is None:
            products: Iterable[tuple[Tensor, Tensor]] = (
                (i, section.vjp(cotangents)) for i, cotangents in section.output_stacks(C)
            )
            if section.keeps_jacobian:
                # All of them before any is summed: each then finds the processor's cache as the last one has left it.
                products = section.jacobian = list(products)
            for _, g in products:
                self._add(section, g, 0)
            return
        self._sampled += 1
        for half, k in enumerate(self._probes):
            if k == 0:
                continue
            signs = self._signs[half].draw(section.n * k, section.S_out * C.shape[1])
            # The probes of one sample follow one another, so that they are orthogonal wherever possible.
            signs = signs.view(section.n, k, section.S_out, C.shape[1]).transpose(0, 1)
            for part in signs.split(section.stack):
                self._add(section, section.vjp(part.to(C) @ C.T), half)

    @property
    def gram(self) -> LowRankGram:
        """The sum, one part for each half of the probes in each group."""
        self._finish_closed()
        return self._gram

    def _finish_closed(self) -> None:
        if self._closed is not None:
            V, sums = self._closed.sums()
            # Exact: as if seen by each of the probes.
            self._gram.add_product(V, (k * X for X in sums for k in self._probes))
            self._closed = None

    def _add(self, section: Section, g: Tensor, half: int) -> None:
        for group, span in section.spans:
            self._gram.add(g[:, span].flatten(0, 2), self._halves * group + half)

    def reduce(self, process_group: ProcessGroup) -> None:
        """Join the sums of several processes."""
        self.gram.meet(process_group)
        all_reduce([self, self.gram], process_group)

    def factor(self, cutoff: float) -> Tensor:
        """Square-root factor ``B`` with ``B^T B = M``.

        Args:
            cutoff: Directions with an eigenvalue up to this share of the largest are dropped.

        Returns:
            ``B`` of shape ``(k, d_in)``, float64.
        """
        return self.gram.factor(cutoff) / math.sqrt(self.rows.sum() * (self.n_probes or 1))

    def replicates(self, directions: Tensor) -> Tensor:
        """Squared length of directions in the metric, with one group of samples left out at a time.

        Args:
            directions: One a row, shape ``(r, d_in)``, float64.

        Returns:
            ``v M v^T`` of each direction and replicate, shape ``(G, r)``; G is 0 where there is only one group.
        """
        lengths = self.gram.squared_lengths(directions).unflatten(0, (-1, self._halves)).sum(1)
        return leave_one_out(lengths, self.rows) / (self.n_probes or 1)

    @property
    def M(self) -> Tensor:
        """The metric, shape ``(d_in, d_in)``, float64; `factor` does without forming it."""
        return self.gram.matrix() / (self.rows.sum() * (self.n_probes or 1))

    @property
    def relative_error(self) -> float | None:
        """Estimated error of a sampled ``M``, relative in the Frobenius norm.

        0 for the exact metric, which closed forms give in any case; None for a single probe, which shows no spread.
        """
        if self.n_probes is None or not self._sampled.any():
            return 0.0
        if self.n_probes == 1:
            return None
        # In the coordinates of one orthonormal span, where norms are the same.
        first, second = self.gram.N[0::2].sum(0), self.gram.N[1::2].sum(0)
        k_1, k_2 = self._probes
        # Var(pooled mean) = sigma^2 / k and Var(mean of one half - mean of the other) = sigma^2 (1/k_1 + 1/k_2).
        spread = (first / k_1 - second / k_2).norm() * (k_1 * k_2) ** 0.5 / self.n_probes
        size = ((first + second) / self.n_probes).norm()
        return float(spread / size) if size > 0 else 0.0
