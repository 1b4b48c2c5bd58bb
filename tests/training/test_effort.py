"""What the snapshots of a run compute: chosen once, from the operations of the training, and the same in all."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lib_lightning import InteractionGraph, LIBCallback, estimate_cost
from lib_lightning.io.run_layout import RunLayout
from lib_lightning.training.effort import RunPlanner, expected_snapshots
from tests.tiny_training import Classifier, trainer_of


class Images(pl.LightningModule):
    """A classifier of images, on which exact sums take many times as long as training."""

    def __init__(self, n: int = 128) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(n, 3, 16, 16, generator=generator)
        self.data = TensorDataset(images, torch.randint(10, (n,), generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=32)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=32)


class Stop(pl.Callback):
    """Ends a training after its first step."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        trainer.should_stop = True


def graphs(folder: Path) -> list[InteractionGraph]:
    return [InteractionGraph.load(path) for path in RunLayout(folder / "lib").basis_files().values()]


def test_all_snapshots_compute_the_same_and_say_what(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).propagate = True
    caplog.set_level("INFO")
    first = LIBCallback(every_n_validations=1)
    trainer = trainer_of(tmp_path / "first", first, max_epochs=2)
    trainer.fit(Images())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    said = {record.message for record in caplog.records if "snapshots (at every" in record.message}
    assert len(said) == 1
    assert first.state.plan is not None
    assert f"lib: 2 snapshots (at every validation), each with {first.state.plan.effort.text}, about " in said.pop()
    # The schedule and the length of the training are others now, but what a snapshot computes is not.
    second = LIBCallback(every_n_validations=1)
    trainer_of(tmp_path / "second", second, max_epochs=4).fit(Images(), ckpt_path=tmp_path / "half.ckpt")
    found = graphs(tmp_path / "first") + graphs(tmp_path / "second")
    assert len(found) == 4
    assert second.state.plan == first.state.plan
    plans = [graph.info["effort"] for graph in found]
    assert all(plan == plans[0] for plan in plans)
    assert plans[0]["n_probes"] is not None
    for graph in found:
        settings = graph.info["settings"]
        assert (settings["n_probes"], settings["n_pushed"]) == (plans[0]["n_probes"], plans[0]["n_pushed"])
        assert graph.info["n_samples"] == plans[0]["num_samples"]


def test_two_runs_compute_the_same_numbers(tmp_path: Path) -> None:
    runs = []
    for name in ("one", "other"):
        torch.manual_seed(0)
        trainer_of(tmp_path / name, LIBCallback(every_n_validations=1), max_epochs=1).fit(Images())
        runs.append(graphs(tmp_path / name)[0])
    for section, E in runs[0].edges.items():
        assert torch.equal(E, runs[1].edges[section])


def test_what_fits_is_exact(tmp_path: Path) -> None:
    callback = LIBCallback(every_n_validations=1)
    trainer_of(tmp_path, callback, max_epochs=1).fit(Classifier())
    assert callback.state.plan is not None
    assert (callback.state.plan.effort.n_probes, callback.state.plan.effort.n_pushed) == (None, None)


def test_numbers_that_are_given_are_kept(tmp_path: Path) -> None:
    given = LIBCallback(num_samples=96, n_probes=3, every_n_validations=1)
    trainer_of(tmp_path / "given", given, max_epochs=1).fit(Images())
    (graph,) = graphs(tmp_path / "given")
    assert graph.info["n_samples"] == 96
    assert graph.info["settings"]["n_probes"] == 3
    exact = LIBCallback(num_samples=8, effort="exact", every_n_validations=1)
    trainer_of(tmp_path / "exact", exact, max_epochs=1).fit(Images())
    (graph,) = graphs(tmp_path / "exact")
    assert (graph.info["effort"]["n_probes"], graph.info["effort"]["n_pushed"]) == (None, None)
    assert (graph.info["settings"]["n_probes"], graph.info["settings"]["n_pushed"]) == (None, None)


class ManyClasses(Images):
    """A classifier with more classes than may be a node layer."""

    def __init__(self) -> None:
        super().__init__(32)
        self.net[6] = nn.Linear(8, 600)


@pytest.mark.parametrize(("effort", "kind"), [("auto", "lib"), ("exact", "pca")])
def test_exact_snapshots_choose_no_metric_either(effort: Any, kind: str, tmp_path: Path) -> None:
    callback = LIBCallback(["net.4", "net.5"], num_samples=8, n_probes=2, n_pushed=2, effort=effort, at_steps=[0])
    trainer_of(tmp_path, callback, max_epochs=1).fit(ManyClasses())
    assert {graph.bases["net.5"].kind for graph in graphs(tmp_path)} == {kind}


