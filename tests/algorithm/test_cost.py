"""Predicted costs: seconds and bytes of graphs, against what graphs then take."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from lib_lightning import compute_interaction_graph, estimate_cost
from lib_lightning.errors import ActivationError, SettingError
from lib_lightning.io.basis_format import NUM_SAMPLES, SETTINGS

MLP = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
CNN = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(),
    nn.Linear(2048, 10),
)  # fmt: skip


@pytest.mark.parametrize(
    ("model", "shape", "layers"),
    [(MLP, (512, 20), ["input", "1", "3", "output"]), (CNN, (64, 3, 16, 16), ["1", "3", "output"])],
)
def test_an_estimate_is_what_a_graph_then_is(
    model: nn.Module, shape: tuple[int, ...], layers: list[str], tmp_path: Path
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rng = torch.get_rng_state()
    estimate = estimate_cost(model, x, layers)
    assert torch.equal(torch.get_rng_state(), rng)
    started = time.perf_counter()
    graph = compute_interaction_graph(model, [x], layers)
    seconds = time.perf_counter() - started
    # Seconds are within a factor of two on a quiet machine (docs/speed.md); tests share theirs.
    assert seconds / 8 < estimate.seconds < seconds * 8
    settings = graph.info[SETTINGS]
    assert (estimate.plan.n_probes, estimate.plan.n_pushed) == (settings["n_probes"], settings["n_pushed"])
    assert estimate.plan.num_samples == graph.info[NUM_SAMPLES]
    graph.save(tmp_path / "graph.safetensors")
    actual = (tmp_path / "graph.safetensors").stat().st_size
    assert actual / 2 < estimate.file_bytes < 2 * actual
    assert f"{shape[0]} samples" in str(estimate)


def test_settings_are_kept_and_checked() -> None:
    x = torch.randn(32, 20)
    estimate = estimate_cost(MLP, x, num_samples=100, n_probes=3, n_pushed=5)
    assert (estimate.plan.num_samples, estimate.plan.n_probes, estimate.plan.n_pushed) == (100, 3, 5)
    assert estimate_cost(CNN, torch.randn(4, 3, 16, 16), effort="exact", num_samples=4).plan.n_probes is None
    with pytest.raises(SettingError, match="effort"):
        estimate_cost(MLP, x, effort="some")  # type: ignore[arg-type]
    with pytest.raises(ActivationError, match="no samples"):
        estimate_cost(MLP, x[:0])
