"""The state of a run in checkpoints: complete, loadable without trusting it, and that of version 0.1 still read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lib_lightning import InteractionGraph, LIBCallback
from lib_lightning.io.run_layout import RunLayout
from tests.data.v0_1.make import NODE_LAYERS, Model, callback
from tests.tiny_training import trainer_of

OLD = Path(__file__).parents[1] / "data" / "v0_1"


@pytest.fixture
def old_checkpoint(tmp_path: Path) -> Path:
    """The checkpoint of version 0.1 after 20 of 40 steps, and the folder of its run."""
    shutil.copytree(OLD / "run", tmp_path / "old" / "run")
    checkpoint = torch.load(OLD / "checkpoints" / "step-20.ckpt", weights_only=True)
    (state,) = checkpoint["callbacks"].values()
    folder = str(tmp_path / "old" / "run" / "lib")
    state["samples"]["written_to"], state["report"]["folders"] = folder, [folder]
    torch.save(checkpoint, tmp_path / "step-20.ckpt")
    return tmp_path / "step-20.ckpt"


def test_a_run_of_version_0_1_is_resumed(old_checkpoint: Path, tmp_path: Path) -> None:
    """With the samples, lineages, events and schedule that it had."""
    lib = callback()
    trainer_of(tmp_path / "new", lib, max_epochs=4).fit(Model(), ckpt_path=old_checkpoint, weights_only=True)
    new, old = RunLayout(tmp_path / "new" / "lib"), RunLayout(tmp_path / "old" / "run" / "lib")
    assert list(new.basis_files()) == [24, 32, 40], "none twice, none missing"
    assert lib.snapshots == 6
    for step, path in new.basis_files().items():
        found, expected = InteractionGraph.load(path), InteractionGraph.load(old.basis_file(step))
        assert found.info["reference_samples"] == expected.info["reference_samples"]
        for name in NODE_LAYERS:
            torch.testing.assert_close(found.bases[name].importance, expected.bases[name].importance, rtol=1e-4, atol=0)
            assert found.lineages[name].ids.tolist() == expected.lineages[name].ids.tolist()
    assert lib.state.history.steps == [0, 8, 16, 24, 32, 40]
    assert [event.to_json() for event in lib.state.events] == old.events_file.read_text().splitlines()
    assert lib.state.ablation_step == 40, "the last one"


def saved_halfway(tmp_path: Path) -> tuple[LIBCallback, dict[str, Any]]:
    """The callback of a run, and its state in a checkpoint after half of the steps."""
    lib = callback()
    trainer = trainer_of(tmp_path / "first", lib, max_epochs=2)
    trainer.fit(Model())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    (saved,) = torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"].values()
    return lib, saved


def test_state_survives_a_checkpoint(tmp_path: Path) -> None:
    first, saved = saved_halfway(tmp_path)
    second = callback()
    second.load_state_dict(saved)
    assert_equal(second.state.state_dict(), saved)
    assert second.state.state_dict()["n_snapshots"] == first.snapshots == 4


def assert_equal(a: Any, b: Any) -> None:
    """Compare nested plain values and tensors."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    else:
        assert a == b or (a != a and b != b)


def test_other_node_layers_start_anew_with_the_samples_and_the_schedule_of_before(tmp_path: Path) -> None:
    first, saved = saved_halfway(tmp_path)
    second = callback()
    second._given_layers = second._given_layers[:1] + second._given_layers[2:]  # type: ignore[index]
    second.load_state_dict(saved)
    assert (second.snapshots, second.state.step, second.state.scalars) == (0, None, {})
    assert second.state.cursor.position == first.state.cursor.position
    assert second.state.samples == first.state.samples
