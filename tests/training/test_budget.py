"""The callback keeps to its share of the training time, on real trainers with time that is made up."""

from __future__ import annotations

import csv
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lib_lightning import InteractionGraph, LIBCallback
from lib_lightning.ablation import AblationPlan
from lib_lightning.lineage.snapshot_tracker import SnapshotTracker
from lib_lightning.training.snapshot import Snapshot
from tests.tiny_training import NODE_LAYERS, STEPS_PER_EPOCH, Classifier, Failing, trainer_of
from tests.training.test_callback import run


class Timed(Classifier):
    """A second for each training step; so many samples to validate on."""

    def __init__(self, n_val: int = 24) -> None:
        super().__init__()
        self.n_val, self.now = n_val, 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.now += 1
        return super().training_step(batch, batch_idx)

    def val_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(self.n_val, 5, generator=torch.Generator().manual_seed(1))
        return DataLoader(TensorDataset(x, x.sum(1).gt(0).long()), batch_size=100)


class TimedAndFailing(Timed, Failing):
    """No snapshot succeeds."""


def timed(model: Timed, cost: float, computing: float = 0.0, **options: Any) -> LIBCallback:
    """A callback whose snapshots take so many seconds, so many of these for the graphs of all samples."""
    callback = LIBCallback(**{"node_layers": NODE_LAYERS, "follow": False, **options})
    take = callback.watcher.take

    def take_that_long(live: Any, samples: Any, *args: Any) -> Snapshot:
        part = sum(len(x) for x, _ in samples.batches) / model.n_val
        model.now += cost - computing * (1 - part)
        return replace(take(live, samples, *args), computing=computing * part)

    callback.watcher.take = take_that_long  # type: ignore[method-assign]
    callback.budget.overhead.clock = lambda: model.now
    return callback


def steps_of(folder: Path) -> list[int]:
    return sorted(int(p.stem.removeprefix("step-")) for p in (folder / "lib" / "snapshots").iterdir())


