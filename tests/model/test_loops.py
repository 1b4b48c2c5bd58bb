"""Loops of which a trial does only some parts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_lightning.model.loops import LoopTrial, loops_shortened, parts_of


class Clock:
    """Stands still unless it is advanced."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@given(st.integers(0, 300), st.integers(0, 50), st.floats(1e-4, 1), st.floats(0, 5))
def test_time_of_all_parts_is_predicted_from_some(count: int, fewest: int, each: float, preparing: float) -> None:
    clock = Clock()
    trial = LoopTrial(clock)
    done = []
    with loops_shortened(trial):
        for part in parts_of(range(count), fewest=fewest):
            clock.now += each + preparing * (not done)
            done.append(part)
    assert len(done) == len(set(done)) <= count
    assert len(done) >= min(count, max(4, fewest))
    assert clock.now + trial.seconds == pytest.approx(preparing * (count > 0) + count * each)
    assert list(parts_of(range(count))) == list(range(count)), "and without a trial all of them are done"


def test_parts_are_spread_over_the_loop() -> None:
    clock = Clock()
    with loops_shortened(LoopTrial(clock)):
        done = []
        for part in parts_of(range(1000)):
            clock.now += 1
            done.append(part)
    assert sorted(done) == [0, 250, 500, 750]


def test_loops_in_loops_and_loops_over_what_another_one_has_made() -> None:
    clock = Clock()
    trial = LoopTrial(clock)
    with loops_shortened(trial):
        made = []
        for part in parts_of(range(50)):
            for _ in parts_of(range(20)):
                clock.now += 1
            made.append(part)
        for _ in parts_of(made, count=50):
            clock.now += 2
    assert clock.now < 150
    assert clock.now + trial.seconds == pytest.approx(50 * 20 + 50 * 2)
