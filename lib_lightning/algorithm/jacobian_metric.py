"""The Jacobian metric of a node layer: how much a step in activation space moves the next layer's features."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lib_lightning.algorithm.gram import Gram
from lib_lightning.algorithm.hutchinson import OrthogonalSigns
from lib_lightning.algorithm.jackknife import leave_one_out
from lib_lightning.algorithm.low_rank_gram import LowRankGram
from lib_lightning.algorithm.section_cache import SectionCache
from lib_lightning.distributed.process_group import ProcessGroup, Reducible, all_reduce
from lib_lightning.jacobian.closed_form import ClosedMetric
from lib_lightning.jacobian.section import Section
from lib_lightning.model.agreement import length


class JacobianMetric(Reducible):
    """Streaming ``M = 1/(n S) sum_x sum_{t,i} sum_s g g^T`` with ``g = d fhat^{l+1}_{t,i} / d a^l_s``.

    See `lib_lightning.algorithm.metric.Metric` for the methods.

    Args:
        d: Width of the node layer.
        C_next: The next node layer's map to features ``C^{l+1}``, shape ``(d_out, r_out)``, float64.
        n_probes: None sums over every output position ``t`` and feature ``i``; a number ``k`` draws ``k`` vectors of
            random signs over ``(t, i)`` for each sample instead, with the same ``M`` in expectation. Sections in
            closed form are summed exactly in any case.
        generator: Source of the random signs, on the CPU.
        groups: Number of jackknife groups.
        gram: Makes the sums ``sum g g^T``: `LowRankGram`, or its plain twin `lib_lightning.algorithm.gram.DenseGram`.

    Note:
        Source: arXiv 2405.10928, the Jacobian step of the transformation into the LIB. Random signs: Hutchinson (1990),
        https://doi.org/10.1080/03610919008812866. With ``z`` of random signs, ``E[(J^T z)(J^T z)^T] = J^T E[z z^T] J =
        J^T J``, and one vector-Jacobian product replaces one for each ``(t, i)``.
    """

    sums = ("rows", "_sampled")

    def __init__(
        self,
        d: int,
        C_next: Tensor,
        n_probes: int | None,
        generator: torch.Generator,
        groups: int = 1,
        gram: Callable[[int, int], Gram] = LowRankGram,
    ) -> None:
        self.C_next, self.n_probes = C_next, n_probes
        self.rows = torch.zeros(groups, dtype=torch.float64, device="cpu")
        # Two independent halves of the probes are summed separately: their difference shows the sampling error.
        self._probes = [1] if n_probes is None else [n_probes - n_probes // 2, n_probes // 2]
        self._signs = [OrthogonalSigns(generator) for _ in self._probes]
        self._halves = len(self._probes)
        self._sampled = torch.zeros(1, device="cpu")
        self._gram = gram(d, self._halves * groups)
        self._closed: ClosedMetric | None = None

    def add_batches(self, cache: SectionCache, index: int, phase: str) -> None:
        """See `Metric`."""
        # The edges of the section need the same gradients again, unless random combinations of them are summed.
        n_reused = self.C_next.shape[1] if self.n_probes is None else 0
        for _, section in cache.sections(phase, index, n_reused):
            self.update(section)

    def update(self, section: Section) -> None:
        """Add one batch.

        Args:
            section: The section after the node layer, at that batch.
        """
        for group, samples in section.group_slices:
            self.rows[group] += section.num_valid(samples)
        if section.closed_form is not None:
            factors = section.closed_form.factors
            if self._closed is None or self._closed.factors is not factors:
                self._finish_closed()
                self._closed = ClosedMetric(factors, self.C_next, len(self.rows))
            for group, samples in section.group_slices:
                self._closed.add(section.closed_form, group, samples)
        elif self.n_probes is None:
            for _, g in section.output_gradients(self.C_next.to(section.a)):
                self._add(section, g, 0)
        else:
            self._sample(section)

    def _sample(self, section: Section) -> None:
        C = self.C_next.to(section.a)
        self._sampled += 1
        for half, k in enumerate(self._probes):
            if k == 0:
                continue
            signs = self._signs[half].draw(section.n * k, section.S_out * C.shape[1])
            # Consecutive vectors are orthogonal; those of one sample are consecutive. All of them are moved at once,
            # as the host waits for a device that it copies to.
            signs = signs.to(C.device).view(section.n, k, section.S_out, C.shape[1]).transpose(0, 1)
            for part in signs.split(section.vectors_per_call):
                self._add(section, section.vjp(part.to(C) @ C.T), half)

    def _add(self, section: Section, g: Tensor, half: int) -> None:
        for group, samples in section.group_slices:
            self._gram.add(g[:, samples].flatten(0, 2), self._halves * group + half)

    def _finish_closed(self) -> None:
        if self._closed is not None:
            V, sums = self._closed.sums()
            # An exact sum is what each of the probes gives in expectation.
            self._gram.add_product(V, (k * X for X in sums for k in self._probes))
            self._closed = None

    @property
    def gram(self) -> Gram:
        """The sums, one part for each half of the probes in each group."""
        self._finish_closed()
        return self._gram

    def reduce(self, process_group: ProcessGroup) -> None:
        """See `Metric`."""
        self.gram.align(process_group)
        all_reduce([self, self._gram], process_group)

    def is_finite(self) -> bool:
        """See `Metric`."""
        return bool(torch.isfinite(self.gram.N).all())

    def factor(self, cutoff: float) -> Tensor:
        """See `Metric`: without forming ``M``."""
        return self.gram.factor(cutoff) / math.sqrt(self.rows.sum() * (self.n_probes or 1))

    def replicates(self, directions: Tensor) -> Tensor:
        """See `Metric`."""
        lengths = self.gram.squared_lengths(directions).unflatten(0, (-1, self._halves)).sum(1)
        return leave_one_out(lengths, self.rows) / (self.n_probes or 1)

    @property
    def M(self) -> Tensor:
        """See `Metric`."""
        return self.gram.matrix() / (self.rows.sum() * (self.n_probes or 1))

    @property
    def relative_error(self) -> float | None:
        """See `Metric`: 0 without probes or in closed form; None for a single probe, whose spread is unknown."""
        if self.n_probes is None or not self._sampled.any():
            return 0.0
        if self.n_probes == 1:
            return None
        # Frobenius norms are the same in every orthonormal basis.
        first, second = self.gram.N[0::2].sum(0), self.gram.N[1::2].sum(0)
        k_1, k_2 = self._probes
        # Var(pooled mean) = sigma^2 / k and Var(mean of one half - mean of the other) = sigma^2 (1/k_1 + 1/k_2).
        spread = length(first / k_1 - second / k_2) * (k_1 * k_2) ** 0.5 / self.n_probes
        size = length((first + second) / self.n_probes)
        return float(spread / size) if size > 0 else 0.0