@pytest.fixture(autouse=True)
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Runs are held to account, and what is said is heard."""
    monkeypatch.setattr("lib_lightning.training.time_meter.GRACE", 1.0)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    caplog.set_level("INFO")
    return caplog


def test_by_default_snapshots_are_spaced_to_three_per_cent_and_it_is_said(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    model, logger = Timed(), CSVLogger(tmp_path, "csv")
    callback = timed(model, 0.5)
    trainer_of(tmp_path, callback, max_epochs=20, logger=logger, log_every_n_steps=1).fit(model)
    # The k-th one is taken at the first validation after 0.5 (k + 1) / 0.03 seconds.
    assert steps_of(Path(logger.log_dir)) == [6, 54, 72, 84, 102, 120]
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["lib/overhead"]]
    shares = {int(row["step"]) + 1: float(row["lib/overhead"]) for row in rows}
    assert list(shares) == list(range(6, 121, 6)), "at every validation"
    expected = {step: 0.5 * sum(taken <= step for taken in (6, 54, 72, 84, 102, 120)) / step for step in shares}
    assert shares == pytest.approx(expected)
    assert all(share <= 0.03 for step, share in shares.items() if step >= 54)
    text = said.text
    assert text.count("is put off") == 1
    assert "the snapshot due after 12 steps is put off. One costs 0.5 s, and max_overhead=0.03 allows one in" in text
    assert "one in 16.7 s of training; 0.5 s have been spent in 12 s" in text
    assert text.count("overhead 2.50% of the training time (3 s of 120 s, max_overhead=0.03)") == 1
    assert text.count("snapshots put off: 14") == 1


def test_first_and_last_one_are_always_there(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    model = Timed()
    callback = timed(model, 1000)
    trainer_of(tmp_path, callback, max_epochs=3).fit(model)
    assert steps_of(tmp_path) == [6, 18]
    assert InteractionGraph.load(tmp_path / "lib" / "final.safetensors").info["step"] == 18
    assert "snapshots put off: 1" in said.text, "the last validation's is taken after all"


SCHEDULES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "steps": ({"every_n_steps": 4}, [0, 4, 8, 12]),
    "list": ({"at_steps": [1, 2, 3]}, [1, 2, 3, 12]),
    "validations": ({"every_n_validations": 1}, [6, 12]),
    "limited": ({"every_n_steps": 1, "max_overhead": 10.0}, [0, 9, 12]),
    "unlimited": ({"max_overhead": math.inf}, [6, 12]),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_of_the_users_own_are_kept_unless_limited(
    schedule: str, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    options, steps = SCHEDULES[schedule]
    model = Timed()
    trainer_of(tmp_path, timed(model, 30.0, **options)).fit(model)
    assert steps_of(tmp_path) == steps
    assert ("is put off" in said.text) == (schedule == "limited")
    assert "of the training time" in said.text, "said in any case"


def test_short_runs_take_all(tmp_path: Path) -> None:
    model = Timed()
    trainer_of(tmp_path, timed(model, 0.125), max_epochs=4).fit(model)
    assert steps_of(tmp_path) == [6, 12, 18, 24]


def test_failing_costs_time_too(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    model = TimedAndFailing()
    trainer_of(tmp_path, timed(model, 0.5), max_epochs=10).fit(model)
    failed = [record.args[1] for record in said.records if "is left out" in record.msg and record.args]  # type: ignore[index]
    assert failed == [6, 54, 60], "and not at every validation"


def test_training_is_untouched_where_snapshots_are_put_off(tmp_path: Path) -> None:
    without = run(Timed(1000), tmp_path, max_epochs=3)
    model = Timed(1000)
    callback = timed(model, 4.0, 3.8, every_n_steps=1, max_overhead=0.5)
    with_it = run(model, tmp_path, callback, max_epochs=3)
    assert with_it == without
    assert callback.budget.put_off
    assert callback.budget.extent.chosen, "and made cheaper"


def test_a_resumed_run_goes_on_with_its_share(tmp_path: Path) -> None:
    def fit(name: str, epochs: int, ckpt: Path | None = None) -> tuple[LIBCallback, Path]:
        model = Timed()
        model.now = 1e6 * epochs  # another day
        callback = timed(model, 0.5)
        trainer = trainer_of(tmp_path / name, callback, max_epochs=epochs)
        trainer.fit(model, ckpt_path=ckpt, weights_only=True if ckpt else None)
        trainer.save_checkpoint(tmp_path / name / "model.ckpt")
        return callback, tmp_path / name / "model.ckpt"

    first, checkpoint = fit("first", 8)
    assert first.budget.put_off == 6
    second, _ = fit("second", 12, checkpoint)
    assert steps_of(tmp_path / "first") == [6, 48], "the last one of the first part costs its time"
    # 1 s spent; a third and a last one make 2 s, which 3% are after 67 s.
    assert steps_of(tmp_path / "second") == [72]
    assert second.budget.put_off == 6 + 3
    assert second.budget.overhead.share == pytest.approx(1.5 / 72)


# Snapshots of 40 s, at validations every 6 s: with half the time allowed, 80 s of training for each.
CHEAPER: dict[str, Any] = {"max_overhead": 0.5}


def test_where_spacing_would_leave_out_most_fewer_samples_are_taken_once_and_for_all(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    model = Timed(1000)
    callback = timed(model, 40.0, 38.0, **CHEAPER)
    trainer_of(tmp_path, callback, max_epochs=32).fit(model)
    graphs = {step: InteractionGraph.load(tmp_path / "lib" / "snapshots" / f"step-{step:08d}.safetensors")
        for step in steps_of(tmp_path)}  # fmt: skip
    found = [graph.info["n_samples"] for graph in graphs.values()]
    assert len(found) >= 3
    assert set(found) == {512}, "not below what is enough, and the first one no more"
    (x, _), *_ = callback.samples.batches
    used = callback.samples.for_snapshot(callback_trainer(callback), callback.budget.extent.part).batches
    assert torch.equal(used[0][0], x), "the first ones"
    expected = {"max_overhead": 0.5, "part_of_samples": 0.512, "n_probes": None}
    assert all(graph.info["budget"] == expected for graph in graphs.values())
    assert said.text.count("the first snapshot, after 6 steps, is computed on 512 of 1,000 samples, as") == 1
    assert said.text.count("From here on they are computed on 512 of 1,000 samples; numbers") == 1
    assert callback.budget.overhead.share <= 0.5


@pytest.mark.parametrize(("epochs", "n", "cost"), [(1, 512, 20 - 11 * 0.488), (2, 1000, 20)])
def test_the_first_one_goes_on_to_all_samples_if_they_will_be_taken(
    epochs: int, n: int, cost: float, tmp_path: Path
) -> None:
    model = Timed(1000)
    callback = timed(model, 20.0, 11.0, max_overhead=0.5)
    trainer_of(tmp_path, callback, max_epochs=24, check_val_every_n_epoch=epochs).fit(model)
    # All samples take 11 s. At most three of four are left out if there are 2 s, half for that, for each of training.
    found = {InteractionGraph.load(tmp_path / "lib" / "snapshots" / f"step-{step:08d}.safetensors").info["n_samples"]
        for step in steps_of(tmp_path)}  # fmt: skip
    assert found == {n}
    newest = callback.budget.overhead.newest.values()
    assert {round(seconds, 6) for seconds in newest} == {cost}, "without the trial"


@pytest.mark.parametrize("options", [{}, {"ablation": AblationPlan("accuracy")}], ids=["plain", "ablation"])
def test_nothing_dear_is_tried(options: dict[str, Any], tmp_path: Path) -> None:
    model = Timed(1000)
    callback = timed(model, 0.1, 0.05, **CHEAPER, **options)
    seen: list[int] = []
    take = callback.watcher.take

    def noted(live: Any, samples: Any, *args: Any) -> Snapshot:
        seen.append(sum(len(x) for x, _ in samples.batches))
        return take(live, samples, *args)

    callback.watcher.take = noted  # type: ignore[method-assign]
    trainer_of(tmp_path, callback, max_epochs=1).fit(model)
    assert seen == ([callback.samples.buffer.count] if options else [512, 1000])


def test_what_was_tried_is_given_up_where_figures_cost_more(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    model = Timed(1000)
    callback = timed(model, 60.0, 20.0, **CHEAPER)
    trainer_of(tmp_path, callback, max_epochs=20).fit(model)
    found = [InteractionGraph.load(tmp_path / "lib" / "snapshots" / f"step-{step:08d}.safetensors").info["n_samples"]
        for step in steps_of(tmp_path)]  # fmt: skip
    assert found == [512, *[1000] * (len(found) - 1)]
    assert said.text.count("snapshots cost 60 s, which max_overhead=0.5 has time for. From here on they are") == 1
    assert said.text.count("computed on all 1,000 samples; numbers before and after may differ by that.") == 1


def callback_trainer(callback: LIBCallback) -> Any:
    """A trainer of one process, which is all that samples ask for."""
    return trainer_of(None, callback)


def test_many_outputs_are_replaced_by_probes(
    tmp_path: Path, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib_lightning.training.run_extent._MANY", 2)
    model = Timed(200)
    callback = timed(model, 40.0, 38.0, **CHEAPER)
    checkpoint = tmp_path / "model.ckpt"
    trainer = trainer_of(tmp_path / "first", callback, max_epochs=4)
    trainer.fit(model)
    trainer.save_checkpoint(checkpoint)
    first, last = (
        InteractionGraph.load(tmp_path / "first" / "lib" / "snapshots" / f"step-{step:08d}.safetensors")
        for step in (6, 24)
    )
    widest = max(basis.n_features for basis in list(first.bases.values())[1:])
    assert callback.budget.extent._outputs == widest
    assert [graph.info["settings"]["n_probes"] for graph in (first, last)] == [None, 16]
    assert last.info["budget"] == {"max_overhead": 0.5, "part_of_samples": 1.0, "n_probes": 16}
    assert f"computed on all 200 samples, with n_probes=16 in place of all {widest} outputs of a layer" in said.text

    def resumed(**options: Any) -> int | None:
        again = Timed(200)
        other = timed(again, 40.0, 38.0, **options)
        trainer_of(tmp_path / "second", other, max_epochs=5).fit(again, ckpt_path=checkpoint, weights_only=True)
        assert other.graph is not None
        return other.graph.info["settings"]["n_probes"]

    said.clear()
    assert resumed(**CHEAPER) == 16
    assert "From here on" not in said.text
    assert resumed(max_overhead=math.inf) is None, "who asks for something else gets it"
    assert resumed(max_overhead=0.5, n_probes=3) == 3


@pytest.mark.parametrize(
    ("cost", "computing", "options"),
    [
        (10.0, 9.0, {}),  # 20 s for each: spacing will do
        (40.0, 15.0, {}),  # figures cost more than what is drawn
        (40.0, 38.0, {"at_steps": list(range(0, 25, 6))}),  # how many will be left out in the end is not known
        (40.0, 38.0, {"max_overhead": math.inf}),
    ],
)
def test_otherwise_all_samples_are_taken(
    cost: float, computing: float, options: dict[str, Any], tmp_path: Path
) -> None:
    model = Timed(1000)
    callback = timed(model, cost, computing, **{**CHEAPER, **options})
    trainer_of(tmp_path, callback, max_epochs=4).fit(model)
    assert callback.budget.extent.chosen == {}
    assert callback.graph is not None
    assert callback.graph.info["n_samples"] == 1000


def test_edges_required_have_their_room_at_the_end(tmp_path: Path) -> None:
    model = Timed()
    plan = AblationPlan("accuracy", every_n_snapshots=3)
    callback = timed(model, 0.5, ablation=plan, max_overhead=0.125)
    take = callback.watcher.take

    def dearer(*args: Any) -> Snapshot:
        model.now += 2.5 * callback.watcher.ablates(last=args[4])
        return take(*args)

    callback.watcher.take = dearer  # type: ignore[method-assign]
    trainer_of(tmp_path, callback, max_epochs=18).fit(model)
    # 3 s for the first one; for a cheaper one, as long as none is known, and the last one 6 s more. Then 0.5 s for two
    # of three and 3 s for the third, with 3 s left for the last one each time.
    assert steps_of(tmp_path) == [6, 72, 78, 84, 90, 96, 108]
    assert callback.watcher.ablated_step == STEPS_PER_EPOCH * 18
    assert callback.budget.put_off == 10 + 1
    assert callback.budget.overhead.share <= 0.125


def test_snapshots_left_out_make_the_distance_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    follow = SnapshotTracker.follow

    def note(self: SnapshotTracker, graphs: Any, numbers: Any, distance: float = 1.0) -> Any:
        seen.append(distance)
        return follow(self, graphs, numbers, distance)

    monkeypatch.setattr(SnapshotTracker, "follow", note)
    model = Timed()
    trainer_of(tmp_path, timed(model, 0.5, follow=True), max_epochs=13).fit(model)
    # 0.5 s, 0.5 s for the second one and twice as much for a last one with figures over time: 67 s of training.
    assert steps_of(tmp_path) == [6, 72, 78]
    assert seen == [1, 11, 1]


def test_a_share_is_above_nothing() -> None:
    for share in (0, -0.1, math.nan):
        with pytest.raises(ValueError, match=f"max_overhead is a share of the training time above 0.* got {share}"):
            LIBCallback(NODE_LAYERS, max_overhead=share)
