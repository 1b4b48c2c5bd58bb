"""What a graph will cost: seconds, memory and the size of its file, from counts of operations and a short trial."""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.algorithm.effort import EffortPlan, ModelCost
from lib_lightning.algorithm.examples import bytes_per_feature
from lib_lightning.algorithm.memory_plan import MemoryPlan
from lib_lightning.algorithm.output_changes import TOP
from lib_lightning.algorithm.progress import on_phase
from lib_lightning.algorithm.section_cache import MOMENTS
from lib_lightning.errors import counted
from lib_lightning.model.loops import LoopTrial, loops_shortened

# A trial has at most this share of the operations of the graph, as far as few samples allow.
_TRIAL_SHARE = 0.05
# Operations that a trial may have in any case: about a second.
_TRIAL_OPERATIONS = 2e10
# Samples of a trial, at least; and rows of activations for each of their dimensions.
_TRIAL_SAMPLES, _ROWS_PER_DIRECTION = 8, 1.25
# Calls of each loop over products that a trial does, about.
_TRIAL_CALLS = 6
# Seconds between two readings of the memory.
_READ_EVERY = 0.002
# Bytes of a file beside its tensors: names, settings, notes.
_HEADER = 2048


@dataclass(frozen=True)
class CostEstimate:
    """What a graph, and a snapshot of it, will cost on this machine.

    Attributes:
        plan: What is computed. It follows from shapes and counts of operations, the same on all machines.
        seconds: Predicted time, in seconds, with the present number of threads.
        peak_bytes: Predicted largest memory of the process in bytes, with what it holds now; on an accelerator, of the
            accelerator.
        file_bytes: Predicted size of its basis file in bytes; labels and the values by which features are tracked come
            on top.
        threads: Number of threads of torch.
        device: Where it is computed.
        num_features: Predicted number of features of each node layer.
    """

    plan: EffortPlan
    seconds: float
    peak_bytes: int
    file_bytes: int
    threads: int
    device: torch.device
    num_features: tuple[int, ...]

    @property
    def where(self) -> str:
        """Where it is computed, in words."""
        return counted(self.threads, "thread") if self.device.type == "cpu" else str(self.device)

    def __str__(self) -> str:
        return (
            f"{self.plan}: about {duration(self.seconds)} with {self.where}, {size(self.peak_bytes)} of memory at its "
            f"peak, and {size(self.file_bytes)} for each file"
        )


def duration(seconds: float) -> str:
    """A duration in words, with two digits.

    Example:
        >>> duration(0.1234), duration(59), duration(200), duration(10_000)
        ('0.12 s', '59 s', '3.3 min', '2.8 h')
    """
    for length, name in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 1.95 * length:
            return f"{seconds / length:.2g} {name}"
    return f"{seconds:.2g} s" if seconds < 99 else f"{seconds:.0f} s"


