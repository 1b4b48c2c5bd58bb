"""Profile of a snapshot: seconds and floating-point operations of each of its steps, for any model."""

from __future__ import annotations

import copy
import html
import itertools
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib_lightning._deprecated import renamed_arguments
from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.algorithm.effort import OperationCount
from lib_lightning.algorithm.progress import on_phase
from lib_lightning.api import check_node_layers, propose_node_layers
from lib_lightning.errors import LIBError
from lib_lightning.interventions.plan import NEVER
from lib_lightning.io.basis_format import EPOCH, STEP
from lib_lightning.model.forward_errors import wrap_forward_errors
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import InputFn, MaskFn, ModelSpec
from lib_lightning.model.node_layer import NodeLayer, as_node_layers
from lib_lightning.model.preserve import preserve_rng
from lib_lightning.model.skip_positions import SkipPositions
from lib_lightning.model.torch_internals import operations_observed
from lib_lightning.training.run_state import RunState
from lib_lightning.training.samples import NUM_REFERENCE_SAMPLES, SampleBuffer
from lib_lightning.training.schedule import Schedule
from lib_lightning.training.snapshot import Previous, SnapshotComputer, SnapshotConfig, SnapshotData
from lib_lightning.training.writer import RunDirectory

# Size of the square matrices whose product measures the rate of a machine, and the number of products timed.
RATE_SIZE = 1500
_RATE_PRODUCTS = 8
REST = "the rest"

# Floating-point operations by dtype.
Flops = dict[torch.dtype, int]


@dataclass(frozen=True)
class Row:
    """One step of a snapshot.

    Attributes:
        step: Its name.
        seconds: Wall-clock time in seconds.
        share: Share of the time of the whole snapshot, from 0 to 1.
        gflop: Floating-point operations of matrix products and convolutions, in 10^9.
        rate: `gflop` per second.
        of_peak: Time that the same operations take in large matrix products of their dtypes, divided by `seconds`; NaN
            if the rate of a dtype is unknown.
    """

    step: str
    seconds: float
    share: float
    gflop: float
    rate: float
    of_peak: float

    @property
    def numbers(self) -> list[str]:
        """Seconds, share, operations, rate and share of the peak, as they are shown."""
        return [
            f"{self.seconds:.4f}", f"{self.share:.1%}", f"{self.gflop:,.3f}", f"{self.rate:,.1f}",
            f"{self.of_peak:.1%}",
        ]  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """Time and floating-point operations of one snapshot.

    Attributes:
        rows: Its steps, in the order in which they are first completed.
        rates: Rate of large matrix products on this machine, in 10^9 operations per second, by dtype.
        samples: Number of samples.
        node_layers: Names of the node layers.
        device: Where it was computed.
    """

    rows: list[Row]
    rates: dict[torch.dtype, float]
    samples: int
    node_layers: list[str]
    device: torch.device

    @property
    def total(self) -> Row:
        """Sum of all steps."""
        seconds = sum(row.seconds for row in self.rows)
        gflop, share = sum(row.gflop for row in self.rows), sum(row.share for row in self.rows)
        return Row("total", seconds, share, gflop, gflop / seconds, sum(row.of_peak * row.share for row in self.rows))

    @property
    def _title(self) -> str:
        return f"one snapshot of {' -> '.join(self.node_layers)} on {self.samples:,} samples"

    @property
    def _notes(self) -> list[str]:
        peaks = ", ".join(f"{str(kind).removeprefix('torch.')} {rate:,.0f}" for kind, rate in self.rates.items())
        return [
            f"Peak, by products of {RATE_SIZE:,} x {RATE_SIZE:,} matrices on {self.device}, in GFLOP/s: {peaks}.",
            "Operations are those of matrix products and convolutions; eigenproblems and others are not counted.",
        ]

    def __str__(self) -> str:
        width = max(len(row.step) for row in self.rows)
        lines = [
            f"{self._title}\n",
            f"{'step':<{width}}  {'seconds':>9}  {'share':>6}  {'GFLOP':>10}  {'GFLOP/s':>9}  {'of peak':>7}",
        ]
        for row in (*self.rows, self.total):
            seconds, share, gflop, rate, of_peak = row.numbers
            lines.append(f"{row.step:<{width}}  {seconds:>9}  {share:>6}  {gflop:>10}  {rate:>9}  {of_peak:>7}")
        return "\n".join([*lines, "", *self._notes])

    def _repr_html_(self) -> str:
        longest = max(row.share for row in self.rows) or 1.0
        bar = "background: currentColor; opacity: 0.5; height: 0.7em"  # text's colour, in light and dark notebooks

        def line(row: Row, picture: str) -> str:
            numbers = "".join(f"<td>{number}</td>" for number in row.numbers)
            return f'<tr><td style="text-align: left">{html.escape(row.step)}</td><td>{picture}</td>{numbers}</tr>'

        rows = [line(row, f'<div style="{bar}; width: {10 * row.share / longest:.2f}em"></div>') for row in self.rows]
        return (
            f"<table><caption>{html.escape(self._title)}</caption><thead><tr><th>step</th><th></th><th>seconds</th>"
            "<th>share</th><th>GFLOP</th><th>GFLOP/s</th><th>of peak</th></tr></thead>"
            f"<tbody>{''.join(rows)}</tbody><tfoot>{line(self.total, '')}</tfoot></table>"
            + "".join(f"<p>{html.escape(note)}</p>" for note in self._notes)
        )


