"""Gradients of what a model predicts, with respect to all of its node layers: metrics and importances from them.

A factor ``R`` of the output's Fisher information (`OutputDistribution.factor`) and vectors ``z`` over all output
positions and entries make gradients ``g = J^T R z``, one backward pass for each ``z``. Random signs have
``E[g g^T] = J^T F J``, in which different positions do not mix, as signs are independent; unit vectors sum to it
exactly. No matrix has the size of the output.

- *Metric:* ``M_out = 1/(n S) sum_x sum_s E[g_s g_s^T]``. To second order, a step ``v`` in the activations at one
  position moves the predictions by ``v M_out v^T / 2`` nats.
- *Importance of feature j for the output:* ``o_j = 1/2 1/(n S) sum_x sum_s E[(g_s . C^+_j)^2] fhat_{s,j}^2`` nats, what
  setting the feature to its mean at one position does to the predictions, to second order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.config import LIBConfig, final_kind
from lib_lightning.algorithm.gradient_metric import GradientMetric, GroupSlices, count_rows
from lib_lightning.algorithm.gram import Gram
from lib_lightning.algorithm.jackknife import leave_one_out, standard_error
from lib_lightning.algorithm.progress import phase_done
from lib_lightning.distributed.process_group import Reducible
from lib_lightning.jacobian.integrated_gradients import sections_between
from lib_lightning.jacobian.section import Section
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.loops import parts_of
from lib_lightning.model.node_layer import OUTPUT
from lib_lightning.model.output_distribution import OutputDistribution
from lib_lightning.model.precision import to_float64
from lib_lightning.model.vjp import apply_mask

# Names of phases, for progress.
OUTPUT_METRIC, OUTPUT_IMPORTANCE = "metric of the output", "importance for the output"
# Output positions times entries up to which a metric is the exact sum, and the random vectors otherwise.
EXACT_OUTPUTS, SAMPLED = 4096, 64
# Random vectors for importances: as many as make this number of gradients, but no fewer and no more than these.
_IMPORTANCE_ROWS, _IMPORTANCE_VECTORS = 2048, (2, 16)


@dataclass(frozen=True)
class LayerGradients:
    """Gradients with respect to one node layer, on one batch.

    Attributes:
        index: Index of the node layer.
        half: Which half of the random vectors they belong to.
        g: Gradients, zero at masked positions, shape ``(k, n, S, d)``.
    """

    index: int
    half: int
    g: Tensor


@dataclass(frozen=True)
class OutputBatch:
    """One batch of `OutputGradients`.

    Attributes:
        sections: The section after each node layer; of the last one, that to the model's output. If the last node layer
            is the output, it has none.
        last: Index of the last node layer.
        a: Activations of each node layer, shape ``(n, S, d)``.
        masks: Their masks, shape ``(n, S)``; None if all positions are valid.
        group_slices: Jackknife groups of the batch.
    """

    sections: Sequence[Section]
    last: int
    a: Sequence[Tensor]
    masks: Sequence[Tensor | None]
    group_slices: GroupSlices

    def backward(self, cotangents: Tensor, half: int, first: int = 0) -> Iterator[LayerGradients]:
        """Gradients with respect to node layers, from the last to the first.

        Args:
            cotangents: Vectors at the model's output, shape ``(k, n, S, d)``.
            half: Which half of the random vectors they belong to.
            first: Index of the first node layer whose gradients are needed.

        Yields:
            The gradients of each node layer.
        """
        g = cotangents
        if len(self.sections) == self.last:
            yield LayerGradients(self.last, half, apply_mask(g, self.masks[-1]))
        for index in reversed(range(first, len(self.sections))):
            g = self.sections[index].vjp(g)
            yield LayerGradients(index, half, g)


class OutputGradients:
    """Gradients of what the model predicts, batch by batch, each from a forward pass of its own.

    Args:
        instrumented: The model and its node layers. Call this within `model_session`.
        batches: The batches.
        distribution: What the output stands for.
        group_slices: Jackknife groups of each batch.
        stack_elements: About how many numbers a batch of vectors may have.
        seed: Seed of the random signs.
    """

    def __init__(
        self,
        instrumented: InstrumentedModel,
        batches: Sequence[Any],
        distribution: OutputDistribution,
        group_slices: Sequence[GroupSlices],
        stack_elements: int,
        seed: int = 0,
    ) -> None:
        self._instrumented, self._batches, self._distribution = instrumented, batches, distribution
        self._group_slices, self._stack_elements, self._seed = group_slices, stack_elements, seed
        self._layers = len(instrumented.layers)
        # Sections in which vectors are multiplied one by one.
        self._sequential_only: set[int] = set()

    def num_vectors(self, n_probes: int | None, exact_outputs: int, sampled: int) -> int | None:
        """How many random vectors to multiply for each sample.

        Args:
            n_probes: Their number, if the user gave one.
            exact_outputs: Output positions times entries up to which all of them are taken, one by one.
            sampled: Number of random vectors otherwise.

        Returns:
            The number; None for all unit vectors, if these are no more than the first two numbers.
        """
        outputs = self._distribution.positions * self._distribution.width
        if not outputs and self._batches:
            with torch.no_grad():
                outputs = self._capture(0)[-1].a[0].numel()
        return num_vectors(outputs, n_probes, exact_outputs, sampled)

    def batches(
        self, phase: str, halves: Sequence[int] | None, first: int = 0
    ) -> Iterator[tuple[OutputBatch, Iterator[LayerGradients]]]:
        """Iterate over the batches.

        Args:
            phase: Name of the phase; its progress is reported after each batch.
            halves: Number of random vectors per sample in each half; None for all unit vectors.
            first: Index of the first node layer whose gradients are needed.

        Yields:
            A batch, and the gradients of its node layers.
        """
        generator = torch.Generator().manual_seed(self._seed)
        for index in range(len(self._batches)):
            batch = self._batch(index)
            yield batch, self._gradients(batch, halves, generator, first)
            self._sequential_only |= {i for i, section in enumerate(batch.sections) if section.sequential_only}
            phase_done(phase)

    def _capture(self, index: int) -> list[Any]:
        self._instrumented.manual_seed(index)
        return self._instrumented.capture_to_output(self._batches[index])

    def _batch(self, index: int) -> OutputBatch:
        captured = self._capture(index)
        groups = self._group_slices[index]
        sections = [
            replace(section, group_slices=groups, sequential_only=i in self._sequential_only)
            for i, section in enumerate(sections_between(captured, self._stack_elements))
        ]
        return OutputBatch(
            sections,
            self._layers - 1,
            [layer.a.detach() for layer in captured],
            [layer.mask for layer in captured],
            groups,
        )

    def _gradients(
        self, batch: OutputBatch, halves: Sequence[int] | None, generator: torch.Generator, first: int
    ) -> Iterator[LayerGradients]:
        out, mask = batch.a[-1], batch.masks[-1]
        size = max(1, min(self._stack_elements // max(1, *(a.numel() for a in batch.a)), 2**31))
        parts = _unit_vectors(out, size) if halves is None else _signs(out, halves, size, generator)
        factor = self._distribution.factor(out)
        for half, z in parts:
            yield from batch.backward(apply_mask(factor(z), mask), half, first)


def _unit_vectors(a: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Unit vectors over positions and entries, the same for all samples, some at a time: ``(k, n, S, d)``."""
    n, S, d = a.shape
    for part in parts_of(torch.arange(S * d, device=a.device).split(size)):
        z = a.new_zeros(len(part), 1, S * d)
        z[torch.arange(len(part), device=a.device), 0, part] = 1
        yield 0, z.expand(-1, n, -1).unflatten(-1, (S, d))


