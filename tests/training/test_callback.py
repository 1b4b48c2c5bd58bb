"""The callback with real trainers: unchanged training, logged scalars, files, and clear errors."""

from __future__ import annotations

import csv
import functools
import itertools
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lib_lightning import InteractionGraph, LIBCallback, NodeLayer, compute_interaction_graph
from lib_lightning.errors import LIBError
from lib_lightning.metrics.summary import scalar_keys
from tests.pairwise import pairs_of, pairwise
from tests.tiny_training import NODE_LAYERS, Classifier, Failing, Noisy, trainer_of

KEYS = {f"lib/{key}" for key in [*scalar_keys(NODE_LAYERS), "samples", "seconds", "step", "age", "overhead"]}


def everything(model: Classifier, trainer: pl.Trainer) -> dict[str, Any]:
    """All that training has left behind, comparable bit for bit."""
    (optimizer,) = trainer.optimizers
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "weights and buffers": {k: v.tolist() for k, v in model.state_dict().items()},
        "optimizer": [{k: v.tolist() for k, v in s.items()} for s in optimizer.state_dict()["state"].values()],
        "losses": model.losses,
        "torch": torch.get_rng_state().tolist(),
        "numpy": (name, keys.tolist(), *rest),
        "python": random.getstate(),
        "training": [m.training for m in model.modules()],
        "grads": [(p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }


def run(model: Classifier, folder: Path, *callbacks: pl.Callback, **options: Any) -> dict[str, Any]:
    pl.seed_everything(7, verbose=False)
    for p in model.parameters():
        nn.init.uniform_(p, -0.5, 0.5)
    trainer = trainer_of(folder, *callbacks, **options)
    trainer.fit(model)
    return everything(model, trainer)


SCHEDULES: dict[str, dict[str, Any]] = {
    "validations": {},
    "steps": {"every_n_steps": 2},
    "list": {"at_steps": [0, 1, 7]},
    "log": {"log_spaced": 4},
}
COMPUTATIONS: dict[str, dict[str, Any]] = {
    "exact": {},
    "probes": {"n_probes": 2, "integration_steps": 2},
    "float64": {"dtype": "float64"},
}
TRAINERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_sanity_check": {"num_sanity_val_steps": 0},
    "accumulation": {"accumulate_grad_batches": 2},
    "bf16": {"precision": "bf16-mixed"},
    "often": {"val_check_interval": 0.5, "gradient_clip_val": 0.1},
}
MODELS: dict[str, type[Classifier]] = {"working": Classifier, "failing": Failing}
OPTIONS = {"schedule": [*SCHEDULES], "computation": [*COMPUTATIONS], "trainer": [*TRAINERS], "model": [*MODELS]}


