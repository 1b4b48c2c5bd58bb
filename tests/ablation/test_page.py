"""The page on ablations runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

from recipes.attacked_edges import RESULTS, table
from tests.benchmarks import two_versions

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


def test_the_page_says_how_many_times_faster_it_is() -> None:
    pairs = json.loads(two_versions.RESULTS.read_text())["lib, float64"]
    assert all(pair["same scores"] for pair in pairs)
    times = [f"{pair['before'] / pair['now']:.1f}" for pair in sorted(pairs, key=lambda x: x["before"] / x["now"])]
    assert f"{', '.join(times[:-1])} and {times[-1]} times less, with the same scores" in PAGE
    for name in ("before", "now"):
        found = [pair[name] for pair in pairs]
        assert f"{min(found):.0f} to {max(found):.0f} s" in PAGE.replace("\n", " ")


def test_table_is_that_of_the_recipe() -> None:
    assert table(json.loads(RESULTS.read_text())) in PAGE
