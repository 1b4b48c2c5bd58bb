"""Peak memory in addition to model and samples, compared with ``memory_limit``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.memory import SUBJECTS

ROOT = Path(__file__).parents[2]
# MiB of a 3072 x 3072 matrix in float64, such as the covariance of the pixels.
SQUARE = 8 * 3072**2 / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("limit", [0.75, 2.0])
@pytest.mark.parametrize("name", sorted(SUBJECTS))
def test_peak(benchmark: Any, name: str, limit: float) -> None:
    peaks: list[float] = []

    def measure() -> None:
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.memory", name, str(limit)],
            cwd=ROOT,
            # Freed memory is returned to the system at once, and no longer counted.
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
            stdout=subprocess.PIPE,
            check=True,
            timeout=3000,
        )
        peaks.append(float(done.stdout))

    benchmark.pedantic(measure, rounds=1, iterations=1)
    (peak,) = peaks
    benchmark.extra_info |= {
        "memory_limit (MiB)": round(limit * 2**10),
        "peak (MiB)": round(peak),
        "in matrices of 3072 x 3072": round(peak / SQUARE, 1),
    }
    assert peak < limit * 2**10
