"""Trainers of all kinds: sources of samples, precisions, and weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lib_lightning import InteractionGraph, LIBCallback, compute_interaction_graph
from lib_lightning.errors import LIBError
from lib_lightning.training.trainer import check_strategy
from lib_lightning.viewer.cache import Cache
from lib_lightning.viewer.run_view import RunView
from tests.resumable_run import NODE_LAYERS, STEPS_PER_EPOCH, Steady
from tests.tiny_training import NODE_LAYERS as CLASSIFIER_LAYERS
from tests.tiny_training import Classifier, trainer_of


def loader(n: int, seed: int = 0) -> DataLoader[Any]:
    x = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, x.sum(1).gt(0).long()), batch_size=8)


def inputs(*loaders: DataLoader[Any]) -> Tensor:
    return torch.cat([batch[0] for data in loaders for batch in data])


def assert_computed_on(callback: LIBCallback, x: Tensor) -> None:
    assert torch.equal(torch.cat([batch[0] for batch in callback.samples.buffer.batches]), x)


# precision


def same_importances(a: InteractionGraph, b: InteractionGraph) -> float:
    """Largest difference between importances, relative to the largest of each node layer."""
    pairs = zip(a.bases.values(), b.bases.values(), strict=True)
    worst = 0.0
    for one, other in pairs:
        k = min(one.n_features, other.n_features)
        difference = (one.importance[:k] - other.importance[:k]).abs().max() / other.importance[0]
        worst = max(worst, float(difference))
    return worst


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [
        ("32-true", None, 1e-5),
        ("64-true", None, 1e-12),
        # Weights are float32, and so is the computation: mixed precision is switched off in it.
        ("bf16-mixed", None, 1e-5),
        # Weights have 8 bits. Computed in float32 nothing is added to that; computed as they are, activations and
        # gradients are rounded to 0.4% each, and importances hold their product, squared.
        ("bf16-true", "float32", 1e-5),
        ("bf16-true", None, 0.05),
        ("16-true", "float32", 1e-5),
    ],
)
def test_precision(precision: Any, dtype: Any, tolerance: float, tmp_path: Path) -> None:
    class Plain(Steady):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)  # Adam divides by zero in half precision

    callback, model = LIBCallback(NODE_LAYERS, dtype=dtype, every_n_validations=1), Plain()
    trainer_of(tmp_path, callback, precision=precision, limit_train_batches=4).fit(model)
    assert callback.graph is not None
    assert all(E.dtype == torch.float64 for E in callback.graph.edges.values())
    exact = compute_interaction_graph(model, callback.samples.buffer.batches, NODE_LAYERS, dtype=torch.float64)
    assert same_importances(callback.graph, exact) < tolerance
    wanted = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
    assert {p.dtype for p in model.parameters()} == {wanted.get(precision, torch.float32)}, "unchanged"


# where samples come from


class TwoLoaders(Steady):
    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [loader(20, 1), loader(12, 2)]

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])


@pytest.mark.parametrize("index", [0, 1])
def test_several_validation_loaders(index: int, tmp_path: Path) -> None:
    callback = LIBCallback(NODE_LAYERS, val_dataloader=index, every_n_validations=1)
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(TwoLoaders())
    assert_computed_on(callback, inputs(loader([20, 12][index], index + 1)))
    assert callback.snapshots == 2
    assert "lib/edges/total" in trainer.callback_metrics


@pytest.mark.parametrize("sanity", [0, 2])
def test_a_missing_validation_loader_is_refused(sanity: int, tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, LIBCallback(NODE_LAYERS, val_dataloader=2, every_n_validations=1), num_sanity_val_steps=sanity
    )
    if sanity:
        with pytest.raises(LIBError, match="val_dataloader=2 of LIBCallback counts from 0, but there are only 2"):
            trainer.fit(TwoLoaders())
        assert trainer.global_step == 0


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"val_check_interval": 0.4, "max_epochs": 1}, [4, 8, 10]),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None, "max_epochs": 1}, [3, 6, 9, 10]),
        ({"check_val_every_n_epoch": 2, "max_epochs": 5}, [20, 40, 50]),
        ({"accumulate_grad_batches": 5, "max_epochs": 2}, [2, 4]),
        ({"limit_val_batches": 2, "max_epochs": 1}, [10]),
        ({"limit_val_batches": 0.5, "max_epochs": 1}, [10]),
        ({"num_sanity_val_steps": 0, "max_epochs": 1}, [10]),
        ({"num_sanity_val_steps": -1, "max_epochs": 1}, [10]),
        ({"max_steps": 7, "max_epochs": -1}, [7]),
    ],
)
def test_validation_intervals_and_limits(options: dict[str, Any], steps: list[int], tmp_path: Path) -> None:
    callback = LIBCallback(NODE_LAYERS, every_n_validations=1)
    trainer_of(tmp_path, callback, **options).fit(Steady())
    files = sorted((tmp_path / "lib" / "snapshots").iterdir())
    assert files == [tmp_path / "lib" / "snapshots" / f"step-{step:08d}.safetensors" for step in steps]
    # Where training ends before the first validation, there are the two batches of the sanity check.
    few = "limit_val_batches" in options or "max_steps" in options
    assert_computed_on(callback, inputs(Steady().val_dataloader())[: 16 if few else None])


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        for batch in loader(20):
            yield from zip(*batch, strict=True)


def test_iterable_datasets(tmp_path: Path) -> None:
    class Streaming(Steady):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(Stream(), batch_size=8)

        val_dataloader = train_dataloader

    callback = LIBCallback(NODE_LAYERS, every_n_validations=1)
    trainer_of(tmp_path, callback).fit(Streaming())
    assert_computed_on(callback, inputs(loader(20)))


@pytest.mark.parametrize("schedule", [{}, {"every_n_validations": 2}, {"every_n_steps": 4}])
def test_an_own_dataloader_replaces_validation(schedule: dict[str, int], tmp_path: Path) -> None:
    class NoValidation(Classifier):
        validation_step = pl.LightningModule.validation_step
        val_dataloader = pl.LightningModule.val_dataloader

    def train(*callbacks: pl.Callback) -> NoValidation:
        pl.seed_everything(0, verbose=False)
        model = NoValidation()
        key = "lib/edges/total"
        others = [EarlyStopping(key, check_on_train_epoch_end=True), ModelCheckpoint(tmp_path, monitor=key)]
        options = {"max_epochs": 3, "enable_checkpointing": bool(callbacks)}
        trainer_of(tmp_path, *callbacks, *(others if callbacks else []), **options).fit(model)
        return model

    # Shuffled: reading it draws random numbers, which training must not miss.
    own = DataLoader(loader(40).dataset, batch_size=16, shuffle=True)
    callback = LIBCallback(CLASSIFIER_LAYERS, dataloader=own, num_samples=24, **schedule)
    model, without = train(callback), train()
    assert model.losses == without.losses
    assert callback.samples.buffer.count == 24
    steps = sorted(int(p.stem.removeprefix("step-")) for p in (tmp_path / "lib" / "snapshots").iterdir())
    assert steps == {0: [0, 1, 3, 7, 18], 2: [6, 18], 4: [0, 4, 8, 12, 16, 18]}[next(iter(schedule.values()), 0)]


def test_an_own_dataloader_beside_validation(tmp_path: Path) -> None:
    callback = LIBCallback(NODE_LAYERS, dataloader=list(loader(20, 5)), every_n_validations=1)
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(Steady())
    assert_computed_on(callback, inputs(loader(20, 5)))
    assert callback.snapshots == 2
    trainer.validate(Steady(), verbose=False)
    assert_computed_on(callback, inputs(loader(20, 5)))


def test_inference_mode(tmp_path: Path) -> None:
    callback, model = LIBCallback(NODE_LAYERS, every_n_validations=1), Steady()
    trainer_of(tmp_path, callback).validate(model, verbose=False)
    assert callback.graph is not None
    again = compute_interaction_graph(model, [inputs(model.val_dataloader())], NODE_LAYERS)
    assert same_importances(callback.graph, again) < 1e-5


# which weights, which steps


def test_manual_optimisation(tmp_path: Path) -> None:
    class Manual(Steady):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net[i].parameters(), lr=0.1) for i in (0, 2)]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            first, second = self.optimizers()
            first.zero_grad(), second.zero_grad()
            self.manual_backward(loss)
            first.step(), second.step()

    logger = TensorBoardLogger(tmp_path)
    callback = LIBCallback(NODE_LAYERS, every_n_steps=5)
    trainer_of(tmp_path, callback, logger=logger, max_epochs=1, log_every_n_steps=1).fit(Manual())
    names = sorted(p.stem for p in (Path(logger.log_dir) / "lib" / "snapshots").iterdir())
    # Two optimizers step with each batch, so steps are even; a snapshot comes at the first step from where it is due.
    assert names == [f"step-{step:08d}" for step in (0, 6, 10, 16, 20)]
    events = EventAccumulator(logger.log_dir, {"images": 0}).Reload()
    assert [e.step for e in events.Images("lib/graph")] == [0, 6, 10, 16, 20], "as in titles and files"
    # Scalars are beside the user's, where Lightning counts batches; the viewer converts that axis.
    assert [e.step for e in events.Scalars("lib/step")][-1] == 9
    assert [e.value for e in events.Scalars("lib/step")][-1] == 20
    run = json.loads(RunView(Path(logger.log_dir) / "lib", "lib", Cache(1 << 20)).run())
    assert run["scalars"]["val_loss"]["steps"] == [20]


def test_several_callbacks_at_once(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    callbacks = [
        LIBCallback(NODE_LAYERS, every_n_validations=1),
        LIBCallback(NODE_LAYERS, basis="pca", name="pca", every_n_steps=4),
        LIBCallback(["input", "output"], name="ends", num_samples=10, every_n_validations=1),
    ]
    trainer = trainer_of(tmp_path, *callbacks, logger=logger, enable_checkpointing=True)
    trainer.fit(Steady())
    for name, count in (("lib", 2), ("pca", 6), ("ends", 2)):
        assert len(list((Path(logger.log_dir) / name / "snapshots").iterdir())) == count
        assert f"{name}/edges/total" in trainer.callback_metrics
    assert trainer.callback_metrics["lib/edges/total"] != trainer.callback_metrics["pca/edges/total"]
    checkpoint = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert len([key for key in checkpoint["callbacks"] if key.startswith("LIBCallback")]) == 3


# what cannot work


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [(FSDPStrategy, "frees a module's weights after one backward pass"), (DeepSpeedStrategy, "DeepSpeedStrategy")],
)
def test_unsupported_strategies_are_refused(strategy: type[Any], reason: str, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    # Neither can be set up here: the one needs an accelerator, the other a package.
    trainer.strategy._lightning_module = None
    trainer._accelerator_connector.strategy = strategy.__new__(strategy)
    with pytest.raises(LIBError, match=reason):
        check_strategy(trainer, None)


def test_a_little_memory_is_enough(tmp_path: Path) -> None:
    callback, unlimited = (
        LIBCallback(NODE_LAYERS, memory_limit=1e-5, every_n_validations=1),
        LIBCallback(NODE_LAYERS, name="unlimited", every_n_validations=1),
    )
    trainer_of(tmp_path, callback, unlimited, max_epochs=1).fit(Steady())
    assert callback.graph is not None
    assert unlimited.graph is not None
    assert same_importances(callback.graph, unlimited.graph) < 1e-5
    assert callback.graph.info["step"] == STEPS_PER_EPOCH


def test_running_out_of_memory_costs_only_the_snapshot(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Greedy(Steady):
        seen: list[int]

        def forward(self, x: Tensor) -> Tensor:
            if torch.is_grad_enabled() and not self.training and len(x) > self.fits and self.trainer.global_step:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().forward(x)

    model = Greedy()
    model.fits = 2
    callback = LIBCallback(NODE_LAYERS, every_n_validations=1)
    trainer_of(tmp_path, callback, max_epochs=1).fit(model)
    assert callback.snapshots == 1, "in chunks that fit"
    exact = compute_interaction_graph(model.net, [inputs(model.val_dataloader())], ["0:input", "2:input", "output"])
    assert callback.graph is not None
    assert same_importances(callback.graph, exact) < 1e-5
    model.fits = 0
    callback = LIBCallback(NODE_LAYERS, every_n_validations=1)
    trainer = trainer_of(tmp_path, callback, max_epochs=1)
    trainer.fit(model)
    assert callback.snapshots == 0
    assert trainer.global_step == STEPS_PER_EPOCH
    assert "failed and is skipped; training continues. OutOfMemoryError" in caplog.text


def test_samples_that_cannot_be_saved_cost_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Unkeepable(Steady):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [*batch, lambda: None]

    callback = LIBCallback(NODE_LAYERS, every_n_validations=1)
    trainer = trainer_of(tmp_path, callback, max_epochs=1)
    trainer.fit(Unkeepable())
    assert callback.snapshots == 1
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    assert "a run resumed from here will collect new ones" in caplog.text


def test_a_standalone_validation_leaves_the_run_alone(tmp_path: Path) -> None:
    callback = LIBCallback(NODE_LAYERS, every_n_validations=1)
    trainer = trainer_of(tmp_path, callback, max_epochs=1)
    model = Steady()
    trainer.fit(model)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    (metrics,) = trainer.validate(model, loader(16, 9), verbose=False)
    assert metrics["lib/samples"] == 16
    assert all(p.read_bytes() == content for p, content in before.items())
    assert (tmp_path / "lib" / "validate" / "snapshots").exists()


def test_a_generator_shared_with_an_own_dataloader_is_restored(tmp_path: Path) -> None:
    def order(with_callback: bool) -> list[Tensor]:
        generator, seen = torch.Generator().manual_seed(0), []
        shared = DataLoader(loader(40).dataset, batch_size=8, shuffle=True, generator=generator)

        class Watching(Steady):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                seen.append(batch[0])
                return super().training_step(batch, batch_idx)

            def train_dataloader(self) -> DataLoader[Any]:
                return shared

        callbacks = [LIBCallback(NODE_LAYERS, dataloader=shared, every_n_validations=1)] if with_callback else []
        trainer_of(tmp_path, *callbacks, max_epochs=1).fit(Watching())
        return seen

    assert all(torch.equal(a, b) for a, b in zip(order(True), order(False), strict=True))


def test_an_own_dataloader_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LIBError, match="has no batches, or is an iterator that is exhausted"):
        trainer_of(tmp_path, LIBCallback(NODE_LAYERS, dataloader=iter([]), every_n_validations=1)).fit(Steady())


def test_tensors_of_the_default_type_fit_the_precision(tmp_path: Path) -> None:
    class MakesOwn(Steady):
        def forward(self, x: Tensor) -> Tensor:
            return self.net(x * torch.ones(5))

    callback = LIBCallback(NODE_LAYERS, every_n_validations=1)
    trainer_of(tmp_path, callback, max_epochs=1, precision="64-true").fit(MakesOwn())
    assert callback.snapshots == 1
    assert torch.get_default_dtype() == torch.float32


def test_numpy_numbers_as_options(tmp_path: Path) -> None:
    callback = LIBCallback(NODE_LAYERS, at_steps=np.logspace(0, 1, 3).astype(int))
    trainer = trainer_of(tmp_path, callback, max_epochs=1, enable_checkpointing=True)
    trainer.fit(Steady())
    torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert callback.snapshots == 3


def test_nan_in_a_training_batch_is_not_a_model_error(tmp_path: Path) -> None:
    class Skips(Steady):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch[0].isfinite().all() else None

        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] * torch.nan, batch[1]] if self.trainer.training and not self.trainer.global_step else batch

    callback = LIBCallback(NODE_LAYERS, every_n_validations=1)
    trainer_of(tmp_path, callback, max_epochs=1, num_sanity_val_steps=0).fit(Skips())
    assert callback.snapshots == 1
