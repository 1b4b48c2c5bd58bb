"""What all benchmarks share: every core for torch, how fast the machine is now, and where published weights are."""

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
    """Note how fast the machine multiplies matrices at this moment, as others may be using it, too."""
    benchmark = request.getfixturevalue("benchmark") if "benchmark" in request.fixturenames else None
    yield
    if benchmark is not None:
        rates = (f"{product_rate(dtype):.0f} in {dtype}" for dtype in (torch.float32, torch.float64))
        benchmark.extra_info["GFLOP/s of large products"] = ", ".join(rates).replace("torch.", "")


@pytest.fixture(autouse=True)
def _all_snapshots_are_affordable() -> None:
    """Not here: what the budget does is measured as users have it (the ordinary tests lift it)."""


@pytest.fixture(params=["published", "made-up"])
def published(request: pytest.FixtureRequest) -> Path | None:
    """Folder of published weights and data; None for made-up ones of the same shape."""
    return request.getfixturevalue("reference_dir") if request.param == "published" else None
