"""Fixtures of all benchmarks: number of threads, speed of the machine, and published weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.benchmarks.clock import product_rate

THREADS = int(os.environ.get("BENCH_THREADS", 0)) or os.cpu_count() or 1


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _rates(request: pytest.FixtureRequest, _threads: None) -> Iterator[None]:
    """Report the current rate of matrix products, because other programs may use the machine as well."""
    benchmark = request.getfixturevalue("benchmark") if "benchmark" in request.fixturenames else None
    yield
    if benchmark is not None:
        rates = (f"{product_rate(dtype):.0f} in {dtype}" for dtype in (torch.float32, torch.float64))
        benchmark.extra_info["GFLOP/s of large products"] = ", ".join(rates).replace("torch.", "")


@pytest.fixture(autouse=True)
def _all_snapshots_are_affordable() -> None:
    """Keep the budget, which other tests disable: benchmarks measure default settings."""


@pytest.fixture(params=["published", "made-up"])
def published(request: pytest.FixtureRequest) -> Path | None:
    """Folder of published weights and data; None for random ones of the same shape."""
    return request.getfixturevalue("reference_dir") if request.param == "published" else None
