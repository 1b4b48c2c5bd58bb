"""Quadrature along the integration path."""

from __future__ import annotations

import pytest

from lib_lightning.jacobian.integrated_gradients import gauss_legendre


@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_quadrature_is_exact_for_polynomials(k: int) -> None:
    for degree in range(2 * k):
        assert sum(w * x**degree for x, w in gauss_legendre(k)) == pytest.approx(1 / (degree + 1), rel=1e-12)
