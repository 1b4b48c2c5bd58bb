"""The claims of the paper (arXiv 2405.10928), measured again: trains networks and measures those without results.

    python -m recipes.paper --folder runs/paper --cifar10 PATH

Networks are saved in the folder, and results in the folder ``results`` next to this file; to measure a network again,
remove its file. If ``LIB_REFERENCE_DIR`` names a folder with the authors' networks, they are measured as well.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from recipes.paper.measure import BASES, Network, measure_all, remaining
from recipes.paper.networks import cifar10, language_model, modular_addition, published
from recipes.paper.table import RESULTS, report

Make = Callable[[int], Network]


@dataclass(frozen=True)
class Task:
    """Networks trained on the same task.

    Attributes:
        name: Name of the task.
        seeds: Number of networks.
        make: Function from a seed to a network.
        bases: Names in `BASES` of the bases to measure.
    """

    name: str
    seeds: int
    make: Make
    bases: Sequence[str] = tuple(BASES)


def tasks(folder: Path, images: Path | None = None, reference: Path | None = None) -> list[Task]:
    """List the tasks.

    Args:
        folder: Folder of the networks.
        images: CIFAR-10, as for `Cifar10`; None to omit it.
        reference: Folder with the authors' networks; None to omit them.

    Returns:
        The tasks.
    """
    found = [
        Task("Modular addition", 5, partial(modular_addition, folder=folder)),
        Task("Language model", 2, partial(language_model, folder=folder)),
    ]
    if images is not None:
        found.append(Task("CIFAR-10", 3, partial(cifar10, folder=folder, images=images)))
    if reference is not None:
        # In the two bases that the authors measured.
        found.append(Task("Published", 2, partial(published, reference=reference), ("lib", "pca")))
    return found


def run(todo: Sequence[Task], results: Path = RESULTS, reference: Path | None = None) -> str:
    """Train and measure the networks without results.

    Args:
        todo: The tasks.
        results: Folder of the results.
        reference: As for `report`.

    Returns:
        The tables.
    """
    for task in todo:
        for seed in range(task.seeds):
            if remaining(task.name, seed, results, task.bases):
                sys.stderr.write(f"{task.name}, seed {seed}\n")
                measure_all(task.make(seed), results, task.bases)
    return report(results, reference)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="recipes.paper", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/paper"), help="folder of the networks")
    parser.add_argument("--cifar10", type=Path, help="the official folder or an .npz, as for recipes/cifar10_mlp.yaml")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(args)
    reference = Path(os.environ["LIB_REFERENCE_DIR"]) if os.environ.get("LIB_REFERENCE_DIR") else None
    sys.stdout.write(run(tasks(options.folder, options.cifar10, reference), options.results, reference) + "\n")


if __name__ == "__main__":
    main()
