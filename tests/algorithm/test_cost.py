"""Predicted costs: seconds and bytes of graphs, against what graphs then take."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib_lightning import compute_interaction_graph, estimate_cost
from lib_lightning.algorithm.build import build_graph
from lib_lightning.errors import ActivationError, SettingError
from lib_lightning.io.basis_format import NUM_SAMPLES, SETTINGS
from tests.algorithm.test_effort import gpt2, llama, lstm
from tests.benchmarks.estimates import UNet
from tests.operations_clock import OperationsClock
from tests.stand_in_device import DEVICE, StandInDevice

MLP = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
CNN = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten(),
    nn.Linear(2048, 10),
)  # fmt: skip


Example = tuple[nn.Module, Tensor, list[str] | None, dict[str, Any]]


def _few(make: Callable[[], tuple[nn.Module, Tensor]], n: int = 16) -> tuple[nn.Module, Tensor]:
    model, x = make()
    return model, x[:n]


def _gpt2() -> Example:
    model, tokens = gpt2()
    return model, tokens[:16], ["transformer.h.0", "transformer.h.1", "lm_head:input"], {}


EXAMPLES: dict[str, Callable[[], Example]] = {
    "mlp": lambda: (MLP, torch.randn(512, 20), ["input", "1", "3", "output"], {}),
    "cnn": lambda: (CNN, torch.randn(32, 3, 16, 16), ["1", "3", "output"], {}),
    "cnn, sampled": lambda: (CNN, torch.randn(32, 3, 16, 16), ["1", "3", "output"], {"n_probes": 64, "n_pushed": 4}),
    "gpt2": _gpt2,
    "gpt2, sampled": lambda: (*_gpt2()[:3], {"n_probes": 16, "n_pushed": 4}),
    "gpt2, gradients of the output": lambda: (*_gpt2()[:3], {"metric": "output"}),
    "gpt2, proposed node layers": lambda: (*_gpt2()[:2], None, {"n_probes": 32}),
    "llama": lambda: (*_few(llama), ["model.layers.0", "model.layers.1"], {}),
    "lstm": lambda: (*_few(lstm, 64), ["input", "head:input", "output"], {}),
    "u-net": lambda: (UNet(4), torch.randn(16, 3, 8, 8), ["input", "output"], {}),
    "positions": lambda: (*_gpt2()[:3], {"skip_positions": 1}),
    "integrated gradients": lambda: (CNN, torch.randn(16, 3, 16, 16), ["3", "output"], {"integration_steps": 3}),
}  # fmt: skip


@pytest.mark.combinations
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("batches", [1, 3])
def test_an_estimate_is_what_a_graph_then_is(
    name: str, batches: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, x, layers, settings = EXAMPLES[name]()
    rng = torch.get_rng_state()
    clock = OperationsClock()
    for module in ("api", "algorithm.cost"):
        monkeypatch.setattr(f"lib_lightning.{module}.time", clock)
    with clock.running():
        estimate = estimate_cost(model, x, layers, batches * len(x), **settings)
        estimating = clock.perf_counter()
        assert torch.equal(torch.get_rng_state(), rng)
        graph = compute_interaction_graph(model, [x] * batches, layers, **settings)
        operations = clock.perf_counter() - estimating
    # In time they are within a factor of two (docs/speed.md), which also depends on what else the machine does.
    assert operations / 1.4 < estimate.seconds < 1.4 * operations
    assert estimating < max(0.25 * operations, 3e10)
    used = graph.info[SETTINGS]
    assert (estimate.plan.n_probes, estimate.plan.n_pushed) == (used["n_probes"], used["n_pushed"])
    assert estimate.plan.num_samples == graph.info[NUM_SAMPLES]
    graph.save(tmp_path / "graph.safetensors")
    actual = (tmp_path / "graph.safetensors").stat().st_size
    assert actual / 2 < estimate.file_bytes < 2 * actual
    assert f"{batches * len(x):,} samples" in str(estimate)


@pytest.mark.parametrize("name", ["cnn", "gpt2"])
def test_the_peak_of_the_memory_is_what_a_graph_then_takes(name: str) -> None:
    def measure(call: str) -> str:
        program = f"""
            import torch
            from lib_lightning import compute_interaction_graph, estimate_cost
            from tests.algorithm.test_cost import EXAMPLES
            from tests.benchmarks.memory import peak
            torch.manual_seed(0)
            model, x, layers, settings = EXAMPLES[{name!r}]()
            {call}
        """
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], check=True, capture_output=True, text=True
        )
        return done.stdout.split()[-1]

    predicted = float(measure("print(estimate_cost(model, x, layers).peak_bytes)"))
    found = 2**20 * float(measure("compute_interaction_graph(model, [x], layers); print(peak())"))
    assert found / 2 < predicted < 2 * found


def test_settings_are_kept_and_checked() -> None:
    x = torch.randn(32, 20)
    estimate = estimate_cost(MLP, x, num_samples=100, n_probes=3, n_pushed=5)
    assert (estimate.plan.num_samples, estimate.plan.n_probes, estimate.plan.n_pushed) == (100, 3, 5)
    assert estimate_cost(CNN, torch.randn(4, 3, 16, 16), effort="exact", num_samples=4).plan.n_probes is None
    with pytest.raises(SettingError, match="effort"):
        estimate_cost(MLP, x, effort="some")  # type: ignore[arg-type]
    with pytest.raises(ActivationError, match="no samples"):
        estimate_cost(MLP, x[:0])


def test_an_estimate_uses_smaller_chunks_after_running_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def build(instrumented: Any, batches: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(batches[0]))
        if sizes[-1] > 10:
            raise torch.OutOfMemoryError("out of memory")
        return build_graph(instrumented, batches, *args, **options)

    monkeypatch.setattr("lib_lightning.api.build_graph", build)
    estimate = estimate_cost(MLP, torch.randn(32, 20), ["input", "1", "output"])
    assert sizes[:3] == [32, 16, 8]
    assert estimate.plan.num_samples == 32


def test_an_estimate_on_a_device_that_tells_nothing() -> None:
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 10))
    with StandInDevice(float64=True) as device:
        estimate = estimate_cost(model.to(DEVICE), torch.randn(64, 20).to(DEVICE), ["input", "output"])
        assert device.operations > 0
    assert estimate.device == DEVICE
    assert estimate.peak_bytes > 0
