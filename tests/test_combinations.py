"""Which combinations of parameters are left to `tox -e combinations`, and whether it has run them."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest

from tests.combinations import RESULTS, each_value, summary

TESTS = Path(__file__).parent


@pytest.mark.parametrize("sizes", [(1,), (5,), (3, 4), (2, 2, 6), (3, 3, 3)])
def test_each_value_occurs_in_as_few_combinations_as_possible(sizes: tuple[int, ...]) -> None:
    combinations = [dict(enumerate(values)) for values in itertools.product(*map(range, sizes))]
    chosen = [combinations[k] for k in each_value(combinations)]
    for parameter, size in enumerate(sizes):
        assert {one[parameter] for one in chosen} == set(range(size))
    assert len(chosen) == max(sizes)


def test_all_marked_tests_have_passed_in_all_combinations() -> None:
    marked = {
        f"tests.{'.'.join(path.relative_to(TESTS).with_suffix('').parts)}.{name}"
        for path in TESTS.rglob("test_*.py")
        for name in re.findall(
            r"^@pytest\.mark\.combinations\n(?:[@ \])].*\n)*def (\w+)", path.read_text("utf-8"), re.M
        )
    }
    results = json.loads(RESULTS.read_text())["tests"]
    assert results.keys() == marked
    others = {test: outcomes for test, outcomes in results.items() if outcomes.keys() != {"passed"}}
    assert not others, "where LIB_REFERENCE_DIR is not set, tests of published results are skipped"


def test_outcomes_are_counted(tmp_path: Path) -> None:
    cases = [("[a-1]", ""), ("[a-2]", "<failure/>"), ("[b-1]", "<skipped/>"), ("[b-2]", "<system-out/>")]
    lines = "".join(f'<testcase classname="tests.test_x" name="test_y{ids}">{inner}</testcase>' for ids, inner in cases)
    (tmp_path / "report.xml").write_text(f"<testsuites><testsuite>{lines}</testsuite></testsuites>")
    found = summary(tmp_path / "report.xml")
    assert found["tests"] == {"tests.test_x.test_y": {"passed": 2, "failure": 1, "skipped": 1}}
    assert "torch" in found["with"]
