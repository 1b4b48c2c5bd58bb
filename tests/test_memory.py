"""Measured memory of a computation, in addition to model and batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = r"""
import re, sys
import torch
from torch import nn
from lib_lightning import NodeLayer, compute_interaction_graph

torch.set_num_threads(1)
blocks = [nn.Sequential(nn.Linear(16, 2000), nn.Tanh(), nn.Linear(2000, 16), nn.Tanh()) for _ in range(2)]
model, batch = nn.Sequential(*blocks), torch.randn(4000, 16)
options = eval(sys.argv[2])

def graph(batch, limit):
    return compute_interaction_graph(model, [batch], ["input", "0", "output"], memory_limit=limit, **options)

def highest():
    # Not getrusage, whose maximum includes that of the parent process.
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1])

graph(batch[:8], 1.0)  # loads what is needed once
before = highest()
graph(batch, float(sys.argv[1]))
print((highest() - before) / 2**20)
"""


def peak(limit: float, options: str) -> float:
    """Peak memory for a memory limit, in GiB."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(limit), options],
        cwd=Path(__file__).parents[1],
        # Freed memory is returned to the system at once, so that it is not counted.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
        stdout=subprocess.PIPE,
        check=True,
        timeout=300,
    )
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("options", ["{}", "{'integration_steps': 2}"])
def test_memory_is_bounded(options: str) -> None:
    assert peak(0.05, options) < 0.05
    assert peak(100.0, options) > 0.1, "needs more without a limit"
