"""Peak memory of a computation beside model and samples, in a new process: ``python THIS FILE SUBJECT LIMIT``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from lib_lightning import compute_interaction_graph
from tests.benchmarks.subjects import Subject, language_model, perceptron

SUBJECTS: dict[str, Callable[[], Subject]] = {
    "cifar10": lambda: perceptron(None),
    "language_model": lambda: language_model(8, 128, n_layers=2),
}


def peak() -> float:
    """Peak memory of this process, in MiB."""
    # Not getrusage, whose maximum includes the parent process.
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10


def main(name: str, limit: float) -> None:
    """Print the peak in MiB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    subject = SUBJECTS[name]()
    small = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    compute_interaction_graph(small, [torch.randn(50, 8)], ["input", "1", "output"])  # loads libraries
    options = {"n_probes": 4} if name == "language_model" else {}
    before = peak()
    graph = compute_interaction_graph(
        subject.model, [subject.data], subject.node_layers, memory_limit=limit, effort="exact", **options
    )
    assert all(torch.isfinite(E).all() for E in graph.edges.values())
    print(peak() - before)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
