"""The examples of docs/circuit_tracer.md run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "circuit_tracer.md"


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    one, small = names["one"], names["small"]
    assert re.match(r"SampleGraph\(12 inputs, \d+ features, \d+ errors, 10 outputs, [\d,]+ edges\)", repr(one))
    assert 0 < len(small.weights) < len(one.weights)
    assert len(names["written"].nodes) == len(small.nodes)
    assert (tmp_path / "graphs" / "one.json").exists()
