"""Sampling with unequal probabilities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib_lightning.algorithm.unequal_sampling import inclusion_probabilities, systematic_sample

sizes = st.lists(st.floats(1e-9, 1e6) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=30)


@given(sizes, st.integers(1, 12))
def test_probabilities_are_proportional_to_size_up_to_one(size: list[float], count: int) -> None:
    x = torch.tensor(size, dtype=torch.float64)
    p = inclusion_probabilities(x, count)
    assert ((p >= 0) & (p <= 1)).all()
    assert float(p.sum()) == pytest.approx(min(count, int((x > 0).sum())))
    assert (p[x == 0] == 0).all()
    uncertain = (p < 1) & (x > 0)
    if uncertain.any():
        scale = (p / x)[uncertain]
        torch.testing.assert_close(scale, scale[:1].expand_as(scale))
        assert (x[(p == 1)] * scale.max() >= 1 - 1e-9).all()


@given(sizes, st.integers(1, 12), st.integers(0, 100))
def test_every_draw_has_as_many_different_items(size: list[float], count: int, seed: int) -> None:
    p = inclusion_probabilities(torch.tensor(size), count)
    chosen = systematic_sample(p, 5, torch.Generator().manual_seed(seed))
    assert chosen.shape == (5, min(count, int((p > 0).sum())))
    assert (p[chosen] > 0).all()
    assert all(len(set(row.tolist())) == len(row) for row in chosen)
    assert all(set((p == 1).nonzero().flatten().tolist()) <= set(row.tolist()) for row in chosen)


@given(sizes, st.integers(1, 12), st.integers(1, 40), st.integers(0, 100))
def test_draws_are_balanced(size: list[float], count: int, draws: int, seed: int) -> None:
    p = inclusion_probabilities(torch.tensor(size), count)
    chosen = systematic_sample(p, draws, torch.Generator().manual_seed(seed))
    times = chosen.flatten().bincount(minlength=len(p))
    assert ((times - draws * p).abs() < 2 + 1e-9).all()


def test_items_are_chosen_as_often_as_their_probability_says() -> None:
    p = inclusion_probabilities(torch.tensor([9.0, 4.0, 3.0, 1.0, 0.5, 0.1, 0.0]), 3)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.cat([systematic_sample(p, 50, generator) for _ in range(200)])
    frequency = chosen.flatten().bincount(minlength=len(p)) / len(chosen)
    error = (p * (1 - p) / len(chosen)).sqrt()
    assert ((frequency - p).abs() <= 4 * error + 1e-12).all()
