"""Sums over samples in closed form, compared with explicit Jacobians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lib_lightning.jacobian import closed_form as closed
from lib_lightning.jacobian.closed_form import ClosedEdges, ClosedForm, ClosedMetric, Factors

H, D_IN, D_OUT, R_IN, R_OUT = 6, 5, 4, 5, 3
Parts = tuple[Factors, Tensor, Tensor]


def parts(residual: bool, r_in: int = R_IN, r_out: int = R_OUT) -> Parts:
    d_out = D_IN if residual else D_OUT
    factors = Factors(torch.randn(H, D_IN).double(), torch.randn(d_out, H).double(), H, residual)
    return factors, torch.randn(r_in, D_IN).double(), torch.randn(d_out, r_out).double()


def jacobian(factors: Factors, s: Tensor) -> Tensor:
    assert factors.W_1 is not None
    assert factors.W_2 is not None
    J = factors.W_2 @ torch.diag(s.double()) @ factors.W_1
    return J + torch.eye(D_IN).double() if factors.residual else J


@pytest.mark.parametrize("block", [1, 100, 2**18])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("n", [1, R_IN, R_IN + 1, 40, 600])
def test_edges_are_the_sum_over_samples(n: int, residual: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closed, "BLOCK", block)
    factors, C_pinv, C_next = parts(residual)
    derivatives, fhat = torch.rand(n, 1, H).double(), torch.randn(n, 1, R_IN).double()
    form = ClosedForm(factors, derivatives, torch.ones(n, 1, dtype=torch.bool))
    fhat_next = torch.randn(n, 1, R_OUT).double()
    squares, signed = ClosedEdges(factors, C_pinv, C_next).sums(form, fhat, fhat_next, slice(None))
    y = [C_next.T @ jacobian(factors, s[0]) @ C_pinv.T * f for s, f in zip(derivatives, fhat, strict=True)]
    torch.testing.assert_close(squares, sum(y_x.square() for y_x in y), rtol=1e-12, atol=1e-12)
    expected = sum(y_x * f[0, :, None] for y_x, f in zip(y, fhat_next, strict=True))
    torch.testing.assert_close(signed, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("r_in", "r_out"), [(0, R_OUT), (R_IN, 0), (0, 0)])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("n", [0, 1, 40])
def test_no_features_have_no_edges(n: int, residual: bool, r_in: int, r_out: int) -> None:
    factors, C_pinv, C_next = parts(residual, r_in, r_out)
    form = ClosedForm(factors, torch.rand(n, 1, H).double(), torch.ones(n, 1, dtype=torch.bool))
    fhat = torch.randn(n, 1, r_in).double()
    fhat_next = torch.randn(n, 1, r_out).double()
    squares, signed = ClosedEdges(factors, C_pinv, C_next).sums(form, fhat, fhat_next, slice(None))
    assert squares.shape == signed.shape == (r_out, r_in)


@pytest.mark.parametrize("derivatives", ["of a ReLU", "of a leaky ReLU", "smooth", "zero", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("residual", [False, True])
def test_metric_is_exact(residual: bool, dtype: torch.dtype, derivatives: str) -> None:
    factors, _, C_next = parts(residual)
    some = torch.rand(3000, 1, H)
    s = {
        "of a ReLU": (some > 0.3).float(),
        "of a leaky ReLU": torch.where(some > 0.3, 1.0, 0.01),
        "smooth": some,
        "zero": torch.zeros_like(some),
        "one": torch.ones_like(some),
    }[derivatives].to(dtype)
    metric = ClosedMetric(factors, C_next, 1)
    form = ClosedForm(factors, s, torch.ones(3000, 1, dtype=torch.bool))
    for span in (slice(0, 1000), slice(1000, 3000)):
        metric.add(form, 0, span)
    V, (X,) = metric.sums()
    gradients = torch.stack([C_next.T @ jacobian(factors, x[0]) for x in s]).flatten(0, 1)
    torch.testing.assert_close(V.T @ X @ V, gradients.T @ gradients, rtol=1e-12, atol=1e-12)
