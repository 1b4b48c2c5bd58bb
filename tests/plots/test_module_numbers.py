"""Modules keep their numbers, and with them their colours, however each snapshot numbers them."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lib_lightning.plots.module_numbers import Members, ModuleNumbers
from lib_lightning.plots.palette import MODULES, NO_MODULE, OTHER_MODULES, module_color

N = len(MODULES)


def update(
    numbers: ModuleNumbers, ids: list[int], modules: list[int], importance: list[float] | None = None
) -> dict[int, int]:
    weights = np.array(importance or [1.0] * len(ids))
    return numbers.update({"fc": Members(np.array(ids), np.array(modules), weights)})


def test_the_number_unused_for_longest_is_used_first() -> None:
    numbers = ModuleNumbers()
    assert update(numbers, [0, 1, 2], [0, 1, -1]) == {0: 0, 1: 1}
    assert update(numbers, [0, 5, 6], [1, 0, 1]) == {1: 0, 0: 2}  # 5 is new; number 1 rests
    found = update(numbers, list(range(100, 109)), list(range(9)))
    assert list(found.values()) == [3, 4, 5, 6, 1, 0, 2, 7, 8]
    # Two modules become one: the heavier share decides.
    assert update(numbers, [100, 101], [4, 4], [1.0, 3.0]) == {4: found[1]}
    assert numbers.update({}) == {}
    assert update(numbers, [101], [0]) == {0: found[1]}, "a snapshot without modules forgets nothing"


def test_a_colour_that_becomes_free_goes_to_the_largest_module_without_one() -> None:
    numbers = ModuleNumbers()
    many = list(range(N + 2))
    assert update(numbers, many, many) == {k: k for k in many}
    # The module of lineage 3 is gone; those of N and N + 1 are now numbered the other way round, by size.
    left = [k for k in many if k != 3]
    found = update(numbers, left, [0, 1, 2, 4, 5, 6, 8, 7])
    assert found == {0: 0, 1: 1, 2: 2, 4: 4, 5: 5, 6: 6, 7: 3, 8: N}


partitions = st.lists(st.lists(st.integers(-1, 11), min_size=1, max_size=14), min_size=1, max_size=6)


@given(partitions)
def test_numbers_are_distinct_and_colours_stay_whatever_the_modules(snapshots: list[list[int]]) -> None:
    numbers, colored = ModuleNumbers(), {}
    for k, modules in enumerate(snapshots):
        number_of = update(numbers, list(range(len(modules))), modules)
        assert set(number_of) == set(modules) - {-1}
        values = list(number_of.values())
        assert len(set(values)) == len(values)
        assert sorted(n for n in values if n < N) == sorted(n for n in values)[: min(N, len(values))]
        assert len([n for n in values if n < N]) == min(N, len(values)), "no colour is left unused"
        if k == 0:
            assert values == list(range(len(values)))
        # A module with the same features as before keeps its number, if that has a colour.
        now = {frozenset(np.flatnonzero(np.array(modules) == m).tolist()): n for m, n in number_of.items()}
        assert all(now[features] == n for features, n in colored.items() if features in now)
        colored = {features: n for features, n in now.items() if n < N}
        numbers_again = ModuleNumbers()
        numbers_again.load_state_dict(json.loads(json.dumps(numbers.state_dict())))
        assert numbers_again.state_dict() == numbers.state_dict()


@given(st.permutations(range(10)), st.integers(0, 9))
def test_renumbering_changes_nothing(order: list[int], feature: int) -> None:
    ids, modules = list(range(30)), [k % 10 for k in range(30)]
    one, other = ModuleNumbers(), ModuleNumbers()
    for numbers in (one, other):
        update(numbers, ids, modules)
    plain, renumbered = update(one, ids, modules), update(other, ids, [order[m] for m in modules])
    assert {m: plain[m] for m in range(N)} == {m: renumbered[order[m]] for m in range(N)}


def test_colours_of_numbers() -> None:
    assert [module_color(k) for k in range(-1, N + 2)] == [NO_MODULE, *MODULES, OTHER_MODULES, OTHER_MODULES]
    assert len({NO_MODULE, *MODULES, OTHER_MODULES}) == N + 2
