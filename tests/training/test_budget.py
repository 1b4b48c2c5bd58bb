"""The overhead stays below its limit: the arithmetic with a fake clock, and real trainers with fake seconds."""

from __future__ import annotations

import csv
import gc
import logging
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lib_lightning import InteractionGraph, LIBCallback
from lib_lightning.ablation import AblationPlan
from lib_lightning.distributed.process_group import SINGLE_PROCESS
from lib_lightning.lineage.snapshot_tracker import SnapshotTracker
from lib_lightning.training.budget import (
    SkippedSnapshots,
    SnapshotKind,
    SnapshotTrigger,
    TimeMeter,
    TimeSpent,
    no_garbage_collection,
)
from lib_lightning.training.snapshot import Snapshot
from lib_lightning.training.trainer import synchronize
from tests.tiny_training import NODE_LAYERS, STEPS_PER_EPOCH, Classifier, Failing, trainer_of
from tests.training.test_callback import run


class Timed(Classifier):
    """A model whose training step takes one second."""

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


def timed(model: Timed, cost: float, **options: Any) -> LIBCallback:
    """A callback whose snapshots take a fixed number of seconds."""
    callback = LIBCallback(**{"node_layers": NODE_LAYERS, "follow": False, **options})
    compute = callback.computer.compute

    def slow_compute(*args: Any, **kwargs: Any) -> Snapshot:
        model.now += cost
        return compute(*args, **kwargs)

    callback.computer.compute = slow_compute  # type: ignore[method-assign]
    callback.clock = lambda: model.now
    return callback


def steps_of(folder: Path) -> list[int]:
    return sorted(int(p.stem.removeprefix("step-")) for p in (folder / "lib" / "snapshots").iterdir())


