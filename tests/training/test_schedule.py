"""When snapshots are due."""

from __future__ import annotations

import itertools

import pytest

from lib_lightning.training.schedule import Schedule, ScheduleCursor


def due_steps(cursor: ScheduleCursor, seen: range) -> list[int]:
    return [step for step in seen if cursor.due_at_step(step)]


@pytest.mark.parametrize(
    ("schedule", "seen", "expected"),
    [
        (Schedule(every_n_steps=10), range(31), [0, 10, 20, 30]),
        (Schedule(every_n_steps=10), range(3, 40, 7), [3, 10, 24, 31]),  # steps passed over are caught up with
        (Schedule(at_steps=[5, 2, 2]), range(10), [2, 5]),
        (Schedule(log_spaced=1), range(101), [0, 1, 10, 100]),
        (Schedule(log_spaced=3), range(101), [0, 1, 2, 5, 10, 22, 46, 100]),
        (Schedule(log_spaced=100), range(6), [0, 1, 2, 3, 4, 5]),
        (Schedule(), range(10), [0]),
    ],
)
def test_due_steps(schedule: Schedule, seen: range, expected: list[int]) -> None:
    assert due_steps(schedule.start(), seen) == expected


def test_due_validations() -> None:
    cursor = Schedule(every_n_validations=3).start()
    assert [cursor.due_at_validation(0) for _ in range(7)] == [True, False, False, True, False, False, True]
    assert all(Schedule().start().due_at_validation(0) for _ in range(3))
    assert not Schedule(every_n_steps=1).start().due_at_validation(0)


def test_a_resumed_schedule_continues_from_its_position() -> None:
    schedule = Schedule(log_spaced=3)
    first = schedule.start()
    due_steps(first, range(8))
    second = schedule.start(first.position)
    assert due_steps(second, range(8, 50)) == due_steps(first, range(8, 50)) == [10, 22, 46]


def test_snapshots_are_denser_for_a_while_after_a_change() -> None:
    cursor = Schedule(every_n_validations=1).start()
    assert cursor.due_at_validation(60)
    assert cursor.due_at_validation(100)
    assert due_steps(cursor, range(100)) == []
    cursor.densify(100)
    assert due_steps(cursor, range(101, 300)) == [110, 120, 130, 140, 150, 160, 170, 180]


def test_consecutive_changes_extend_the_denser_phase() -> None:
    cursor = Schedule(at_steps=[0, 20, 100, 1000, 2000]).start()
    assert due_steps(cursor, range(101)) == [0, 20, 100]
    cursor.densify(100)
    assert due_steps(cursor, range(101, 261)) == [120, 140, 160, 180, 200, 220, 240, 260]
    cursor.densify(260)  # found at the very last of them
    assert due_steps(cursor, range(261, 2000)) == [280, 300, 320, 340, 360, 380, 400, 420, 1000]


def test_at_most_four_additional_snapshots_per_regular_one() -> None:
    cursor, steps = Schedule(log_spaced=10).start(), []
    for step in range(10_001):
        if cursor.due_at_step(step):
            steps.append(step)
            cursor.densify(step)
    regular = due_steps(Schedule(log_spaced=10).start(), range(10_001))
    assert 4 * len(regular) < len(steps) < 5 * len(regular)


def test_a_denser_phase_continues_in_a_resumed_run() -> None:
    schedule = Schedule(log_spaced=1)
    first = schedule.start()
    due_steps(first, range(11))
    first.densify(10)
    due_steps(first, range(11, 15))
    second = schedule.start(first.position)
    assert due_steps(second, range(15, 200)) == due_steps(first, range(15, 200)) == [16, 18, 20, 22, 24, 26, 100]


def test_the_smallest_interval_is_one_step() -> None:
    cursor = Schedule(every_n_steps=2).start()
    due_steps(cursor, range(3))
    cursor.densify(2)
    assert due_steps(cursor, range(3, 14)) == [3, 4, 5, 6, 7, 8, 9, 10, 12]


def test_relative_intervals() -> None:
    cursor = Schedule(every_n_steps=100).start()
    due_steps(cursor, range(201))
    cursor.densify(200)
    steps = [0, 100, 200, *due_steps(cursor, range(201, 501))]
    found = [cursor.relative_interval(*pair) for pair in itertools.pairwise(steps[1:])]
    assert found == [1.0] + [0.25] * 8 + [1.0]


def test_schedules_are_checked() -> None:
    with pytest.raises(ValueError, match="Give one schedule, not 2: every_n_steps, log_spaced"):
        Schedule(every_n_steps=1, log_spaced=1)
    with pytest.raises(ValueError, match="every_n_steps must be at least 1; got 0"):
        Schedule(every_n_steps=0)
