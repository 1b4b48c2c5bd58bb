"""Tolerances hold at every scale of the numbers, and never accept what cannot be compared."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.algorithm.linalg import eigh_psd
from lib_lightning.errors import NotFiniteError
from lib_lightning.jacobian.closed_form_detect import ClosedFormDetector
from lib_lightning.jacobian.integrated_gradients import sections
from lib_lightning.model.agreement import agree, any_differs, half_of_the_digits, length, other_order, same_numbers
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.node_layer import as_node_layers

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
exponents = st.integers(-30, 30)


@settings(max_examples=200, deadline=None)
@given(exponent=exponents, dtype=st.sampled_from(DTYPES), error=st.sampled_from([0.0, 1e-3, 0.5]), n=st.integers(1, 50))
def test_agreement_at_any_scale(exponent: int, dtype: torch.dtype, error: float, n: int) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) + 2
    b = (x * 10.0**exponent).to(dtype)
    a = (x * 10.0**exponent * (1 + error)).to(dtype)
    expected = (a.double() - b.double()).norm() <= 0.1 * b.double().norm()
    finite = bool(torch.isfinite(a).all() and torch.isfinite(b).all())
    assert agree(a, b, 0.1) == (finite and bool(expected))
    if finite:
        torch.testing.assert_close(length(b), (b.double() * 10.0**-exponent).norm() * 10.0**exponent, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_numbers_that_are_not_finite_never_agree(value: float) -> None:
    x = torch.tensor([1.0, value])
    assert not agree(x, x, 0.5)
    assert not agree(x, torch.ones(2), 0.5)
    assert not agree(torch.ones(2), x, 0.5)
    assert agree(torch.zeros(2), torch.zeros(2), 0.0)
    assert not agree(torch.zeros(2), torch.zeros(3), 0.0)
    with pytest.raises(NotFiniteError, match="exceeds the range of float64"):
        eigh_psd(torch.diag(x), 1e-6)


@settings(max_examples=60, deadline=None)
@given(exponent=exponents, dtype=st.sampled_from([torch.float32, torch.float64]), seed=st.integers(0, 99))
def test_no_nonlinearity_passes_for_an_affine_map(exponent: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype)
    x = (torch.randn(32, 4, dtype=torch.float64) * 10.0**exponent).to(dtype)
    with torch.no_grad():
        model[2].weight.mul_(10.0 ** min(abs(exponent), 15))
        model[0].bias.zero_()
    instrumented = InstrumentedModel(model, as_node_layers(["input", "output"]))
    with model_session(instrumented):
        (section,) = sections(instrumented, x, [], 0, 2**20)
        detector = ClosedFormDetector()
        detector.fit(section)
        form = detector.match(section)
    assert form is None or not form.factors.affine


def scaled(exponent: int, dtype: torch.dtype, kind: str) -> InteractionGraph:
    torch.manual_seed(0)
    act: nn.Module = {"closed": nn.ReLU(), "forward": nn.Tanh(), "affine": nn.Identity()}[kind]
    width = 12 if kind == "forward" else 5
    layers: list[nn.Module] = [nn.Linear(4, 6), act, nn.Linear(6, width)]
    if kind == "forward":
        layers.insert(2, nn.LayerNorm(6))  # no closed form
    model = nn.Sequential(*layers).to(dtype)
    x = torch.randn(40, 4, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model[-1].parameters():
            parameter.mul_(10.0**exponent)
    return compute_interaction_graph(model, [x.to(dtype)], ["input", "output"], basis="lib", final_basis="pca")


@pytest.mark.parametrize("kind", ["closed", "forward", "affine"])
@pytest.mark.parametrize("exponent", [-18, 15, 20, 25])
def test_edges_at_any_scale_of_the_output(exponent: int, kind: str) -> None:
    """Squares of interactions leave the range of float32 long before activations do."""
    plain, large = scaled(0, torch.float32, kind), scaled(exponent, torch.float32, kind)
    E, other = plain.edges["input", "output"], large.edges["input", "output"]
    assert bool(torch.isfinite(other).all())
    torch.testing.assert_close(other * 10.0 ** (-2 * exponent), E, rtol=1e-3, atol=1e-5 * float(E.max()))


def test_the_scale_of_the_input_does_not_matter() -> None:
    x = torch.randn(30, 4).double()
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)).double()
    expected = compute_interaction_graph(model, [x], ["input", "output"])
    with torch.no_grad():
        model[0].weight.mul_(1e-25)
    graph = compute_interaction_graph(model, [x * 1e25], ["input", "output"])
    pair = ("input", "output")
    torch.testing.assert_close(graph.edges[pair], expected.edges[pair], rtol=1e-8, atol=1e-10)


@settings(max_examples=200, deadline=None)
@given(
    exponent=st.integers(-4, 4), dtype=st.sampled_from(DTYPES), n=st.integers(1, 50),
    special=st.sampled_from([None, torch.nan, torch.inf, -torch.inf]), error=st.sampled_from([0.0, 0.5, 2.0]),
)  # fmt: skip
def test_numbers_that_are_the_same_up_to_a_tolerance(
    exponent: int, dtype: torch.dtype, n: int, special: float | None, error: float
) -> None:
    """One entry beyond the tolerance is found, at any scale and beside entries that are not finite."""
    b = ((torch.randn(n, generator=torch.Generator().manual_seed(n)) + 2) * 2.0**exponent).to(dtype)
    for tolerance in (other_order(dtype), half_of_the_digits(dtype)):
        assert torch.finfo(dtype).eps < tolerance <= half_of_the_digits(dtype) < 0.1
        x, y = b.double().clone(), b.double().clone()
        x[n // 2] += error * tolerance * y.abs().max()
        if special is not None:
            x, y = (torch.cat([t, t.new_tensor([special])]) for t in (x, y))
            assert not same_numbers(torch.cat([x[:-1], x.new_ones(1)]), y, tolerance)
        assert same_numbers(x, y, tolerance) == (error <= 1)
        assert not same_numbers(x[:-1], y, tolerance)
    assert same_numbers(torch.arange(3), torch.arange(3), 0.0)
    assert not same_numbers(torch.arange(3), torch.arange(1, 4), 1.0)


@settings(max_examples=100, deadline=None)
@given(dtype=st.sampled_from(DTYPES), exponent=st.integers(-4, 4), ulps=st.integers(-9, 9))
def test_a_result_that_differs_by_more_than_its_last_digit(dtype: torch.dtype, exponent: int, ulps: int) -> None:
    first = torch.full((1, 3), 2.0**exponent, dtype=dtype)
    rows = first.repeat(4, 1)
    rows[2, 1] += ulps * torch.finfo(dtype).eps * 2.0**exponent
    assert bool(any_differs(rows, first)) == (abs(ulps) > 2)
