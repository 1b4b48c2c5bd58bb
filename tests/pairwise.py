"""A small set of cases in which every pair of option values occurs, in place of all combinations."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

Case = tuple[str, ...]


def pairs_of(options: Sequence[str], case: Case) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    """All pairs ``((option, value), (option, value))`` that occur in a case."""
    return set(itertools.combinations(zip(options, case, strict=True), 2))


def pairwise(options: Mapping[str, Sequence[str]]) -> list[Case]:
    """Choose cases greedily, always the first of those with most pairs that have not occurred yet.

    Example:
        >>> pairwise({"letter": ["a", "b"], "digit": ["1", "2"], "sign": ["+", "-"]})
        [('a', '1', '+'), ('a', '2', '-'), ('b', '1', '-'), ('b', '2', '+')]
    """
    names = list(options)
    candidates = list(itertools.product(*options.values()))
    missing = set().union(*(pairs_of(names, case) for case in candidates))
    chosen = []
    while missing:
        best = max(candidates, key=lambda case: len(pairs_of(names, case) & missing))
        chosen.append(best)
        missing -= pairs_of(names, best)
    return chosen
