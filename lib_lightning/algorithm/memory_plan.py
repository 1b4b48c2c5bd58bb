"""How much is computed at once: chunks of samples through the model, and batches of vectors through a section."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib_lightning.algorithm.jackknife import GROUPS
from lib_lightning.algorithm.low_rank_gram import DENSE_WIDTH
from lib_lightning.errors import ActivationError, is_out_of_memory
from lib_lightning.jacobian.section import STACK_ELEMENTS
from lib_lightning.model.agreement import agree
from lib_lightning.model.capture import CapturedLayer
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.node_layer import OUTPUT
from lib_lightning.model.torch_internals import storage_key

# Default memory limit, in GiB.
MEMORY_LIMIT = 2.0

# Larger tensors do not fit into a CPU's caches, and each is in newly mapped memory: twice the time.
_CPU_NUMBERS = 2**22
_WITHOUT_OUTPUT = " Logits need not be one: without them, they measure the node layer before."
# Number of samples that show whether a batch can be split.
_FEW = 8
# Forward mode differentiates a backward pass, whose intermediate results are kept beside those of the forward pass.
_GRAPHS = 3
# Probabilities, vectors and their products, for a vocabulary larger than everything else.
_OUTPUTS = 8
# A backward pass has a few tensors of the size of the largest one at a time.
_WORKING = 4


@dataclass(frozen=True)
class MemoryPlan:
    """How much is computed at once.

    Attributes:
        samples: Largest number of samples in one forward pass.
        stack_elements: About how many numbers a batch of vectors through a section may have.
        groups: Number of jackknife groups, each with sums of its own; 1 for no standard errors.
        keep_graphs: Whether the autograd graphs of all samples are kept.
        product_bytes: Bytes of gradients to keep from the metric for the edges, if graphs are kept.
        peak_bytes: About how much memory that takes, in bytes, without such gradients; 0 if unknown.
        edge_bytes: Largest size of the matrices of one section between latents of dictionaries, in bytes.
    """

    samples: int = 2**31
    stack_elements: int = STACK_ELEMENTS
    groups: int = GROUPS
    keep_graphs: bool = False
    product_bytes: int = 0
    peak_bytes: int = 0
    edge_bytes: int = 2**29

    def halved(self, largest_batch: int) -> MemoryPlan:
        """A plan of half the size, without kept graphs.

        Args:
            largest_batch: Number of samples of the largest batch.

        Returns:
            The plan.
        """
        return MemoryPlan(
            max(1, min(self.samples, largest_batch) // 2),
            max(1, self.stack_elements // 2),
            max(1, self.groups // 2),
            edge_bytes=max(2**20, self.edge_bytes // 2),
        )


@dataclass(frozen=True)
class Workload:
    """What determines the memory that a computation needs.

    Attributes:
        samples: Number of samples; 0 if unknown.
        points: Number of points of the integration path, each of which has a graph.
        lib: Whether all node layers but the last have a metric, so that wide ones need no covariance.
        fisher: Whether the last node layer has a metric as well.
        output: Whether gradients of the model's output are needed.
    """

    samples: int = 0
    points: int = 1
    lib: bool = False
    fisher: bool = False
    output: bool = False


def plan_memory(
    instrumented: InstrumentedModel, batch: Any, memory_limit: int, workload: Workload = Workload()
) -> MemoryPlan:
    """Choose how much is computed at once, from what autograd saves for a few samples.

    Args:
        instrumented: The model and its node layers.
        batch: One batch, of which one or two samples are run.
        memory_limit: Memory to use in addition to the model and the batches, in bytes.
        workload: What is to be computed.

    Returns:
        The plan.

    Raises:
        ActivationError: If a node layer is so wide that its covariance alone does not fit.
    """
    n = instrumented.num_samples(batch)
    cut = instrumented.to_output if workload.output else instrumented
    try:
        captured, two, largest = saved_by_autograd(cut, instrumented.select(batch, slice(0, 2)))
        # What does not depend on the number of samples (weights, position embeddings) is in both.
        one = saved_by_autograd(cut, instrumented.select(batch, slice(0, 1)))[1] if n > 1 else 0
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # A tensor of the batch has the length of the batch by chance and must not be cut: run the whole batch.
        captured, saved, largest = saved_by_autograd(cut, batch)
        two, one = saved // max(1, n), 0
    output_bytes = captured[-1].a[0].numel() * captured[-1].a.element_size() if workload.output else 0
    captured = captured[: len(instrumented.layers)]
    # A covariance and two maps for each node layer, and the eigenproblem and products of the widest. A wide node layer
    # with a metric needs only the directions that are read: their number is unknown, at least a few hundred.
    widths = [layer.a.shape[-1] for layer in captured]
    ranks = [min(d, DENSE_WIDTH) if workload.lib else d for d in widths[:-1]] + widths[-1:]
    matrices = 8 * (3 * sum(map(operator.mul, widths, ranks)) + 4 * max(map(operator.mul, widths, ranks)))
    if matrices > memory_limit:
        widest = captured[widths.index(max(widths))].layer.name
        raise ActivationError(
            f"Node layer '{widest}' has {max(widths):,} features at each position: with the other node layers, "
            f"matrices of that size take {matrices / 2**30:.2g} GiB, more than memory_limit allows "
            f"({memory_limit / 2**30:.2g} GiB). Choose narrower node layers, or raise memory_limit."
            + _WITHOUT_OUTPUT
            * (widest == OUTPUT and len(captured) > 2)
        )
    # A metric for each node layer, and edges and attributions of each section, once for each group.
    sums = 8 * sum(d * d + 2 * d * d_next for d, d_next in itertools.pairwise(ranks))
    sums += 8 * workload.fisher * widths[-1] ** 2
    groups = next((g for g in (GROUPS, GROUPS // 2, 2) if matrices + g * sums <= memory_limit // 2), 1)
    itemsize = captured[0].a.element_size()
    outputs = max(layer.a.numel() for layer in captured)
    # Half for graphs and a quarter for vectors; the rest is lost to fragmentation.
    samples = memory_limit // 2 // (_GRAPHS * max(1, workload.points) * max(1, two - one) + _OUTPUTS * output_bytes)
    # Sections know only the sizes of their inputs and outputs, but the largest tensor between them needs the memory.
    stack = min(STACK_ELEMENTS, memory_limit // 4 // (_WORKING * itemsize)) * outputs // max(outputs, largest)
    # Kept graphs: those of all samples, activations on both sides of each cut, and a second graph for one chunk.
    per_sample = two - one + 3 * itemsize * sum(layer.a.numel() // len(layer.a) for layer in captured)
    left = memory_limit // 2 - matrices - groups * sums - workload.samples * per_sample
    keep_graphs = 0 < workload.samples <= samples and left > 0
    if captured[0].a.device.type == "cpu":
        samples = min(samples, _CPU_NUMBERS * len(captured[0].a) // largest)
    peak_bytes = matrices + groups * sums + _WORKING * itemsize * stack * max(outputs, largest) // outputs
    at_once = min(samples, workload.samples) if workload.samples else samples
    peak_bytes += at_once * _GRAPHS * max(1, workload.points) * max(1, two - one)
    if keep_graphs:
        peak_bytes += workload.samples * per_sample
    return MemoryPlan(max(1, samples), max(1, stack), groups, keep_graphs, max(0, left), peak_bytes, memory_limit // 4)


def saved_by_autograd(instrumented: InstrumentedModel, batch: Any) -> tuple[list[CapturedLayer], int, int]:
    """Capture a batch; return also the bytes that autograd saves, and the size of the largest saved tensor."""
    state = (*instrumented.model.parameters(), *instrumented.model.buffers())
    weights = {storage_key(t) for t in state if t.layout == torch.strided}
    saved: dict[int, int] = {}
    largest = 1

    def note(t: Tensor) -> Tensor:
        nonlocal largest
        if t.layout != torch.strided:
            return t
        if (key := storage_key(t)) not in weights:
            saved[key] = t.untyped_storage().nbytes()
            largest = max(largest, t.numel())
        return t

    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            captured = instrumented.capture(batch)
    except RuntimeError as error:
        if "saved tensor" not in str(error):
            raise
        # The model itself differentiates (torch.func), which forbids hooks on saved tensors: assume that nothing is
        # saved, so that the number of samples is not limited.
        captured = instrumented.capture(batch)
    return captured, sum(saved.values()), largest


def split_batches(instrumented: InstrumentedModel, batches: Sequence[Any], size: int) -> list[Any]:
    """Split batches into chunks of samples.

    Args:
        instrumented: The model, which is run to check whether batches can be split at all.
        batches: Batches.
        size: Largest number of samples in a chunk.

    Returns:
        The chunks, in order. The batches themselves if none of them is larger, or if splitting changes activations,
        because a tensor of the batch has the length of the batch by chance.
    """
    num_samples = instrumented.num_samples
    if all(num_samples(batch) <= size for batch in batches):
        return list(batches)
    large = next(batch for batch in batches if num_samples(batch) > size)
    half = max(1, min(_FEW, size) // 2)
    try:
        more, fewer = (
            instrumented.activations(instrumented.select(large, slice(0, stop))) for stop in (2 * half, half)
        )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return list(batches)
    # Other batch sizes may use other kernels: equal up to rounding, which half precision makes large.
    same = all(agree(a[:half], b, torch.finfo(a.dtype).eps ** 0.5) for a, b in zip(more, fewer, strict=True))
    if not same:
        # A model that draws random numbers draws others for another number of samples, which is no reason.
        instrumented.manual_seed(instrumented.seed + 1)
        other = instrumented.activations(instrumented.select(large, slice(0, 2 * half)))
        same = any(not torch.equal(a, b) for a, b in zip(more, other, strict=True))
    return [chunk for batch in batches for chunk in _chunks(instrumented, batch, size)] if same else list(batches)


def _chunks(instrumented: InstrumentedModel, batch: Any, size: int) -> Iterator[Any]:
    if not instrumented.layout(batch).can_split(batch):
        yield batch
        return
    n = max(1, instrumented.num_samples(batch))
    size = math.ceil(n / math.ceil(n / size))  # of about equal size: a last one of few samples takes as long as others
    for start in range(0, n, size):
        yield instrumented.select(batch, slice(start, start + size))
