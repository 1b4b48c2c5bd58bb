"""All batches, run through the live model no more often than memory demands.

Where the graphs of all batches fit into memory, one forward pass serves everything: moments, bases and edges. Else each
step runs the batches anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lib_lightning.algorithm.jackknife import group_slices
from lib_lightning.algorithm.memory_plan import MemoryPlan
from lib_lightning.algorithm.progress import phase_done
from lib_lightning.errors import is_out_of_memory
from lib_lightning.jacobian.closed_form_detect import SAMPLES, ClosedFormDetector
from lib_lightning.jacobian.integrated_gradients import sections, sections_between
from lib_lightning.jacobian.section import Section
from lib_lightning.model.autograd_graph import saved_tensors_intact
from lib_lightning.model.batch import batch_size, slice_batch
from lib_lightning.model.capture import CapturedLayer, rows_of
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.preserve import tensors_unchanged

Tick = Callable[[str], None]


class SectionCache:
    """Goes through all batches of this process, step after step.

    Args:
        instrumented: The model and its node layers.
        batches: The batches.
        chunks: How much fits into memory.
        integration_steps: As for `lib_lightning.jacobian.integrated_gradients.sections`.
        closed_forms: Whether to look for closed forms.
        tick: Called after each batch of each step, with the name of the step.

    Attributes:
        unstackable: Sections in which vectors go one by one, because an operation asks for it.
    """

    def __init__(
        self,
        instrumented: InstrumentedModel,
        batches: Sequence[Any],
        chunks: MemoryPlan,
        integration_steps: int = 0,
        closed_forms: bool = True,
        tick: Tick = lambda step: None,
    ) -> None:
        self.instrumented, self.batches, self.chunks, self.tick = instrumented, batches, chunks, tick
        self.integration_steps = integration_steps
        self.unstackable: set[int] = set()
        # Along an integration path slopes are not those at the activations.
        self._recognitions = (
            [ClosedFormDetector() for _ in instrumented.layers[1:]] if closed_forms and not integration_steps else []
        )
        self._keep = chunks.keep and not integration_steps
        self._jacobians = chunks.jacobians
        self._kept: list[list[Section]] = []
        self._spans: list[list[tuple[int, slice]]] = []

    def first(self) -> Iterator[list[CapturedLayer]]:
        """Run all batches for the first time.

        Yields:
            The node layers at each batch.
        """
        self._learn()
        as_before = tensors_unchanged(self.instrumented.model) if self._keep else None
        sizes = []
        for index, batch in enumerate(self.batches):
            self.instrumented.manual_seed(index)
            with torch.set_grad_enabled(self._keep):
                cuts = self.instrumented.capture(batch)
            yield cuts
            sizes.append(cuts[0].a.shape[0])
            if self._keep:
                self._kept.append(self._ready(sections_between(cuts, self.chunks.stack_elements)))
            self.tick("moments")
        # A model that writes into its own tensors has perhaps written over what the first graphs hold.
        if as_before is not None and not (as_before() and self._still_good()):
            self._kept = []
        starts = itertools.accumulate(sizes, initial=0)
        groups = self.chunks.groups
        self._spans = [
            list(group_slices(start, start + n, sum(sizes), groups)) for start, n in zip(starts, sizes, strict=False)
        ]

    def sections(self, step: str, means: Sequence[Tensor], only: int | None = None) -> Iterator[tuple[int, Section]]:
        """Go through the sections of all batches.

        Args:
            step: Name of the step.
            means: ``mu`` of each node layer.
            only: Index of the only section that is wanted; None for all.

        Yields:
            The index of a section and the section, batch by batch.
        """
        for index, batch in enumerate(self.batches):
            for i, section in enumerate(self._sections_of(index, batch, means, only)):
                if only in (None, i):
                    if i in self.unstackable:
                        section.stack = 1
                    section.spans = self._spans[index]
                    yield i, section
                    section.forget_products()
                    if section.unstackable:
                        self.unstackable.add(i)
            self.tick(step)

    @property
    def kept(self) -> bool:
        """Whether the graphs of all batches are kept, now that they have been run."""
        return bool(self._kept)

    def keep_jacobian(self, i: int, r_out: int) -> None:
        """Have what is computed for the metric of a section serve its edges, too, if there is memory for it.

        Args:
            i: Index of the section.
            r_out: Number of features of the node layer after it.
        """
        sections = [sections[i] for sections in self._kept if sections[i].closed is None]
        needed = sum(section.S_out * r_out * section.a.numel() * section.a.element_size() for section in sections)
        if needed <= self._jacobians:
            self._jacobians -= needed
            for section in sections:
                section.keeps_jacobian = True

    def rows(self, step: str, i: int) -> Iterator[tuple[Tensor, int]]:
        """Go through the activations of one node layer, at the positions that count.

        Args:
            step: Name of the step.
            i: Index of the node layer.

        Yields:
            One vector of activations a row, ``(m, d)``, and the group of samples that they belong to.
        """
        for index, batch in enumerate(self.batches):
            a, mask = self._activations(index, batch, i)
            for group, span in self._spans[index]:
                yield rows_of(a[span], None if mask is None else mask[span]), group
            self.tick(step)

    def _activations(self, index: int, batch: Any, i: int) -> tuple[Tensor, Tensor | None]:
        if self._kept:
            sections = self._kept[index]
            if i < len(sections):
                return sections[i].a, sections[i].mask_in
            return sections[-1].a_out, sections[-1].mask_out
        self.instrumented.manual_seed(index)
        with torch.no_grad():
            cut = self.instrumented.capture(batch)[i]
        return cut.a, cut.mask

    def _sections_of(self, index: int, batch: Any, means: Sequence[Tensor], only: int | None) -> list[Section]:
        if self._kept:
            return self._kept[index]
        self.instrumented.manual_seed(index)
        found = sections(self.instrumented, batch, means, self.integration_steps, self.chunks.stack_elements)
        phase_done("forward passes")
        return self._ready(found, only)

    def _ready(self, found: list[Section], only: int | None = None) -> list[Section]:
        for i, (recognise, section) in enumerate(zip(self._recognitions, found, strict=False)):
            if only in (None, i):
                section.closed = recognise(section)
                if section.closed is not None:
                    section.forget_graph()
        return found

    def _learn(self) -> None:
        """Read closed forms off the first samples of the first batch."""
        if not self._recognitions or not self.batches:
            return
        self.instrumented.manual_seed(0)
        batch = self.batches[0]
        few = slice_batch(batch, 0, SAMPLES) if batch_size(batch) > SAMPLES else batch
        try:
            cuts = self.instrumented.capture(few)
        except Exception as error:
            if few is batch or is_out_of_memory(error):
                raise
            # Something in it is not one entry a sample, though it has that length: all of it, then.
            cuts = self.instrumented.capture(batch)
        found = sections_between(cuts, self.chunks.stack_elements)
        for recognition, section in zip(self._recognitions, found, strict=True):
            recognition.learn(section)

    def _still_good(self) -> bool:
        """Whether the graphs of all batches have outlived the later ones."""
        try:
            for section in itertools.chain(*self._kept[:-1]):
                ends = [end for point in section.points for end in point.after.outputs]
                if section.closed is None and not all(map(saved_tensors_intact, ends)):
                    section.vjp(torch.zeros_like(section.a_out)[None])
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            return False
        return True