def size(num_bytes: float) -> str:
    """A number of bytes in words.

    Example:
        >>> size(2_000), size(3_500_000), size(3 * 2**30)
        ('2.0 kB', '3.5 MB', '3.2 GB')
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes / 1e3:.1f} kB"


def trial_size(cost: ModelCost, config: LIBConfig, num_samples: int, chunk: int) -> tuple[int, int]:
    """Number of samples in a chunk of a trial, and number of its chunks.

    Chunks are those of the graph, as far as a trial, which shortens loops over products, then is a small part of it.

    Args:
        cost: Cost of the model.
        config: What the graph computes.
        num_samples: Its number of samples.
        chunk: Number of samples in one of its chunks.

    Returns:
        The two numbers. There are two chunks, the first of which may take longer than all others, or one with all
        samples.
    """
    chunk = min(chunk, num_samples)
    shapes = [section.shape_in for section in cost.sections] + [cost.sections[-1].shape_out]
    # Fewer rows of activations would have fewer features.
    fewest = max(_TRIAL_SAMPLES, *(math.ceil(_ROWS_PER_DIRECTION * d / S) for S, d in shapes))
    allowed = max(_TRIAL_OPERATIONS, _TRIAL_SHARE * cost.of_graph(config, num_samples))

    def operations(n: int) -> float:
        return cost.steps(config, n, _TRIAL_CALLS).total * (1 if n == num_samples else 2)

    n = chunk
    while n // 2 >= fewest and operations(n) > allowed:
        n //= 2
    return n, 1 if n == num_samples else 2


class Trial:
    """Times a graph of few samples, in which loops over products are shortened, to predict that of all samples.

    Args:
        per_batch: How often each phase of a graph of `MANY` batches is reported.
        device: Where it is computed.
    """

    MANY = 1000

    def __init__(self, per_batch: Mapping[str, int], device: torch.device) -> None:
        self._per_batch = per_batch
        self._clock = partial(_now, device)
        self._loops = LoopTrial(self._clock)
        self._seconds: dict[str, list[float]] = defaultdict(list)
        self._last = 0.0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """A block in which the small graph is computed."""
        self._last = self._now()
        with loops_shortened(self._loops), on_phase(self._add):
            yield

    def _now(self) -> float:
        return self._clock() + self._loops.seconds

    def _add(self, phase: str) -> None:
        now = self._now()
        self._seconds[phase].append(now - self._last)
        self._last = now

    def seconds(self, chunks: int, repeats: float, with_jacobians: float) -> float:
        """Seconds of the graph of all samples.

        Args:
            chunks: Number of chunks in the small graph, 1 or 2.
            repeats: Number of such chunks that all samples make.
            with_jacobians: Number of such chunks that the samples with Jacobians make.

        Returns:
            The seconds.
        """
        total = 0.0
        # Features of samples without Jacobians take another pass, about as long as that for the moments.
        passes = 1 if with_jacobians == repeats else 2
        for phase, spent in self._seconds.items():
            # The last report of some phases is for what is computed of all batches together.
            once = self._per_batch.get(phase, 0) in (1, self.MANY + 1)
            total += spent[-1] * once
            batches = spent[:-1] if once else spent
            first = sum(batches[::chunks])
            later = sum(batches[1::chunks]) if chunks > 1 else first
            count = passes * repeats if phase == MOMENTS else with_jacobians
            total += first + max(0.0, count - 1) * later
        return total


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        with suppress(AttributeError, RuntimeError, ValueError):  # a device that torch.accelerator does not know
            torch.accelerator.synchronize(device)
    return time.perf_counter()


def kept_bytes(cost: ModelCost, plan: EffortPlan, config: LIBConfig, memory: MemoryPlan, itemsize: int) -> int:
    """Memory of the products that an exact metric keeps for the edges, in bytes.

    Args:
        cost: Cost of the model.
        plan: What is computed.
        config: Its configuration.
        memory: How much is computed at once.
        itemsize: Bytes of a number in the computation.

    Returns:
        Bytes; 0 without kept graphs.
    """
    if not memory.keep_graphs or config.n_probes is not None or config.basis != "lib" or config.metric != "next":
        return 0
    # All products of a section at a chunk of samples, or none; from the last section to the first.
    num_samples = min(plan.num_samples, plan.jacobian_samples or plan.num_samples)
    chunk = min(num_samples, memory.samples)
    kept = 0
    for section in reversed(cost.sections):
        (S, d), (S_out, d_out) = section.shape_in, section.shape_out
        needed = chunk * S * d * S_out * d_out * itemsize
        if not section.has_closed_form:
            kept += needed * min(-(-num_samples // chunk), (memory.product_bytes - kept) // needed)
    return kept


def likely_ranks(cost: ModelCost, found: Sequence[int], few: int, many: int) -> list[int]:
    """Number of features of each node layer with many samples, by those with few.

    Args:
        cost: Cost of the model, which knows the widths of the node layers.
        found: Number of features of each node layer with few samples.
        few: Number of the few samples.
        many: Number of the many.

    Returns:
        The numbers.
    """
    shapes = [section.shape_in for section in cost.sections] + [cost.sections[-1].shape_out]
    # Few samples allow few directions; a layer that has fewer than that has no more with all samples.
    limits = [[min(d, max(1, samples * S - 1)) for S, d in shapes] for samples in (few, many)]
    return [r if r < 0.9 * low else high for r, low, high in zip(found, *limits, strict=True)]


def file_bytes(cost: ModelCost, ranks: Sequence[int], itemsize: int) -> int:
    """Predict the size of a basis file.

    Args:
        cost: Cost of the model, which knows the widths of the node layers.
        ranks: Number of features of each node layer.
        itemsize: Bytes of a number.

    Returns:
        Bytes.
    """
    shapes = [section.shape_in for section in cost.sections] + [cost.sections[-1].shape_out]
    widths = [d for _, d in shapes]
    # As if all positions were those of a sequence, whose examples have a context.
    examples = sum(r * bytes_per_feature(S) for (S, _), r in zip(shapes, ranks, strict=True))
    # Mean, both maps, importances with their errors and modules; edges and attributions with their errors.
    bases = sum(d + 2 * d * r + 4 * r for d, r in zip(widths, ranks, strict=True))
    # Index, change and error of the outputs that are raised and lowered most.
    effects = 3 * 4 * 2 * TOP * sum(ranks)
    edges = sum(4 * r * r_next for r, r_next in itertools.pairwise(ranks))
    return itemsize * (bases + edges) + effects + examples + _HEADER


class PeakMemory:
    """Peak memory of this process during a block, read every few milliseconds.

    Args:
        device: The accelerator whose memory is measured, or the CPU for main memory.

    Attributes:
        before: Bytes before the block.
        peak: Largest number of bytes in it; 0 where it is unknown.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.before = self.peak = held_bytes(device)
        self._over = threading.Event()

    def __enter__(self) -> PeakMemory:
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _read(self) -> None:
        while True:
            self.peak = max(self.peak, held_bytes(self._device))
            if self._over.wait(_READ_EVERY):
                return


def held_bytes(device: torch.device) -> int:
    """Memory that this process holds now, on an accelerator or in main memory; 0 where it is unknown."""
    if device.type != "cpu":
        try:
            return int(torch.accelerator.memory_allocated(device))
        except (AttributeError, RuntimeError):
            return 0
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def samples_of(batches: Sequence[Any], num_samples: int, select: Callable[[Any, slice], Any], count: Any) -> list[Any]:
    """Batches with a number of samples, repeating some batches as often as needed.

    Args:
        batches: Batches that are not empty.
        num_samples: Number of samples.
        select: Takes samples of a batch.
        count: Counts those of a batch.

    Returns:
        The batches.
    """
    found: list[Any] = []
    for batch in itertools.cycle(batches):
        n = count(batch)
        if n >= num_samples:
            return [*found, batch if n == num_samples else select(batch, slice(0, num_samples))]
        found.append(batch)
        num_samples -= n
    raise AssertionError("unreachable")
