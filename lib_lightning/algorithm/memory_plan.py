"""How much fits: samples go through a model in chunks, and vectors through a section in stacks, of bounded size."""

from __future__ import annotations

import itertools
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
from lib_lightning.model.batch import batch_size, slice_batch
from lib_lightning.model.capture import CapturedLayer
from lib_lightning.model.instrumented import InstrumentedModel

# Tensors of more numbers than this leave a CPU's caches, and each comes in newly mapped memory: twice the time.
_CPU_NUMBERS = 2**22
# Samples that show whether a batch can be cut into chunks.
_FEW = 8
# Forward mode differentiates a backward pass, whose intermediates are kept beside those of the forward pass.
_GRAPHS = 3
# A backward pass holds a few tensors of the size of the largest one at a time.
_WORKING = 4

# Default, in GiB, of how much memory a computation may take beside model and samples.
MEMORY_LIMIT = 2.0


@dataclass(frozen=True)
class MemoryPlan:
    """How much is computed at once.

    Attributes:
        samples: Most samples that go through the model together.
        stack_elements: About how many numbers one stack of vectors through a section may hold.
        groups: Groups of samples whose sums are kept apart; 1 for none.
        keep: Whether the graphs of all samples fit into memory at once.
        jacobians: Bytes of Jacobians to keep from the metric for the edges, where graphs are kept.
    """

    samples: int = 2**31
    stack_elements: int = STACK_ELEMENTS
    groups: int = GROUPS
    keep: bool = False
    jacobians: int = 0

    def halved(self, largest_batch: int) -> MemoryPlan:
        """Half of it, for batches of up to so many samples."""
        return MemoryPlan(
            max(1, min(self.samples, largest_batch) // 2), max(1, self.stack_elements // 2), max(1, self.groups // 2)
        )


@dataclass(frozen=True)
class Workload:
    """What is to be computed, as far as it decides how much memory that takes.

    Attributes:
        samples: Number of samples; 0 where it is not known.
        points: Points of the integration path, each with a graph of its own.
        lib: Whether node layers but the last are measured by a metric, so that wide ones need no covariance.
        fisher: Whether the last node layer has a metric, too.
    """

    samples: int = 0
    points: int = 1
    lib: bool = False
    fisher: bool = False


def plan_memory(
    instrumented: InstrumentedModel, batch: Any, memory_limit: int, demand: Workload = Workload()
) -> MemoryPlan:
    """Choose chunks that keep a computation within a memory budget, by what autograd keeps of a few samples.

    Args:
        instrumented: The model and its node layers.
        batch: One batch, of which a few samples are run.
        memory_limit: Memory to use beside the model and the batches, in bytes.
        demand: What is to be computed.

    Returns:
        The chunks.

    Raises:
        ActivationError: If a node layer is so wide that its covariance alone does not fit.
    """
    try:
        cuts, two, largest = _kept_by_autograd(instrumented, slice_batch(batch, 0, 2))
        # What is kept once, whatever the number of samples (weights, position tables), is in both.
        one = _kept_by_autograd(instrumented, slice_batch(batch, 0, 1))[1] if batch_size(batch) > 1 else 0
    except Exception as error:
        if is_out_of_memory(error):
            raise
        # Something in the batch is not one entry a sample, though it has that length: only the whole can be run.
        cuts, kept, largest = _kept_by_autograd(instrumented, batch)
        two, one = kept // max(1, batch_size(batch)), 0
    # A covariance and two maps for each node layer, and what eigenproblem and products of the widest one take. Of wide
    # node layers with a metric only the directions that are read count: how many is not known; a few hundred at least.
    widths = [cut.a.shape[-1] for cut in cuts]
    ranks = [min(d, DENSE_WIDTH) if demand.lib else d for d in widths[:-1]] + widths[-1:]
    matrices = 8 * (3 * sum(map(operator.mul, widths, ranks)) + 4 * max(map(operator.mul, widths, ranks)))
    if matrices > memory_limit:
        widest = cuts[widths.index(max(widths))].layer.name
        raise ActivationError(
            f"Node layer '{widest}' has {max(widths):,} features at each position: with the other node layers, "
            f"matrices of that size take {matrices / 2**30:.2g} GiB, more than memory_limit allows "
            f"({memory_limit / 2**30:.2g} GiB). Choose narrower node layers, or raise memory_limit."
        )
    # A metric for each node layer and the edges of each section, once for each group.
    sums = 8 * (sum(d * d + d * d_next for d, d_next in itertools.pairwise(ranks)) + demand.fisher * widths[-1] ** 2)
    groups = next((g for g in (GROUPS, GROUPS // 2, 2) if matrices + g * sums <= memory_limit // 2), 1)
    itemsize = cuts[0].a.element_size()
    ends = max(cut.a.numel() for cut in cuts)
    # Half for graphs, a quarter for stacks; allocators do not give back the rest.
    samples = memory_limit // 2 // (_GRAPHS * max(1, demand.points) * max(1, two - one))
    # What counts is the largest tensor on the way; sections know only their ends.
    stack = min(STACK_ELEMENTS, memory_limit // 4 // (_WORKING * itemsize)) * ends // max(ends, largest)
    # All samples at once: graphs, activations on either side of each cut, and a second graph for one chunk at a time.
    at_once = demand.samples * (two - one + 3 * itemsize * sum(cut.a.numel() // len(cut.a) for cut in cuts))
    rest = memory_limit // 2 - matrices - groups * sums - at_once
    keep = 0 < demand.samples <= samples and rest > 0
    if cuts[0].a.device.type == "cpu":
        samples = min(samples, _CPU_NUMBERS * len(cuts[0].a) // largest)
    return MemoryPlan(max(1, samples), max(1, stack), groups, keep, max(0, rest))


def _kept_by_autograd(instrumented: InstrumentedModel, batch: Any) -> tuple[list[CapturedLayer], int, int]:
    """Capture a batch; bytes that autograd keeps of it, and numbers in the largest tensor among them."""
    state = (*instrumented.model.parameters(), *instrumented.model.buffers())
    weights = {t.untyped_storage()._cdata for t in state if t.layout == torch.strided}
    kept: dict[int, int] = {}
    largest = 1

    def note(t: Tensor) -> Tensor:
        nonlocal largest
        if t.layout != torch.strided:
            return t
        storage = t.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
            largest = max(largest, t.numel())
        return t

    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            cuts = instrumented.capture(batch)
    except RuntimeError as error:
        if "saved tensor" not in str(error):
            raise
        # The model differentiates inside (torch.func), where nobody may look: as much at once as there is.
        cuts = instrumented.capture(batch)
    return cuts, sum(kept.values()), largest


def split_batches(instrumented: InstrumentedModel, batches: Sequence[Any], size: int) -> list[Any]:
    """Cut batches into chunks of samples.

    Args:
        instrumented: The model, which tells whether a batch can be cut at all.
        batches: Batches.
        size: Most samples in a chunk.

    Returns:
        MemoryPlan, in order; the batches as they are where no batch is larger, or where cut batches give other
        activations (something in the batch is not one entry a sample, though it has that length).
    """
    if all(batch_size(batch) <= size for batch in batches):
        return list(batches)
    large = next(batch for batch in batches if batch_size(batch) > size)
    half = max(1, min(_FEW, size) // 2)
    try:
        more, fewer = (instrumented.activations(slice_batch(large, 0, stop)) for stop in (2 * half, half))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return list(batches)
    # Other kernels may serve other batch sizes: equal up to rounding, which half precision makes large.
    same = all(
        a.shape[1:] == b.shape[1:] and bool((a[:half] - b).norm() <= torch.finfo(a.dtype).eps ** 0.5 * b.norm())
        for a, b in zip(more, fewer, strict=True)
    )
    if not same:
        # A model that draws random numbers draws others for another number of samples: that is no reason.
        instrumented.manual_seed(instrumented.seed + 1)
        other = instrumented.activations(slice_batch(large, 0, 2 * half))
        same = any(not torch.equal(a, b) for a, b in zip(more, other, strict=True))
    return [chunk for batch in batches for chunk in _chunks(batch, size)] if same else list(batches)


def _chunks(batch: Any, size: int) -> Iterator[Any]:
    for start in range(0, max(1, batch_size(batch)), size):
        yield slice_batch(batch, start, start + size)
