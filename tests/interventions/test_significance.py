"""Tests of differences, and the false discovery rate."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lib_lightning.interventions import benjamini_hochberg, sign_flip_p_values
from lib_lightning.interventions.significance import samples_needed


def p_of(d: Tensor) -> Tensor:
    """p-values of differences ``(n, m)``."""
    return sign_flip_p_values(d.sum(0), d.square().sum(0))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(-10, 10) | st.sampled_from([0.0, 1.0, 1.0, -1.0, 1e6]), min_size=1, max_size=10))
def test_never_below_the_p_value_over_all_sign_flips(values: list[float]) -> None:
    d = torch.tensor(values, dtype=torch.float64)
    signs = torch.tensor(list(itertools.product([1.0, -1.0], repeat=len(d))), dtype=torch.float64)
    exact = ((signs @ d).abs() >= d.sum().abs() * (1 - 1e-12) - 1e-300).double().mean()
    assert p_of(d[:, None])[0] >= exact - 1e-12


def test_close_to_the_t_test_with_many_samples() -> None:
    d = torch.randn(2000, 5).double() + torch.tensor([0.0, 0.02, 0.04, 0.06, 0.08]).double()
    t_test = torch.tensor(scipy.stats.ttest_1samp(d, 0).pvalue)
    ratio = p_of(d) / t_test.clamp(max=1 / 3.2)
    assert (ratio > 0.9).all()
    assert (ratio < 3.3).all()  # 3.18, the constant of the bound


@pytest.mark.parametrize("n", [4, 12, 40, 300])
@pytest.mark.parametrize("kind", ["normal", "Cauchy", "few changes", "ties", "skewed"])
def test_no_more_false_ones_than_the_level(kind: str, n: int) -> None:
    draws: dict[str, Callable[[], Tensor]] = {
        "normal": lambda: torch.randn(n, 2000),
        "Cauchy": lambda: torch.randn(n, 2000) / torch.randn(n, 2000),
        "few changes": lambda: torch.randint(-1, 2, (n, 2000)) * (torch.rand(n, 2000) < 0.1),
        "ties": lambda: torch.randint(-2, 3, (n, 2000)).float(),
        "skewed": lambda: torch.empty(n, 2000).exponential_() - 1,  # mean zero, and not symmetric
    }
    share = (p_of(draws[kind]().double()) <= 0.05).double().mean()
    assert share <= 0.05


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1) | st.sampled_from([0.0, 0.01, 0.05, 1.0]), max_size=12), st.floats(0.01, 0.5))
def test_benjamini_hochberg_equals_that_of_scipy(p_values: list[float], level: float) -> None:
    p = torch.tensor(p_values, dtype=torch.float64)
    found = benjamini_hochberg(p, level)
    expected = [] if not p_values else scipy.stats.false_discovery_control(p_values) <= level
    # On the boundary the two may round differently.
    close = [] if not p_values else abs(scipy.stats.false_discovery_control(p_values) - level) < 1e-12
    assert all(a == b or c for a, b, c in zip(found.tolist(), expected, close, strict=True))


def test_samples_that_are_needed() -> None:
    for m in (1, 10, 1000):
        n = samples_needed(m, 0.05)
        same = torch.ones(n, 1).double()
        assert p_of(same)[0] <= 0.05 / m < p_of(same[1:])[0]