@pytest.fixture(autouse=True)
def messages(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The limit applies, also to short runs; Lightning's log lines are captured."""
    monkeypatch.setattr("lib_lightning.training.budget.GRACE", 1.0)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    caplog.set_level("INFO")
    return caplog


def test_snapshots_are_skipped_to_stay_below_the_limit(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    model, logger = Timed(), CSVLogger(tmp_path, "csv")
    callback = timed(model, 0.5, max_overhead=0.03)
    trainer_of(tmp_path, callback, max_epochs=20, logger=logger, log_every_n_steps=1).fit(model)
    # The k-th one is taken at the first validation after 0.5 (k + 1) / 0.03 seconds.
    assert steps_of(Path(logger.log_dir)) == [6, 54, 72, 84, 102, 120]
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["lib/overhead"]]
    shares = {int(row["step"]) + 1: float(row["lib/overhead"]) for row in rows}
    assert list(shares) == list(range(6, 121, 6)), "at every validation"
    expected = {step: 0.5 * sum(due <= step for due in (6, 54, 72, 84, 102, 120)) / step for step in shares}
    assert shares == pytest.approx(expected)
    assert all(share <= 0.03 for step, share in shares.items() if step >= 54)
    text = messages.text
    assert text.count("is skipped") == 1
    assert "the snapshot due at step 12 is skipped, as are later ones that would exceed max_overhead=0.03." in text
    assert "A snapshot takes 0.5 s, so one is allowed every 16.7 s of training; 0.5 s of 12 s have been spent" in text
    assert text.count("overhead 2.50% of the training time (3 s of 120 s, max_overhead=0.03)") == 1
    assert text.count("snapshots skipped: 14") == 1


def test_first_and_last_snapshot_are_always_taken(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    model = Timed()
    callback = timed(model, 1000, max_overhead=0.03)
    trainer_of(tmp_path, callback, max_epochs=3).fit(model)
    assert steps_of(tmp_path) == [6, 18]
    assert InteractionGraph.load(tmp_path / "lib" / "final.safetensors").info["step"] == 18
    assert "snapshots skipped: 1" in messages.text, "the one of the last validation is taken as the last one of the run"


@pytest.mark.parametrize("model", [Timed(), TimedAndFailing()], ids=["computed", "failed"])
def test_by_default_there_are_at_least_five_snapshots(
    model: Timed, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    callback = timed(model, 1000)
    trainer_of(tmp_path, callback, max_epochs=16).fit(model)
    assert callback.meter.spent.attempts == 5
    if not isinstance(model, TimedAndFailing):
        assert steps_of(tmp_path) == [6, 24, 48, 72, 96]
    assert "s of training (but 5 at least in the whole training);" in messages.text


SCHEDULES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "steps": ({"every_n_steps": 4}, [0, 4, 8, 12]),
    "list": ({"at_steps": [1, 2, 3]}, [1, 2, 3, 12]),
    "validations": ({"every_n_validations": 1}, [6, 12]),
    "limited": ({"every_n_steps": 1, "max_overhead": 10.0}, [0, 9, 12]),
    "unlimited": ({"max_overhead": math.inf}, [6, 12]),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_explicit_schedules_are_kept_unless_limited(
    schedule: str, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    options, steps = SCHEDULES[schedule]
    model = Timed()
    trainer_of(tmp_path, timed(model, 30.0, **options)).fit(model)
    assert steps_of(tmp_path) == steps
    assert ("is skipped" in messages.text) == (schedule == "limited")
    assert "of the training time" in messages.text, "logged in any case"


def test_short_runs_skip_nothing(tmp_path: Path) -> None:
    model = Timed()
    trainer_of(tmp_path, timed(model, 0.125), max_epochs=4).fit(model)
    assert steps_of(tmp_path) == [6, 12, 18, 24]


def test_failed_snapshots_count_as_overhead(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    model = TimedAndFailing()
    trainer_of(tmp_path, timed(model, 0.5, max_overhead=0.03), max_epochs=10).fit(model)
    failed = [record.args[1] for record in messages.records if "failed and is skipped" in record.msg and record.args]  # type: ignore[index]
    assert failed == [6, 54, 60], "not at every validation"


def test_training_is_unchanged_if_snapshots_are_skipped(tmp_path: Path) -> None:
    without = run(Timed(1000), tmp_path, max_epochs=3)
    model = Timed(1000)
    callback = timed(model, 4.0, every_n_steps=1, max_overhead=0.5)
    with_it = run(model, tmp_path, callback, max_epochs=3)
    assert with_it == without
    assert callback.trigger.skipped.total


def test_all_snapshots_of_a_run_are_computed_alike(tmp_path: Path) -> None:
    """However little time there is: the same samples and the same settings from the first to the last."""
    model = Timed(1000)
    callback = timed(model, 15.0, max_overhead=0.5)
    trainer_of(tmp_path, callback, max_epochs=32).fit(model)
    files = (tmp_path / "lib" / "snapshots").iterdir()
    graphs = [InteractionGraph.load(file) for file in files]
    assert len(graphs) >= 3
    assert callback.trigger.skipped.total
    assert {graph.info["n_samples"] for graph in graphs} == {1000}
    assert all(graph.info["settings"] == graphs[0].info["settings"] for graph in graphs)
    assert graphs[0].info["settings"]["n_probes"] is None


def test_a_resumed_run_continues_with_the_time_spent(tmp_path: Path) -> None:
    def fit(name: str, epochs: int, ckpt: Path | None = None) -> tuple[LIBCallback, Path]:
        model = Timed()
        model.now = 1e6 * epochs  # the clock of another process
        callback = timed(model, 0.5, max_overhead=0.03)
        trainer = trainer_of(tmp_path / name, callback, max_epochs=epochs)
        trainer.fit(model, ckpt_path=ckpt, weights_only=True if ckpt else None)
        trainer.save_checkpoint(tmp_path / name / "model.ckpt")
        return callback, tmp_path / name / "model.ckpt"

    first, checkpoint = fit("first", 8)
    assert first.trigger.skipped.total == 6
    second, _ = fit("second", 12, checkpoint)
    assert steps_of(tmp_path / "first") == [6, 48], "the last one of the first part costs its time"
    # 1 s spent; a third and a last one make 2 s, which 3% are after 67 s.
    assert steps_of(tmp_path / "second") == [72]
    assert second.trigger.skipped.total == 6 + 3
    assert second.meter.ratio == pytest.approx(1.5 / 72)


def test_time_for_edges_required_at_the_end_is_reserved(tmp_path: Path) -> None:
    model = Timed()
    plan = AblationPlan("accuracy", every_n_snapshots=3)
    callback = timed(model, 0.5, ablation=plan, max_overhead=0.125)
    compute = callback.computer.compute

    def dearer(*args: Any) -> Snapshot:
        model.now += 2.5 * args[4]  # whether edges required are counted
        return compute(*args)

    callback.computer.compute = dearer  # type: ignore[method-assign]
    trainer_of(tmp_path, callback, max_epochs=18).fit(model)
    # 3 s for the first one; for a cheaper one, as long as none is known, and the last one 6 s more. Then 0.5 s for two
    # of three and 3 s for the third, with 3 s left for the last one each time.
    assert steps_of(tmp_path) == [6, 72, 78, 84, 90, 96, 108]
    assert callback.state.ablation_step == STEPS_PER_EPOCH * 18
    assert callback.trigger.skipped.total == 10 + 1
    assert callback.meter.ratio <= 0.125


def test_skipped_snapshots_lengthen_the_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    follow = SnapshotTracker.follow

    def note(self: SnapshotTracker, graphs: Any, numbers: Any, distance: float = 1.0) -> Any:
        seen.append(distance)
        return follow(self, graphs, numbers, distance)

    monkeypatch.setattr(SnapshotTracker, "follow", note)
    model = Timed()
    trainer_of(tmp_path, timed(model, 0.5, follow=True, max_overhead=0.03), max_epochs=13).fit(model)
    # 0.5 s, 0.5 s for the second one and twice as much for a last one with figures over time: 67 s of training.
    assert steps_of(tmp_path) == [6, 72, 78]
    assert seen == [1, 11, 1]


def test_max_overhead_is_positive() -> None:
    for share in (0, -0.1, math.nan):
        with pytest.raises(ValueError, match=f"max_overhead is a share of the training time above 0.* got {share}"):
            LIBCallback(NODE_LAYERS, max_overhead=share)


class Clock:
    """Seconds pass when they are spent."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr("lib_lightning.training.budget.GRACE", 1.0)
    return Clock()


def spend(meter: TimeMeter, clock: Clock, seconds: float, kind: str = "plain") -> None:
    with meter.snapshot(kind):
        clock.spend(seconds)


def test_all_time_is_overhead_or_training(clock: Clock) -> None:
    meter = TimeMeter(0.1, clock)
    clock.spend(7)  # before training
    with meter.timed():
        clock.spend(2)
    assert (meter.spent.overhead, meter.spent.training) == (2, 0)
    assert math.isnan(meter.ratio)
    with meter.timed():
        meter.begin()
        clock.spend(1)
        with meter.timed():
            clock.spend(1)
        with meter.excluded():
            clock.spend(4)
        clock.spend(1)
    clock.spend(16)
    assert meter.ratio == 5 / 20
    meter.end()
    clock.spend(50)
    assert (meter.spent.overhead, meter.spent.training, meter.ratio) == (5, 20, 0.25)


def test_failed_snapshots_cost_their_time(clock: Clock) -> None:
    meter = TimeMeter(0.1, clock)
    meter.begin()

    def fail() -> None:
        with meter.snapshot("plain"):
            clock.spend(3)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    clock.spend(10)
    assert (meter.ratio, meter.expected_cost("plain")) == (0.3, 3)


@pytest.mark.parametrize("limit", [0.015625, 0.125, 2.0])  # sums without rounding
@pytest.mark.parametrize("cost", [0.25, 5.0, 40.0])
def test_the_limit_holds_with_time_reserved_for_the_last_snapshot(limit: float, cost: float, clock: Clock) -> None:
    meter, seconds = TimeMeter(limit, clock), []
    meter.begin()
    for second in range(20_000):
        if meter.can_afford("plain"):
            seconds.append(second)
            spend(meter, clock, cost)
            if len(seconds) > 1:
                assert meter.spent.overhead + cost <= max(1.0, limit * meter.spent.training)
        clock.spend(1)
    # No fewer snapshots than there is time for, up to the two that are reserved.
    assert len(seconds) == 20_000 or len(seconds) + 3 > limit * 20_000 / cost
    assert seconds[0] == 0


def test_very_short_runs_can_afford_everything(clock: Clock) -> None:
    meter = TimeMeter(0.03, clock)
    meter.begin()
    for _ in range(7):  # and an eighth one at the end
        assert meter.can_afford("plain")
        spend(meter, clock, 0.125)
        clock.spend(0.25)
    assert not meter.can_afford("plain")


def test_without_a_limit_everything_is_affordable(clock: Clock) -> None:
    meter = TimeMeter(math.inf, clock)
    meter.begin()
    spend(meter, clock, 1e6)
    assert meter.can_afford("plain")


def test_a_snapshot_that_is_due_twice_at_a_step_is_skipped_once(clock: Clock) -> None:
    meter, skipped = TimeMeter(0.1, clock), SkippedSnapshots()
    trigger = SnapshotTrigger(meter, skipped, "lib", draws_over_time=False)
    meter.begin()
    spend(meter, clock, 10)
    for step in (3, 3, 4):
        clock.spend(1)
        assert not trigger.can_take(step, SnapshotKind(), SINGLE_PROCESS)
    assert (skipped.total, skipped.since_last) == (2, 2)


def test_the_first_snapshot_is_the_estimate_for_kinds_without_one(clock: Clock) -> None:
    meter = TimeMeter(0.1, clock)
    meter.begin()
    spend(meter, clock, 10)
    assert (meter.expected_cost("plain"), meter.expected_cost("other")) == (10, 10)
    clock.spend(299)
    assert not meter.can_afford("plain")
    clock.spend(1)
    assert meter.can_afford("plain")
    spend(meter, clock, 1)
    assert meter.expected_cost("plain") == 1
    assert meter.can_afford("plain")


@pytest.mark.parametrize(("training", "kind", "affordable"), [
    (410, "plain", False), (420, "plain", True), (600, "ablation", False), (610, "ablation", True),
])  # fmt: skip
def test_time_for_an_expensive_last_snapshot_is_reserved(
    training: int, kind: str, affordable: bool, clock: Clock
) -> None:
    meter = TimeMeter(0.1, clock)
    meter.begin()
    spend(meter, clock, 20, "ablation")
    spend(meter, clock, 1)
    clock.spend(training)
    # 21 spent, 1 or 20 to spend now, and 20 at the end.
    assert meter.can_afford(kind) is affordable


def test_a_resumed_meter_continues_from_the_time_spent(clock: Clock) -> None:
    first = TimeMeter(0.1, clock)
    first.begin()
    spend(first, clock, 10)
    clock.spend(250)
    first.end()
    spent = TimeSpent(**asdict(first.spent))
    clock.spend(10_000)  # between the two processes
    second = TimeMeter(0.1, clock, spent)
    clock.spend(100)  # before training
    with second.timed():
        second.begin()
    assert (spent.overhead, spent.training) == (10, 250)
    assert not second.can_afford("plain")
    clock.spend(50)
    assert second.can_afford("plain")


@pytest.mark.parametrize(("device", "calls"), [("cuda:1", ["cuda:1"]), ("cpu", [])])
def test_queued_kernels_of_training_are_waited_for(
    device: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    record: Callable[[torch.device], None] = lambda d: seen.append(str(d))  # noqa: E731
    monkeypatch.setattr("torch.cuda.synchronize", record)
    synchronize(SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device))))  # type: ignore[arg-type]
    assert seen == calls


@pytest.mark.parametrize("was_on", [True, False])
def test_garbage_collection_is_off_and_then_as_before(was_on: bool) -> None:
    def fail() -> None:
        with no_garbage_collection():
            assert not gc.isenabled()
            raise ValueError("bad")

    try:
        (gc.enable if was_on else gc.disable)()
        with pytest.raises(ValueError, match="bad"):
            fail()
        assert gc.isenabled() == was_on
    finally:
        gc.enable()
