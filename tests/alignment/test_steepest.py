"""The steepest change of curves whose steepest change is known, and what must not matter to it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lightning.alignment import SteepestChange, steepest_change
from lib_lightning.errors import SettingError
from tests.viewer.node import evaluate, write_modules

# A fall whose steepest part is at step 700, in steps of 10.
STEPS = np.arange(0, 2000, 10)


def logistic(steps: np.ndarray, centre: float = 700, width: float = 50) -> np.ndarray:
    return 1 / (1 + np.exp((steps - centre) / width))


def numbers_of(change: SteepestChange) -> list[float]:
    return [change.step, change.first, change.last]


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.1])
def test_a_noisy_fall_is_found_where_it_is_and_its_range_covers_it(noise: float) -> None:
    rng = np.random.default_rng(0)
    found = [steepest_change(STEPS, logistic(STEPS) + noise * rng.normal(size=len(STEPS))) for _ in range(20)]
    assert {one.direction for one in found} == {"fall"}
    assert np.median([abs(one.step - 700) for one in found]) < 1 + 300 * noise
    assert np.mean([one.first <= 700 <= one.last for one in found]) >= 0.85
    # The middle half of a logistic function is 1.1 widths on either side.
    if noise == 0:
        assert 50 < found[0].last - found[0].step < 65


def test_noise_alone_has_no_steepest_change() -> None:
    rng = np.random.default_rng(0)
    for n in (5, 8, 20, 100):
        found = [steepest_change(range(n), rng.normal(size=n)) for _ in range(25)]
        assert [one.reason for one in found if one.exists] == []
        assert all(math.isnan(one.step) for one in found)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([3.0] * 50, "does not change"),
        ([math.nan] * 50, "has 0 points; 5 are needed"),
        ([1.0, 0.0, math.inf, 0.5], "has 3 points; 5 are needed"),
        ([0.0] * 25 + [1.0] * 25, "does not fall by a quarter of its range"),
    ],
)
def test_curves_without_one_say_why(values: list[float], reason: str) -> None:
    found = steepest_change(range(len(values)), values, direction="fall")
    assert (found.exists, found.reason, found.text) == (False, reason, reason)


def test_a_jump_between_two_points_is_between_them() -> None:
    steps = [0, 100, 200, 300, 500, 600, 700, 800]
    found = steepest_change(steps, [1, 1, 1, 1, 0, 0, 0, 0])
    assert found.step == pytest.approx(400)
    assert found.first == pytest.approx(300, abs=10)
    assert found.last == pytest.approx(500, abs=10)
    assert (found.direction, found.before, found.after) == ("fall", 1, 0)


def test_of_two_falls_the_steeper_one_counts_unless_they_cannot_be_told_apart() -> None:
    def two(first: float) -> np.ndarray:
        return first * logistic(STEPS, 500, 20) + (1 - first) * logistic(STEPS, 1400, 20)

    assert steepest_change(STEPS, two(0.65)).step == pytest.approx(500, abs=5)
    assert steepest_change(STEPS, two(0.35)).step == pytest.approx(1400, abs=5)
    assert steepest_change(STEPS, two(0.65)).last < 600
    alike = steepest_change(STEPS, two(0.5))
    assert alike.first < 500 < 1400 < alike.last


def test_directions_are_told_apart() -> None:
    bump = logistic(STEPS, 1500, 10) - logistic(STEPS, 600, 60)
    assert steepest_change(STEPS, bump).step == pytest.approx(1500, abs=5)
    rise = steepest_change(STEPS, bump, "rise")
    assert (rise.step, rise.direction) == (pytest.approx(600, abs=15), "rise")
    with pytest.raises(SettingError, match=r"direction must be one of either, rise, fall; got 'up'\."):
        steepest_change(STEPS, bump, "up")  # type: ignore[arg-type]


def test_the_axis_decides_what_is_steep() -> None:
    """A loss that falls by half in the first steps, and by half much later."""
    steps = np.arange(3000)
    loss = np.exp(-steps / 20) + logistic(steps, 1500, 80)
    assert steepest_change(steps, loss).step < 20
    assert steepest_change(steps, loss, log=True).step == pytest.approx(1500, rel=0.02)


def test_outliers_do_not_win() -> None:
    """Of a training that rises to 1, with collapses of some points that recover at once, up to the end."""
    values = 1 - logistic(STEPS)
    for place in (3, 30, 120, 121, 160, 199):
        values[place] = 9.0 if place == 30 else 0.0
    for direction in ("rise", "either"):
        found = steepest_change(STEPS, values, direction)  # type: ignore[arg-type]
        assert found.step == pytest.approx(700, abs=15)


def test_steps_between_which_to_look() -> None:
    both = 0.7 * logistic(STEPS, 300, 10) + 0.3 * logistic(STEPS, 1400, 10)
    assert steepest_change(STEPS, both).step == pytest.approx(300, abs=5)
    assert steepest_change(STEPS, both, between=(800, math.inf)).step == pytest.approx(1400, abs=5)


@st.composite
def curves(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, bool]:
    """Steps, values with one to three changes and noise, and whether the axis is logarithmic."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(5, 120))
    steps = np.unique(rng.integers(0, 5000, n) if draw(st.booleans()) else (10 ** rng.uniform(0, 4, n)).astype(int))
    values = draw(st.sampled_from([0.0, 0.01, 0.1])) * rng.normal(size=len(steps))
    for _ in range(draw(st.integers(1, 3))):
        sharp = 1 / (1 + np.exp(-np.clip((steps - rng.uniform(0, 5000)) / rng.uniform(1, 300), -500, 500)))
        values = values + rng.normal() * sharp
    return steps, values, draw(st.booleans())