def _signs(a: Tensor, halves: Sequence[int], size: int, generator: torch.Generator) -> Iterator[tuple[int, Tensor]]:
    """Random signs, some vectors at a time: ``(k, n, S, d)``."""
    for half, count in enumerate(halves):
        for start in parts_of(range(0, count, size)):
            yield half, _random_signs((min(size, count - start), *a.shape), generator, a)


def _random_signs(shape: Sequence[int], generator: torch.Generator, like: Tensor) -> Tensor:
    """Independent random signs with the type and device of another tensor, which do not depend on these."""
    size = math.prod(shape)
    # Drawn on the CPU, eight with one number: over a vocabulary, drawing them one by one takes as long as a product.
    draws = torch.randint(0, 256, (-(-size // 8),), dtype=torch.uint8, generator=generator, device="cpu")
    bits = torch.arange(256, device=like.device)[:, None] >> torch.arange(8, device=like.device) & 1
    signs = (2 * bits - 1).to(like.dtype)
    return signs[draws.to(like.device).int()].flatten()[:size].view(*shape)


def output_metrics(
    gradients: OutputGradients,
    layers: Sequence[int],
    widths: Sequence[int],
    n_probes: int | None,
    groups: int,
    gram: Callable[[int, int], Gram],
) -> dict[int, GradientMetric]:
    """The metrics ``M_out`` of some node layers, of the samples of this process.

    Args:
        gradients: Gradients of what the model predicts.
        layers: Indices of the node layers.
        widths: Number of features of every node layer.
        n_probes: Random vectors per sample; None for the exact sum.
        groups: Number of jackknife groups.
        gram: As for `GradientMetric`.

    Returns:
        The metrics by index of the node layer, not yet summed over processes.
    """
    metrics = {i: GradientMetric(widths[i], n_probes, groups, gram) for i in layers}
    halves = None if n_probes is None else next(iter(metrics.values())).halves
    for batch, found in gradients.batches(OUTPUT_METRIC, halves, min(layers)):
        for i, metric in metrics.items():
            metric.count(batch.a[i], batch.masks[i], batch.group_slices)
        for one in found:
            if one.index in metrics:
                metrics[one.index].add(batch.group_slices, one.g, one.half)
    return metrics


class OutputImportance(Reducible):
    """Streaming ``o_j = 1/2 1/(n S) sum_x sum_s E[(g_s . C^+_j)^2] fhat_{s,j}^2`` of one node layer, in nats.

    Args:
        basis: Basis of the node layer.
        n_vectors: Random vectors per sample; None for the exact sum.
        groups: Number of jackknife groups.

    Note:
        Source: second-order expansion of the Kullback-Leibler divergence, whose Hessian is the Fisher information.
    """

    sums = ("rows", "_total")

    def __init__(self, basis: Basis, n_vectors: int | None, groups: int = 1) -> None:
        self.basis, self.n_vectors = basis, n_vectors
        self.rows = torch.zeros(groups, dtype=torch.float64, device="cpu")
        self._total = torch.zeros(groups, basis.n_features, dtype=torch.float64, device=basis.mean.device)

    def count(self, batch: OutputBatch, index: int) -> None:
        """Count the samples and positions of one batch."""
        count_rows(self.rows, batch.a[index], batch.masks[index], batch.group_slices)

    def add(self, batch: OutputBatch, g: Tensor, parts: Tensor) -> None:
        """Add gradients of one batch.

        Args:
            batch: The batch.
            g: Gradients with respect to the node layer, shape ``(k, n, S, d)``.
            parts: `Basis.parts` of its activations, zero at masked positions, shape ``(n, S, c)``.
        """
        squares = to_float64(self.basis.effects(g, parts.to(g))).square().sum((0, 2))
        for group, samples in batch.group_slices:
            self._total[group] += squares[samples].sum(0)

    @property
    def value(self) -> Tensor:
        """``o_j`` in nats, shape ``(r,)``, float64."""
        return self._total.sum(0) / (2 * self.rows.sum() * (self.n_vectors or 1))

    @property
    def error(self) -> Tensor | None:
        """Its standard error, shape ``(r,)``, float64; None if there are too few samples for groups."""
        replicates = leave_one_out(self._total, self.rows) / (2 * (self.n_vectors or 1))
        return standard_error(replicates) if len(replicates) > 1 else None


def output_importances(
    gradients: OutputGradients, bases: Sequence[Basis], n_vectors: int | None, groups: int
) -> list[OutputImportance]:
    """The importances of all features for the output, of the samples of this process.

    Args:
        gradients: Gradients of what the model predicts.
        bases: Basis of each node layer.
        n_vectors: Random vectors per sample; None for the exact sum.
        groups: Number of jackknife groups.

    Returns:
        The importances of each node layer, not yet summed over processes.
    """
    importances = [OutputImportance(basis, n_vectors, groups) for basis in bases]
    for batch, found in gradients.batches(OUTPUT_IMPORTANCE, None if n_vectors is None else [n_vectors]):
        parts = []
        for i, importance in enumerate(importances):
            importance.count(batch, i)
            parts.append(apply_mask(importance.basis.parts(batch.a[i]).detach(), batch.masks[i]))
        for one in found:
            importances[one.index].add(batch, one.g, parts[one.index])
    return importances


def num_vectors(outputs: int, n_probes: int | None, exact_outputs: int, sampled: int) -> int | None:
    """How many random vectors to multiply for each sample.

    Args:
        outputs: Output positions times entries.
        n_probes: The number of vectors, if the user gave one.
        exact_outputs: Number of outputs up to which all unit vectors are taken if the user gave none.
        sampled: Number of random vectors otherwise.

    Returns:
        The number; None for all unit vectors, which are never more than the user's number.

    Example:
        >>> num_vectors(10, 16, 0, 64), num_vectors(1000, 16, 0, 64), num_vectors(1000, None, 100, 64)
        (None, 16, 64)
    """
    if outputs <= (exact_outputs if n_probes is None else n_probes):
        return None
    return sampled if n_probes is None else n_probes


def importance_vectors(config: LIBConfig, rows: int) -> int:
    """Number of random vectors per sample for importances, which samples and positions average over, too.

    Args:
        config: What to compute.
        rows: Number of samples times positions of a node layer.

    Returns:
        The number, no more than the user's number of probes.

    Example:
        >>> [importance_vectors(LIBConfig(), rows) for rows in (10, 512, 100_000)]
        [16, 4, 2]
    """
    needed = min(max(-(-_IMPORTANCE_ROWS // max(1, rows)), _IMPORTANCE_VECTORS[0]), _IMPORTANCE_VECTORS[1])
    return min(config.n_probes or needed, needed)


def is_output(taps: Sequence[str]) -> bool:
    """Whether a node layer is the model's output.

    Args:
        taps: Its taps.

    Returns:
        The answer.

    Example:
        >>> is_output(("output",)), is_output(("blocks.3",))
        (True, False)
    """
    return tuple(taps) == (OUTPUT,)


def measured_by_output(config: LIBConfig, count: int, taps: Sequence[str]) -> list[int]:
    """Indices of the node layers with a metric that gradients of the output make.

    Args:
        config: What to compute.
        count: Number of node layers.
        taps: Taps of the last one.

    Returns:
        The indices. The output itself is not among them: its metric is the Fisher information.

    Example:
        >>> measured_by_output(LIBConfig(metric="output"), 3, ["output"])
        [0, 1]
        >>> measured_by_output(LIBConfig(final_metric="fisher"), 3, ["blocks.3"])
        [2]
    """
    layers = list(range(count - 1)) if config.metric == "output" else []
    return layers + [count - 1] * (final_kind(config, taps) == "lib" and not is_output(taps))


def needs_output(config: LIBConfig, taps: Sequence[str]) -> bool:
    """Whether a basis depends on what the output stands for.

    Args:
        config: What to compute.
        taps: Taps of the last node layer.

    Returns:
        The answer.
    """
    return config.metric == "output" or final_kind(config, taps) == "lib"