@pytest.fixture(scope="module")
def without_callback(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Training without the callback, run once for each trainer."""
    return functools.cache(lambda trainer: run(Classifier(), tmp_path_factory.mktemp(trainer), **TRAINERS[trainer]))


def test_cases_cover_all_pairs_of_options() -> None:
    cases = pairwise(OPTIONS)
    covered = set().union(*(pairs_of([*OPTIONS], case) for case in cases))
    possible = set().union(*(pairs_of([*OPTIONS], case) for case in itertools.product(*OPTIONS.values())))
    assert covered == possible
    assert len(covered) == 71
    assert len(cases) <= 24, "of 120 combinations"


@pytest.mark.combinations
@pytest.mark.parametrize(("schedule", "computation", "trainer", "model"), pairwise(OPTIONS))
def test_training_is_bit_identical(
    schedule: str,
    computation: str,
    trainer: str,
    model: str,
    without_callback: Callable[[str], dict[str, Any]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    callback = LIBCallback(NODE_LAYERS, **SCHEDULES[schedule], **COMPUTATIONS[computation])
    with_callback = run(MODELS[model](), tmp_path, callback, **TRAINERS[trainer])
    messages = [record.getMessage() for record in caplog.records if record.name == "lib_lightning.training.reporter"]
    assert with_callback == without_callback(trainer)
    if model == "failing":
        assert callback.snapshots == 0
        assert all("training continues. RuntimeError: the model fails" in message for message in messages)
    else:
        assert callback.snapshots >= 2
    assert bool(messages) == (model == "failing")


def test_scalars_reach_loggers_and_other_callbacks(tmp_path: Path) -> None:
    class Monitor(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[dict[str, Tensor]] = []

        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if not trainer.sanity_checking:
                self.seen.append(dict(trainer.callback_metrics))

    loggers = [TensorBoardLogger(tmp_path, "tb"), CSVLogger(tmp_path, "csv")]
    callback, monitor = LIBCallback(NODE_LAYERS, every_n_validations=2), Monitor()
    key = "lib/effective_edges/total"
    others = [
        EarlyStopping(key, patience=10),
        ModelCheckpoint(tmp_path / "best", monitor=key, filename="{step}", save_top_k=2),
    ]
    trainer = trainer_of(
        tmp_path,
        callback,
        monitor,
        *others,
        logger=loggers,
        enable_checkpointing=True,
        max_epochs=3,
        log_every_n_steps=1,
    )
    trainer.fit(Classifier())

    assert len(monitor.seen) == 3
    assert all(set(metrics) >= KEYS for metrics in monitor.seen)
    assert [float(metrics["lib/age"]) for metrics in monitor.seen] == [0, 6, 0]
    assert float(monitor.seen[0][key]) == float(monitor.seen[1][key]) != float(monitor.seen[2][key])
    assert len(list((tmp_path / "best").glob("*.ckpt"))) == 2

    with (Path(loggers[1].log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["lib/edges/total"]]
    assert [int(row["step"]) for row in rows] == [5, 17], "a point for each snapshot"
    events = EventAccumulator(loggers[0].log_dir, {"images": 0, "scalars": 0}).Reload()
    assert set(events.Tags()["scalars"]) >= KEYS
    assert [e.step for e in events.Scalars("lib/edges/total")] == [5, 17]
    assert [e.step for e in events.Images("lib/graph")] == [6, 18]
    assert [e.value for e in events.Scalars("lib/step")] == [6, 6, 18]


def test_scalars_between_validations_share_the_step_axis(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    callback = LIBCallback(NODE_LAYERS, at_steps=[0, 2, 6, 9, 100])
    trainer_of(tmp_path, callback, logger=logger, log_every_n_steps=1).fit(Classifier())
    events = EventAccumulator(logger.log_dir, {"images": 0, "scalars": 0}).Reload()
    assert [e.step for e in events.Images("lib/graph")] == [0, 2, 6, 9, 12], "as in titles and files"
    # Steps 6 and 12 end in validations; 12 is the end of training. Lightning's axis of scalars counts from 0.
    assert [e.step for e in events.Scalars("lib/edges/total")] == [0, 1, 5, 5, 8, 11, 11]
    files = sorted(p.name for p in (Path(logger.log_dir) / "lib" / "snapshots").iterdir())
    assert files == [f"step-{step:08d}.safetensors" for step in (0, 2, 6, 9, 12)]


def test_files_match_a_graph_computed_afterwards(tmp_path: Path) -> None:
    callback, model = LIBCallback(NODE_LAYERS, num_samples=20, dtype="float64", every_n_validations=1), Classifier()
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(model)
    final = InteractionGraph.load(tmp_path / "lib" / "final.safetensors")
    last = InteractionGraph.load(tmp_path / "lib" / "snapshots" / "step-00000012.safetensors")
    assert (final.info["step"], final.info["epoch"], final.info["n_samples"]) == (12, 1, 20)
    again = compute_interaction_graph(model, callback.samples.buffer.batches, NODE_LAYERS, dtype=torch.float64)
    for pair, E in again.edges.items():
        assert torch.equal(final.edges[pair], E)
        assert torch.equal(last.edges[pair], E)
    figures = sorted(p.name for p in (tmp_path / "lib" / "figures").iterdir())
    assert figures == ["step-00000006.png", "step-00000012.png"]
    assert (tmp_path / "lib" / "figures" / figures[0]).read_bytes().startswith(b"\x89PNG")


def test_num_samples_limits_the_samples(tmp_path: Path) -> None:
    callback = LIBCallback(NODE_LAYERS, num_samples=10, every_n_validations=1)
    trainer_of(tmp_path, callback).fit(Classifier())
    assert [len(x) for x, _ in callback.samples.buffer.batches] == [8, 2]
    assert callback.graph is not None
    assert callback.graph.info["n_samples"] == 10


def test_sanity_check_takes_no_snapshot(tmp_path: Path) -> None:
    callback = LIBCallback(NODE_LAYERS, every_n_validations=1)
    trainer_of(tmp_path, callback, limit_train_batches=0, num_sanity_val_steps=-1).fit(Classifier())
    assert callback.snapshots == 0


def test_validate_computes_too(tmp_path: Path) -> None:
    callback = LIBCallback(NODE_LAYERS, every_n_validations=1)
    trainer = trainer_of(tmp_path, callback)
    (metrics,) = trainer.validate(Classifier(), verbose=False)
    assert KEYS - set(metrics) == {"lib/overhead"}, "there is no training that it could be a share of"
    assert callback.snapshots == 1


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"barebones": True}])
def test_trial_runs_write_nothing(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    overridden = {
        "logger": None,
        "enable_checkpointing": None,
        "enable_progress_bar": None,
        "enable_model_summary": None,
    }
    callback = LIBCallback(NODE_LAYERS, every_n_validations=1)
    trainer_of(tmp_path, callback, **overridden, **options).fit(Classifier())
    assert not list(tmp_path.rglob("*.safetensors"))


def test_end_of_fit_logs_all_paths(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = TensorBoardLogger(tmp_path)
    with caplog.at_level("INFO"):
        for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch"):
            __import__("logging").getLogger(name).propagate = True
        trainer_of(tmp_path, LIBCallback(NODE_LAYERS, every_n_validations=1), logger=logger).fit(Classifier())
    assert f"--logdir {logger.log_dir} --samples_per_plugin images=1000" in caplog.text
    (files,) = {line for line in caplog.text.splitlines() if line.startswith("  files  ")}
    assert files.startswith(f"  files  {Path(logger.log_dir) / 'lib'}: final.safetensors, snapshots/, figures/")


def test_a_run_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    whole = LIBCallback(NODE_LAYERS, every_n_steps=5)
    pl.seed_everything(3, verbose=False)
    trainer_of(tmp_path / "whole", whole, max_epochs=3).fit(Classifier())

    first, second = (LIBCallback(NODE_LAYERS, every_n_steps=5) for _ in range(2))
    pl.seed_everything(3, verbose=False)
    trainer = trainer_of(tmp_path / "parts", first, max_epochs=1)
    trainer.fit(Classifier())
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=False)
    torch.load(tmp_path / "model.ckpt", weights_only=True)
    trainer_of(tmp_path / "parts", second, max_epochs=3).fit(Classifier(), ckpt_path=tmp_path / "model.ckpt")
    names = [{p.name for p in (tmp_path / part / "lib" / "snapshots").iterdir()} for part in ("whole", "parts")]
    assert names[0] == {f"step-{step:08d}.safetensors" for step in (0, 5, 10, 15, 18)}
    assert names[1] == names[0] | {"step-00000006.safetensors"}, "and the end of the first part"
    assert second.snapshots == len(names[1])


def test_a_checkpoint_with_other_node_layers_starts_anew(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, LIBCallback(NODE_LAYERS, every_n_validations=1), max_epochs=1)
    trainer.fit(Classifier())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    other = LIBCallback(["net.0:input", "net.3", "output"], every_n_validations=5)
    stopping = EarlyStopping("lib/features/net.3", patience=9)
    trainer_of(tmp_path, other, stopping).fit(Classifier(), ckpt_path=tmp_path / "model.ckpt")
    assert other.snapshots == 1


def test_training_with_workers_is_unchanged(tmp_path: Path) -> None:
    without = run(Classifier(workers=2), tmp_path)
    assert run(Classifier(workers=2), tmp_path, LIBCallback(NODE_LAYERS, every_n_steps=2)) == without


def test_two_callbacks_need_two_names(tmp_path: Path) -> None:
    with pytest.raises(LIBError, match="Two LIBCallbacks of this trainer would both write to 'lib': give each a name="):
        trainer_of(
            tmp_path, LIBCallback(NODE_LAYERS, every_n_validations=1), LIBCallback(NODE_LAYERS, every_n_validations=1)
        ).fit(Classifier())
    pca = LIBCallback(NODE_LAYERS, basis="pca", name="pca", every_n_validations=1)
    trainer = trainer_of(tmp_path, LIBCallback(NODE_LAYERS, every_n_validations=1), pca)
    trainer.fit(Classifier())
    assert {"lib/edges/total", "pca/edges/total"} <= set(trainer.callback_metrics)
    assert (tmp_path / "pca" / "final.safetensors").exists()


def test_dict_batches_and_input_fn(tmp_path: Path) -> None:
    class TakesDict(Classifier):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.net(x * scale)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(**batch).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self(**batch)

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader([{"x": x} for x in Noisy(16).x], batch_size=8)

        val_dataloader = train_dataloader

    for input_fn in (None, lambda batch: (batch["x"], 2.0)):
        callback = LIBCallback(NODE_LAYERS, input_fn=input_fn, every_n_validations=1)
        trainer_of(tmp_path, callback).fit(TakesDict())
        assert callback.snapshots == 2


class Tokens(Classifier):
    """Starts from integers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(self.embed(tokens))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.arange(8), torch.zeros(8).long()), batch_size=4)

    val_dataloader = train_dataloader


