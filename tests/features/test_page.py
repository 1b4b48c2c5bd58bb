"""The examples of docs/features.md run, and its table has all renderers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lib_lightning import features
from lib_lightning.io.rendering_file import key_of

PAGE = (Path(__file__).parents[2] / "docs" / "features.md").read_text()


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "docs/features.md", "exec"), names)
    assert set(names["renderings"][names["largest"]]) == {"kind", "columns", "values", "label"}
    feature = names["run"].graph().feature("input/0")
    assert re.search(r"(high|low): (large|small) (age|height|weight)", feature.label)
    assert feature.label_score > 0.8
    assert names["run"].notes == {"input/0": feature.note} == {"input/0": "what the model reads"}


def test_all_renderers_are_there() -> None:
    for name in features.__all__:
        if name.endswith("Renderer") and name != "Renderer":
            assert f"| `{name}(" in PAGE
    (line,) = re.findall(r"```json\n(.*?)\n```", PAGE)
    assert key_of(line) == (12, json.loads(line)["samples"])
