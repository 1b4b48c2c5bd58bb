"""The overhead stays below its limit: the arithmetic with a fake clock, and real trainers with fake seconds."""

from __future__ import annotations

import csv
import gc
import itertools
import logging
import math
import re
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lib_lightning import InteractionGraph, LIBCallback
from lib_lightning.ablation import AblationPlan
from lib_lightning.algorithm.effort import EffortPlan
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
from lib_lightning.training.effort import RunPlan, _warning
from lib_lightning.training.snapshot import Snapshot
from lib_lightning.training.trainer import synchronize
from lib_lightning.training.writer import steps_to_keep
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
    """A callback whose snapshots take a fixed number of seconds, by default at every validation."""
    if not {"every_n_steps", "at_steps", "every_n_validations", "planned"} & options.keys():
        options["every_n_validations"] = 1
    options.pop("planned", None)
    callback = LIBCallback(**{"node_layers": NODE_LAYERS, "follow": False, "causal_every": 0, **options})
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
    assert "A snapshot takes 0.5 s, so one is allowed every 16.7 s of training; so far it is 0.5 s beside 12 s." in text
    said = (
        "6 snapshots and all that belongs to them took 3 s, beside 120 s of training (2.50%); 14 were skipped to stay "
    )
    assert text.count(f"{said}below max_overhead=0.03") == 1


