"""Searches on synthetic scores that are not monotone."""

from __future__ import annotations

import itertools
import random

import pytest

from lib_lightning.ablation.search import ScoreCache, bisect, coarse, powers_of, scan, try_counts


def holding(numbers: set[int], largest: int) -> ScoreCache:
    """A score for which these numbers are sufficient."""
    return ScoreCache(lambda count: float(count in numbers), largest, 1.0)


def up_and_down(seed: int, largest: int) -> set[int]:
    """Sufficient numbers: none at first, then more and more of them, and the largest one."""
    numbers, start = random.Random(seed), largest // (2 + seed % 7)
    return {k for k in range(largest) if numbers.random() < (k - start) / (1 + start)} | {largest}


@pytest.mark.parametrize("largest", [1, 2, 3, 10, 97, 1000, 4000])
def test_scan_finds_the_smallest_number_from_which_on_all_tried_ones_suffice(largest: int) -> None:
    for seed in range(40):
        holds = up_and_down(seed, largest)
        tried = holding(holds, largest)
        answer = scan(tried)
        assert answer in tried.scores
        by_force = min(k for k in tried.scores if all(j in holds for j in tried.scores if j >= k))
        assert answer == by_force
        assert answer == 0 or answer - 1 not in holds, "the next smaller number was tried, and is insufficient"
        beyond = range(answer, min(largest, answer + min(100, max(8, round(0.05 * answer)))) + 1)
        assert set(beyond) <= tried.scores.keys(), "the numbers above it were tried"


def test_scan_does_not_depend_on_the_total_number() -> None:
    for seed in range(40):
        holds = up_and_down(seed, 300)
        answers = {scan(holding(holds | set(range(300, largest + 1)), largest)) for largest in (300, 301, 777, 5000)}
        assert len(answers) == 1


def test_scan_continues_above_an_insufficient_number() -> None:
    assert scan(holding(set(range(40, 1001)), 1000)) == 40
    assert scan(holding(set(range(40, 1001)) - {43}, 1000)) == 44
    assert scan(holding(set(range(40, 1001)) - {43, 50}, 1000)) == 51
    assert scan(holding({8, 9, 10}, 10)) == 8
    assert scan(holding({10}, 10)) == 10


@pytest.mark.parametrize("search", [scan, coarse, lambda tried: bisect(tried, 100), lambda tried: bisect(tried, 7)])
def test_ends_of_a_search(search) -> None:
    assert search(holding(set(), 7)) is None
    assert search(holding({7}, 7)) == 7
    assert search(holding({1, 2, 3, 4, 5, 6, 7}, 7)) == 1
    assert search(holding(set(), 0)) is None


def test_scan_may_find_zero() -> None:
    assert scan(holding(set(range(8)), 7)) == 0
    assert scan(holding({0}, 0)) == 0


@pytest.mark.parametrize("bracket", [5, 64, 100, 1001])
def test_bisection_equals_the_loop_of_the_paper(bracket: int) -> None:
    # `low` is insufficient, `high` is sufficient.
    for seed in range(40):
        holds = up_and_down(seed, min(bracket, 90))
        tried = holding(holds, min(bracket, 90))
        low, high = 0, bracket
        while high - low > 1:
            middle = (low + high + 1) // 2
            if min(middle, tried.largest) in holds:
                high = middle
            else:
                low = middle
        assert bisect(tried, bracket) == min(high, tried.largest)
        assert all(k in holds for k in tried.scores if k >= high)
        assert not any(k in holds for k in tried.scores if k < high)


@pytest.mark.parametrize("largest", [1, 2, 10, 97, 1000, 330_000])
def test_a_coarse_search_is_right_to_an_eighth(largest: int) -> None:
    for seed in range(40):
        smallest = random.Random(seed).randint(1, largest)
        tried = ScoreCache(lambda count, smallest=smallest: float(count >= smallest), largest, 1.0)
        answer = coarse(tried)
        assert smallest <= answer <= max(smallest, 1.125 * (smallest - 1))
        assert len(tried.scores) <= 9


def test_a_coarse_search_of_any_scores_tries_its_answer_and_what_is_below() -> None:
    for seed in range(40):
        holds = up_and_down(seed, 97)
        tried = holding(holds, 97)
        answer = coarse(tried)
        assert all(k in holds for k in tried.scores if k >= answer)
        assert not any(k in holds for k in tried.scores if k < answer)
        assert answer in tried.scores


def test_nothing_is_computed_twice() -> None:
    calls: list[int] = []

    def evaluate(count: int) -> float:
        calls.append(count)
        return float(count >= 30)

    tried = ScoreCache(evaluate, 100, 1.0)
    scan(tried)
    bisect(tried, 5000)
    try_counts(tried, "exponential", 100)
    assert len(calls) == len(set(calls)) == len(tried.scores)
    assert max(calls) == 100


def test_grids() -> None:
    def counts(grid, largest: int = 12) -> list[int]:
        scores = try_counts(ScoreCache(lambda count: count / largest, largest, 0.5), grid, largest + 1)
        assert scores == {count: count / largest for count in scores}
        return list(scores)

    assert counts("every") == list(range(13))
    assert counts("exponential") == [0, 1, 2, 3, 4, 6, 8, 11, 12]
    assert counts("bisection") == [4, 5, 6, 7]
    assert counts([7, 3, 3, 0]) == [0, 3, 7]
    assert counts(range(2, 5)) == [2, 3, 4]
    assert counts([]) == []


def test_grids_without_features() -> None:
    for grid in ("every", "exponential"):
        assert try_counts(ScoreCache(float, 0, 1.0), grid, 1) == {0: 0.0}


def test_powers() -> None:
    for base, largest in itertools.product((2**0.5, 2, 10), (1, 5, 64, 1000)):
        powers = powers_of(base, largest)
        assert powers == sorted(set(powers))
        assert (powers[0], powers[-1]) == (1, largest)


@pytest.mark.parametrize("counts", [[-1, 2], [3, 13], "all", 5, [1.5]])
def test_bad_counts_are_refused(counts) -> None:
    with pytest.raises(ValueError, match=r"counts must be between 0 and 12|counts must be one of every, exponential"):
        try_counts(ScoreCache(float, 12, 1.0), counts, 13)