def test_longer_trainings_get_better_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib_lightning.training.effort.MIN_OPERATIONS", 1e6)
    probes = []
    for epochs in (2, 40000):
        callback = LIBCallback(at_steps=[1])
        trainer_of(tmp_path / str(epochs), callback, Stop(), max_epochs=epochs).fit(Images(64))
        assert callback.state.plan is not None
        probes.append(callback.state.plan.effort.n_probes or 10**9)
    assert probes[0] < probes[1]


@pytest.mark.parametrize("estimated", [30.0, None])
def test_seconds_are_those_of_an_estimate_where_it_is_a_small_part_and_decide_nothing(
    estimated: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def estimate(*args: Any, **settings: Any) -> SimpleNamespace:
        asked.append(settings)
        if estimated is None:
            raise ValueError("no estimate")
        return SimpleNamespace(seconds=estimated, file_bytes=1000, num_features=(3,))

    monkeypatch.setattr("lib_lightning.training.effort.estimate_cost", estimate)
    monkeypatch.setattr("lib_lightning.training.effort._ESTIMATE_OPERATIONS", 1e9)
    plans = []
    for rate in (1e9, 1e12):
        monkeypatch.setattr(RunPlanner, "_forward_rate", lambda *args, rate=rate: rate)
        callback = LIBCallback(at_steps=[1, *range(100, 105)], max_overhead=0.03)
        trainer_of(tmp_path / str(rate), callback, Stop(), max_epochs=200_000).fit(Images(64))
        plans.append(callback.state.plan)
    assert len(asked) == 2, "once in each run"
    slow, fast = plans
    assert slow is not None
    assert fast is not None
    assert slow.effort == fast.effort
    assert asked[0]["n_probes"] == slow.effort.n_probes
    if estimated is not None:
        of_graph = estimated * slow.of_graph / slow.effort.operations
        assert slow.seconds == fast.seconds == pytest.approx(of_graph + 0.8)
    else:
        assert slow.seconds > fast.seconds


def test_processes_that_share_the_samples_allow_as_many_times_the_operations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunPlanner, "_forward_rate", lambda *args: 1e9)
    plans = []
    for processes in (1, 4):
        monkeypatch.setattr("lib_lightning.training.effort.data_rank", lambda trainer, n=processes: (0, n))
        callback = LIBCallback(at_steps=[1, *range(100, 105)])
        trainer_of(tmp_path / str(processes), callback, Stop(), max_epochs=40_000).fit(Images(64))
        assert callback.state.plan is not None
        plans.append(callback.state.plan)
    one, four = plans
    assert 2 * one.effort.operations < four.effort.operations < 4.5 * one.effort.operations
    assert all(plan.share is not None and 0.02 < plan.share <= 0.0301 for plan in plans)
    assert one.seconds == pytest.approx(one.of_graph / 1e9 + 0.8)
    assert four.seconds == pytest.approx(four.of_graph / 4e9 + 0.8), "divided among the processes"


def test_forward_passes_to_recognise_features_are_part_of_a_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib_lightning.training.effort.MIN_OPERATIONS", 1e6)
    monkeypatch.setattr(RunPlanner, "_forward_rate", lambda *args: 1e9)
    plans = []
    for follow in (False, True):
        callback = LIBCallback(follow=follow, at_steps=[1])
        trainer_of(tmp_path / str(follow), callback, Stop(), max_epochs=3000).fit(Images(64))
        plans.append(callback.state.plan)
    without, tracked = plans
    assert without is not None
    assert tracked is not None
    assert without.tracking == 0 < tracked.tracking
    assert without.effort.allowed - tracked.effort.allowed == pytest.approx(tracked.tracking)
    for plan in plans:
        assert plan.seconds == pytest.approx((plan.effort.operations + plan.tracking) / 1e9 + 0.8)
    # The training has three passes of the 64 samples in each epoch, and the snapshots, before training too, one each.
    of_training = (without.of_graph + 5e9) * without.snapshots / without.share
    more = tracked.share * of_training - (tracked.effort.operations + 5e9) * tracked.snapshots
    assert more == pytest.approx(tracked.tracking * tracked.snapshots)
    assert 0.5 < tracked.tracking * 9000 / of_training < 1.5


def test_a_plan_predicts_the_time_of_its_snapshots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib_lightning.training.effort._MAX_ESTIMATE_SHARE", 1e9)
    asked = []

    def estimate(*args: Any, **settings: Any) -> Any:
        asked.append(estimate_cost(*args, **settings))
        return asked[-1]

    monkeypatch.setattr("lib_lightning.training.effort.estimate_cost", estimate)
    callback = LIBCallback(at_steps=[0])
    trainer_of(tmp_path, callback, max_epochs=1).fit(Images(64))
    assert len(asked) == 1, "in the midst of a training"
    plan = callback.state.plan
    assert plan is not None
    assert asked[0].plan.num_samples == plan.effort.num_samples
    assert plan.seconds == pytest.approx(asked[0].seconds * plan.of_graph / plan.effort.operations + 0.8)
    # The clock of a busy machine allows no closer look; tests/benchmarks/estimates.py takes it.
    assert callback.graph is not None


