"""Which features does a language model need? Eight bases, a small model and SmolLM2-135M: docs/bases_compared.md.

    python -m recipes.bases_compared --folder runs/bases             # measure what is missing, and write the results
    python -m recipes.bases_compared --folder runs/bases --network small
    python -m recipes.bases_compared                                 # the tables, from the committed results

Networks, activations, bases and autoencoders are kept in the folder, and each number in a small file of its own in
``results`` next to this file as soon as it is known, so that a run that was ended goes on. To measure something again,
remove its file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lib_lightning.model.instrumented import model_session
from recipes.bases_compared.fit import BASES, Fit
from recipes.bases_compared.measure import COLUMNS, Measurements
from recipes.bases_compared.subjects import (
    LARGE,
    LARGE_RANDOM,
    LARGE_SECTIONS,
    RANDOM,
    SMALL,
    Subject,
    small,
    smollm2,
)
from recipes.bases_compared.table import RESULTS, report

SEEDS = 2
# What is measured of the small network: the effect of each feature, so that some need no column of their own.
SMALL_ALL = {"bases": tuple(BASES), "columns": tuple(name for name in COLUMNS if name != "largest_causal")}
# What is measured of networks with new weights: of the large one, whose predictions are those of chance, what is quick.
SMALL_CONTROL = {"bases": ("lib", "pca", "neuron", "random"), "columns": SMALL_ALL["columns"]}
LARGE_CONTROL = {"bases": SMALL_CONTROL["bases"], "columns": ("features", "edges", "names")}
# What is measured of a pretrained network with other seeds than the first: of it only autoencoders are trained here.
TRAINED_HERE = {"bases": ("sae",), "columns": COLUMNS}


def measure(
    subject: Callable[[], Subject],
    name: str,
    seed: int,
    folder: Path,
    results: Path = RESULTS,
    bases: Sequence[str] = tuple(BASES),
    columns: Sequence[str] = COLUMNS,
    one_by_one: Sequence[tuple[str, str]] = (),
) -> None:
    """Measure what is missing of a network.

    Args:
        subject: Makes the network.
        name: Its name.
        seed: Its seed.
        folder: Folder for what is computed once.
        results: Folder for the results.
        bases: The bases, in this order for each column.
        columns: The columns, in this order.
        one_by_one: Sections in which edges required are counted one at a time; empty for all of them together.
    """
    cells = [
        (column, kind, section)
        for column in columns
        for section in (one_by_one if one_by_one and column == "edges_required" else [None])
        for kind in bases
    ]
    missing = {cell: path for cell in cells if not (path := cell_path(results, name, seed, *cell)).exists()}
    if not missing:
        return
    fit = Fit(subject(), folder)
    measurements = Measurements(fit)
    with model_session(fit.instrumented):
        for (column, kind, section), path in missing.items():
            found = measurements.column(column, kind, section)
            write(path, {"network": name, "seed": seed, "basis": kind, column: found})


def cell_path(
    results: Path, name: str, seed: int, column: str, kind: str, section: tuple[str, str] | None = None
) -> Path:
    """The file of one number."""
    part = "" if section is None else f"-{'-to-'.join(section)}"
    return results / f"{name.replace(' ', '_').lower()}-{seed}-{kind}-{column}{part}.json"


def write(path: Path, found: dict[str, Any]) -> None:
    """Write a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found) + "\n")
    part.replace(path)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="recipes.bases_compared", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, help="measure what is missing; networks and bases are kept here")
    parser.add_argument("--network", choices=("small", "smollm2"), help="measure only this one")
    parser.add_argument("--bases", nargs="+", choices=tuple(BASES), default=list(BASES), help="measure only these")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS), help="measure only these")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(SEEDS)), help="of what is trained here")
    options = parser.parse_args(args)
    if options.folder is not None:
        chosen = {"bases": options.bases, "columns": options.columns}

        def among(allowed: Mapping[str, Sequence[str]]) -> dict[str, Any]:
            return {name: [x for x in chosen[name] if x in allowed[name]] for name in chosen}

        if options.network != "smollm2":
            for seed in options.seeds:
                measure(partial(small, seed, options.folder), SMALL, seed, options.folder, **among(SMALL_ALL))
                fresh = partial(small, seed, options.folder, fresh=True)
                measure(fresh, RANDOM, seed, options.folder, **among(SMALL_CONTROL))
        if options.network != "small":
            for seed in options.seeds:
                of_seed = chosen if seed == 0 else among(TRAINED_HERE)
                measure(partial(smollm2, seed), LARGE, seed, options.folder, **of_seed, one_by_one=LARGE_SECTIONS)
            if 0 in options.seeds:
                measure(partial(smollm2, fresh=True), LARGE_RANDOM, 0, options.folder, **among(LARGE_CONTROL))
    sys.stdout.write(report() + "\n")


if __name__ == "__main__":
    main()
