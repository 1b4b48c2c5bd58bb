"""Each line of docs/compatibility.md is shown by a test."""

from __future__ import annotations

import re

from tests.pages import ROOT


def test_what_it_works_with_is_shown_by_tests_that_exist() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    source = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    tests = [re.findall(r"`(test_\w+)`", row.rsplit("|", 2)[1]) for row in rows]
    files = [re.findall(r"`(tests/[\w/]+\.py)`", row.rsplit("|", 2)[1]) for row in rows]
    headings = ("| models |", "| trainers |")
    assert [row for row in rows if row.startswith(headings)] == [f"{heading} | |" for heading in headings]
    for row, functions, modules in zip(rows, tests, files, strict=True):
        assert functions or modules or row.startswith(headings), row
        assert all(f"def {function}(" in source for function in functions), row
        assert all((ROOT / module).exists() for module in modules), row
