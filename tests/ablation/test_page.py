"""The page on ablations runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

from recipes.attacked_edges import RESULTS, table

PAGE = (Path(__file__).parents[2] / "docs" / "ablations.md").read_text()


def test_snippets_run() -> None:
    names: dict[str, object] = {"__name__": "page"}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/ablations.md", "exec"), names)
    found, random, worst, result = (names[name] for name in ("found", "random", "worst", "result"))
    assert found.count <= worst.count
    assert found.count <= random.count
    assert result.score <= result.dropped


def test_table_is_that_of_the_recipe() -> None:
    assert table(json.loads(RESULTS.read_text())) in PAGE
