"""Every file says which weights it is of, and the last one is of the final weights, whatever replaces them and when."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import SWALR

from lib_lightning import InteractionGraph, LIBCallback, compute_interaction_graph
from lib_lightning.model.weights_hash import weights_hash
from lib_lightning.training.frameworks import PACKAGES, member
from lib_lightning.training.weights import FINAL, TRAINED
from tests.training.test_frameworks import NODE_LAYERS, model_of

each_package = pytest.mark.parametrize("package", PACKAGES)
each_order = pytest.mark.parametrize("first", [True, False], ids=["listed first", "listed last"])


def fit(package: str, folder: Path, model: nn.Module, callbacks: list[Any], **options: Any) -> Any:
    pl = importlib.import_module(package)
    defaults: dict[str, Any] = {
        "default_root_dir": folder, "max_epochs": 3, "accelerator": "cpu", "enable_progress_bar": False,
        "enable_model_summary": False, "logger": False, "enable_checkpointing": False, "callbacks": callbacks,
    }  # fmt: skip
    trainer = pl.Trainer(**(defaults | options))
    listed = list(trainer.callbacks)
    trainer.fit(model)
    assert trainer.callbacks == listed, "the list is as it was"
    return trainer


def assert_final(callback: LIBCallback, model: nn.Module, folder: Path) -> InteractionGraph:
    """The last snapshot is of the weights that the model has now."""
    final = InteractionGraph.load(folder / "lib" / "final.safetensors")
    expected = compute_interaction_graph(model, callback.samples.buffer.batches, NODE_LAYERS)
    for graph in (final, callback.graph):
        assert graph is not None
        assert graph.info["weights_hash"] == weights_hash(model)
        for name, basis in expected.bases.items():
            assert torch.allclose(basis.importance, graph.bases[name].importance, rtol=1e-4)
    return final


# callbacks of Lightning


@each_package
@each_order
def test_stochastic_weight_averaging(package: str, first: bool, tmp_path: Path) -> None:
    callback, model = LIBCallback(NODE_LAYERS, every_n_validations=1), model_of(package)
    averaging = member(package, "callbacks.StochasticWeightAveraging")(0.5, swa_epoch_start=1)
    fit(package, tmp_path, model, [callback, averaging] if first else [averaging, callback])
    assert assert_final(callback, model, tmp_path).info["weights"] == FINAL
    before = InteractionGraph.load(tmp_path / "lib" / "snapshots" / "step-00000008.safetensors")
    assert before.info["weights"] == TRAINED
    assert callback.state.history.steps == [4, 8, 12], "one snapshot for each step"
    assert callback.snapshots == 3


@each_package
@each_order
def test_moving_averages_are_validated_and_kept(package: str, first: bool, tmp_path: Path) -> None:
    callback, model = LIBCallback(NODE_LAYERS, max_overhead=float("inf"), every_n_validations=1), model_of(package)
    averaging = member(package, "callbacks.EMAWeightAveraging")(decay=0.8)
    trained: list[str] = []
    spy = made_of(package, on_train_epoch_end=lambda trainer, module: trained.append(weights_hash(module)))
    trainer = fit(package, tmp_path, model, [callback, averaging, spy] if first else [averaging, callback, spy])
    assert assert_final(callback, model, tmp_path).info["weights"] == FINAL
    assert "lib/features/total" in trainer.callback_metrics
    for step, expected in zip((4, 8), trained, strict=False):
        info = InteractionGraph.load(tmp_path / "lib" / "snapshots" / f"step-{step:08d}.safetensors").info
        assert (info["weights"], info["weights_hash"]) == (TRAINED, expected), "validation used other weights"


@pytest.mark.combinations
@pytest.mark.parametrize(
    ("package", "kind", "first", "saved_after"),
    [
        (PACKAGES[0], "StochasticWeightAveraging", True, 2),
        (PACKAGES[-1], "StochasticWeightAveraging", False, 1),
        (PACKAGES[0], "EMAWeightAveraging", False, 3),
        (PACKAGES[-1], "EMAWeightAveraging", True, 2),
    ],
)
def test_averages_of_a_resumed_run(package: str, kind: str, first: bool, saved_after: int, tmp_path: Path) -> None:
    checkpoint = tmp_path / "part.ckpt"

    def run(folder: Path, ckpt_path: Path | None) -> tuple[LIBCallback, Any]:
        def save(trainer: Any, module: nn.Module) -> None:
            if ckpt_path is None and trainer.current_epoch == saved_after - 1:
                trainer.save_checkpoint(checkpoint)

        options: dict[str, Any] = {"swa_lrs": 0.5, "swa_epoch_start": 1} if kind[0] == "S" else {"decay": 0.8}
        averaging = member(package, f"callbacks.{kind}")(**options)
        callback, model = LIBCallback(NODE_LAYERS, max_overhead=float("inf"), every_n_validations=1), model_of(package)
        callbacks = [callback, averaging] if first else [averaging, callback]
        spy = made_of(package, on_train_epoch_end=save)
        trainer = importlib.import_module(package).Trainer(
            default_root_dir=folder, max_epochs=4, accelerator="cpu", enable_progress_bar=False, logger=False,
            enable_model_summary=False, enable_checkpointing=False, callbacks=[*callbacks, spy],
        )  # fmt: skip
        # SWA's schedule is a method, which the first versions of PyTorch with weights_only do not load.
        with torch.serialization.safe_globals([getattr, SWALR]):
            trainer.fit(model, ckpt_path=ckpt_path)
        return callback, model

    whole, _ = run(tmp_path / "whole", None)
    callback, model = run(tmp_path / "resumed", checkpoint)
    assert assert_final(callback, model, tmp_path / "resumed").info["weights"] == FINAL
    assert callback.state.history.steps == whole.state.history.steps == [4, 8, 12, 16]


# callbacks of others


def made_of(package: str, **hooks: Callable[..., Any]) -> Any:
    """A callback with the given hooks, which are called with trainer, model and so on."""
    made = member(package, "Callback")()
    for name, hook in hooks.items():
        setattr(made, name, hook)
    return made


def in_place(trainer: Any, module: nn.Module, *_: Any) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)


def behind_the_version_counter(trainer: Any, module: nn.Module, *_: Any) -> None:
    for parameter in module.parameters():
        parameter.data.add_(0.3)


def in_one_entry(trainer: Any, module: nn.Module, *_: Any) -> None:
    next(module.parameters()).data[0, 0] += 1


def permuted(trainer: Any, module: Any, *_: Any) -> None:
    module.net[0].weight.data = module.net[0].weight.data.flip(0)


def loaded(trainer: Any, module: nn.Module, *_: Any) -> None:
    module.load_state_dict({name: 2 * t for name, t in module.state_dict().items()})


def new_parameters(trainer: Any, module: Any, *_: Any) -> None:
    module.net[2].weight = nn.Parameter(module.net[2].weight.detach() + 0.2)


def new_modules(trainer: Any, module: Any, *_: Any) -> None:
    module.net[2] = copy.deepcopy(module.net[2])
    module.net[2].bias.data.add_(1)


WAYS = [in_place, behind_the_version_counter, in_one_entry, permuted, loaded, new_parameters, new_modules]


@each_order
@pytest.mark.parametrize("way", WAYS)
def test_any_callback_may_change_the_final_weights(way: Callable[..., Any], first: bool, tmp_path: Path) -> None:
    callback, model = LIBCallback(NODE_LAYERS, every_n_validations=1), model_of(PACKAGES[0])
    swapper = made_of(PACKAGES[0], on_train_end=way)
    fit(PACKAGES[0], tmp_path, model, [callback, swapper] if first else [swapper, callback], max_epochs=1)
    assert assert_final(callback, model, tmp_path).info["weights"] == FINAL


@each_package
@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end"])
def test_the_model_itself_may_change_the_final_weights(package: str, hook: str, tmp_path: Path) -> None:
    callback, model = LIBCallback(NODE_LAYERS, every_n_validations=1), model_of(package)
    setattr(model, hook, lambda: in_place(None, model))
    fit(package, tmp_path, model, [callback], max_epochs=1)
    assert assert_final(callback, model, tmp_path).info["weights"] == FINAL


@each_package
def test_checkpoints_hold_the_state_of_the_final_weights(package: str, tmp_path: Path) -> None:
    seen = []

    class AtTheEnd(member(package, "callbacks.Checkpoint")):  # type: ignore[misc]
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            seen.append((callback.state_dict()["weights_hash"], weights_hash(pl_module)))

    callback, model = LIBCallback(NODE_LAYERS, every_n_validations=1), model_of(package)
    callbacks = [AtTheEnd(), callback, made_of(package, on_train_end=in_place)]
    fit(package, tmp_path, model, callbacks, max_epochs=1, enable_checkpointing=True)
    ((saved, weights),) = seen
    assert saved == weights == weights_hash(model)


def test_weights_that_stay_replaced_during_validation_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def back(trainer: Any, module: nn.Module) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(2.0)

    swapper = made_of(PACKAGES[0], on_validation_start=in_place, on_validation_end=back)
    for name, order in (("before", 1), ("after", -1)):
        callback, model = LIBCallback(NODE_LAYERS, every_n_validations=1), model_of(PACKAGES[0])
        fit(PACKAGES[0], tmp_path / name, model, [swapper, callback][::order], max_epochs=1, num_sanity_val_steps=0)
        file = tmp_path / name / "lib" / "snapshots" / "step-00000004.safetensors"
        assert InteractionGraph.load(file).info["weights"] == TRAINED, "the last one is computed again"
        assert_final(callback, model, tmp_path / name)
    assert "is of weights that were put in place of the trained ones for validation" in caplog.text


def test_without_others_nothing_is_computed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback, model = LIBCallback(NODE_LAYERS, every_n_validations=1), model_of(PACKAGES[0])
    computed = []
    original = callback.computer.compute
    monkeypatch.setattr(callback.computer, "compute", lambda *args: computed.append(1) or original(*args))
    plain = made_of(PACKAGES[0], on_train_end=lambda *_: None)
    fit(PACKAGES[0], tmp_path, model, [plain, callback, made_of(PACKAGES[0])])
    assert len(computed) == callback.snapshots == 3
    assert assert_final(callback, model, tmp_path).info["weights"] == TRAINED


def test_an_error_of_another_callback_leaves_the_list_as_it_was(tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("of another callback")

    callback = LIBCallback(NODE_LAYERS, every_n_validations=1)
    callbacks = [callback, made_of(PACKAGES[0], on_train_end=fail)]
    pl = importlib.import_module(PACKAGES[0])
    options: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=callbacks, **options)
    listed = list(trainer.callbacks)
    with pytest.raises(RuntimeError, match="of another callback"):
        trainer.fit(model_of(PACKAGES[0]))
    assert trainer.callbacks == listed


@each_package
def test_without_a_second_call_the_last_snapshot_comes_at_teardown(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if Lightning went through a copy of its list.
    monkeypatch.setattr("lib_lightning.training.callback.call_again_last", lambda trainer, callback: False)
    callback, model = LIBCallback(NODE_LAYERS, every_n_validations=1), model_of(package)
    fit(package, tmp_path, model, [callback, made_of(package, on_train_end=in_place)], max_epochs=1)
    assert_final(callback, model, tmp_path)


HOOKS = [
    "on_train_end",
    "on_fit_end",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_train_epoch_end",
]


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    swappers=st.lists(st.tuples(st.sampled_from(HOOKS), st.sampled_from(WAYS[:5])), max_size=3),
    place=st.integers(0, 3),
    package=st.sampled_from(PACKAGES),
)
def test_whoever_changes_weights_and_when(
    swappers: list[tuple[str, Any]], place: int, package: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, model = tmp_path_factory.mktemp("run"), model_of(package)
    callback = LIBCallback(NODE_LAYERS, every_n_validations=1)
    others = [made_of(package, **{hook: way}) for hook, way in swappers]
    fit(package, folder, model, [*others[:place], callback, *others[place:]], max_epochs=2)
    assert_final(callback, model, folder)
    assert callback.state.history.steps == [4, 8]
    events = [(e.kind, e.step, e.layer, e.lineage, e.metric) for e in callback.state.events]
    assert len(events) == len(set(events))