@settings(max_examples=60, deadline=None)
@given(curves(), st.floats(1e-3, 1e3), st.floats(-10, 10))
def test_scale_and_offset_of_the_scalar_do_not_matter(
    curve: tuple[np.ndarray, np.ndarray, bool], scale: float, offset: float
) -> None:
    steps, values, log = curve
    # Exact in floating point, so that ties stay ties.
    values, scale, offset = np.round(values * 2**20) / 2**20, 2.0 ** round(math.log2(scale)), float(round(offset))
    one, other = (steepest_change(steps, y, log=log) for y in (values, scale * (values + offset)))
    assert numbers_of(other) == pytest.approx(numbers_of(one), rel=1e-6, abs=1e-6, nan_ok=True)
    assert (other.reason, other.direction) == (one.reason, one.direction)
    turned = steepest_change(steps, -values, log=log)
    assert turned.exists == one.exists


@settings(max_examples=40, deadline=None)
@given(curves(), st.randoms(use_true_random=False))
def test_order_and_repetition_of_points_do_not_matter(curve: tuple[np.ndarray, np.ndarray, bool], random: Any) -> None:
    steps, values, log = curve
    points = [*zip(steps.tolist(), values.tolist(), strict=True)] * 2
    random.shuffle(points)
    points += [(step, math.nan) for step in (-5, 10_000)]
    found = steepest_change([step for step, _ in points], [value for _, value in points], log=log)
    assert numbers_of(found) == pytest.approx(numbers_of(steepest_change(steps, values, log=log)), nan_ok=True)


def test_a_repeated_step_has_its_last_value() -> None:
    steps, values = [0, *STEPS], [50.0, *logistic(STEPS)]
    assert steepest_change(steps, values) == steepest_change(STEPS, logistic(STEPS))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(300, 1500), st.floats(5, 100), st.booleans(), st.booleans())
def test_where_points_are_dense_does_not_matter(seed: int, centre: float, width: float, log: bool, early: bool) -> None:
    """The same curve at every step, and at few of them, most of them in one half."""
    rng = np.random.default_rng(seed)
    every = np.arange(0, 2500, 5)
    few = np.unique(np.concatenate([every[::5], rng.choice(1250, 200) + (0 if early else 1250)]))
    dense, thin = (steepest_change(x, logistic(x, centre, width), log=log) for x in (every, few))
    assert thin.step == pytest.approx(dense.step, abs=25 + 0.2 * width)


@pytest.fixture(scope="module")
def viewer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_modules(tmp_path_factory.mktemp("viewer"))


def test_the_tab_computes_the_same(viewer: Path) -> None:
    cases: list[tuple[list[int], list[float | None], str, bool]] = []

    @settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @given(curves(), st.sampled_from(["either", "rise", "fall"]), st.booleans())
    def collect(curve: tuple[np.ndarray, np.ndarray, bool], direction: str, with_gaps: bool) -> None:
        steps, values, log = curve
        kept: list[float | None] = [*values.tolist()]
        if with_gaps:
            kept[:: max(2, len(kept) // 3)] = [None] * len(kept[:: max(2, len(kept) // 3)])
        cases.append((steps.tolist(), kept, direction, log))

    collect()
    rng = np.random.default_rng(0)
    cases += [([*range(n)], rng.normal(size=n).tolist(), "either", False) for n in (4, 40)]
    cases.append(([*range(9)], [2.0] * 9, "either", True))
    in_tab = evaluate(
        viewer,
        {"steepest.js": "steepestChange"},
        "data.map(([steps, values, direction, log]) => steepestChange(steps, values, {direction, log}))",
        cases,
    )
    exist = 0
    for (steps, values, direction, log), found in zip(cases, in_tab, strict=True):
        filled = [math.nan if value is None else value for value in values]
        expected = steepest_change(steps, filled, direction, log)  # type: ignore[arg-type]
        assert (found["reason"], found["direction"]) == (expected.reason, expected.direction)
        if expected.exists:
            exist += 1
            keys = ("step", "first", "last", "before", "after")
            assert [found[key] for key in keys] == pytest.approx([getattr(expected, key) for key in keys], rel=1e-9)
    assert 10 < exist < len(cases)