@renamed_arguments(watched="config")
def profile_snapshot(
    model: nn.Module,
    batches: Iterable[Any],
    node_layers: Sequence[str | NodeLayer] | None = None,
    config: SnapshotConfig | None = None,
    input_fn: InputFn | None = None,
    mask: str | int | MaskFn | None = None,
    dtype: torch.dtype | None = None,
    skip_positions: SkipPositions | None = None,
) -> Profile:
    """Measure the time and operations of each step of a snapshot of `lib_lightning.LIBCallback`.

    Three snapshots are taken, and written to a temporary folder: one to warm up, one to measure time, and one to count
    operations, which is slower. The model is left unchanged. Parts that not every snapshot has are excluded: ablations,
    and figures over the whole run.

    Args:
        model: Any module, on any device; the batches are on the same one.
        batches: As for `lib_lightning.compute_interaction_graph`.
        node_layers: As for `lib_lightning.compute_interaction_graph`.
        config: What a snapshot computes; by default as with ``LIBCallback()``.
        input_fn: As for `lib_lightning.compute_interaction_graph`.
        mask: As for `lib_lightning.compute_interaction_graph`.
        dtype: As for `lib_lightning.compute_interaction_graph`.
        skip_positions: As for `lib_lightning.compute_interaction_graph`.

    Returns:
        A profile with a row for each step. Baselines count towards the rows of the main basis.

    Raises:
        NodeLayerError: If a node layer is unknown, is not run, is out of order, or does not cut the computation.
        LIBError: If there are no samples, or the model cannot be run on them.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> profile = profile_snapshot(model, [torch.randn(64, 4)], ["input", "1", "output"])
        >>> [row.step for row in profile.rows][2:5]
        ['moments', 'basis of output', 'basis of 1']
        >>> round(profile.total.share, 6)
        1.0
    """
    config = replace(config or SnapshotConfig(LIBConfig()), ablation=None, causal=NEVER)
    samples = SampleBuffer(2**62)
    for batch in batches:
        samples.add(batch)
    if not samples.count:
        raise LIBError("There are no samples: batches is empty.")
    reference = samples.subsample(NUM_REFERENCE_SAMPLES, seed=0)
    device = next((t.device for t in itertools.chain(model.parameters(), model.buffers())), torch.device("cpu"))
    spec = ModelSpec(input_fn, mask, dtype, skip_positions)
    with preserve_rng([]):
        with wrap_forward_errors(model, spec):
            first = model, samples.batches[0]
            layers = as_node_layers(node_layers or propose_node_layers(*first, input_fn, mask))
            check_node_layers(*first, layers, dtype, input_fn, mask, skip_positions)
        instrumented = InstrumentedModel(model, layers, spec)
        take = _snapshots(instrumented, config, SnapshotData(samples.batches, reference=reference.batches))
        take(lambda step: None)
        clock = _Clock(device)
        take(clock)
        clock(REST)
        count = _Count()
        with operations_observed(count.add):
            take(count)
        types = {torch.float32, torch.float64, *(kind for step in count.steps.values() for kind in step)}
        found = {kind: product_rate(kind, device) for kind in sorted(types, key=str)}
    rates = {kind: rate for kind, rate in found.items() if rate is not None}
    rows = _rows(clock.steps, count.steps, rates)
    return Profile(rows, rates, samples.count, [layer.name for layer in layers], device)


