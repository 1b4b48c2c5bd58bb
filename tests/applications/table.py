"""The page of the documentation on applications, from the results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEAD = """# Applications

<!-- Written by `tox -e applications`, from tests/applications/results.json. -->

Each application was installed from PyPI and trained for a few steps on made-up data, with `LIBCallback()` and no
settings for it: node layers are proposed, and the model is called as its own steps call it.

"""
ORACLE = """
## Hugging Face transformers

Tiny models of {count} types with random weights, in float64. Graphs at the proposed node layers are compared with the
paper's formulas on dense Jacobians of autograd: the largest error relative to the largest entry is below the number
given. Errors above 1e-8 are of models that compute parts in float32 whatever the type of their weights.

"""


def page(results: Mapping[str, Any]) -> str:
    """The page.

    Args:
        results: The content of ``results.json``.

    Returns:
        Markdown.
    """
    every = list(results["results"].values())
    applications = [r for r in every if r.get("group") != "transformers"]
    types = [r for r in every if r.get("group") == "transformers"]
    lines = [HEAD, "| application | versions | | what was computed, or why not |\n|---|---|---|---|\n"]
    lines += [f"| {r['name']} | {_versions(r)} | {r['status']} | {_outcome(r)} |\n" for r in applications]
    lines += [f"\n{_count(applications)} ({results['interpreter']}; {_dates(applications)}).\n"]
    if types:
        lines += [ORACLE.format(count=len(types)), "| model type | | node layers, or why not |\n|---|---|---|\n"]
        lines += [f"| `{r['name']}` | {_accuracy(r)} | {_layers(r)} |\n" for r in types]
        lines += [f"\n{_count(types)} ({_dates(types)}).\n"]
    return "".join(lines)


def _versions(result: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())


def _outcome(result: Mapping[str, Any]) -> str:
    if result["status"] != "works":
        return _cell(result["reason"])
    layers = ", ".join(f"`{layer}` {n}" for layer, n in result["features"].items())
    return f"{result['snapshots']} snapshots; features: {layers}"


def _accuracy(result: Mapping[str, Any]) -> str:
    return f"{result['tolerance']:g}" if result["status"] == "works" else str(result["status"])


def _layers(result: Mapping[str, Any]) -> str:
    if result["status"] != "works":
        return _cell(result["reason"])
    return ", ".join(f"`{layer}`" for layer in result["node_layers"])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", r"\|").replace("<", "&lt;").split())


def _count(results: list[Any]) -> str:
    works = sum(r["status"] == "works" for r in results)
    return f"{works} of {len(results)} work"


def _dates(results: list[Any]) -> str:
    dates = sorted({r["date"] for r in results})
    return dates[0] if len(set(dates)) == 1 else f"{dates[0]} to {dates[-1]}"
