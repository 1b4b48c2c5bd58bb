"""DDP: two processes with one thread each compared with a single one, on the same samples. Needs two cores."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.two_processes import SUBJECTS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", sorted(SUBJECTS))
def test_speedup(benchmark: Any, name: str, tmp_path: Path) -> None:
    path = tmp_path / "found.json"

    def launch() -> None:
        script = str(ROOT / "tests" / "benchmarks" / "two_processes.py")
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, name, path],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            check=True,
            timeout=3000,
        )

    benchmark.pedantic(launch, rounds=1, iterations=1)
    found = json.loads(path.read_text())
    # Sums in another order: weak directions at the threshold may appear or disappear.
    assert max(pair["error"] for pair in found) < 1e-4
    benchmark.extra_info |= {
        "one process (s)": round(min(pair["one"] for pair in found), 2),
        "two processes (s)": round(min(pair["two"] for pair in found), 2),
        "speedup, median of pairs": round(statistics.median(pair["one"] / pair["two"] for pair in found), 2),
        "work of one process (CPU s)": round(min(pair["one_work"] for pair in found), 2),
        "work of both of two (CPU s)": round(min(pair["two_work"] for pair in found), 2),
    }
