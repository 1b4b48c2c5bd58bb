"""The bar of long snapshots: only where the trainer shows bars, and not for short ones."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

from lib_lightning import LIBCallback
from lib_lightning.training import snapshot_bar
from lib_lightning.training.frameworks import PACKAGES
from tests.training.test_frameworks import NODE_LAYERS, model_of

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(("is_enabled", "delay"), [(True, 0.0), (True, 60.0), (False, 0.0)])
def test_a_bar_appears_where_the_trainer_shows_bars_and_the_snapshot_is_long(
    package: str, is_enabled: bool, delay: float, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    pl = importlib.import_module(package)
    monkeypatch.setattr(snapshot_bar, "DELAY", delay)
    trainer = pl.Trainer(
        default_root_dir=tmp_path, callbacks=[LIBCallback(node_layers=NODE_LAYERS)], max_epochs=1, accelerator="cpu",
        devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=is_enabled, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model_of(package))
    said = capsys.readouterr().out
    assert ("lib: snapshot" in said) == (is_enabled and delay == 0)
    assert ("Epoch 0" in said) == is_enabled
