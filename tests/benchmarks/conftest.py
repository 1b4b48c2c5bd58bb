"""What all benchmarks share: every core for torch, and where published weights and data are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

THREADS = int(os.environ.get("BENCH_THREADS", 0)) or os.cpu_count() or 1


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["published", "made-up"])
def published(request: pytest.FixtureRequest) -> Path | None:
    """Folder of published weights and data; None for made-up ones of the same shape."""
    return request.getfixturevalue("reference_dir") if request.param == "published" else None
