"""Tests of many combinations of parameters: each value in every run, all combinations in `tox -e combinations`.

    python -m tests.combinations REPORT    # writes tests/combinations.json from pytest's --junit-xml

A test is marked ``@pytest.mark.combinations`` where it takes long and its parameters are independent: what fails for a
value mostly fails for it in any combination.
"""

from __future__ import annotations

import json
import platform
import sys
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import pytest

RESULTS = Path(__file__).with_name("combinations.json")


def each_value(combinations: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """Choose few combinations in which every value of every parameter occurs.

    Args:
        combinations: Values by parameter.

    Returns:
        Indices of the chosen ones, ascending.

    Example:
        >>> each_value([{"model": m, "steps": n} for m in ("cnn", "gpt2", "mlp") for n in (1, 4)])
        [0, 3, 4]
    """
    missing = {value for one in combinations for value in one.items()}
    chosen: list[int] = []
    while missing:
        best = max(range(len(combinations)), key=lambda k: len(missing & set(combinations[k].items())))
        chosen.append(best)
        missing -= set(combinations[best].items())
    return sorted(chosen)


def left_out(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """The combinations of marked tests that an ordinary run does without."""
    tests: dict[str, list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("combinations"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    found: set[pytest.Item] = set()
    for of_test in tests.values():
        # Each combination has the same objects.
        kept = each_value([{name: id(x) for name, x in item.callspec.params.items()} for item in of_test])
        found.update(item for k, item in enumerate(of_test) if k not in kept)
    return found


def summary(report: Path) -> dict[str, dict[str, dict[str, int] | str]]:
    """Count the outcomes of each test in a report, and name what it was run with."""
    counts: dict[str, Counter[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        if not case.get("classname"):
            continue  # a file that is for another environment
        test = f"{case.get('classname')}.{str(case.get('name')).partition('[')[0]}"
        outcome = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        counts.setdefault(test, Counter())[outcome] += 1
    versions = {name: version(name) for name in ("torch", "lightning", "torchmetrics", "transformers")}
    return {
        "with": {"python": platform.python_version(), **versions},
        "tests": {test: dict(counts[test]) for test in sorted(counts)},
    }


if __name__ == "__main__":
    RESULTS.write_text(json.dumps(summary(Path(sys.argv[1])), indent=1) + "\n")
