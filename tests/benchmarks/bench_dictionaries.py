"""Dictionaries: operations, seconds and memory of edges against the number of active latents, and against all of them.

Operations of matrix products are counted, and their exponents compared with the predicted ones: 1 in the number of
active latents, each of which is pushed through a section, and 0 in the number of all latents. The exponents of the
seconds are only reported. A graph of 16,384 latents of which 32 are active has to fit into its memory limit.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lib_lightning import compute_interaction_graph
from lib_lightning.algorithm.dictionary_edges import DictionaryEdges
from lib_lightning.algorithm.feature_reader import FeatureReader
from lib_lightning.algorithm.latent_choice import choose_latents
from lib_lightning.dictionaries import AdaptedDictionary, TopKSAE
from lib_lightning.distributed.process_group import SINGLE_PROCESS
from lib_lightning.jacobian.integrated_gradients import sections
from lib_lightning.jacobian.section import STACK_ELEMENTS, Section
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.node_layer import as_node_layers
from tests.benchmarks.clock import now
from tests.benchmarks.memory import peak

ROOT = Path(__file__).parents[2]
LIMIT = 2.0
TOLERANCE = 0.1
REPEATS = 4


def sae(d: int, r: int, k: int, seed: int) -> TopKSAE:
    """A dictionary of random directions."""
    W = nn.functional.normalize(torch.randn(r, d, generator=torch.Generator().manual_seed(seed)), dim=1)
    return TopKSAE(W.T.contiguous(), torch.zeros(r), W, torch.zeros(d), k)


def blocks(d: int) -> nn.Module:
    """Three residual blocks of the shape of those of a transformer, without attention."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.f(x)

    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Sequential(Block(), Block()), Block())


def measured(section: Section, dictionaries: Sequence[TopKSAE]) -> tuple[float, float]:
    """Operations and seconds of the edges of one section, of which the latents are known."""
    bases, fhats = [], []
    for dictionary, a in zip(dictionaries, (section.a, section.a_out), strict=True):
        rows = a.flatten(0, 1)
        basis, _ = choose_latents(AdaptedDictionary(dictionary, rows, "x"), [(rows, 0)], 10**6, SINGLE_PROCESS)
        bases.append(basis)
        fhats.append(FeatureReader(basis).next(a, None))
    counter = FlopCounterMode(display=False)
    seconds = []
    for _ in range(REPEATS):
        edges, started = DictionaryEdges(*bases), now()
        edges.update(section, *fhats)
        seconds.append(now() - started)
    with counter:
        DictionaryEdges(*bases).update(section, *fhats)
    assert torch.isfinite(edges.E).all()
    return counter.get_total_flops(), min(seconds)


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of a line through logarithms."""
    u, v = (torch.tensor([math.log(t) for t in values], dtype=torch.float64) for values in (x, y))
    return float(((u - u.mean()) * (v - v.mean())).sum() / (u - u.mean()).square().sum())


@pytest.mark.parametrize(
    ("varied", "sweep", "predicted"),
    [("active", [(16384, k) for k in (16, 32, 64, 128)], 1.0), ("all", [(r, 32) for r in (4096, 8192, 16384)], 0.0)],
    ids=["active", "all"],
)
def test_cost_grows_with_active_latents(
    benchmark: Any, varied: str, sweep: list[tuple[int, int]], predicted: float
) -> None:
    d = 256
    model, x = blocks(d), torch.randn(64, d)
    instrumented = InstrumentedModel(model, as_node_layers(["0", "1", "2"]))
    found: list[tuple[float, float]] = []

    def measure() -> None:
        with model_session(instrumented):
            section = sections(instrumented, x, (), 0, STACK_ELEMENTS)[0]
            found.extend(measured(section, [sae(d, r, k, seed) for seed in (0, 1)]) for r, k in sweep)

    benchmark.pedantic(measure, rounds=1, iterations=1)
    operations, seconds = zip(*found, strict=True)
    counts = [k if varied == "active" else r for r, k in sweep]
    of_operations = exponent(counts, operations)
    benchmark.extra_info |= {
        "exponent of operations": round(of_operations, 2),
        "exponent of seconds": round(exponent(counts, seconds), 2),
        **{f"seconds with {r:,} latents, {k} active": round(s, 3) for (r, k), s in zip(sweep, seconds, strict=True)},
    }
    assert abs(of_operations - predicted) <= TOLERANCE


def graph_of_many_latents() -> None:
    """Print the peak memory of a graph of 16,384 latents, in MiB, its features, and the latents that are active."""
    torch.set_num_threads(1)
    d = 256
    model, x = blocks(d), torch.randn(512, d)
    dictionaries = {layer: sae(d, 16384, 32, seed) for seed, layer in enumerate(("0", "1"))}
    small = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    compute_interaction_graph(small, [torch.randn(50, 8)], ["input", "1", "output"])  # loads libraries
    before = peak()
    graph = compute_interaction_graph(
        model,
        [x],
        ["0", "1"],
        dictionaries=dictionaries,
        memory_limit=LIMIT,
        effort="exact",
        output_distribution="none",
    )
    used = peak() - before
    with torch.no_grad():
        active = int((dictionaries["0"].encode(model[0](x)) != 0).any(0).sum())
    print(used, graph.bases["0"].n_features, active)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_16384_latents_stay_within_the_memory_limit(benchmark: Any) -> None:
    found: list[float] = []

    def measure() -> None:
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.bench_dictionaries"],
            cwd=ROOT,
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
            stdout=subprocess.PIPE,
            check=True,
            timeout=3000,
        )
        found.extend(map(float, done.stdout.split()))

    benchmark.pedantic(measure, rounds=1, iterations=1)
    used, features, active = found
    benchmark.extra_info |= {
        "memory_limit (MiB)": round(LIMIT * 2**10), "peak (MiB)": round(used), "features": int(features),
        "latents that are active": int(active),
    }  # fmt: skip
    assert used < LIMIT * 2**10
    # Two matrices of edges in float64 have to fit into a quarter of the limit.
    assert features > 0.99 * min(active, math.isqrt(int(LIMIT * 2**30 / 4) // 16))


if __name__ == "__main__":
    graph_of_many_latents()
