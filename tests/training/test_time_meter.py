"""What own work may cost: the arithmetic, by a clock that stands still unless it is told otherwise."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from lib_lightning.training.sample_buffer import take_fraction
from lib_lightning.training.time_meter import TimeMeter, no_garbage_collection
from lib_lightning.training.trainer import synchronize


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
    monkeypatch.setattr("lib_lightning.training.time_meter.GRACE", 1.0)
    return Clock()


def take(overhead: TimeMeter, clock: Clock, seconds: float, kind: str = "plain") -> None:
    with overhead.snapshot(kind):
        clock.spend(seconds)


def test_all_time_is_own_work_or_training(clock: Clock) -> None:
    overhead = TimeMeter(0.1, clock)
    clock.spend(7)  # before training
    with overhead.own():
        clock.spend(2)
    assert (overhead.cost, overhead.training) == (2, 0)
    assert math.isnan(overhead.share)
    with overhead.own():
        overhead.begin()
        clock.spend(1)
        with overhead.own():
            clock.spend(1)
        with overhead.waiting():
            clock.spend(4)
        clock.spend(1)
    clock.spend(16)
    assert overhead.share == 5 / 20
    overhead.end()
    clock.spend(50)
    assert (overhead.cost, overhead.training, overhead.share) == (5, 20, 0.25)
    overhead.reset()
    assert (overhead.cost, overhead.training, overhead.newest) == (0, 0, {})


def test_work_that_fails_has_cost_its_time(clock: Clock) -> None:
    overhead = TimeMeter(0.1, clock)
    overhead.begin()

    def fail() -> None:
        with overhead.snapshot("plain"):
            clock.spend(3)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    clock.spend(10)
    assert (overhead.share, overhead.expected("plain")) == (0.3, 3)


@pytest.mark.parametrize("limit", [0.015625, 0.125, 2.0])  # sums without rounding
@pytest.mark.parametrize("cost", [0.25, 5.0, 40.0])
def test_the_share_is_kept_and_there_is_room_for_the_last_one(limit: float, cost: float, clock: Clock) -> None:
    overhead, taken = TimeMeter(limit, clock), []
    overhead.begin()
    for second in range(20_000):
        if overhead.affordable("plain"):
            taken.append(second)
            take(overhead, clock, cost)
            if len(taken) > 1:
                assert overhead.cost + cost <= max(1.0, limit * overhead.training)
        clock.spend(1)
    # Not fewer than there is time for: but for two, the share is used up, or one is taken whenever it is asked for.
    assert len(taken) == 20_000 or len(taken) + 3 > limit * 20_000 / cost
    assert taken[0] == 0


def test_a_run_so_short_takes_all(clock: Clock) -> None:
    overhead = TimeMeter(0.03, clock)
    overhead.begin()
    for _ in range(7):  # and an eighth one at the end
        assert overhead.affordable("plain")
        take(overhead, clock, 0.125)
        clock.spend(0.25)
    assert not overhead.affordable("plain")


def test_without_a_limit_all_is_affordable(clock: Clock) -> None:
    overhead = TimeMeter(math.inf, clock)
    overhead.begin()
    take(overhead, clock, 1e6)
    assert overhead.affordable("plain")


def test_the_first_one_says_what_others_cost_until_there_are_others(clock: Clock) -> None:
    overhead = TimeMeter(0.1, clock)
    overhead.begin()
    take(overhead, clock, 10)
    assert (overhead.expected("plain"), overhead.expected("other")) == (10, 10)
    clock.spend(299)
    assert not overhead.affordable("plain")
    clock.spend(1)
    assert overhead.affordable("plain")
    take(overhead, clock, 1)
    assert overhead.expected("plain") == 1
    assert overhead.affordable("plain")
    overhead.expect(0.25)
    assert overhead.expected("plain") == 0.25


@pytest.mark.parametrize(("training", "kind", "affordable"), [
    (410, "plain", False), (420, "plain", True), (600, "ablation", False), (610, "ablation", True),
])  # fmt: skip
def test_a_dear_last_one_has_its_room(training: int, kind: str, affordable: bool, clock: Clock) -> None:
    overhead = TimeMeter(0.1, clock)
    overhead.begin()
    take(overhead, clock, 20, "ablation")
    take(overhead, clock, 1)
    clock.spend(training)
    # 21 spent, 1 or 20 to spend now, and 20 at the end.
    assert overhead.affordable(kind) is affordable


def test_a_resumed_run_goes_on_with_its_share(clock: Clock) -> None:
    first, second = TimeMeter(0.1, clock), TimeMeter(0.1, clock)
    first.begin()
    take(first, clock, 10)
    clock.spend(250)
    state = first.state_dict()
    clock.spend(10_000)  # nobody trains
    second.load_state_dict(state)
    clock.spend(100)  # not yet
    with second.own():
        second.begin()
    assert (second.cost, second.training) == (10, 250)
    assert not second.affordable("plain")
    clock.spend(50)
    assert second.affordable("plain")


@pytest.mark.parametrize(("part", "expected"), [(1.0, [4, 4, 2]), (0.5, [4, 1]), (0.4, [4]), (0.01, [1])])
def test_the_first_samples_stay_the_same_ones(part: float, expected: list[int]) -> None:
    batches = [(x, x + 0.5) for x in torch.arange(10.0).split(4)]
    taken = take_fraction(batches, part)
    assert [len(x) for x, _ in taken] == expected
    assert torch.cat([x for x, _ in taken]).tolist() == list(range(sum(expected)))
    assert all(torch.equal(y, x + 0.5) for x, y in taken)
    assert take_fraction([], part) == []


@pytest.mark.parametrize(("device", "calls"), [("cuda:1", ["cuda:1"]), ("cpu", [])])
def test_what_training_has_begun_on_a_device_is_waited_for(
    device: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    record: Callable[[torch.device], None] = lambda d: seen.append(str(d))  # noqa: E731
    monkeypatch.setattr("torch.cuda.synchronize", record)
    synchronize(SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device))))  # type: ignore[arg-type]
    assert seen == calls


@pytest.mark.parametrize("was_on", [True, False])
def test_no_garbage_collection_and_afterwards_as_before(was_on: bool) -> None:
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
