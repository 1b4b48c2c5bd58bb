"""The examples of docs/compare.md run, and it explains all kinds of features."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from lib_lightning.comparison.layers import CONSTANT, KINDS

PAGE = (Path(__file__).parents[2] / "docs" / "compare.md").read_text()


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(block, "docs/compare.md", "exec"), names)
    assert "base" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comparison.html", "comparison.json"]
    assert names["found"].matches[0].kind == "shared"


def test_all_kinds_are_explained() -> None:
    rows = re.findall(r"^\| (\w+) \|", PAGE.partition("## What features are")[2].partition("##")[0], re.MULTILINE)
    assert set(rows) == {"kind", *KINDS, CONSTANT}
