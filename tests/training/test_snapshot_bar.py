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


@pytest.mark.combinations
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize(("is_enabled", "delay"), [(True, 0.0), (True, 60.0), (False, 0.0)])
def test_a_bar_appears_where_the_trainer_shows_bars_and_the_snapshot_is_long(
    package: str, is_enabled: bool, delay: float, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    pl = importlib.import_module(package)
    monkeypatch.setattr(snapshot_bar, "DELAY", delay)
    # Where rich is installed, its bars are the default.
    bars = [importlib.import_module(f"{package}.callbacks").TQDMProgressBar()] if is_enabled else []
    trainer = pl.Trainer(
        default_root_dir=tmp_path, callbacks=[*bars, LIBCallback(node_layers=NODE_LAYERS)], max_epochs=1,
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=is_enabled,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model_of(package))
    said = capsys.readouterr().out
    assert ("lib: snapshot" in said) == (is_enabled and delay == 0)
    assert ("Epoch 0" in said) == is_enabled


def test_bars_of_rich_have_one_more_as_long_as_the_snapshot_lasts(tmp_path: Path, monkeypatch: Any) -> None:
    from lightning.pytorch.callbacks import RichProgressBar

    monkeypatch.setattr(snapshot_bar, "DELAY", 0.0)
    pl = importlib.import_module(PACKAGES[0])
    seen: list[tuple[str, float, bool]] = []
    hidden: list[bool] = []

    class Bar(RichProgressBar):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_start(trainer, pl_module)
            progress: Any = self.progress
            update = progress.update

            def watched(task: Any, **options: Any) -> None:
                update(task, **options)
                (found,) = (one for one in progress.tasks if one.id == task)
                if "snapshot" in found.description:
                    seen.append((found.description, found.percentage, progress.live.is_started))
                    hidden.append(not found.visible)

            progress.update = watched

    bar = Bar()
    trainer = pl.Trainer(
        default_root_dir=tmp_path, callbacks=[bar, LIBCallback(node_layers=NODE_LAYERS, at_steps=[1, 3])],
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model_of(PACKAGES[0]))
    assert hidden.count(True) >= 2
    assert all(is_live for *_, is_live in seen)
    assert any(description.startswith("lib: snapshot, edges from") for description, *_ in seen)
    shares = [percentage for _, percentage, _ in seen]
    assert max(shares) == 100
    assert bar.progress is not None
    (own,) = (task for task in bar.progress.tasks if "snapshot" in task.description)
    assert not own.visible
    # Lightning takes the ids of its tasks for indices.
    assert [task.id for task in bar.progress.tasks] == list(range(len(bar.progress.tasks)))
