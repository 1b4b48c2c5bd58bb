"""The tables of docs/bases_compared.md, from the committed results alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib_lightning.interventions.significance import samples_needed
from recipes.bases_compared.fit import BASES

RESULTS = Path(__file__).parent / "results"
# Results of one network in one basis, by column.
Cell = dict[str, Any]
Results = dict[str, dict[str, list[Cell]]]
_MISSING = "-"
# Of the tests of single features.
_LEVEL = 0.05


def read(folder: Path = RESULTS) -> Results:
    """Read all results.

    Args:
        folder: Their folder.

    Returns:
        By network and basis, the columns of each seed.
    """
    found: dict[str, dict[str, dict[int, Cell]]] = {}
    for path in sorted(folder.glob("*.json")):
        one = json.loads(path.read_text())
        cells = found.setdefault(one.pop("network"), {}).setdefault(one.pop("basis"), {})
        cell = cells.setdefault(one.pop("seed"), {})
        for column, numbers in one.items():
            # Sections that take minutes have files of their own.
            known = (cell.get(column) or {}).get("sections", {})
            cell[column] = {**numbers, "sections": known | numbers["sections"]} if known else numbers
    return {
        network: {kind: [by_kind[kind][seed] for seed in sorted(by_kind[kind])] for kind in BASES if kind in by_kind}
        for network, by_kind in sorted(found.items())
    }


def report(folder: Path = RESULTS) -> str:
    """Write all tables in Markdown.

    Args:
        folder: Folder of the results.

    Returns:
        The tables.
    """
    parts = []
    for network, by_kind in read(folder).items():
        parts.append(f"**{network}**{_seeds(by_kind)}")
        parts += [overview(by_kind), by_layer(by_kind), *against_pca(by_kind), effective_by_section(by_kind)]
        parts += by_section(by_kind)
        if "sae" in by_kind:
            parts.append(autoencoders(by_kind["sae"]))
    return "\n\n".join(parts)


def _seeds(by_kind: Mapping[str, Sequence[Cell]]) -> str:
    """How many seeds there are, and of what if not of all.

    Example:
        >>> _seeds({"lib": [{}, {}], "sae": [{}, {}]}), _seeds({"lib": [{}], "sae": [{}, {}]}), _seeds({"lib": [{}]})
        (', 2 seeds', ', 2 seeds of SAE', '')
    """
    most = max(map(len, by_kind.values()))
    some = [BASES[kind] for kind, seeds in by_kind.items() if len(seeds) == most]
    of_some = f" of {', '.join(some)}" if len(some) < len(by_kind) else ""
    return f", {most} seeds{of_some}" if most > 1 else ""


def overview(by_kind: Mapping[str, Sequence[Cell]]) -> str:
    """One row for each basis, with sums over node layers or sections.

    Args:
        by_kind: Columns of each seed, by basis.

    Returns:
        The table.
    """
    layers = _layers(by_kind)
    columns: dict[str, Callable[[Sequence[Cell]], str]] = {
        "features": lambda seeds: _mean(seeds, layers),
        "features required": lambda seeds: _bounded(seeds, "features", "layers", layers),
        "reconstruction": lambda seeds: _reconstruction(seeds, layers),
        "effective edges": _effective,
        "edges required": lambda seeds: _bounded(seeds, "edges_required", "sections", _sections(by_kind)),
        "of one section, under attack": _attacked,
        "causal": lambda seeds: _causal(seeds, "causal"),
        "of the most important": lambda seeds: _causal(seeds, "largest_causal"),
        "named": _named,
        "their importance": _importance_of_named,
        "AUROC of the names": _auroc,
    }
    return _table("basis", columns, by_kind)


def by_layer(by_kind: Mapping[str, Sequence[Cell]]) -> str:
    """The features required in each node layer."""
    layers = _layers(by_kind)
    columns = {name: (lambda seeds, name=name: _bounded(seeds, "features", "layers", (name,))) for name in layers}
    return _table("features required", columns, by_kind)


def against_pca(by_kind: Mapping[str, Sequence[Cell]]) -> list[str]:
    """Scores with as many features as principal components are required, minus those with these; else nothing."""
    rows = {kind: seeds for kind, seeds in by_kind.items() if _of(seeds, "against_pca", "layers")}
    if not rows:
        return []

    def difference(seeds: Sequence[Cell], name: str) -> str:
        return _change([one[name] for one in _of(seeds, "against_pca", "layers")])

    columns = {name: (lambda seeds, name=name: difference(seeds, name)) for name in _layers(by_kind)}
    return [_table("log likelihood less that of as many principal components", columns, rows)]


def effective_by_section(by_kind: Mapping[str, Sequence[Cell]]) -> str:
    """The effective edges of each section; of an autoencoder also those of latents alone."""
    rows = {kind: seeds for kind, seeds in by_kind.items() if _of(seeds, "edges", "sections")}
    if latents := [
        {"edges": {"sections": {name: x["of latents alone"] for name, x in one.items()}}}
        for one in _of(by_kind.get("sae", ()), "edges", "sections")
    ]:
        rows["SAE, latents alone"] = latents
    columns = {name: (lambda seeds, name=name: _effective(seeds, (name,))) for name in _sections(by_kind)}
    return _table("effective edges", columns, rows)


def by_section(by_kind: Mapping[str, Sequence[Cell]]) -> list[str]:
    """The edges required in each section, if these were attacked; else nothing."""
    found = [x for seeds in by_kind.values() for one in _of(seeds, "edges_required", "sections") for x in one.items()]
    names = [name for name in _sections(by_kind) if any(name == known and "worst" in x for known, x in found)]
    if not names:
        return []
    columns = {name: (lambda seeds, name=name: _withstood(seeds, name)) for name in _sections(by_kind)}
    rows = {kind: seeds for kind, seeds in by_kind.items() if _of(seeds, "edges_required", "sections")}
    return [_table("edges required, change under attack", columns, rows)]


def _withstood(seeds: Sequence[Cell], name: str) -> str:
    """Edges required in a section, and how the score changes with those of the others that lower it put back."""
    count = _bounded(seeds, "edges_required", "sections", [name])
    lost = [one[name] for one in _of(seeds, "edges_required", "sections") if "worst" in one.get(name, {})]
    texts = {"worst": "{:+.3f} ± {:.3f}", "random": "at random {:+.3f} ± {:.3f}"}
    changes = [text.format(x[kind], x[f"{kind} error"]) for x in lost for kind, text in texts.items() if kind in x]
    return ", ".join([count, *changes])


def autoencoders(seeds: Sequence[Cell]) -> str:
    """How good the autoencoders are, and what is lost without what they leave out."""
    layers = [one["features"]["layers"] for one in seeds if "features" in one]
    rows = {
        "variance explained, of other text": lambda x: f"{_average(one['explained'] for one in x):.0%}",
        "change of log likelihood without the error": lambda x: _change([one["without error"] for one in x]),
        "with all latents and the error": lambda x: _change([one["all"] for one in x]),
    }
    names = [name for name in (layers[0] if layers else ()) if all(name in of for of in layers)]
    lines = [f"| SAE | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for title, text in rows.items():
        lines.append(f"| {title} | {' | '.join(text([of[name] for of in layers]) for name in names)} |")
    return "\n".join(lines)


def _table(
    first: str, columns: Mapping[str, Callable[[Sequence[Cell]], str]], rows: Mapping[str, Sequence[Cell]]
) -> str:
    cells = {title: [text(seeds) for seeds in rows.values()] for title, text in columns.items()}
    # What was measured in no basis has no column.
    cells = {title: column for title, column in cells.items() if any(cell != _MISSING for cell in column)}
    lines = [f"| {first} | {' | '.join(cells)} |", "|---" * (1 + len(cells)) + "|"]
    for kind, *row in zip(rows, *cells.values(), strict=True):
        lines.append(f"| {BASES.get(kind, kind)} | {' | '.join(row)} |")
    return "\n".join(lines)


def _of(seeds: Sequence[Cell], column: str, parts: str) -> list[dict[str, Any]]:
    """Layers or sections of the seeds that have a column."""
    return [one[column][parts] for one in seeds if one.get(column)]


def _average(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _layers(by_kind: Mapping[str, Sequence[Cell]]) -> list[str]:
    """Names of the node layers: the most of any basis."""
    found = [layers for seeds in by_kind.values() for layers in _of(seeds, "features", "layers")]
    return list(max(found, key=len, default={}))


def _sections(by_kind: Mapping[str, Sequence[Cell]]) -> list[str]:
    """Names of the sections: the most of any basis."""
    found = [one for seeds in by_kind.values() for one in _of(seeds, "edges", "sections")]
    return list(max(found, key=len, default={}))


def _mean(seeds: Sequence[Cell], layers: Sequence[str]) -> str:
    """Mean number of features of all node layers; missing if that of one is."""
    found = _of(seeds, "features", "layers")
    if not found or any(name not in one for one in found for name in layers):
        return _MISSING
    return f"{_average(sum(one[name]['features'] for name in layers) for one in found):,.0f}"


def _bounded(seeds: Sequence[Cell], column: str, parts: str, only: Sequence[str] | None = None) -> str:
    """Mean over seeds, and the range of bounds of one standard error over all seeds."""
    found = _of(seeds, column, parts)
    if not found or any(name not in one for one in found for name in only or ()):
        return _MISSING
    found = [{name: x for name, x in one.items() if only is None or name in only} for one in found]
    if any(x["count"] is None for one in found for x in one.values()):
        return "not with all"
    count = _average(sum(x["count"] for x in one.values()) for one in found)
    low = min(sum(x["low"] for x in one.values()) for one in found)
    no_high = any(x["high"] is None for one in found for x in one.values())
    high = _MISSING if no_high else f"{max(sum(x['high'] for x in one.values()) for one in found):,}"
    return f"{count:,.0f} ({low:,} to {high})"


def _reconstruction(seeds: Sequence[Cell], layers: Sequence[str]) -> str:
    """The largest change of the score where one node layer is replaced by what all of its features say of it."""
    found = _of(seeds, "features", "layers")
    if not found or any(name not in one for one in found for name in layers):
        return _MISSING
    # Of a dictionary, without what it leaves out.
    changes = [[one[name].get("without error", one[name]["all"]) for one in found] for name in layers]
    return _change(max(changes, key=lambda of_layer: abs(_average(x["change"] for x in of_layer))))


def _effective(seeds: Sequence[Cell], only: Sequence[str] | None = None) -> str:
    """Sum over sections, with the standard error over samples and seeds; without that over samples if it is unknown."""
    found = [
        {name: x for name, x in one.items() if only is None or name in only} for one in _of(seeds, "edges", "sections")
    ]
    if not found:
        return _MISSING
    totals = [sum(x["effective"] for x in one.values()) for one in found]
    errors = [math.hypot(*(x["error"] or 0.0 for x in one.values())) for one in found]
    return f"{_average(totals):,.0f} ± {_error(totals, errors):,.0f}"


def _error(values: Sequence[float], errors: Sequence[float]) -> float:
    """Standard error of the mean of seeds: of their samples, and of the seeds.

    Example:
        >>> round(_error([1.0, 3.0], [0.0, 0.0]), 6), round(_error([1.0, 1.0], [3.0, 4.0]), 6), _error([1.0], [0.5])
        (1.0, 2.5, 0.5)
    """
    n = len(values)
    between = math.sqrt(sum((x - _average(values)) ** 2 for x in values) / (n - 1) / n) if n > 1 else 0.0
    return math.hypot(between, *(error / n for error in errors))


def _attacked(seeds: Sequence[Cell]) -> str:
    """Edges of one section by ablation alone, under attack at random if that was measured, and by descent."""
    found = [one for one in seeds if one.get("attacked") and one.get("edges_required")]
    if not found:
        return _MISSING
    names = [name for one in found for name in one["attacked"]["sections"]]
    at_random = [{"attacked": {"sections": one["attacked"]["random"]}} for one in found if "random" in one["attacked"]]
    kinds = [(found, "edges_required"), *([(at_random, "attacked")] if at_random else []), (found, "attacked")]
    return ", ".join(_bounded(cells, column, "sections", names) for cells, column in kinds)


def _causal(seeds: Sequence[Cell], column: str) -> str:
    for one in seeds:
        tested = sum(x["tested"] for of in _of([one], column, "layers") for x in of.values())
        if tested and one[column]["samples"] < samples_needed(tested, _LEVEL):
            return "too few pieces"
    return _counts(
        seeds, column, ("significant", "tested"), lambda significant, tested: f"{significant:,} of {tested:,}"
    )


def _named(seeds: Sequence[Cell]) -> str:
    return _counts(seeds, "names", ("named", "features"), share)


def _importance_of_named(seeds: Sequence[Cell]) -> str:
    """Smallest and largest share of the importance of a node layer that is that of features with a name."""
    found = [x["importance"] for one in _of(seeds, "names", "layers") for x in one.values()]
    return f"{min(found):.0%} to {max(found):.0%}" if found else _MISSING


def _counts(seeds: Sequence[Cell], column: str, keys: Sequence[str], text: Callable[[int, int], str]) -> str:
    """Text for two numbers, each summed over seeds and node layers."""
    found = _of(seeds, column, "layers")
    if not found:
        return _MISSING
    count, total = (sum(x[key] for one in found for x in one.values()) for key in keys)
    return text(count, total)


def share(count: int, total: int) -> str:
    """A share and its binomial standard error.

    Example:
        >>> share(50, 100)
        '50% ± 5%'
    """
    p = count / total
    return f"{p:.0%} ± {math.sqrt(p * (1 - p) / total):.0%}"


def _auroc(seeds: Sequence[Cell]) -> str:
    """Mean over node layers and seeds of the median, and the standard error if these are independent."""
    found = [x["median score"] for one in _of(seeds, "names", "layers") for x in one.values()]
    known = [score for score in found if score is not None]
    return f"{_average(known):.2f} ± {_error(known, []):.2f}" if known else _MISSING


def _change(values: Sequence[Mapping[str, float]]) -> str:
    changes = [x["change"] for x in values]
    return f"{_average(changes):+.3f} ± {_error(changes, [x['error'] for x in values]):.3f}"
