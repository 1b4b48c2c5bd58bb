"""The table of `python -m recipes.paper`, from its committed results alone: ``python -m recipes.paper.table``.

If ``LIB_REFERENCE_DIR`` names a folder with the authors' results, the table includes their numbers of edges.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.paper.measure import BASES

RESULTS = Path(__file__).parent / "results"
PUBLISHED = "Published"
# Metrics, and the decimals to show.
METRICS = {"features": 0, "features_required": 0, "edges_required": 0, "effective_edges": 0, "modularity": 2}
COLUMNS = " | ".join(metric.replace("_", " ") for metric in METRICS)
_OF_LAYERS = ("features", "features_required")
# Numerator, denominator, and whether to exclude the section to the output: "fisher" changes the features of the output,
# which the features before them match one to one.
COMPARED = (
    ("lib", "pca", False),
    ("lib", "pca", True),
    ("lib, centered", "lib", False),
    ("lib, fisher", "lib", True),
)

Results = dict[str, list[dict[str, Any]]]


def read(folder: Path = RESULTS) -> Results:
    """Read all files of results.

    Args:
        folder: Their folder.

    Returns:
        Results of all seeds, by task.
    """
    found: Results = {}
    for path in sorted(folder.glob("*.json")):
        one = json.loads(path.read_text())
        found.setdefault(one["task"], []).append(one)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


def report(folder: Path = RESULTS, reference: Path | None = None) -> str:
    """Write all tables in Markdown.

    Args:
        folder: Folder of the results.
        reference: Folder with the authors' results.

    Returns:
        The tables.
    """
    results = read(folder)
    published = results.pop(PUBLISHED, [])
    parts = [numbers(results), ratios(results)] if results else []
    if published:
        theirs = reference and json.loads((reference / "modular_addition_published.json").read_text())
        parts += [counted_as_published(published, theirs or None), features_of_published(published)]
    return "\n\n".join(parts)


def numbers(results: Results) -> str:
    """Tabulate means over the measured seeds, with standard errors.

    Args:
        results: By task.

    Returns:
        The table.
    """
    lines = [f"| network (seeds) | basis | {COLUMNS} |", "|" + "---|" * (2 + len(METRICS))]
    for task, seeds in results.items():
        for basis in BASES:
            measured = [one for one in seeds if basis in one["bases"]]
            cells = [
                mean_and_error([total(one, basis, metric) for one in measured], digits)
                for metric, digits in METRICS.items()
            ]
            if measured:
                lines.append(f"| {task} ({len(measured)}) | {basis} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratios(results: Results) -> str:
    """Tabulate ratios of two bases in the same network; for modularity, differences.

    Args:
        results: By task.

    Returns:
        The table.
    """
    lines = [f"| network (seeds) | compared | {COLUMNS} |", "|" + "---|" * (2 + len(METRICS))]
    for task, seeds in results.items():
        for basis, other, inner in COMPARED:
            measured = [one for one in seeds if {basis, other} <= one["bases"].keys()]
            cells = []
            for metric in METRICS:
                pairs = [(total(one, basis, metric, inner), total(one, other, metric, inner)) for one in measured]
                if metric == "modularity":
                    cells.append(mean_and_error([x - y for x, y in pairs], 2, "+"))
                else:
                    cells.append(mean_and_error([x / y if y else math.nan for x, y in pairs], 2))
            where = ", before the output" if inner else ""
            if measured:
                lines.append(f"| {task} ({len(measured)}) | {basis} / {other}{where} | {' | '.join(cells)} |")
    return "\n".join(lines)


def counted_as_published(results: Sequence[Mapping[str, Any]], theirs: Mapping[str, Any] | None) -> str:
    """Tabulate the edges required in the authors' networks, by section.

    Args:
        results: Results of their networks.
        theirs: The authors' results, by seed and basis; None if unavailable.

    Returns:
        The table.
    """
    lines = [f"| authors' network | section | lib | pca |{' published lib | published pca |' if theirs else ''}"]
    lines.append("|" + "---|" * (6 if theirs else 4))
    for one in results:
        counts = {basis: one["bases"][basis]["edges_required"] for basis in ("lib", "pca")}
        for section in list(counts["lib"])[:-1]:
            cells = [counts[basis][section] for basis in counts]
            if theirs:
                place = section.split("-to-")[0]
                cells += [theirs[str(one["seed"])][basis]["edges_required"][place] for basis in counts]
            lines.append(f"| {one['seed']} | {section} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def features_of_published(results: Sequence[Mapping[str, Any]]) -> str:
    """Tabulate the features that the authors' networks have and require, by node layer.

    Args:
        results: Results of their networks.

    Returns:
        The table.
    """
    lines = [
        "| authors' network | node layer | lib: required of features | pca: required of features |",
        "|" + "---|" * 4,
    ]
    for one in results:
        bases = [one["bases"][basis] for basis in ("lib", "pca")]
        for layer in list(bases[0].get("features_required", {}))[:-1]:
            counts = [x["features_required"][layer] for x in bases]
            cells = [
                f"{'-' if count is None else count} of {x['features'][layer]:.0f}"
                for count, x in zip(counts, bases, strict=True)
            ]
            lines.append(f"| {one['seed']} | {layer} | {' | '.join(cells)} |")
    return "\n".join(lines)


def total(one: Mapping[str, Any], basis: str, metric: str, inner: bool = False) -> float:
    """Read a metric of a whole graph.

    Args:
        one: Results of a network.
        basis: Name of the basis.
        metric: One of `METRICS`.
        inner: Whether to exclude the section to the output: sum over the others, or mean of their modularities.

    Returns:
        The value; NaN if it is missing.
    """
    values = one["bases"].get(basis, {}).get(metric, {})
    if inner and metric not in _OF_LAYERS:
        parts = [value for key, value in values.items() if key != "total" and not key.endswith("-to-output")]
        if not parts or None in parts:
            return math.nan
        return sum(parts) / (len(parts) if metric == "modularity" else 1)
    value = values.get("total")
    return math.nan if value is None else value


def mean_and_error(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Mean and standard error of the mean.

    Args:
        values: Independent values.
        digits: After the decimal point.
        sign: "+" to show it always.

    Returns:
        Such as "12 ± 3"; "-" if one of them is missing.

    Example:
        >>> mean_and_error([1.0, 3.0], 1), mean_and_error([1.0, float("nan")], 1), mean_and_error([0.25], 2, "+")
        ('2.0 ± 1.0', '-', '+0.25')
    """
    if not values or any(math.isnan(value) for value in values):
        return "-"
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return f"{mean:{sign}.{digits}f}"
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return f"{mean:{sign}.{digits}f} ± {error:.{digits}f}"


def main() -> None:
    """Print the tables."""
    reference = os.environ.get("LIB_REFERENCE_DIR")
    sys.stdout.write(report(reference=Path(reference) if reference else None) + "\n")


if __name__ == "__main__":
    main()
