"""Scaling: operations and seconds of single steps against samples, positions, widths, features and depth.

The operations of matrix products are counted, and their exponents (least squares in logarithms) compared with the
predicted ones. The exponents of the seconds are only reported. Every sweep changes one number of one model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lib_lightning.algorithm.build import build_graph
from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.algorithm.memory_plan import MemoryPlan
from lib_lightning.algorithm.progress import on_phase
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.node_layer import as_node_layers
from lib_lightning.model.torch_internals import operations_observed
from lib_lightning.training.profiling import _Count
from tests.benchmarks.clock import now

REPEATS = 2
# Largest difference between a counted exponent and the predicted one, which is that of the largest term alone.
TOLERANCE = 0.2


class Mixing(nn.Module):
    """A section without a closed form that mixes positions: a residual stream with a simple kind of attention."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(d, d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.key(x).tanh().mean(1, keepdim=True)
        return x + self.value(x * mean).tanh()


@dataclass(frozen=True)
class Case:
    """A model and what is computed of it.

    Attributes:
        model: The model.
        data: All samples, as one batch.
        node_layers: Its node layers.
        config: What is computed.
        plan: How much is computed at once.
    """

    model: nn.Module
    data: Tensor
    node_layers: Sequence[str]
    config: LIBConfig = field(default_factory=lambda: LIBConfig(rtol=0))
    plan: MemoryPlan = field(default_factory=lambda: MemoryPlan(keep_graphs=True))


def affine(n: int = 2000, d: int = 64) -> Case:
    """``d -> d``, linear."""
    return Case(nn.Sequential(nn.Linear(d, d)), torch.randn(n, d), ["input", "0"])


def activated(n: int = 2000, d: int = 48, h: int = 192, r: int = 48) -> Case:
    """``d -> h -> r``, with one activation function."""
    return Case(nn.Sequential(nn.Linear(d, h), nn.GELU(), nn.Linear(h, r)), torch.randn(n, d), ["input", "output"])


def general(
    n: int = 64, S: int = 16, d: int = 32, depth: int = 1, n_probes: int | None = None, points: int = 0,
    keep: bool = True, jacobians: int = 0, outputs: int | None = None, n_pushed: int | None = None,
) -> Case:  # fmt: skip
    """Blocks of width ``d``; with ``outputs``, followed by a linear map of one position to that many numbers."""
    model = nn.Sequential(*(Mixing(d) for _ in range(depth)))
    names = ["input", *map(str, range(depth))]
    if outputs is not None:
        model.append(_Readout(d, outputs))
        names = ["input", "output"]
    config = LIBConfig(rtol=0, n_probes=n_probes, integration_steps=points, n_pushed=n_pushed)
    return Case(model, torch.randn(n, S, d), names, config, MemoryPlan(keep_graphs=keep, product_bytes=jacobians))


