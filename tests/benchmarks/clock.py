"""Timing of this package and of slow implementations, of whose loops only a part is run."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from lib_lightning import InteractionGraph
from lib_lightning.algorithm.progress import on_phase
from tests import reference
from tests.benchmarks import plain
from tests.benchmarks.subjects import Subject

T = TypeVar("T")


def now() -> float:
    """CPU time of this process if torch has one thread, since it depends little on other programs; else wall time."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(work: Callable[[], Any], repeats: int = 1) -> float:
    """Shortest time of several runs."""
    times = []
    for _ in range(repeats):
        started = now()
        work()
        times.append(now() - started)
    return min(times)


def product_rate(dtype: torch.dtype, size: int = 1000) -> float:
    """Current rate of large matrix products on this machine, in 10^9 operations per second."""
    a = torch.rand(size, size, dtype=dtype)
    return 2e-9 * size**3 / seconds(lambda: a @ a, 8)


def fastest(benchmark: Any, work: Callable[[], T], budget: float = 20.0, most: int = 7) -> tuple[T, float]:
    """Run as often as a budget of seconds allows, after a warm-up; the result and the shortest time."""
    times = [seconds(work)]
    results: list[T] = []
    rounds = max(1, min(most, int(budget / times[0])))
    benchmark.pedantic(lambda: times.append(seconds(lambda: results.append(work()))), rounds=rounds, iterations=1)
    benchmark.extra_info["seconds"] = float(f"{min(times):.3g}")
    return results[-1], min(times)


def extrapolated(work: Callable[[int], Any], part: int, whole: int) -> float:
    """Seconds of a loop of ``whole`` rounds, extrapolated from 1 and ``1 + part`` rounds."""
    work(1)
    one, more = seconds(lambda: work(1), 2), seconds(lambda: work(1 + part), 2)
    return one + (whole - 1) * max(0.0, more - one) / part


def edges_seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds for the edges, with their forward passes, and for the whole graph."""
    bases, edges, started = 0.0, 0.0, now()

    def note(step: str) -> None:
        nonlocal bases, edges
        if step.startswith("basis of"):
            bases = now()
        if step.startswith("edges from"):
            edges = now()

    with on_phase(note):
        work()
    return edges - bases, now() - started


def plain_seconds(subject: Subject, graph: InteractionGraph, part: int = 3) -> dict[str, float]:
    """Seconds of the plain loop over outputs for a whole graph.

    Moments and eigenproblems are timed completely. Of the loops over output positions and features ``1 + part`` are
    run on all samples, with the graph's own bases.

    Returns:
        Seconds for ``moments``, ``bases`` and ``edges``.
    """
    a, bases = subject.activations(), _bases(subject, graph)
    spent = {"moments": sum(seconds(lambda x=x: plain.covariance(x)) for x in a), "bases": 0.0, "edges": 0.0}
    for l, F in enumerate(subject.chain):
        (mu, C, C_pinv), (_, C_next, _) = bases[l : l + 2]
        outputs = [(t, i) for t in range(a[l + 1].shape[1]) for i in range(C_next.shape[1])]
        Sigma = plain.covariance(a[l])[1]
        spent["bases"] += 2 * seconds(lambda Sigma=Sigma: torch.linalg.eigh(Sigma))

        def metric(k: int, F: Any = F, a_l: Tensor = a[l], C_next: Tensor = C_next, o: Any = outputs) -> None:
            plain.metric(F, a_l, C_next, o[:k])

        def edges(k: int, F: Any = F, x: Any = (a[l], mu, C, C_pinv, C_next), o: Any = outputs) -> None:
            plain.edges(F, *x, o[:k])

        spent["bases"] += extrapolated(metric, part, len(outputs))
        spent["edges"] += extrapolated(edges, part, len(outputs))
    return spent


def reference_seconds(subject: Subject, graph: InteractionGraph, part: int = 3) -> dict[str, float]:
    """Seconds of the literal transcription of the paper (`tests.reference`) for a whole graph.

    Its eigenproblems are timed completely. Of its loops over samples, and over rows in the covariance, ``1 + part``
    rounds are run, with the graph's own bases: bases of a few samples would be smaller.

    Returns:
        Seconds for ``moments``, ``bases`` and ``edges``.
    """
    a, bases = subject.activations(), _bases(subject, graph)
    spent = {"moments": 0.0, "bases": 0.0, "edges": 0.0}
    for x, (mu, _, _) in zip(a, bases, strict=True):
        rows = x.flatten(0, 1)

        def outer(k: int, rows: Tensor = rows, mu: Tensor = mu) -> None:
            sum(torch.outer(r - mu, r - mu) for r in rows[:k])

        spent["moments"] += extrapolated(outer, part, len(rows))
    for l, F in enumerate(subject.chain):
        (mu, C, C_pinv), (_, C_next, _) = bases[l : l + 2]
        counts, counts_next = (torch.ones(x.shape[:2], dtype=torch.bool) for x in a[l : l + 2])
        Sigma = plain.covariance(a[l])[1]
        spent["bases"] += 2 * seconds(lambda Sigma=Sigma: reference.nonzero_eigh(Sigma, 0.0))

        def metric(k: int, F: Any = F, x: Any = (a[l], mu, C_next, counts, counts_next)) -> None:
            a_l, mu, C_next, counts, counts_next = x
            reference.jacobian_metric(F, a_l[:k], mu, C_next, counts[:k], counts_next[:k])

        def edges(k: int, F: Any = F, x: Any = (a[l], mu, C, C_pinv, C_next, counts, counts_next)) -> None:
            a_l, mu, C, C_pinv, C_next, counts, counts_next = x
            reference.edges(F, a_l[:k], mu, C, C_pinv, C_next, counts[:k], counts_next[:k])

        spent["bases"] += extrapolated(metric, part, len(a[l]))
        spent["edges"] += extrapolated(edges, part, len(a[l]))
    return spent


def note_ratios(benchmark: Any, own: float, **slow: dict[str, float]) -> None:
    """Report the seconds of the slow implementations by step, and their ratios to this package."""
    for name, spent in slow.items():
        whole = sum(spent.values())
        benchmark.extra_info[f"times the {name.replace('_', ' ')}"] = round(whole / own, 1)
        steps = ", ".join(f"{step} {x:.3g}" for step, x in spent.items())
        benchmark.extra_info[f"{name.replace('_', ' ')} (s)"] = f"{whole:.3g} ({steps})"


def _bases(subject: Subject, graph: InteractionGraph) -> list[tuple[Tensor, Tensor, Tensor]]:
    dtype = next(subject.model.parameters()).dtype
    return [
        (b.mean.to(dtype), b.to_features.to(dtype), b.from_features.to(dtype))
        for b in (graph.bases[name] for name in subject.node_layers)
    ]


def pairs(graph: InteractionGraph) -> list[tuple[str, str]]:
    """Neighbouring node layers."""
    return list(itertools.pairwise(graph.node_layers))
