"""Edges required under attack, in the bases that the paper compares: the table of docs/ablations.md.

    python -m recipes.attacked_edges --reference FOLDER

A perceptron 64-32-32-10 on scikit-learn's digits is trained here, three seeds, in seconds. With the folder of published
networks, a perceptron on CIFAR-10 is measured as well, and the paper authors' transformers for addition modulo 113, on
few test pairs: an attack by projected gradient descent takes minutes for each section there. Results that are in the
file are not computed again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lib_lightning import NodeLayer, compute_interaction_graph
from lib_lightning.ablation import EdgeAttack, edges_required
from lib_lightning.ablation.scores import accuracy
from recipes.digits_mlp import Digits
from recipes.mlp import MLP
from recipes.paper.measure import Network
from recipes.paper.networks import published, published_perceptron

RESULTS = Path(__file__).with_suffix(".json")
# What a row is the result of.
KEY = ("task", "seed", "basis", "section", "attack")
BASES = ("lib", "pca", "neuron")
ATTACKS: dict[str, EdgeAttack | None] = {
    "greedy": None,
    "random": EdgeAttack("random", n_draws=8),
    "pgd": EdgeAttack("pgd", n_steps=5, n_starts=1),
}


def digits(seed: int, epochs: int = 40) -> Network:
    """A perceptron on scikit-learn's digits, trained here.

    Args:
        seed: Of weights and batches.
        epochs: Epochs of training.

    Returns:
        The network, with its hidden layers and logits as node layers.
    """
    L.seed_everything(seed, verbose=False)
    data = Digits()
    data.setup("fit")
    module = MLP([64, 32, 32, 10])
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-3)
    x, labels = data.train[:][0], data.train.labels
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module.layers(x[rows]), labels[rows]).backward()
            optimizer.step()
    batches = [[(split[:][0].double(), split.labels)] for split in (data.train, data.test)]
    return Network(
        "Digits", seed, module.layers.double(), ["2:input", "4:input", "output"], *batches, accuracy, tolerance=0.01
    )


def addition(seed: int, reference: Path, scored: int = 500) -> Network:
    """A transformer of the paper's authors, with few test pairs.

    Args:
        seed: Index of the network, 0 or 1.
        reference: Folder with their weights.
        scored: Number of test pairs.

    Returns:
        The network.
    """
    network = published(seed, reference)
    tokens, answers = network.test[0]
    options = {"rtol": 1e-6}
    test = [(tokens[:scored], answers[:scored])]
    return Network(
        "Modular addition", seed, network.model, network.node_layers, network.fit, test, network.score, tolerance=0.01,
        search="bisection", options=options, ablation=network.ablation,
    )  # fmt: skip


def measure(network: Network, known: Collection[tuple[Any, ...]] = ()) -> Iterator[dict[str, Any]]:
    """Count the edges required in all bases, by ablation alone and under attack.

    Args:
        network: The network.
        known: Values of `KEY` of the rows to omit.

    Yields:
        One row for each section, basis and attack.
    """
    sections = ["-to-".join(pair) for pair in itertools.pairwise(map(name_of, network.node_layers))]
    for basis in BASES:
        rows = [(network.task, network.seed, basis, section, name) for section in sections for name in ATTACKS]
        missing = [row for row in rows if row not in known]
        if not missing:
            continue
        graph = compute_interaction_graph(
            network.model, network.fit, network.node_layers, basis=basis, effort="exact", **network.options
        )
        by_name = {"-to-".join(section): section for section in graph.edges}
        for row in missing:
            section, start = by_name[row[3]], time.process_time()
            found = edges_required(
                network.model, network.test, graph, network.score, network.tolerance, [section], network.search,
                ATTACKS[row[4]], **network.ablation,
            )[section]  # fmt: skip
            yield {
                **dict(zip(KEY, row, strict=True)), "edges": graph.edges[section].numel(), "count": found.count,
                "bounds": found.bounds, "score": round(found.score, 6), "unablated": round(found.unablated, 6),
                "error": round(found.error, 6), "tolerance": network.tolerance,
                "samples": sum(len(batch[1]) for batch in network.test),
                "seconds": round(time.process_time() - start, 1),
            }  # fmt: skip


def name_of(layer: str | NodeLayer) -> str:
    """The name of a node layer."""
    return layer if isinstance(layer, str) else layer.name


def write(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write results as JSON, one row per line."""
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format results, with one row for each network, section and basis.

    Args:
        rows: Results of `measure`.

    Returns:
        A Markdown table; in parentheses the bounds of one standard error.
    """
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in sorted(rows, key=lambda row: (row["task"], row["seed"])):
        key = (row["task"], row["seed"], row["section"], row["basis"], row["edges"])
        low, high = ("-" if bound is None else bound for bound in row["bounds"])
        count = "-" if row["count"] is None else row["count"]
        cells.setdefault(key, {})[row["attack"]] = f"{count} ({low} to {high})"
    lines = ["| network | section | basis | edges | greedy | random | pgd |", "|---|---|---|---|---|---|---|"]
    for (task, seed, section, basis, edges), found in cells.items():
        counts = " | ".join(found.get(name, "not run") for name in ATTACKS)
        lines.append(f"| {task}, seed {seed} | {section} | {basis} | {edges} | {counts} |")
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="recipes.attacked_edges", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--reference", type=Path, help="folder with the published networks")
    parser.add_argument("--seeds", type=int, default=3, help="number of perceptrons")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the results")
    options = parser.parse_args(args)
    rows: list[dict[str, Any]] = json.loads(options.results.read_text()) if options.results.exists() else []
    makers = [lambda seed=seed: digits(seed) for seed in range(options.seeds)]
    if options.reference is not None:
        # By bisection, as the authors count: a scan with an attack at every number would take hours.
        makers.append(lambda: replace(published_perceptron(options.reference), search="bisection"))
        makers += [lambda seed=seed: addition(seed, options.reference) for seed in range(2)]
    for make in makers:
        for row in measure(make(), {tuple(row[key] for key in KEY) for row in rows}):
            rows.append(row)
            write(rows, options.results)
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