class _Readout(nn.Module):
    """A linear map of the last position."""

    def __init__(self, d: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(d, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[:, -1])


def wide(d: int = 1024, n: int = 1000, h: int = 24) -> Case:
    """``d -> h -> 10``: a wide node layer of which the next module reads few directions."""
    return Case(
        nn.Sequential(nn.Linear(d, h), nn.GELU(), nn.Linear(h, 10)), torch.randn(n, d), ["input", "0", "output"]
    )


MOMENTS, BASIS, FORWARD, EDGES = "moments", "basis of input", "forward passes", "edges from"


@dataclass(frozen=True)
class Sweep:
    """One number that is changed.

    Attributes:
        make: Makes the case of a value.
        values: The values.
        step: Prefix of the names of the steps that are added up.
        predicted: The exponent of the largest term.
    """

    make: Callable[[int], Case]
    values: Sequence[int]
    step: str
    predicted: float


# Only matrix products are counted; eigenproblems and elementwise operations are part of the seconds.
SWEEPS = {
    "affine: moments, samples": Sweep(lambda n: affine(n=n), [2000, 4000, 8000, 16000], MOMENTS, 1),
    "affine: moments, width": Sweep(lambda d: affine(d=d), [32, 64, 128, 256], MOMENTS, 2),
    "affine: metric, width": Sweep(lambda d: affine(d=d), [32, 64, 128, 256], BASIS, 3),
    "one activation function: metric, samples": Sweep(lambda n: activated(n), [4000, 8000, 16000, 32000], BASIS, 1),
    "one activation function: metric, hidden width": Sweep(
        lambda h: activated(8000, 16, h, 16), [128, 256, 512], BASIS, 2
    ),
    "one activation function: edges, samples": Sweep(lambda n: activated(n), [500, 1000, 2000, 4000], EDGES, 1),
    "one activation function: edges, hidden width": Sweep(
        lambda h: activated(1000, h=h), [64, 128, 256, 512], EDGES, 1
    ),
    "one activation function: edges, features on both sides": Sweep(
        lambda d: activated(1000, d, 128, d), [16, 32, 64, 128], EDGES, 2
    ),
    "general: exact metric, samples": Sweep(lambda n: general(n), [16, 32, 64, 128], BASIS, 1),
    "general: exact metric, positions": Sweep(lambda S: general(S=S), [8, 16, 32, 64], BASIS, 2),
    "general: exact metric, width": Sweep(lambda d: general(d=d), [16, 32, 64, 128], BASIS, 3),
    "general: sampled metric, samples": Sweep(lambda n: general(n, n_probes=4), [64, 128, 256, 512], BASIS, 1),
    "general: sampled metric, positions": Sweep(lambda S: general(S=S, n_probes=4), [16, 32, 64, 128], BASIS, 1),
    "general: sampled metric, probes": Sweep(lambda k: general(256, n_probes=k), [2, 4, 8, 16], BASIS, 1),
    "general: edges forward, samples": Sweep(lambda n: general(n, n_probes=1), [32, 64, 128, 256], EDGES, 1),
    "general: edges forward, positions": Sweep(lambda S: general(S=S, n_probes=1), [16, 32, 64, 128], EDGES, 1),
    "general: edges forward, width": Sweep(lambda d: general(d=d, n_probes=1), [16, 32, 64, 128], EDGES, 3),
    "general: sampled edges, samples": Sweep(
        lambda n: general(n, n_probes=1, n_pushed=8), [64, 128, 256, 512], EDGES, 1
    ),
    "general: sampled edges, positions": Sweep(
        lambda S: general(S=S, n_probes=1, n_pushed=8), [16, 32, 64, 128], EDGES, 1
    ),
    "general: sampled edges, width": Sweep(
        lambda d: general(d=d, n_probes=1, n_pushed=8), [16, 32, 64, 128], EDGES, 2
    ),
    "general: sampled edges, features per sample": Sweep(
        lambda m: general(d=128, n_probes=1, n_pushed=m), [8, 16, 32, 64], EDGES, 1
    ),
    "depth: sampled edges": Sweep(
        lambda L: general(depth=L, n_probes=1, n_pushed=8), [2, 4, 8, 16], EDGES, 1
    ),
    "general: edges in reverse, outputs": Sweep(lambda r: general(outputs=r), [3, 6, 12, 24], EDGES, 1),
    "general: edges in reverse, positions": Sweep(lambda S: general(S=S, outputs=8), [16, 32, 64, 128], EDGES, 1),
    "general: edges from kept Jacobians, positions": Sweep(
        lambda S: general(S=S, jacobians=2**30), [8, 16, 32], EDGES, 2
    ),
    "depth: all steps, graphs kept": Sweep(lambda L: general(depth=L, d=16, n_probes=2), [2, 4, 8, 16], "", 1),
    "depth: forward passes, graphs not kept": Sweep(
        lambda L: general(512, depth=L, d=16, n_probes=1, keep=False), [4, 8, 16, 32], FORWARD, 2
    ),
    "integrated gradients: metric, points": Sweep(lambda p: general(points=p), [2, 4, 8], BASIS, 1),
    "integrated gradients: edges, points": Sweep(lambda p: general(n_probes=1, points=p), [2, 4, 8, 16], EDGES, 1),
    "wide node layer by duality: basis, width": Sweep(wide, [1024, 2048, 4096, 8192], BASIS, 1),
}  # fmt: skip


def run(case: Case, listener: Callable[[str], None]) -> None:
    """Compute bases and edges, with a listener for the steps."""
    instrumented = InstrumentedModel(case.model, as_node_layers(list(case.node_layers)))
    with on_phase(listener):
        build_graph(instrumented, [case.data], case.config, case.plan)


def operations(case: Case, step: str) -> int:
    """Floating-point operations of the matrix products in some steps."""
    count = _Count()
    with operations_observed(count.add):
        run(case, count)
    return sum(sum(by_type.values()) for name, by_type in count.steps.items() if name.startswith(step))


def step_seconds(case: Case, step: str) -> float:
    """Least seconds of some steps."""
    found = []
    for _ in range(REPEATS):
        spent: dict[str, float] = defaultdict(float)
        last = now()

        def note(name: str, spent: dict[str, float] = spent) -> None:
            nonlocal last
            spent[name] += now() - last
            last = now()

        run(case, note)
        found.append(sum(own for name, own in spent.items() if name.startswith(step)))
    return min(found)


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    """Exponent of costs as a power of the values, by least squares in logarithms.

    Example:
        >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
        2.0
    """
    x, y = (torch.tensor(v, dtype=torch.float64).log() for v in (values, costs))
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


@pytest.mark.parametrize("name", list(SWEEPS))
def test_exponent(benchmark: Any, name: str) -> None:
    sweep = SWEEPS[name]
    cases = [sweep.make(value) for value in sweep.values]
    counted = exponent(sweep.values, [operations(case, sweep.step) for case in cases])
    spent: list[float] = []
    benchmark.pedantic(lambda: spent.extend(step_seconds(case, sweep.step) for case in cases), rounds=1, iterations=1)
    benchmark.extra_info |= {
        "values": f"{sweep.values[0]} to {sweep.values[-1]}",
        "predicted": sweep.predicted,
        "operations": round(counted, 2),
        "seconds": round(exponent(sweep.values, spent), 2),
        "seconds at the last value": round(spent[-1], 4),
    }
    assert abs(counted - sweep.predicted) < TOLERANCE


class _Synchronizations(TorchDispatchMode):
    """Counts, by step, the operations that synchronize with an accelerator: reading a number, or a size that depends on
    values. On a CPU, which has no queue, the operations are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: dict[str, int] = defaultdict(int)
        self._open = 0

    def __call__(self, step: str) -> None:
        self.steps[step.partition(" ")[0]] += self._open
        self._open = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func._overloadpacket is torch.ops.aten.index and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        self._open += by_mask or func._overloadpacket in _SYNCHRONIZING
        return func(*args, **(kwargs or {}))


_SYNCHRONIZING = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal}


@pytest.mark.parametrize("n_probes", [None, 4], ids=["exact", "sampled"])
def test_synchronizations_do_not_depend_on_the_number_of_products(benchmark: Any, n_probes: int | None) -> None:
    def count(S: int, d: int) -> dict[str, int]:
        with _Synchronizations() as found:
            run(general(n=4, S=S, d=d, depth=3, n_probes=n_probes), found)
        return dict(found.steps)

    few = benchmark.pedantic(lambda: count(4, 8), rounds=1, iterations=1)
    benchmark.extra_info |= few
    assert sum(few.values()) > 0
    assert count(16, 32) == few
