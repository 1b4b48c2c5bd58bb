"""Several processes: nobody waits for anybody, and files are written once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lib_lightning import InteractionGraph

ROOT = Path(__file__).parents[1]
SCRIPT = """
import sys
import torch
from tests.training import NODE_LAYERS, Classifier, trainer_of
from lib_lightning import LIBCallback

torch.set_num_threads(1)
callback = LIBCallback(NODE_LAYERS, **eval(sys.argv[2]))
trainer = trainer_of(sys.argv[1], callback, devices=2, strategy="ddp", limit_val_batches=2)
trainer.fit(Classifier())
assert callback.snapshots >= 2, callback.snapshots
assert {"lib/edges/total", "lib/age"} <= set(trainer.callback_metrics)
"""


@pytest.mark.parametrize("schedule", [{}, {"every_n_steps": 2}])
def test_two_processes(schedule: dict[str, int], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), repr(schedule)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "failed and is left out" not in done.stderr
    final = InteractionGraph.load(tmp_path / "lib" / "final.safetensors")
    steps = final.info["step"]
    assert steps == 6, "48 samples in batches of 8, halved between two processes, twice"
    assert not list(tmp_path.rglob("*.tmp"))
