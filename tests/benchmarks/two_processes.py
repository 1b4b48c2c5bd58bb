"""Two processes and one on the same samples, with one thread each: ``torchrun --nproc_per_node 2 THIS FILE``."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed as dist

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.distributed.torch_group import TorchProcessGroup
from tests.benchmarks.agreement import edges_errors
from tests.benchmarks.subjects import Subject, language_model, modular_addition, perceptron

PAIRS = 5
SUBJECTS: dict[str, Callable[[], Subject]] = {
    "modular_addition": lambda: modular_addition(None),
    "cifar10": lambda: perceptron(None),
    "language_model": lambda: language_model(16, 16, n_layers=2, batch_size=4),
}


def timed(work: Callable[[], InteractionGraph]) -> tuple[float, float, InteractionGraph]:
    """Wall time and CPU time in seconds, and the result."""
    started, worked = time.perf_counter(), time.process_time()
    graph = work()
    return time.perf_counter() - started, time.process_time() - worked, graph


def main(name: str, path: Path) -> None:
    """Measure, and write the results as JSON."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    subject = SUBJECTS[name]()
    # Divided as by a distributed sampler: one half each.
    halves = [half.split(subject.batch_size) for half in subject.data.chunk(2)]
    batches, own = [*halves[0], *halves[1]], halves[rank]
    processes = TorchProcessGroup()

    def process_group() -> InteractionGraph:
        graph = compute_interaction_graph(
            subject.model, own, subject.node_layers, process_group=processes, effort="exact"
        )
        dist.barrier()
        return graph

    def alone() -> InteractionGraph:
        return compute_interaction_graph(subject.model, batches, subject.node_layers, effort="exact")

    process_group()  # to warm up
    found = []
    for _ in range(PAIRS):  # alternating, because the machine's speed changes
        dist.barrier()
        two, work, graph = timed(process_group)
        both = torch.tensor([work])
        dist.all_reduce(both)
        if rank == 0:  # the other process is idle
            one, one_work, expected = timed(alone)
            error = max(edges_errors(graph, expected))
            found.append({"one": one, "two": two, "one_work": one_work, "two_work": float(both), "error": error})
    if rank == 0:
        path.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
