"""Sums stay on the device of the activations, tested with a fake device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.covariance import RunningCovariance
from lib_lightning.algorithm.edges import Edges
from lib_lightning.algorithm.fisher_metric import FisherMetric
from lib_lightning.algorithm.jackknife import FeatureVariances
from lib_lightning.algorithm.jacobian_metric import JacobianMetric
from lib_lightning.algorithm.low_rank_gram import LowRankGram
from lib_lightning.algorithm.wide_layers import DualEigenproblem
from lib_lightning.jacobian.closed_form import ClosedEdges, ClosedForm, ClosedMetric, Factors
from lib_lightning.jacobian.section import Section

# As on an accelerator, operations between tensors on two devices raise an error; so does reading a value, which would
# synchronize with the device.
DEVICE = torch.device("meta")
N, S, D, H, R = 6, 3, 5, 7, 4


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device=DEVICE)


def basis(d: int, r: int) -> Basis:
    return Basis("layer", "lib", numbers(d), numbers(d, r), numbers(r, d), numbers(r))


def test_the_fake_device_detects_moved_tensors() -> None:
    with pytest.raises(RuntimeError, match="device"):
        numbers(2) + torch.zeros(2)


def test_moments_and_variances() -> None:
    moments = RunningCovariance()
    moments.update(numbers(N, D, dtype=torch.float32), 2)
    moments.update(numbers(N, D, dtype=torch.float32), 2)
    assert moments.covariance.device == DEVICE
    variances = FeatureVariances(basis(D, R), groups=2)
    variances.update(numbers(N, S, R), None, [(0, slice(0, 2)), (1, slice(2, 6))])
    assert variances._second.device == DEVICE


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_closed_forms(affine: bool, residual: bool) -> None:
    weights = Factors(None if affine else numbers(H, D), numbers(D, D if affine else H), H, residual, affine)
    counts = torch.ones(N, S, dtype=torch.bool, device=DEVICE)
    form = ClosedForm(weights, None if affine else numbers(N, S, H), counts)
    assert form.bilinear(numbers(N, S, D), numbers(D, 2)).device == DEVICE
    metric = ClosedMetric(weights, numbers(D, R), groups=2)
    metric.add(form, 1, slice(1, 4))
    V, sums = metric.sums()
    X = list(sums)
    assert V.device == X[0].device == DEVICE
    gram = LowRankGram(D, parts=2)
    gram.add_product(V, X)
    assert gram.matrix().device == DEVICE
    if affine:  # the number of valid positions, which determines the blocks, is not known for fake tensors
        edges = ClosedEdges(weights, numbers(R, D), numbers(D, R))
        assert edges.J is not None
        assert edges.J.device == DEVICE


def test_dual_moments_and_fisher() -> None:
    dual = DualEigenproblem(numbers(D), numbers(2, D))
    dual.update(numbers(N, D, dtype=torch.float32))
    assert dual._cross.device == DEVICE
    fisher = FisherMetric(D)
    fisher.update(numbers(N, D), 0)
    assert fisher.M.device == DEVICE


class Linear(Section):
    """A section with products but without a graph."""

    def __init__(self) -> None:
        groups = [(0, slice(0, 2)), (1, slice(2, 6))]
        super().__init__(numbers(N, S, D), numbers(N, S, D), [], stack_elements=4 * N * S * D, group_slices=groups)
        self.cached_products = []

    def vjp(self, cotangents: Tensor) -> Tensor:
        return cotangents * numbers(())

    jvp = vjp

    def has_jvp(self) -> bool:
        return True


@pytest.mark.parametrize("n_probes", [None, 3])
def test_general_sections(n_probes: int | None) -> None:
    section = Linear()
    metric = JacobianMetric(D, numbers(D, R), n_probes, torch.Generator(), groups=2)
    metric.update(section)
    assert metric.M.device == metric.gram.squared_lengths(numbers(R, D)).device == DEVICE
    edges = Edges(basis(D, R), basis(D, R), groups=2)
    edges.update(section, numbers(N, S, R), numbers(N, S, R))
    edges.update_forward(section, numbers(N, S, R), numbers(N, S, R))
    edges.update_reverse(section, numbers(N, S, R), numbers(N, S, R))
    assert edges.E.device == edges.A.device == DEVICE