class Broken(Classifier):
    """Gives NaN from the start."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / 0 * 0)


class NeedsMore(Classifier):
    """Cannot be called with what is in its batch, and has no step that calls it on a validation batch."""

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return self.net(x + 0 * y[:, None]) + z

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.training
        return self(*batch, torch.ones(1)).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


MISTAKES: list[tuple[Callable[[], Classifier], list[str | NodeLayer], dict[str, Any], str]] = [
    (Classifier, ["net.0:input", "nte.4", "output"], {}, r"no module 'nte\.4' .* Near matches: .*'net\.4'"),
    (Classifier, ["net.4:input", "net.0:input", "output"], {}, "out of order"),
    (Classifier, ["net.0:input", "spare", "output"], {}, "'spare' did not run"),
    (Classifier, ["net.0:input", NodeLayer(["net.4"], positions=3)], {}, "has 1 positions"),
    (Tokens, ["input", "output"], {}, "int64 numbers, which have no gradient"),
    (Broken, NODE_LAYERS, {}, r"Node layer 'net\.0:input' has NaN activations"),
    (NeedsMore, NODE_LAYERS, {}, r"cannot be run on a batch \(\[Tensor \(.*TypeError(.|\n)*input_fn=lambda batch: "),
]


@pytest.mark.parametrize("sanity", [2, 0])
@pytest.mark.parametrize(("model", "layers", "options", "message"), MISTAKES)
def test_mistakes_stop_before_the_first_step(
    model: Callable[[], Classifier],
    layers: list[Any],
    options: dict[str, Any],
    message: str,
    sanity: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    module = model()
    module.spare = nn.Linear(1, 1)
    trainer = trainer_of(tmp_path, LIBCallback(layers, every_n_validations=1), num_sanity_val_steps=sanity, **options)
    if model in (NeedsMore, Tokens) and sanity == 0:
        # Without a sanity check, what only a validation batch can show is seen at the first validation.
        trainer.fit(module)
        assert trainer.global_step > 0
        (said,) = [record for record in caplog.messages if "No samples for snapshots are collected" in record]
        assert re.search(message, said)
        assert not [record for record in caplog.messages if "failed and is skipped" in record]
        return
    with pytest.raises(LIBError, match=message):
        trainer.fit(module)
    assert trainer.global_step == 0


def test_a_failing_forward_pass_costs_only_its_snapshot(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class BreaksOnce(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            if self.trainer.global_step == 12 and torch.is_grad_enabled() and not self.training:
                x = x * math.nan
            return super().forward(x)

    callback = LIBCallback(NODE_LAYERS, every_n_validations=1)
    trainer = trainer_of(tmp_path, callback, EarlyStopping("lib/edges/total", patience=9), max_epochs=3)
    trainer.fit(BreaksOnce())
    assert trainer.global_step == 18
    assert caplog.text.count("at step 12 failed and is skipped") == 1
    assert "has NaN activations" in caplog.text
    names = sorted(p.name for p in (tmp_path / "lib" / "snapshots").iterdir())
    assert names == ["step-00000006.safetensors", "step-00000018.safetensors"]


def test_a_full_disk_costs_only_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(InteractionGraph, "save", full)
    trainer = trainer_of(tmp_path, LIBCallback(NODE_LAYERS, every_n_validations=1))
    trainer.fit(Classifier())
    assert trainer.global_step == 12
    assert "No space left on device" in caplog.text


def test_logging_in_forward_is_muted_in_snapshots(tmp_path: Path) -> None:
    class Talkative(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            h = super().forward(x)
            self.log("size", h.abs().mean(), on_epoch=True)
            return h

    def logged(*callbacks: pl.Callback) -> float:
        pl.seed_everything(3, verbose=False)
        trainer = trainer_of(tmp_path, *callbacks)
        trainer.fit(Talkative())
        return float(trainer.callback_metrics["size"])

    callback = LIBCallback(NODE_LAYERS, every_n_steps=1)
    assert logged(callback) == logged()
    assert callback.snapshots == 13
