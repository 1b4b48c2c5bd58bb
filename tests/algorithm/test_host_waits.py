"""The host waits for an accelerator as often for many products with a Jacobian as for few."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lib_lightning import compute_interaction_graph
from tests.stand_in_device import DEVICE, StandInDevice
from tests.test_without_float64 import gpt2

# Other numbers of features and groups change a few decisions of eigenproblems and of the search for closed forms; the
# settings below differ by ten products or more in every section.
FEW = 8


def waits(model: nn.Module, x: torch.Tensor, layers: list[str], **options: Any) -> int:
    with StandInDevice(float64=True) as device:
        graph = compute_interaction_graph(model.to(DEVICE), [x.to(DEVICE)], layers, memory_limit=4, **options)
        model.to("cpu")
    assert all(float(E.sum()) > 0 for E in graph.edges.values())
    return device.waits


def mixing(width: int) -> nn.Module:
    """Sections without a closed form."""
    return nn.Sequential(
        nn.Linear(32, width), nn.LayerNorm(width), nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, 64)
    )


@pytest.mark.parametrize("width", [32, 600], ids=["narrow", "wide"])
def test_numbers_of_probes_and_features(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # One vector in each call, so that every product is a call of its own.
    monkeypatch.setattr("lib_lightning.jacobian.section.Section.vectors_per_call", 1)
    model, x, layers = mixing(width), torch.randn(64, 32), ["0", "2", "output"]
    few = waits(model, x, layers, n_probes=2, n_pushed=2)
    assert few > 0
    assert abs(waits(model, x, layers, n_probes=32, n_pushed=2) - few) <= FEW
    assert abs(waits(model, x, layers, n_probes=2, n_pushed=12) - few) <= FEW


def test_exact_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib_lightning.jacobian.section.Section.vectors_per_call", 1)
    x, layers = torch.randn(32, 32), ["0", "2", "output"]
    few, many = (waits(mixing(width), x, layers, effort="exact") for width in (8, 24))
    assert abs(many - few) <= FEW


@pytest.mark.parametrize("options", [{"effort": "exact"}, {"n_probes": 4, "n_pushed": 2, "final_metric": "fisher"}])
def test_a_language_model(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib_lightning.jacobian.section.Section.vectors_per_call", 1)
    model, x, layers = gpt2()
    few, many = (waits(model, x[:, :S], layers, **options) for S in (4, 8))
    assert few > 0
    assert abs(many - few) <= FEW
