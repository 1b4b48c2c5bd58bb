"""Checkpoints that two processes have written, as Lightning, torch and accelerate do it, are traced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lib_lightning import trace
from lib_lightning.training.trace import CheckpointSource
from lib_lightning.training.weights_names import load_weights
from tests.sharded_training import STEPS, STRATEGIES, Net, samples
from tests.training.test_distributed import torchrun

pytestmark = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this version of PyTorch shards weights on accelerators only"
)
NODE_LAYERS = ["net.0:input", "net.3:input", "output"]
OF_TORCH = ("torch", "accelerate", "converted")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a folder of checkpoints for each way to save them."""
    folder = tmp_path_factory.mktemp("saved")
    torchrun("tests/sharded_training.py", folder)
    return folder


def weights_in(folder: Path) -> dict[int, dict[str, Tensor]]:
    """Weights and buffers of a model that has loaded them, by step."""
    source, found = CheckpointSource(folder), {}
    for checkpoint in source.find():
        model = Net()
        torch.nn.init.constant_(model.net[0].weight, 7.0)
        load_weights(model, source.read(checkpoint).weights)
        found[source.step(checkpoint)] = model.state_dict()
    return found


def assert_same(found: dict[int, dict[str, Tensor]], expected: dict[int, dict[str, Tensor]]) -> None:
    assert set(found) == set(expected) == set(STEPS)
    for step, weights in expected.items():
        torch.testing.assert_close(found[step], weights, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["fsdp", "model-parallel"])
def test_shards_saved_by_lightning_are_the_weights_that_it_gathers(kind: str, saved: Path) -> None:
    assert f"{kind}-sharded" in STRATEGIES
    assert all(path.is_dir() for path in (saved / f"{kind}-sharded").iterdir())
    assert all(path.is_file() for path in (saved / f"{kind}-full").iterdir())
    assert_same(weights_in(saved / f"{kind}-sharded"), weights_in(saved / f"{kind}-full"))
    source = CheckpointSource(saved / f"{kind}-sharded")
    assert [source.read(one).logging_step for one in source.find()] == [step - 1 for step in STEPS]


@pytest.mark.parametrize("kind", OF_TORCH)
def test_shards_saved_by_torch_are_the_weights_that_it_gathers(kind: str, saved: Path) -> None:
    assert_same(weights_in(saved / kind), weights_in(saved / "torch-full"))  # of the network within the module


def test_a_trace_along_shards_is_that_along_whole_checkpoints(saved: Path, tmp_path: Path) -> None:
    batches = list(zip(*(part.split(16) for part in samples()), strict=True))
    runs = [
        trace(Net(), saved / name, batches, NODE_LAYERS, tmp_path / name)
        for name in ("model-parallel-sharded", "model-parallel-full")
    ]
    assert [run.steps for run in runs] == [list(STEPS)] * 2
    files = [
        [(run.folder / "snapshots" / f"step-{step:08d}.safetensors").read_bytes() for step in STEPS] for run in runs
    ]
    assert files[0] == files[1]
