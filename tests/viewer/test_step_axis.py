"""Lightning's axis of logged scalars, converted to numbers of optimizer steps."""

from __future__ import annotations

from itertools import accumulate, pairwise

from hypothesis import given
from hypothesis import strategies as st

from lib_lightning.viewer.step_axis import StepAxis


@given(st.lists(st.integers(1, 3), min_size=1, max_size=40), st.data())
def test_snapshots_are_at_their_own_steps(steps_of_batches: list[int], data: st.DataObject) -> None:
    """Whatever the number of optimizer steps of each batch, and whenever snapshots are taken."""
    steps = list(accumulate(steps_of_batches))
    taken = sorted(data.draw(st.sets(st.integers(0, len(steps) - 1), min_size=1)))
    axis = StepAxis({0: 0, **{steps[batch]: batch for batch in taken}})
    assert axis.steps(taken) == [steps[batch] for batch in taken]
    everywhere = axis.steps(range(2 * len(steps)))
    assert everywhere[0] > 0
    assert all(before <= after for before, after in pairwise(everywhere))


def test_one_step_for_each_batch() -> None:
    assert StepAxis({0: 0, 50: 49, 3000: 2999}).steps([0, 7, 49, 2999, 4000]) == [1, 8, 50, 3000, 4001]


def test_files_without_it_keep_the_axis() -> None:
    assert StepAxis({0: None, 3000: None}).steps([0, 2999]) == [0, 2999]
    assert StepAxis({}).steps([5]) == [5]
