"""Activations and sections of all batches: kept from the first forward pass, or recomputed for each phase.

`SectionCache.collect` runs all batches once. If their autograd graphs fit into memory, it returns `KeptSections`, and
one forward pass serves moments, bases and edges; else `RerunSections`, which runs each batch again for every phase.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lib_lightning.algorithm.jackknife import group_slices
from lib_lightning.algorithm.memory_plan import MemoryPlan
from lib_lightning.algorithm.progress import phase_done
from lib_lightning.errors import is_out_of_memory
from lib_lightning.jacobian.closed_form_detect import ClosedForms, NoClosedForms
from lib_lightning.jacobian.integrated_gradients import sections, sections_between
from lib_lightning.jacobian.section import Gradients, Section
from lib_lightning.model.autograd_graph import saved_tensors_intact
from lib_lightning.model.capture import CapturedLayer, rows_of
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.saved_state import tensors_unchanged

# Names of phases, for progress: the first pass; sections that are made again; features of all samples, where fewer have
# sections.
MOMENTS, FORWARD_PASSES, FEATURES = "moments", "forward passes", "features"


@dataclass(frozen=True)
class _Batches:
    """What is needed to run all batches of this process.

    Attributes:
        instrumented: The model and its node layers.
        batches: The batches.
        plan: Memory plan; its `keep_graphs` decides whether graphs are kept.
        closed_forms: Where closed forms of sections are looked up.
        integration_steps: As for `lib_lightning.jacobian.integrated_gradients.sections`.
    """

    instrumented: InstrumentedModel
    batches: Sequence[Any]
    plan: MemoryPlan
    closed_forms: ClosedForms
    integration_steps: int

    def capture(self, index: int) -> list[CapturedLayer]:
        """Run one batch."""
        self.instrumented.manual_seed(index)
        return self.instrumented.capture(self.batches[index])

    def with_closed_form(self, i: int, section: Section) -> Section:
        """The section with its closed form, if it has one, in place of its graph."""
        form = self.closed_forms.closed_form_of(i, section)
        return section if form is None else replace(section, closed_form=form, points=())


class SectionCache(ABC):
    """The activations and sections of all batches of this process, for one phase of the algorithm after another.

    Args:
        source: What is needed to run the batches.
        sizes: Number of samples of each batch.

    Attributes:
        is_cached: Whether no batch is run again.
        num_samples: Number of samples.
        group_slices: Jackknife groups of each batch: number of the group, and slice of its samples.
    """

    is_cached: ClassVar[bool]

    def __init__(self, source: _Batches, sizes: Sequence[int]) -> None:
        self._source = source
        self.num_samples = sum(sizes)
        starts = itertools.accumulate(sizes, initial=0)
        self.group_slices = [
            list(group_slices(start, start + n, sum(sizes), source.plan.groups))
            for start, n in zip(starts, sizes, strict=False)
        ]
        self._sequential_only: set[int] = set()
        # Gradients of next-layer features, by batch and section, kept from the metric for the edges.
        self._products: dict[tuple[int, int], list[Gradients]] = {}
        self._free_bytes = source.plan.product_bytes if self.is_cached else 0

    @staticmethod
    def collect(
        instrumented: InstrumentedModel,
        batches: Sequence[Any],
        plan: MemoryPlan,
        closed_forms: type[ClosedForms],
        integration_steps: int,
        visit: Callable[[list[CapturedLayer]], None],
        phase: str = MOMENTS,
    ) -> SectionCache:
        """Run all batches for the first time.

        Args:
            instrumented: The model and its node layers.
            batches: The batches.
            plan: Memory plan; its `keep_graphs` decides whether graphs are kept.
            closed_forms: How closed forms are found.
            integration_steps: As for `lib_lightning.jacobian.integrated_gradients.sections`.
            visit: Called with the captured node layers of each batch.
            phase: Name of the phase; its progress is reported after each batch.

        Returns:
            The sections of all batches.
        """
        keep = plan.keep_graphs and not integration_steps
        # Along an integration path the derivatives are not those at the activations.
        fitted = (NoClosedForms if integration_steps else closed_forms).fit(instrumented, batches)
        source = _Batches(instrumented, batches, plan, fitted, integration_steps)
        unchanged = tensors_unchanged(instrumented.model) if keep else None
        kept: list[list[Section]] = []
        sizes = []
        for index in range(len(batches)):
            with torch.set_grad_enabled(keep):
                captured = source.capture(index)
            visit(captured)
            sizes.append(captured[0].a.shape[0])
            if keep:
                found = sections_between(captured, plan.stack_elements)
                kept.append([source.with_closed_form(i, section) for i, section in enumerate(found)])
            phase_done(phase)
        # A model that writes into its own tensors may have overwritten what the graphs of earlier batches have saved.
        if unchanged is not None and unchanged() and _all_intact(kept):
            return KeptSections(source, sizes, kept)
        return RerunSections(source, sizes)

    @property
    def sequential_sections(self) -> list[int]:
        """Indices of sections in which vectors were multiplied one by one: an operation has no batching rule."""
        return sorted(self._sequential_only)

    def path_from(self, means: Sequence[Tensor]) -> SectionCache:
        """The same sections, for integration paths that start at the means of the node layers.

        Args:
            means: ``mu`` of each node layer, shape ``(d,)``.

        Returns:
            The sections.
        """
        return self

    def sections(self, phase: str, only: int | None = None, n_reused: int = 0) -> Iterator[tuple[int, int, Section]]:
        """Iterate over the sections of all batches.

        Args:
            phase: Name of the phase; its progress is reported after each batch of a single section.
            only: Index of a single section; None for all.
            n_reused: Number of next-layer features whose gradients are needed again in a later phase, and therefore
                kept as far as there is memory.

        Yields:
            Index of the batch, index of the section, and the section, batch by batch.
        """
        for index in range(len(self._source.batches)):
            for i, section in self._sections_of(index, only):
                products = self._products.pop((index, i), None)
                needed = section.S_out * n_reused * section.a.numel() * section.a.element_size()
                if products is None and section.closed_form is None and 0 < needed <= self._free_bytes:
                    self._free_bytes -= needed
                    products = []
                # A copy, so that whatever a phase computes of the section is freed after it.
                copied = replace(
                    section,
                    group_slices=self.group_slices[index],
                    sequential_only=i in self._sequential_only,
                    cached_products=products,
                )
                yield index, i, copied
                if copied.sequential_only:
                    self._sequential_only.add(i)
                if n_reused and products:
                    self._products[index, i] = products
            if only is not None:
                phase_done(phase)

    def rows(self, phase: str, i: int) -> Iterator[tuple[Tensor, int]]:
        """Iterate over the activations of one node layer at valid positions.

        Args:
            phase: Name of the phase; its progress is reported after each batch.
            i: Index of the node layer.

        Yields:
            Activations, one vector a row, ``(m, d)``, and the jackknife group that they belong to.
        """
        for index in range(len(self._source.batches)):
            a, mask = self._activations_of(index)[i]
            for group, samples in self.group_slices[index]:
                yield rows_of(a[samples], None if mask is None else mask[samples]), group
            phase_done(phase)

    @abstractmethod
    def _sections_of(self, index: int, only: int | None) -> list[tuple[int, Section]]:
        """The sections of one batch, or a single one of them, with their indices."""

    def activations(self, phase: str) -> Iterator[list[tuple[Tensor, Tensor | None]]]:
        """Iterate over the activations of all node layers.

        Args:
            phase: Name of the phase; its progress is reported after each batch.

        Yields:
            For each batch, activations ``(n, S, d)`` of each node layer, and their mask ``(n, S)``.
        """
        for index in range(len(self._source.batches)):
            yield self._activations_of(index)
            phase_done(phase)

    @abstractmethod
    def _activations_of(self, index: int) -> list[tuple[Tensor, Tensor | None]]:
        """Activations ``(n, S, d)`` of the node layers on one batch, and their masks ``(n, S)``."""


class KeptSections(SectionCache):
    """Sections whose graphs are kept from the first forward pass.

    Args:
        source: What is needed to run the batches.
        sizes: Number of samples of each batch.
        kept: The sections of each batch.
    """

    is_cached = True

    def __init__(self, source: _Batches, sizes: Sequence[int], kept: Sequence[Sequence[Section]]) -> None:
        super().__init__(source, sizes)
        self._kept = kept

    def _sections_of(self, index: int, only: int | None) -> list[tuple[int, Section]]:
        return [(i, section) for i, section in enumerate(self._kept[index]) if only in (None, i)]

    def _activations_of(self, index: int) -> list[tuple[Tensor, Tensor | None]]:
        found = self._kept[index]
        return [*((section.a, section.mask_in) for section in found), (found[-1].a_out, found[-1].mask_out)]


class RerunSections(SectionCache):
    """Sections of batches that are run again for each phase: the plain twin of `KeptSections`.

    Args:
        source: What is needed to run the batches.
        sizes: Number of samples of each batch.
        means: ``mu`` of each node layer, where integration paths start.
    """

    is_cached = False

    def __init__(self, source: _Batches, sizes: Sequence[int], means: Sequence[Tensor] = ()) -> None:
        super().__init__(source, sizes)
        self._sizes, self._means = sizes, means

    def path_from(self, means: Sequence[Tensor]) -> SectionCache:
        """See `SectionCache`."""
        return RerunSections(self._source, self._sizes, means)

    def _sections_of(self, index: int, only: int | None) -> list[tuple[int, Section]]:
        source = self._source
        source.instrumented.manual_seed(index)
        found = sections(
            source.instrumented,
            source.batches[index],
            self._means,
            source.integration_steps,
            source.plan.stack_elements,
        )
        phase_done(FORWARD_PASSES)
        return [(i, source.with_closed_form(i, section)) for i, section in enumerate(found) if only in (None, i)]

    def _activations_of(self, index: int) -> list[tuple[Tensor, Tensor | None]]:
        with torch.no_grad():
            return [(captured.a, captured.mask) for captured in self._source.capture(index)]


def _all_intact(kept: Sequence[Sequence[Section]]) -> bool:
    """Whether the graphs of all batches can still be differentiated after later batches have run."""
    try:
        for section in itertools.chain(*kept[:-1]):
            outputs = [output for point in section.points for output in point.after.outputs]
            if section.closed_form is None and not all(map(saved_tensors_intact, outputs)):
                section.vjp(torch.zeros_like(section.a_out)[None])
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return False
    return True
