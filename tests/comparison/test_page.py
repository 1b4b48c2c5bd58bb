"""The examples of docs/compare.md run, and its table is that of the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lib_lightning.comparison.layers import CONSTANT, KINDS
from recipes.compare_seeds import RESULTS, measure, table, trained

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


def test_table_of_seeds() -> None:
    results = json.loads(RESULTS.read_text())
    assert f"<!-- seeds -->\n{table(results)}\n<!-- end of seeds -->" in PAGE
    assert not any(x["wrong"] for x in results)
    found, of = (sum(x[key] for x in results) for key in ("found", "of"))
    others_found, others = (sum(x[key] for x in results) for key in ("others_found", "others"))
    assert found / of > 0.9
    assert others_found / others < 0.02


def test_recipe_trains_what_is_missing(tmp_path: Path) -> None:
    models = [trained(tmp_path, 0, modulus=5, steps=2) for _ in range(2)]
    assert [path.name for path in tmp_path.iterdir()] == ["seed-0.pt"]
    torch.testing.assert_close(*(model.state_dict() for model in models))
    (found,) = measure(models, modulus=5)
    assert found["seeds"] == [0, 1]
    assert found["frequencies"][0] == found["frequencies"][1]
    assert found["wrong"] == 0
    assert found["found"] == found["of"]
