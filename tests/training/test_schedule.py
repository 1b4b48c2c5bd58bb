"""When snapshots are due, and which samples they are computed on."""

from __future__ import annotations

import itertools

import pytest
import torch

from lib_lightning.training.sample_buffer import SampleBuffer
from lib_lightning.training.schedule import Schedule


def due_steps(schedule: Schedule, seen: range) -> list[int]:
    return [step for step in seen if schedule.due_at_step(step)]


@pytest.mark.parametrize(
    ("schedule", "seen", "expected"),
    [
        (Schedule(every_n_steps=10), range(31), [0, 10, 20, 30]),
        (Schedule(every_n_steps=10), range(3, 40, 7), [3, 10, 24, 31]),  # steps passed over are caught up with
        (Schedule(at_steps=[5, 2, 2]), range(10), [2, 5]),
        (Schedule(per_decade=1), range(101), [0, 1, 10, 100]),
        (Schedule(per_decade=3), range(101), [0, 1, 2, 5, 10, 22, 46, 100]),
        (Schedule(per_decade=100), range(6), [0, 1, 2, 3, 4, 5]),
        (Schedule(), range(10), []),
    ],
)
def test_due_steps(schedule: Schedule, seen: range, expected: list[int]) -> None:
    assert due_steps(schedule, seen) == expected


def test_due_validations() -> None:
    schedule = Schedule(every_n_validations=3)
    assert [schedule.due_at_validation(0) for _ in range(7)] == [True, False, False, True, False, False, True]
    assert all(Schedule().due_at_validation(0) for _ in range(3))
    assert not Schedule(every_n_steps=1).due_at_validation(0)


def test_a_schedule_goes_on_where_it_was() -> None:
    first, second = Schedule(per_decade=3), Schedule(per_decade=3)
    due_steps(first, range(8))
    second.load_state_dict(first.state_dict())
    assert due_steps(second, range(8, 50)) == due_steps(first, range(8, 50)) == [10, 22, 46]


def test_after_an_event_snapshots_are_denser_for_a_while() -> None:
    schedule = Schedule(every_n_validations=1)
    assert schedule.due_at_validation(60)
    assert schedule.due_at_validation(100)
    assert due_steps(schedule, range(100)) == []
    schedule.densify(100)
    assert due_steps(schedule, range(101, 300)) == [110, 120, 130, 140, 150, 160, 170, 180]


def test_events_in_a_row_make_it_last_longer_and_not_denser_and_denser() -> None:
    schedule = Schedule(at_steps=[0, 20, 100, 1000, 2000])
    assert due_steps(schedule, range(101)) == [0, 20, 100]
    schedule.densify(100)
    assert due_steps(schedule, range(101, 261)) == [120, 140, 160, 180, 200, 220, 240, 260]
    schedule.densify(260)  # found at the very last of them
    assert due_steps(schedule, range(261, 2000)) == [280, 300, 320, 340, 360, 380, 400, 420, 1000]


def test_however_much_happens_there_are_at_most_four_snapshots_more_for_each_regular_one() -> None:
    schedule, steps = Schedule(per_decade=10), []
    for step in range(10_001):
        if schedule.due_at_step(step):
            steps.append(step)
            schedule.densify(step)
    regular = due_steps(Schedule(per_decade=10), range(10_001))
    assert 4 * len(regular) < len(steps) < 5 * len(regular)


def test_denser_snapshots_go_on_in_a_resumed_run() -> None:
    first, second = Schedule(per_decade=1), Schedule(per_decade=1)
    due_steps(first, range(11))
    first.densify(10)
    due_steps(first, range(11, 15))
    second.load_state_dict(first.state_dict())
    assert due_steps(second, range(15, 200)) == due_steps(first, range(15, 200)) == [16, 18, 20, 22, 24, 26, 100]


def test_one_step_is_the_least_gap() -> None:
    schedule = Schedule(every_n_steps=2)
    due_steps(schedule, range(3))
    schedule.densify(2)
    assert due_steps(schedule, range(3, 14)) == [3, 4, 5, 6, 7, 8, 9, 10, 12]


def test_distances_are_those_of_the_schedule() -> None:
    schedule = Schedule(every_n_steps=100)
    due_steps(schedule, range(201))
    schedule.densify(200)
    steps = [0, 100, 200, *due_steps(schedule, range(201, 501))]
    found = [schedule.distance(*pair) for pair in itertools.pairwise(steps[1:])]
    assert found == [1.0] + [0.25] * 8 + [1.0]


def test_schedules_are_checked() -> None:
    with pytest.raises(ValueError, match="Give one schedule, not 2: every_n_steps, log_spaced"):
        Schedule(every_n_steps=1, per_decade=1)
    with pytest.raises(ValueError, match="every_n_steps is a number from 1 on; got 0"):
        Schedule(every_n_steps=0)


def test_samples_are_copies_that_gradients_can_be_taken_through() -> None:
    buffer = SampleBuffer(5)
    with torch.inference_mode():
        batch = {"x": torch.ones(4, 2), "y": (torch.ones(4),), "scale": torch.ones(3)}
        buffer.add(batch)
        buffer.add(batch)
        buffer.add(batch)
        batch["x"].zero_()
    assert buffer.count == 5
    assert buffer.full
    assert [len(b["x"]) for b in buffer.batches] == [4, 1]
    assert [len(b["scale"]) for b in buffer.batches] == [3, 3]
    assert all(b["x"].all() and not b["x"].is_inference() for b in buffer.batches)
