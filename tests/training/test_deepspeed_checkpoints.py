"""Checkpoints of DeepSpeed, written by it and by Lightning's strategy, are read; skipped where it is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib_lightning.training.trace import CheckpointSource
from tests.training.test_distributed import torchrun
from tests.training.test_sharded_checkpoints import assert_same, weights_in

pytest.importorskip("deepspeed", reason="deepspeed is not installed: tox -e deepspeed")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a folder of checkpoints for each stage, and one with the same weights in whole files."""
    folder = tmp_path_factory.mktemp("saved")
    torchrun("tests/deepspeed_training.py", folder)
    return folder


@pytest.mark.parametrize("name", ["stage-1", "stage-2", "stage-3", "lightning-2", "lightning-3"])
def test_checkpoints_of_deepspeed_have_the_weights_that_it_gathers(name: str, saved: Path) -> None:
    assert_same(weights_in(saved / name), weights_in(saved / f"{name}-full"))
    source = CheckpointSource(saved / name)
    assert all(source.read(one).logging_step == (1, 3)[k] for k, one in enumerate(source.find()) if "lightning" in name)