def test_first_and_last_snapshot_are_always_taken(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    model = Timed()
    callback = timed(model, 1000, max_overhead=0.03)
    trainer_of(tmp_path, callback, max_epochs=3).fit(model)
    assert steps_of(tmp_path) == [6, 18]
    assert InteractionGraph.load(tmp_path / "lib" / "final.safetensors").info["step"] == 18
    assert "1 was skipped" in messages.text, "the one of the last validation is taken as the last one of the run"


@pytest.mark.parametrize("model", [Timed(), TimedAndFailing()], ids=["computed", "failed"])
def test_by_default_there_are_at_least_five_snapshots(
    model: Timed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("lib_lightning.training.effort.FEWEST", 20)  # as in a longer training
    monkeypatch.setattr("lib_lightning.training.callback.FEWEST", 20)
    callback = timed(model, 1000, planned=True)
    trainer_of(tmp_path, callback, max_epochs=16).fit(model)
    assert callback.meter.spent.attempts == 5
    if not isinstance(model, TimedAndFailing):
        assert steps_of(tmp_path) == [0, 4, 11, 32, 96], "evenly among the 20 that were planned"
    assert "s of training (but 5 at least in the whole training);" in messages.text


def test_planned_snapshots_are_thinned_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of them are early, when there has been little training that they could be a share of."""
    monkeypatch.setattr("lib_lightning.training.callback.FEWEST", 20)
    monkeypatch.setattr("lib_lightning.training.effort.FEWEST", 20)
    for cost, expected in ((0.15, 18), (0.3, 8)):
        model = Timed()
        callback = timed(model, cost, planned=True, max_overhead=0.03)
        trainer_of(tmp_path / str(cost), callback, max_epochs=20).fit(model)
        steps, planned = steps_of(tmp_path / str(cost)), callback.state.cursor.planned
        assert len(planned) == 20
        assert len(steps) >= expected
        assert callback.meter.ratio <= 0.03 + cost / 120
        taken = [planned.index(step) for step in steps]
        assert taken[0] == 0
        assert taken[-1] == 19
        assert max(b - a for a, b in itertools.pairwise(taken)) <= 4


SCHEDULES: dict[str, tuple[dict[str, Any], list[int]]] = {
    "steps": ({"every_n_steps": 4}, [0, 4, 8, 12]),
    "list": ({"at_steps": [1, 2, 3]}, [1, 2, 3, 12]),
    "validations": ({"every_n_validations": 1}, [6, 12]),
    "limited": ({"every_n_steps": 1, "max_overhead": 10.0}, [0, 9, 12]),
    "unlimited": ({"max_overhead": math.inf, "planned": True}, [*range(13)]),
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
    assert "and all that belongs to them took" in messages.text, "logged in any case"


def test_short_runs_skip_nothing(tmp_path: Path) -> None:
    model = Timed()
    trainer_of(tmp_path, timed(model, 0.125, max_overhead=0.03), max_epochs=4).fit(model)
    assert steps_of(tmp_path) == [6, 12, 18, 24]


def test_failed_snapshots_count_as_overhead(tmp_path: Path) -> None:
    model = TimedAndFailing()
    callback = timed(model, 0.5, max_overhead=0.03)
    compute, failed = callback.computer.compute, []

    def noted(*args: Any, **kwargs: Any) -> Snapshot:
        failed.append(model.global_step)
        return compute(*args, **kwargs)

    callback.computer.compute = noted  # type: ignore[method-assign]
    trainer_of(tmp_path, callback, max_epochs=10).fit(model)
    assert callback.meter.spent.failures == len(failed)
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


def test_the_overhead_of_other_callbacks_is_no_training(clock: Clock) -> None:
    meters = [TimeMeter(0.1, clock) for _ in range(3)]
    for meter in meters:
        with meter.timed():
            clock.spend(1)  # before others begin
            meter.begin([other for other in meters if other is not meter])
    for _ in range(4):
        clock.spend(10)
        for i, meter in enumerate(meters):
            with meter.timed():
                clock.spend(1 + i)
                with meter.excluded():
                    clock.spend(0.5)
                assert all(other.ratio < 1 for other in meters[:i])  # asked for in between
    clock.spend(2)
    # What is excluded in one meter, such as waiting for kernels, is training in all.
    assert [meter.ratio for meter in meters] == [pytest.approx((1 + 4 * (1 + i)) / (4 * 11.5 + 2)) for i in range(3)]


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


def test_the_summary_counts_failures_and_has_plurals(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    model = TimedAndFailing()
    trainer_of(tmp_path, timed(model, 0.5, at_steps=[0, 2, 4])).fit(model)
    assert messages.text.count("failed and is skipped") == 1
    # At the steps given, at the first validation, and at the end.
    said = "0 snapshots and all that belongs to them took 2.5 s, beside 12 s of training (20.83%); 5 failed"
    assert said in messages.text


def test_the_plan_is_logged_and_stored(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    model = Timed()
    callback = timed(model, 0.1, planned=True)
    trainer = trainer_of(tmp_path, callback)
    trainer.fit(model)
    (line,) = {r.getMessage() for r in messages.records if "log-spaced" in r.getMessage()}
    assert line.startswith(
        "lib: 5 snapshots (from step 0 to step 12, log-spaced), each with 24 samples, the exact metric,"
    )
    assert " s each and " in line
    assert " s in total" in line
    plan = callback.state.plan
    assert plan is not None
    assert steps_of(tmp_path) == callback.state.cursor.planned
    for step in steps_of(tmp_path):
        graph = InteractionGraph.load(tmp_path / "lib" / "snapshots" / f"step-{step:08d}.safetensors")
        assert graph.info["effort"] == plan.of_snapshot()
        assert graph.info["n_samples"] == 24
    assert callback.state_dict()["plan"] == plan.plain()


def test_long_snapshots_are_announced_with_the_setting() -> None:
    effort = EffortPlan(64, 512, None, 1e13, 1e10)
    long, short = RunPlan(effort, 4, 500.0, 2.0), RunPlan(effort, 4, 59.0, 2.0)
    given = {"n_probes": 512, "effort": "auto"}
    expected = "each snapshot will take about 8.3 min, because of n_probes=512. Without: about 5 s."
    assert _warning(long, given, 5.0) == expected
    assert "Fewer node_layers, or num_samples=16, would shorten it." in _warning(long, given, 490.0)
    assert not _warning(short, given, 5.0)


@pytest.mark.parametrize("keep", [2, "log_spaced", "all"])
def test_snapshots_are_kept_as_asked(keep: Any, tmp_path: Path) -> None:
    model = Timed()
    callback = timed(model, 0.1, every_n_steps=1, keep_snapshots=keep)
    trainer_of(tmp_path, callback, max_epochs=2).fit(model)
    log_spaced = sorted(steps_to_keep(range(13), "log_spaced"))
    assert len(log_spaced) < 13
    assert steps_of(tmp_path) == {2: [11, 12], "log_spaced": log_spaced, "all": [*range(13)]}[keep]
    assert len(list((tmp_path / "lib" / "figures").iterdir())) == len(steps_of(tmp_path))
    with pytest.raises(ValueError, match="keep_snapshots is 'all', 'log_spaced', or a number"):
        LIBCallback(NODE_LAYERS, keep_snapshots=0)


def test_a_folder_that_cannot_be_written_to_is_named_once_at_the_start(
    tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "lib").write_text("in the way")
    model = Timed()
    trainer_of(tmp_path, timed(model, 0.1, at_steps=[0, 1, 2])).fit(model)
    said = [r.getMessage() for r in messages.records if "snapshots cannot be written to" in r.getMessage()]
    assert len(set(said)) == 1
    assert str(tmp_path / "lib") in said[0]
    assert "5 failed" in messages.text


class OneNumber(Timed):
    """A regression on more inputs than samples."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 40), torch.nn.ReLU(), torch.nn.Linear(40, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])


def test_an_output_of_one_number_is_said_once(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    model = OneNumber()
    callback = timed(model, 0.1, at_steps=[0, 1], node_layers=["net.0:input", "net.2:input", "output"])
    trainer_of(tmp_path, callback).fit(model)
    said = {r.getMessage() for r in messages.records if "'output' is one number" in r.getMessage()}
    assert len(said) == 1


def test_fewer_samples_than_directions_are_said_once(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    model = OneNumber()
    layers = ["net.0:input", "net.1:input", "output"]
    callback = timed(model, 0.1, at_steps=[0, 1], node_layers=layers, num_samples=10)
    trainer_of(tmp_path, callback).fit(model)
    said = {r.getMessage() for r in messages.records if "would show more" in r.getMessage()}
    assert said == {
        "lib: 'net.1:input' has 40 directions, of which 10 samples can show 9 at most. More samples would show more."
    }


def test_more_samples_than_there_are_are_said_once(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    for num_samples, expected in ((500, 1), (24, 0), (None, 0)):
        messages.clear()
        model = Timed()
        callback = timed(model, 0.1, at_steps=[0, 1], num_samples=num_samples)
        trainer_of(tmp_path / str(num_samples), callback).fit(model)
        said = {r.getMessage() for r in messages.records if "is more than there are" in r.getMessage()}
        assert len(said) == expected
        assert said <= {"lib: num_samples=500 is more than there are: snapshots use all 24."}


@pytest.mark.parametrize("limits", [{"max_epochs": -1, "max_steps": -1}, {"max_epochs": 1}])
def test_a_stop_that_comes_after_this_callback_is_no_change_of_weights(
    limits: dict[str, Any], tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
            trainer.should_stop = trainer.should_stop or trainer.global_step == 4

    model = Timed()
    trainer_of(tmp_path, timed(model, 0.1, planned=True), Stops(), **limits).fit(model)
    assert max(steps_of(tmp_path)) == 4
    assert InteractionGraph.load(tmp_path / "lib" / "final.safetensors").info["weights"] == "trained"
    assert "put in place" not in messages.text
    if limits["max_epochs"] == -1:
        text = "snapshots before training and at every validation, within 3% of the training time, each with 24 samples"
        assert text in messages.text


def test_a_test_without_snapshots_says_so_once(tmp_path: Path, messages: pytest.LogCaptureFixture) -> None:
    class Tested(Timed):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

        def test_dataloader(self) -> DataLoader[Any]:
            return self.val_dataloader()

    trainer = trainer_of(tmp_path, LIBCallback(NODE_LAYERS))
    for _ in range(2):
        trainer.test(Tested(), verbose=False)
    said = [r for r in messages.records if "a test computes no snapshots" in r.getMessage()]
    assert len({id(r) for r in said}) <= 2
    assert said


def test_a_disk_that_is_full_is_said_with_its_path_and_leaves_no_half_files(
    tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    resource = pytest.importorskip("resource")
    model, before = Timed(), resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = trainer_of(tmp_path, timed(model, 0.1, at_steps=[0, 1, 2]))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # Writes end in the middle of a file, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        trainer.fit(model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    (said,) = {r.getMessage() for r in messages.records if "failed and is skipped" in r.getMessage()}
    assert str(tmp_path / "lib") in said
    assert "File too large" in said
    assert messages.text.count("cannot be written to") == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert trainer.global_step > 2, "training goes on"


@pytest.mark.parametrize(("free", "warns"), [(3000, True), (10**9, False)])
def test_files_that_will_not_fit_on_the_disk_are_said_beforehand(
    free: int, warns: bool, tmp_path: Path, messages: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free))
    model = Timed()
    trainer_of(tmp_path, timed(model, 0.1, at_steps=[0, 1, 2])).fit(model)
    said = [r.getMessage() for r in messages.records if "keeps as many" in r.getMessage()]
    assert len(said) == warns
    if warns:
        assert str(tmp_path / "lib") in said[0]
        assert re.search(r"keep_snapshots=\d+ keeps as many as there is room for", said[0])
