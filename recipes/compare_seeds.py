"""Do networks with other seeds have the same features? Modular addition, five seeds, each compared with each other.

    python -m recipes.compare_seeds --folder runs/compare_seeds   # train the networks that are missing, and compare
    python -m recipes.compare_seeds                               # the table of docs/compare.md, from committed results

Two minutes of one CPU core per seed. Each network is that of ``modular_addition.yaml``, modulo 59, with another seed of
split and weights. It computes sums with waves of a few frequencies, which differ between seeds: features can be the
same in two networks only where these share a frequency.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lib_lightning import InteractionGraph, NodeLayer, compare, compute_interaction_graph
from lib_lightning.comparison import SideOfLayer
from lib_lightning.features.values import feature_values
from lib_lightning.labels.fourier import FourierLabels
from lib_lightning.model.instrumented import InstrumentedModel
from recipes.modular_addition import AllPairs, ModularAddition

RESULTS = Path(__file__).parent / "compare_seeds.json"
SEEDS = (0, 1, 2, 3, 4)
MODULUS, STEPS = 59, 3000
LAYER = "resid_mid"
# Share of the importance from which a feature counts: those below are hardly used.
IMPORTANT = 0.001


def trained(folder: Path, seed: int, modulus: int = MODULUS, steps: int = STEPS) -> ModularAddition:
    """A trained network, from a file if there is one.

    Args:
        folder: Folder for its weights.
        seed: Seed of split and weights.
        modulus: The modulus ``p``.
        steps: Number of steps.

    Returns:
        The network.
    """
    path = folder / f"seed-{seed}.pt"
    if path.exists():
        model = ModularAddition(modulus)
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    L.seed_everything(seed)
    model = ModularAddition(modulus)
    trainer = L.Trainer(
        max_epochs=1, limit_val_batches=0, logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=AllPairs(modulus, steps_per_epoch=steps, split_seed=seed))
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    return model


def measure(models: Sequence[ModularAddition], modulus: int = MODULUS) -> list[dict[str, Any]]:
    """Compare all pairs of networks on all sums.

    Args:
        models: The networks.
        modulus: The modulus ``p``.

    Returns:
        For each pair its number of shared features by frequency, see `count`.
    """
    batches = list(AllPairs(modulus).tokens.split(1000))
    layers = [NodeLayer(["transformer.mlp:input"], name=LAYER), "output"]
    graphs = [compute_interaction_graph(model, batches, layers) for model in models]
    frequencies = [_frequencies(graph, model, batches, modulus) for graph, model in zip(graphs, models, strict=True)]
    found = []
    for i, j in itertools.combinations(range(len(models)), 2):
        comparison = compare(graphs[i], graphs[j], models[i], models[j], batches, layers={LAYER: LAYER})
        layer = comparison.layers[0]
        found.append({"seeds": [i, j], **count((layer.a, layer.b), (frequencies[i], frequencies[j]))})
    return found


def _frequencies(graph: InteractionGraph, model: ModularAddition, batches: Sequence[Any], modulus: int) -> list[int]:
    """The frequency of each feature; 0 for none."""
    values, tokens = [], []
    for part in feature_values(InstrumentedModel(model, graph.node_layer_specs()), graph, batches):
        values.append(part.features[LAYER])
        tokens.append(part.inputs)
    labels = FourierLabels(modulus).of(torch.cat(values), torch.cat(tokens))
    return [label.frequency if label.explained >= 0.5 else 0 for label in labels]


def count(sides: tuple[SideOfLayer, SideOfLayer], frequencies: tuple[list[int], list[int]]) -> dict[str, Any]:
    """Count shared features by frequency.

    Args:
        sides: The features of both networks.
        frequencies: The frequency of each, 0 for none.

    Returns:
        ``frequencies`` of both networks, those ``in_both``; of the important features of both networks at such a
        frequency, ``of`` how many and how many are ``found`` again, shared or rotated; the same for all others as
        ``others`` and ``others_found``; and ``wrong``: pairs of shared features with different frequencies.
    """
    important = [
        [k for k, share in enumerate(side.importance.tolist()) if share >= IMPORTANT and frequencies[s][k]]
        for s, side in enumerate(sides)
    ]
    used = [sorted({frequencies[s][k] for k in important[s]}) for s in (0, 1)]
    both = sorted(set(used[0]) & set(used[1]))
    numbers = {"of": 0, "found": 0, "others": 0, "others_found": 0}
    for s, side in enumerate(sides):
        for k in important[s]:
            at_shared = frequencies[s][k] in both
            numbers["of" if at_shared else "others"] += 1
            if side.kinds[k] in ("shared", "rotated", "split", "merged"):
                numbers["found" if at_shared else "others_found"] += 1
    second = sides[1]
    wrong = sum(
        kind == "shared" and frequencies[0][int(second.partners[k])] != frequencies[1][k]
        for k, kind in enumerate(second.kinds)
        if k in important[1]
    )
    return {"frequencies": used, "in_both": both, **numbers, "wrong": wrong}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as a table in Markdown.

    Args:
        results: As `measure` returns them.

    Returns:
        Lines of text.
    """
    rows = ["| seeds | frequencies | in both | found again there | found again elsewhere |", "|---|---|---|---|---|"]
    for x in results:
        a, b = (", ".join(map(str, one)) for one in x["frequencies"])
        both = ", ".join(map(str, x["in_both"])) or "none"
        there = f"{x['found']} of {x['of']}" if x["of"] else ""
        rows.append(
            f"| {x['seeds'][0]}, {x['seeds'][1]} | {a}; {b} | {both} | {there} | {x['others_found']} of {x['others']} |"
        )
    return "\n".join(rows)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Do networks with other seeds have the same features?")
    parser.add_argument("--folder", type=Path, help="train the networks that are missing here, compare, write results")
    args = parser.parse_args()
    if args.folder:
        results = measure([trained(args.folder, seed) for seed in SEEDS])
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    sys.stdout.write(table(json.loads(RESULTS.read_text())) + "\n")


if __name__ == "__main__":
    main()
