"""Explained variance by frequency: features with known frequencies, and comparison with least squares."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lib_lightning.metrics import fourier_variance
from lib_lightning.metrics.functional.fourier import KINDS

SUM, BOTH, A, B = range(4)
MODULI = [2, 3, 4, 5, 6, 12, 17, 64, 113]


def pairs(modulus: int) -> tuple[Tensor, Tensor]:
    a, b = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus)).T
    return a, b


def wave(m: Tensor, k: int, modulus: int, phase: float = 0.3) -> Tensor:
    return torch.cos(2 * math.pi * k * m.double() / modulus + phase)


@pytest.mark.parametrize("modulus", MODULI)
def test_single_waves_are_found(modulus: int) -> None:
    a, b = pairs(modulus)
    frequencies = range(1, modulus // 2 + 1)
    for kind, m in ((SUM, a + b), (A, a), (B, b)):
        features = torch.stack([5 * wave(m, k, modulus) - 7 for k in frequencies], -1)[:, None]
        expected = torch.zeros(4, modulus // 2, modulus // 2, dtype=torch.float64)
        expected[kind] = torch.eye(modulus // 2)
        if kind in (A, B):
            expected[BOTH] = torch.eye(modulus // 2)
        torch.testing.assert_close(fourier_variance(features, a, b, modulus), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("modulus", [5, 6, 12, 113])
def test_mixtures_are_weighted_by_variance_over_positions(modulus: int) -> None:
    a, b = pairs(modulus)
    k, last = 1, modulus // 2
    features = torch.stack([3 * wave(a, k, modulus), 4 * wave(b, k, modulus), torch.full_like(a, 9).double()], 1)
    first = fourier_variance(features[..., None], a, b, modulus)[:, k - 1, 0]
    torch.testing.assert_close(first, torch.tensor([0, 1, 9 / 25, 16 / 25], dtype=torch.float64), atol=1e-10, rtol=0)
    # At half the modulus the wave is an alternating sign, with variance cos(phase)^2.
    own = torch.tensor([wave(a, q, modulus).var() for q in (k, last)])
    mixed = 2 * wave(a + b, k, modulus) + wave(a, last, modulus)
    found = fourier_variance(mixed[:, None, None], a, b, modulus)[..., 0]
    expected = torch.stack([4 * own[0], own[1]]) / (4 * own[0] + own[1])
    torch.testing.assert_close(torch.stack([found[SUM, k - 1], found[A, last - 1]]), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize(("modulus", "n"), [(6, 11), (7, 40), (2, 9), (113, 300), (12, 3)])
def test_equals_least_squares_on_some_pairs(modulus: int, n: int) -> None:
    a, b = torch.randint(0, modulus, (2, n))
    features = torch.randn(n, 2, 3).double() + wave(a + b, 1, modulus)[:, None, None] + 100
    found = fourier_variance(features, a, b, modulus)
    y = features.flatten(1).numpy()
    for kind, ms in enumerate([(a + b,), (a, b), (a,), (b,)]):
        for k in range(1, modulus // 2 + 1):
            angles = [2 * np.pi * k * m.numpy() / modulus for m in ms]
            X = np.stack([np.ones(n)] + [f(angle) for angle in angles for f in (np.cos, np.sin)], 1)
            residual = y - X @ np.linalg.lstsq(X, y, rcond=1e-9)[0]
            left, whole = (v.reshape(n, 2, 3).var(0).sum(0) for v in (residual, y))
            np.testing.assert_allclose(found[kind, k - 1], 1 - left / whole, atol=1e-8)


def test_degenerate_samples() -> None:
    a, b = torch.full((5,), 3), torch.full((5,), 4)
    for features in (torch.randn(5, 2, 3), torch.full((5, 2, 3), 0.1), torch.zeros(5, 2, 0)):
        assert (fourier_variance(features, a, b, 7) == 0).all()
    assert fourier_variance(torch.zeros(0, 2, 3), a[:0], b[:0], 7).shape == (4, 3, 3)
    constant = torch.full((25, 1, 1), 0.1) + torch.tensor([0.0, 2**-30]).float().repeat(13)[:25, None, None]
    assert (fourier_variance(constant, *pairs(5), 5) == 0).all()
    for modulus, shape in ((1, (5, 2, 3)), (7, (5, 2)), (7, (4, 2, 3))):
        with pytest.raises(ValueError, match=r"modulus|\(n, S, r\)"):
            fourier_variance(torch.zeros(shape), a, b, modulus)


def test_noise_in_thousands_of_samples_is_hardly_explained() -> None:
    a, b = (m[torch.randperm(113**2)[:3830]] for m in pairs(113))
    shares = fourier_variance(torch.randn(3830, 1, 128), a, b, 113)
    assert shares.shape == (len(KINDS), 56, 128)
    assert shares.max() < 0.02  # noise: about 2 or 4 in 3829