def _snapshots(
    instrumented: InstrumentedModel, config: SnapshotConfig, samples: SnapshotData
) -> Callable[[Callable[[str], None]], None]:
    """Make a function that computes and writes the next snapshot, as in training, with a listener for its phases."""
    computer = SnapshotComputer(config, "lib")
    state = RunState(computer.folders, None, config.follow, Schedule())

    def take(listener: Callable[[str], None]) -> None:
        layouts = copy.deepcopy(state.layouts)
        with tempfile.TemporaryDirectory() as root, on_phase(listener):
            metadata = {STEP: state.n_snapshots, EPOCH: 0}
            snapshot = computer.compute(instrumented, samples, metadata, Previous(state.scalars, state.tracker))
            RunDirectory(Path(root), computer.folders).write(snapshot.graphs, snapshot.step, layouts)
        state.commit(snapshot, layouts)

    return take


class _Clock:
    """Adds up the seconds of every step."""

    def __init__(self, device: torch.device) -> None:
        self.steps: dict[str, float] = defaultdict(float)
        self._device, self._last = device, _now(device)

    def __call__(self, step: str) -> None:
        now = _now(self._device)
        self.steps[step] += now - self._last
        self._last = now


class _Count(OperationCount):
    """Adds up the floating-point operations of every step by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[str, Flops] = {}

    def __call__(self, step: str) -> None:
        counted = self.steps.setdefault(step, defaultdict(int))
        for kind, flop in self.flops.items():
            counted[kind] += flop
        self.flops.clear()


def product_rate(dtype: torch.dtype, device: torch.device, size: int = RATE_SIZE) -> float | None:
    """Measure the rate of large matrix products on this machine, with the current number of threads of torch.

    Args:
        dtype: Dtype of the matrices.
        device: Their device.
        size: Number of their rows and columns.

    Returns:
        Floating-point operations per second, in 10^9; None if the device does not support the dtype.

    Example:
        >>> product_rate(torch.float32, torch.device("cpu"), size=64) > 0
        True
    """
    try:
        generator = torch.Generator(device).manual_seed(0)
        a = torch.rand(size, size, generator=generator, device=device).to(dtype)
        a @ a
    except (RuntimeError, TypeError):
        return None
    times = []
    for _ in range(_RATE_PRODUCTS):
        started = _now(device)
        a @ a
        times.append(_now(device) - started)
    return 2e-9 * size**3 / min(times)


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _rows(seconds: Mapping[str, float], flops: Mapping[str, Flops], rates: Mapping[torch.dtype, float]) -> list[Row]:
    total = sum(seconds.values())
    rows = []
    for step, own in seconds.items():
        by_type = {kind: 1e-9 * flop for kind, flop in flops.get(step, {}).items()}
        at_peak = sum(gflop / rates.get(kind, math.nan) for kind, gflop in by_type.items())
        gflop = sum(by_type.values())
        rows.append(Row(step, own, own / total, gflop, gflop / own if own else 0.0, at_peak / own if own else 0.0))
    return rows
