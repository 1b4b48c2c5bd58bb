"""A Markdown table of benchmark results: ``python -m tests.benchmarks.report FILE.json``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def table(found: Mapping[str, Any]) -> str:
    """Format the results of pytest-benchmark.

    Args:
        found: The contents of its JSON file.

    Returns:
        One row for each benchmark: its shortest time and its extra info.

    Example:
        >>> one = {"fullname": "tests/benchmarks/bench_a.py::test_b[c]", "stats": {"min": 0.5}, "extra_info": {"x": 2}}
        >>> print(table({"benchmarks": [one]}))
        | benchmark | seconds | |
        |---|---|---|
        | a: b[c] | 0.5 | x **2** |
    """
    rows = ["| benchmark | seconds | |", "|---|---|---|"]
    for one in found["benchmarks"]:
        file, _, test = one["fullname"].partition("::")
        name = f"{Path(file).stem.removeprefix('bench_')}: {test.removeprefix('test_')}"
        noted = "; ".join(f"{key} **{value}**" for key, value in one["extra_info"].items())
        rows.append(f"| {name} | {one['stats']['min']:.3g} | {noted} |")
    return "\n".join(rows)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        contents = json.loads(Path(argument).read_text())
        machine = contents["machine_info"]
        print(f"{machine['cpu'].get('brand_raw', machine['processor'])}, Python {machine['python_version']}\n")
        print(table(contents))
