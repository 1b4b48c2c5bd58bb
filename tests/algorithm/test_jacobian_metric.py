"""The Jacobian metric: exact, and sampled with probes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lib_lightning import compute_interaction_graph
from lib_lightning.algorithm.jacobian_metric import JacobianMetric
from lib_lightning.jacobian.integrated_gradients import sections
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.node_layer import as_node_layers


@pytest.mark.parametrize("stack_elements", [1, 10**6])
def test_probes_are_unbiased_and_their_error_is_estimated(stack_elements: int) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).double()
    instrumented = InstrumentedModel(model, as_node_layers(["input", "1", "output"]))
    x = torch.randn(40, 3, 4).double()
    means = [a.mean((0, 1)) for a in instrumented.activations(x)]
    (section, _) = sections(instrumented, x, means, 0, stack_elements)
    C, generator = torch.randn(6, 6).double(), torch.Generator().manual_seed(1)
    exact = JacobianMetric(4, C, None, generator)
    exact.update(section)
    assert exact.relative_error == 0
    errors, estimates = [], []
    for _ in range(40):
        sampled = JacobianMetric(4, C, 5, generator)
        sampled.update(section)
        errors.append(sampled.M - exact.M)
        estimates.append(sampled.relative_error)
    spread = torch.stack(errors).square().mean().sqrt()
    # The mean of 40 runs lies within 4 standard errors of the exact metric, and the estimate is right within half.
    assert torch.stack(errors).mean(0).abs().max() < 4 * torch.stack(errors).std(0).max() / math.sqrt(40)
    true_error = spread * len(exact.M) / exact.M.norm()
    assert torch.tensor(estimates).square().mean().sqrt() == pytest.approx(float(true_error), rel=0.5)


def test_info_has_number_of_probes_and_estimated_error() -> None:
    # The last section has a closed form and is summed exactly.
    model, x = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)), torch.randn(30, 4)
    infos = [compute_interaction_graph(model, [x], ["0", "1", "output"], n_probes=k).info for k in (None, 1, 4)]
    assert [info["settings"]["n_probes"] for info in infos] == [None, 1, 4]
    assert infos[0]["metric_errors"] == {"0": 0.0, "1": 0.0}
    assert infos[1]["metric_errors"] == {"0": None, "1": 0.0}
    assert 0 < infos[2]["metric_errors"]["0"] < 1
    assert infos[2]["metric_errors"]["1"] == 0.0


def test_orthogonal_probes_have_less_variance_than_independent_ones() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.LayerNorm(16)).double()
    instrumented = InstrumentedModel(model, as_node_layers(["0", "3"]))
    x = torch.randn(64, 4).double()
    (section,) = sections(instrumented, x, [a.mean((0, 1)) for a in instrumented.activations(x)], 0, 10**6)
    C, generator = torch.eye(16).double(), torch.Generator().manual_seed(0)
    exact = JacobianMetric(16, C, None, generator)
    exact.update(section)

    def spread(k: int, size: int | None) -> float:
        squares = []
        for _ in range(30):
            sampled = JacobianMetric(16, C, k, generator)
            if size is not None:  # independent vectors
                for signs in sampled._signs:
                    signs.draw = lambda count, size: 1 - 2 * torch.randint(0, 2, (count, size), generator=generator)
            sampled.update(section)
            squares.append((sampled.M - exact.M).square().mean())
        return float(torch.stack(squares).mean())

    # 64 samples use each of 16 orthogonal vectors 4 times for every probe: only
    # the differences between samples are random. Measured: 0.35 to 0.6 of the variance.
    for k in (2, 8):
        assert spread(k, None) < 0.8 * spread(k, 1)


def test_many_probes_approach_the_exact_basis() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3), nn.LayerNorm(3)), torch.randn(50, 4)
    exact = compute_interaction_graph(model.double(), [x.double()], ["0", "1", "output"])
    sampled = compute_interaction_graph(model, [x.double()], ["0", "1", "output"], n_probes=400)
    for name in ("0", "1"):
        torch.testing.assert_close(sampled.bases[name].importance, exact.bases[name].importance, rtol=0.1, atol=1e-3)
