"""Running mean and covariance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lib_lightning import compute_interaction_graph
from lib_lightning.algorithm.covariance import RunningCovariance, all_reduce_covariances
from lib_lightning.distributed.process_group import ProcessGroup
from lib_lightning.errors import ActivationError
from tests.algorithm.two_threads import in_two


def test_moments_far_from_zero_lose_no_digits() -> None:
    rows = torch.randn(600, 3).double()
    near, far = RunningCovariance(), RunningCovariance()
    near.update(rows, n=300)
    for batch in (rows + 1e6).split([2, 14, 584]):
        far.update(batch, n=len(batch) // 2)
    # The input itself is rounded at 1e6 * 2e-16; a sum of squares would lose twelve digits.
    torch.testing.assert_close(far.covariance, near.covariance, rtol=0, atol=1e-8)
    torch.testing.assert_close(far.mean, near.mean + 1e6, rtol=1e-15, atol=1e-9)


@pytest.mark.parametrize("always", [True, False])
def test_moments_of_two_processes_are_combined(always: bool) -> None:
    x = [torch.randn(30, 4).double() + 1e6, torch.randn(30, 600).float()]

    def work(process_group: ProcessGroup) -> list[RunningCovariance]:
        moments = [RunningCovariance(always), RunningCovariance(always)]
        for layer_moments, a in zip(moments, x, strict=True):
            if process_group.rank == 0:
                layer_moments.update(a[:10], 10)
                layer_moments.update(a[10:], 20)
        all_reduce_covariances(moments, process_group)
        return moments

    for moments in in_two(work):
        assert [m.dtype for m in moments] == [torch.float64, torch.float32]
        assert moments[1].has_covariance == always
        for layer_moments, a in zip(moments, x, strict=True):
            assert (layer_moments.n, layer_moments.count) == (30, 30)
            torch.testing.assert_close(layer_moments.mean, a.double().mean(0))
            if layer_moments.has_covariance:
                torch.testing.assert_close(layer_moments.covariance, a.T.double().cov(correction=0))


@pytest.mark.parametrize(("bad", "word"), [(math.nan, "NaN"), (math.inf, "infinite")])
@pytest.mark.parametrize(("sample", "seen"), [(1, 9), (4, 15)])  # among the samples of the first check, and after them
def test_activations_must_be_finite(bad: float, word: str, sample: int, seen: int) -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(5, 3)
    x[sample, 2] = bad
    with pytest.raises(ActivationError, match=rf"Node layer '0:input' has {word} activations \(1 of {seen} numbers\)"):
        compute_interaction_graph(model, [x], ["0:input", "output"])
