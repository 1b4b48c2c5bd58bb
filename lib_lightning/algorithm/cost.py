"""What a graph will cost: seconds, memory and the size of its file, from counts of operations and a short trial."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.algorithm.effort import EffortPlan, ModelCost
from lib_lightning.algorithm.memory_plan import MemoryPlan

# A trial has at most this share of the operations of the graph, as far as samples and products allow.
_TRIAL_SHARE = 0.1
_TRIAL_SAMPLES, _TRIAL_PRODUCTS = 8, 4
# Operations below which a trial is too short to be measured.
_TRIAL_OPERATIONS = 1e9
# Seconds after which a trial is not repeated.
_LONG_TRIAL = 5
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
        file_bytes: Predicted size of its basis file in bytes; features that are followed, and labels, come on top.
        threads: Number of threads of torch.
        device: Where it is computed.
    """

    plan: EffortPlan
    seconds: float
    peak_bytes: int
    file_bytes: int
    threads: int
    device: torch.device

    def __str__(self) -> str:
        where = f"{self.threads} thread{'s' * (self.threads != 1)}" if self.device.type == "cpu" else str(self.device)
        return (
            f"{self.plan}: about {duration(self.seconds)} with {where}, {size(self.peak_bytes)} of memory at its peak, "
            f"and {size(self.file_bytes)} for each file"
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


def try_out(
    cost: ModelCost, plan: EffortPlan, config: LIBConfig, run: Callable[[int, LIBConfig], Sequence[int]]
) -> tuple[float, list[int]]:
    """Predict the seconds and features of a graph from a much smaller one, by their operations.

    Args:
        cost: Cost of the model.
        plan: What the graph computes.
        config: Its configuration, with the numbers of the plan.
        run: Computes a graph of some of the samples with another configuration; returns the number of features of each
            node layer.

    Returns:
        The seconds, and the number of features of each node layer.
    """
    n, trial = _trial(cost, plan, config)
    seconds: list[float] = []
    found: Sequence[int] = ()
    while len(seconds) < 2 and sum(seconds) < _LONG_TRIAL:  # the first one warms up
        started = time.perf_counter()
        found = run(n, trial)
        seconds.append(time.perf_counter() - started)
    shapes = [section.shape_in for section in cost.sections] + [cost.sections[-1].shape_out]
    # Few samples allow few directions; a layer that has fewer than that has no more with all samples.
    limits = [[min(d, max(1, samples * S - 1)) for S, d in shapes] for samples in (n, plan.num_samples)]
    ranks = [r if r < 0.9 * few else many for r, few, many in zip(found, *limits, strict=True)]
    return min(seconds) * plan.operations / cost.of_graph(trial, n), ranks


def _trial(cost: ModelCost, plan: EffortPlan, config: LIBConfig) -> tuple[int, LIBConfig]:
    """Number of samples and configuration of a much smaller graph with the same steps."""
    n, trial = plan.num_samples, config
    allowed = max(_TRIAL_OPERATIONS, _TRIAL_SHARE * plan.operations)
    # Half at least, so that a cheap graph is not computed as a whole either.
    n = max(min(n, _TRIAL_SAMPLES), n // 2)
    fewest = cost.of_graph(trial, _TRIAL_SAMPLES)  # what does not depend on samples is not saved by fewer
    while cost.of_graph(trial, n) - fewest > allowed and n > _TRIAL_SAMPLES:
        n = max(_TRIAL_SAMPLES, n // 2)
    if cost.of_graph(trial, n) > 2 * allowed:
        probes, pushed = (min(k or _TRIAL_PRODUCTS, _TRIAL_PRODUCTS) for k in (config.n_probes, config.n_pushed))
        trial = replace(config, n_probes=probes, n_pushed=pushed)
    return n, trial


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
    if not memory.keep_graphs or config.n_probes is not None or config.basis != "lib":
        return 0
    # All products of a section at a chunk of samples, or none; from the last section to the first.
    chunk = min(plan.num_samples, memory.samples)
    kept = 0
    for section in reversed(cost.sections):
        (S, d), (S_out, d_out) = section.shape_in, section.shape_out
        needed = chunk * S * d * S_out * d_out * itemsize
        if not section.has_closed_form:
            kept += needed * min(-(-plan.num_samples // chunk), (memory.product_bytes - kept) // needed)
    return kept


def file_bytes(cost: ModelCost, ranks: Sequence[int], itemsize: int) -> int:
    """Predict the size of a basis file.

    Args:
        cost: Cost of the model, which knows the widths of the node layers.
        ranks: Number of features of each node layer.
        itemsize: Bytes of a number.

    Returns:
        Bytes.
    """
    widths = [section.shape_in[1] for section in cost.sections] + [cost.sections[-1].shape_out[1]]
    # Mean, both maps, importances with their errors and modules; edges with their errors.
    bases = sum(d + 2 * d * r + 4 * r for d, r in zip(widths, ranks, strict=True))
    edges = sum(2 * r * r_next for r, r_next in itertools.pairwise(ranks))
    return itemsize * (bases + edges) + _HEADER


def held_bytes(device: torch.device) -> int:
    """Memory that this process holds now, on an accelerator or in main memory; 0 where the system does not tell."""
    if device.type != "cpu":
        return int(torch.accelerator.memory_allocated(device)) if hasattr(torch, "accelerator") else 0
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def samples_of(batches: Sequence[Any], num_samples: int, select: Callable[[Any, slice], Any], count: Any) -> list[Any]:
    """Batches with a number of samples, taken from some batches over and over.

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
