"""Gram sums by several threads."""

from __future__ import annotations

import pytest
import torch

from lib_lightning.algorithm.linalg import add_gram


@pytest.mark.parametrize("d", [1, 5, 300])
@pytest.mark.parametrize("m", [0, 1, 7, 1000])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_gram_sum_for_any_number_of_threads(threads: int, m: int, d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rows, total = torch.randn(m, d).double(), torch.eye(d).double()
    add_gram(total, rows)
    torch.testing.assert_close(total, torch.eye(d).double() + rows.T @ rows, rtol=1e-13, atol=1e-12)
