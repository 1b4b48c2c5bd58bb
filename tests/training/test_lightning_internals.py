"""Internals of Lightning that the callback uses: what each is for, and that it works without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.utilities.combined_loader import CombinedLoader

from lib_lightning import LIBCallback
from lib_lightning.training import trainer as ours
from lib_lightning.training.frameworks import PACKAGES, member
from tests.tiny_training import NODE_LAYERS, Classifier, trainer_of

INTERNALS = {
    "_batches_that_stepped": "the step axis of everything logged between validations",
    "_combined_loader": "the check that several validation loaders come one after the other",
    "_mode": "the same check",
    "_on_before_batch_transfer": "transfer hooks of data modules on batches of the user's own data loader",
}


def test_internals_are_where_they_were(tmp_path: Path) -> None:
    trainer, model = trainer_of(tmp_path), Classifier()
    trainer.fit(model)
    loop = trainer.fit_loop.epoch_loop
    assert isinstance(loop, _TrainingEpochLoop)
    assert isinstance(loop.val_loop, _EvaluationLoop)
    found = {
        "_batches_that_stepped": hasattr(loop, "_batches_that_stepped"),
        "_combined_loader": hasattr(loop.val_loop, "_combined_loader"),
        "_mode": hasattr(CombinedLoader([]), "_mode"),
        "_on_before_batch_transfer": hasattr(model, "_on_before_batch_transfer"),
    }
    missing = [f"{name}, used for {what}" for name, what in INTERNALS.items() if not found[name]]
    assert not missing, (
        f"Lightning {pl.__version__} has no {'; no '.join(missing)}: see the fallbacks in {ours.__name__}"
    )


class Hidden:
    """A stand-in for an object without some of its attributes."""

    def __init__(self, wrapped: Any, *names: str) -> None:
        self._wrapped, self._names = wrapped, names

    def __getattr__(self, name: str) -> Any:
        if name in self._names:
            raise AttributeError(name)
        return getattr(self._wrapped, name)


@pytest.mark.parametrize("function", ["_batches_that_stepped", "_combined_mode", "_before_transfer"])
def test_without_an_internal_snapshots_are_the_same(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(folder: Path) -> dict[str, float]:
        pl.seed_everything(0, verbose=False)
        batches = list(Classifier().val_dataloader())
        callback = LIBCallback(NODE_LAYERS, dataloader=batches, every_n_steps=4)
        trainer_of(folder, callback).fit(Classifier())
        assert callback.snapshots == 4
        return {key: value for key, value in callback.state.scalars.items() if not key.endswith("seconds")}

    expected = fit(tmp_path / "with")
    original = getattr(ours, function)

    def without(first: Any, *rest: Any) -> Any:
        if function == "_before_transfer":
            return original(Hidden(first, "_on_before_batch_transfer"), *rest)
        hidden = Hidden(first.fit_loop.epoch_loop, "_batches_that_stepped")
        hidden.val_loop = Hidden(first.fit_loop.epoch_loop.val_loop, "_combined_loader")  # type: ignore[attr-defined]
        trainer = Hidden(first)
        trainer.fit_loop = Hidden(first.fit_loop)  # type: ignore[attr-defined]
        trainer.fit_loop.epoch_loop = hidden  # type: ignore[attr-defined]
        return original(trainer)

    monkeypatch.setattr(ours, function, without)
    found = fit(tmp_path / "without")
    assert found == pytest.approx(expected, nan_ok=True, rel=0, abs=0)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_callback_can_be_called_again_after_the_others(package: str, tmp_path: Path) -> None:
    """Trainers go through their own list of callbacks, and not through a copy."""
    calls = []

    class Noted(member(package, "Callback")):  # type: ignore[misc]
        def __init__(self, name: str) -> None:
            self.name = name

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            calls.append(self.name)
            if self.name == "ours" and calls.count("ours") == 1:
                assert ours.call_again_last(trainer, self)
            elif self.name == "ours":
                ours.remove_duplicates(trainer)

    class Last(Noted, member(package, "callbacks.Checkpoint")):  # type: ignore[misc]
        pass

    callbacks = [Noted("ours"), Noted("other"), Last("checkpoint")]
    trainer = member(package, "Trainer")(
        default_root_dir=tmp_path, max_steps=1, accelerator="cpu", logger=False, callbacks=callbacks,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    listed = list(trainer.callbacks)
    trainer.fit(member(package, "demos.boring_classes.BoringModel")())
    assert calls == ["ours", "other", "ours", "checkpoint"]
    assert trainer.callbacks == listed
