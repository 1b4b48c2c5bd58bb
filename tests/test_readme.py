"""The README is short, and its quick start is what continuous integration runs. Its examples: tests/documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pages import ROOT, blocks, check_command, commands

README = ROOT / "README.md"


def test_quick_start_is_two_lines_which_continuous_integration_runs() -> None:
    first, second = blocks(README, "bash")[0].splitlines()
    assert first.endswith("lib-lightning fit --config recipes/modular_addition.yaml")
    assert second.endswith("tox")
    assert "quick_start" in (ROOT / ".ci" / "run").read_text()
    assert len(blocks(README, "bash")) == 1


def test_it_can_be_read_in_a_few_minutes() -> None:
    lines = README.read_text("utf-8").splitlines()
    assert len(lines) <= 150
    for heading in ("## What you get", "## What it works with"):
        start = lines.index(heading)
        section = lines[start + 1 : next(i for i in range(start + 1, len(lines)) if lines[i].startswith("## "))]
        assert sum(line.startswith("- ") for line in section) == 6


def test_commands_are_found_behind_each_other(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```bash\npip install '.[docs]' && lib-lightning inspect 'a b'  # why\n```\n")
    assert list(commands(page)) == [["pip", "install", ".[docs]"], ["lib-lightning", "inspect", "a b"]]
    check_command("pip", "install", ".[docs]")
    with pytest.raises(AssertionError):
        check_command("pip", "install", ".[nothing]")
    with pytest.raises(AssertionError):
        check_command("rm", "graph.png")
