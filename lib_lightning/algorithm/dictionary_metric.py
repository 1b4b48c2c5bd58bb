"""The Jacobian metric of a node layer in front of one whose features are latents of a dictionary."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lib_lightning.algorithm.active_latents import ActiveLatents
from lib_lightning.algorithm.dictionary_basis import DictionaryBasis
from lib_lightning.algorithm.gradient_metric import GradientMetric
from lib_lightning.algorithm.gram import Gram
from lib_lightning.algorithm.section_cache import SectionCache
from lib_lightning.jacobian.section import Section
from lib_lightning.model.loops import parts_of


class DictionaryMetric(GradientMetric):
    """Streaming ``M = 1/(n S) sum_x sum_{t,i} sum_s g g^T`` with ``g = d f'_{t,i} / d a_s`` of active latents ``i``.

    The error of the dictionary is not among them. See `lib_lightning.algorithm.metric.Metric` for the methods.

    Args:
        d: Width of the node layer.
        after: Basis of the next node layer.
        n_probes: None for every active latent; a number ``k`` for so many combinations of them with random signs.
        generator: Source of the random signs, on the CPU.
        groups: Number of jackknife groups.
        gram: As for `GradientMetric`.

    Note:
        Source: arXiv 2405.10928, the Jacobian step of the transformation into the LIB, with the derivatives of the
        encoder in place of ``C^{l+1}``.
    """

    def __init__(
        self,
        d: int,
        after: DictionaryBasis,
        n_probes: int | None,
        generator: torch.Generator,
        groups: int,
        gram: Callable[[int, int], Gram],
    ) -> None:
        super().__init__(d, n_probes, groups, gram)
        self._after, self._generator = after, generator

    def add_batches(self, cache: SectionCache, index: int, phase: str) -> None:
        """See `Metric`."""
        for _, _, section in cache.sections(phase, index):
            self.update(section)

    def update(self, section: Section) -> None:
        """Add one batch.

        Args:
            section: The section after the node layer, at that batch.
        """
        self.count(section.a, section.mask_in, section.group_slices)
        active = ActiveLatents.of(self._after, section.a_out, section.mask_out)
        n, S, d = active.a.shape
        if self.n_probes is not None:
            for half, k in enumerate(self.halves):
                for part in parts_of(list(range(0, k, section.vectors_per_call))):
                    shape = (min(section.vectors_per_call, k - part), *active.index.shape)
                    signs = 2 * torch.randint(2, shape, generator=self._generator, device="cpu") - 1
                    u = torch.einsum("qnsp,nspd->qnsd", signs.to(active.a), active.gradients)
                    self.add(section.group_slices, section.vjp(u), half)
            return
        samples = torch.arange(n, device=active.a.device)
        for part in parts_of(list(active.pairs().T.split(section.vectors_per_call))):
            t, p = part // max(1, active.K), part % max(1, active.K)
            u = active.a.new_zeros(len(part), n, S, d)
            u[torch.arange(len(part), device=t.device)[:, None], samples, t] = active.gradients[samples, t, p]
            self.add(section.group_slices, section.vjp(u))
