"""The Jacobian metric of a node layer: how much a step in activation space moves the next layer's features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lib_lightning.algorithm.gradient_metric import GradientMetric
from lib_lightning.algorithm.gram import Gram
from lib_lightning.algorithm.hutchinson import OrthogonalSigns
from lib_lightning.algorithm.low_rank_gram import LowRankGram
from lib_lightning.algorithm.section_cache import SectionCache
from lib_lightning.jacobian.closed_form import ClosedMetric
from lib_lightning.jacobian.section import Section
from lib_lightning.model.loops import parts_of


class JacobianMetric(GradientMetric):
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
        reuse: Whether the edges of the section are of the same next-layer features, so that their gradients are kept.
        gram: Makes the sums ``sum g g^T``: `LowRankGram`, or its plain twin `lib_lightning.algorithm.gram.DenseGram`.

    Note:
        Source: arXiv 2405.10928, the Jacobian step of the transformation into the LIB. Random signs: Hutchinson (1990),
        https://doi.org/10.1080/03610919008812866. With ``z`` of random signs, ``E[(J^T z)(J^T z)^T] = J^T E[z z^T] J =
        J^T J``, and one vector-Jacobian product replaces one for each ``(t, i)``.
    """

    def __init__(
        self,
        d: int,
        C_next: Tensor,
        n_probes: int | None,
        generator: torch.Generator,
        groups: int = 1,
        reuse: bool = True,
        gram: Callable[[int, int], Gram] = LowRankGram,
    ) -> None:
        super().__init__(d, n_probes, groups, gram)
        self.C_next, self._reuse = C_next, reuse
        self._signs = [OrthogonalSigns(generator) for _ in self.halves]
        self._closed: ClosedMetric | None = None

    def add_batches(self, cache: SectionCache, index: int, phase: str) -> None:
        """See `Metric`."""
        # The edges of the section need the same gradients again, unless random combinations of them are summed.
        n_reused = self.C_next.shape[1] if self._reuse and self.n_probes is None else 0
        for _, _, section in cache.sections(phase, index, n_reused):
            self.update(section)

    def update(self, section: Section) -> None:
        """Add one batch.

        Args:
            section: The section after the node layer, at that batch.
        """
        self.count(section.a, section.mask_in, section.group_slices)
        if section.closed_form is not None:
            factors = section.closed_form.factors
            if self._closed is None or self._closed.factors is not factors:
                self._finish_closed()
                self._closed = ClosedMetric(factors, self.C_next, len(self.rows))
            for group, samples in section.group_slices:
                self._closed.add(section.closed_form, group, samples)
        elif self.n_probes is None:
            for gradients in section.output_gradients(self.C_next.to(section.a)):
                self.add(section.group_slices, gradients.g)
        else:
            self._sample(section)

    def _sample(self, section: Section) -> None:
        C = self.C_next.to(section.a)
        for half, k in enumerate(self.halves):
            if k == 0:
                continue
            signs = self._signs[half].draw(section.n * k, section.S_out * C.shape[1])
            # Consecutive vectors are orthogonal; those of one sample are consecutive. All of them are moved at once,
            # as the host waits for a device that it copies to.
            signs = signs.to(C.device).view(section.n, k, section.S_out, C.shape[1]).transpose(0, 1)
            for part in parts_of(signs.split(section.vectors_per_call)):
                self.add(section.group_slices, section.vjp(part.to(C) @ C.T), half)

    def _finish_closed(self) -> None:
        if self._closed is not None:
            V, sums = self._closed.sums()
            # An exact sum is what each of the probes gives in expectation.
            self._gram.add_product(V, (k * X for X in sums for k in self.halves))
            self._closed = None

    @property
    def gram(self) -> Gram:
        """See `GradientMetric`."""
        self._finish_closed()
        return super().gram