def test_plans_include_the_metric_that_is_chosen(tmp_path: Path) -> None:
    operations = {}
    for metric, options in (("chosen", {}), ("pca", {"final_basis": "pca"}), ("fisher", {"final_metric": "fisher"})):
        callback = LIBCallback(["net.4", "net.5"], 8, n_probes=2, n_pushed=2, at_steps=[0], **options)
        trainer_of(tmp_path / metric, callback, max_epochs=1).fit(ManyClasses())
        assert callback.state.plan is not None
        operations[metric] = callback.state.plan.effort.operations
    assert operations["chosen"] == operations["fisher"] > operations["pca"]


class Stream(IterableDataset[Tensor]):
    """Samples without a length."""

    def __init__(self, data: Tensor) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.data)


class Streamed(Images):
    """A training that cannot tell how many steps it has."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Stream(self.data), batch_size=32)


def test_a_training_of_unknown_length_has_a_snapshot_at_every_validation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).propagate = True
    caplog.set_level("INFO")
    callback = LIBCallback()
    trainer_of(tmp_path, callback, max_epochs=3).fit(Streamed(64))
    assert callback.snapshots >= 3
    assert callback.state.plan is not None
    assert callback.state.plan.snapshots is None
    (said,) = {record.message for record in caplog.records if "lib: snapshots " in record.message}
    assert "step -1" not in said


def test_no_estimate_in_a_short_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def estimate(*args: Any, **settings: Any) -> None:
        raise AssertionError("would take longer than the training")

    monkeypatch.setattr("lib_lightning.training.effort.estimate_cost", estimate)
    callback = LIBCallback(at_steps=[0])
    trainer_of(tmp_path, callback, max_epochs=1).fit(Images(64))
    assert callback.state.plan is not None
    assert 0.8 < callback.state.plan.seconds < 60


def test_the_effort_is_a_choice() -> None:
    with pytest.raises(ValueError, match="effort must be one of 'auto', 'exact'; got 'all'"):
        LIBCallback(effort="all", every_n_validations=1)  # type: ignore[arg-type]


SCHEDULES: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "validations": ({"every_n_validations": 1}, {"max_epochs": 6}, 6),
    "every second epoch": ({"every_n_validations": 1}, {"max_epochs": 6, "check_val_every_n_epoch": 2}, 3),
    "within epochs": ({"every_n_validations": 1}, {"max_epochs": 3, "val_check_interval": 2}, 6),
    "every third validation": ({"every_n_validations": 3}, {"max_epochs": 6}, 2),
    "until a step": ({"every_n_validations": 1}, {"max_epochs": -1, "max_steps": 12}, 3),
    "steps": ({"every_n_steps": 5}, {"max_epochs": 5}, 5),
    "list": ({"at_steps": [0, 3, 10**6]}, {"max_epochs": 6}, 2),
    "no end": ({}, {"max_epochs": -1, "max_steps": -1}, float("inf")),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_expected_number_of_snapshots(name: str, tmp_path: Path) -> None:
    options, limits, expected = SCHEDULES[name]
    callback = LIBCallback(**options)

    class Count(pl.Callback):
        found: float | None = None

        def on_train_batch_start(self, trainer: pl.Trainer, *args: object) -> None:
            self.found = expected_snapshots(callback.schedule, trainer)
            raise KeyboardInterrupt

    count = Count()
    with pytest.raises(SystemExit):
        trainer_of(tmp_path, count, **limits).fit(Images(64 * 2))
    assert count.found == pytest.approx(expected, abs=1)


def test_a_standalone_validation_chooses_for_itself(tmp_path: Path) -> None:
    callback = LIBCallback(every_n_validations=1)
    trainer_of(tmp_path, callback).validate(Images(64), verbose=False)
    assert callback.snapshots == 1
    assert callback.state.plan is not None
    assert callback.state.plan.effort.n_probes is not None


def test_samples_of_the_users_own_may_be_more_than_a_validation_has(tmp_path: Path) -> None:
    own = DataLoader(Images(96).data, batch_size=32)
    callback = LIBCallback(dataloader=own, every_n_validations=1)
    trainer_of(tmp_path, callback, max_epochs=1, limit_val_batches=1).fit(Images(64))
    assert callback.state.plan is not None
    assert callback.state.plan.effort.num_samples == 96
