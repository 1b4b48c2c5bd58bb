"""Other rotations and re-initialised weights on a device, with or without float64: the same as on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_lightning import compute_interaction_graph, reinitialized
from lib_lightning.algorithm.basis_kinds import ROTATED
from tests.stand_in_device import DEVICE, StandInDevice, batches_on_device

LAYERS = ["input", "1", "output"]


@pytest.mark.parametrize("float64", [True, False])
@pytest.mark.parametrize("kind", ROTATED)
def test_same_graph_as_on_the_cpu(kind: str, float64: bool) -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.rand(400, 6) ** 2
    expected = compute_interaction_graph(model, [x], LAYERS, kind)
    with StandInDevice(float64) as device:
        graph = compute_interaction_graph(model.to(DEVICE), [batches_on_device(x)], LAYERS, kind)
        model.to("cpu")
        assert device.operations > 100
    for name, basis in graph.bases.items():
        importance = expected.bases[name].importance
        assert basis.importance.sum() == pytest.approx(float(importance.sum()), rel=1e-4)
        if kind == "random":  # single precision is enough for the rotation that is drawn
            assert (basis.importance - importance).abs().max() < 1e-3 * importance.max()


def test_reinitialized_weights_stay_on_their_device() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    model.register_parameter("own", nn.Parameter(torch.arange(3.0)))
    with StandInDevice():
        control = reinitialized(model.to(DEVICE))
        assert all(p.device == DEVICE for p in control.parameters())
