"""How sparse is the LIB, against what? Modular addition and digits, beside other bases and re-initialised weights.

    python -m recipes.controls --folder runs/controls           # measure, and write the results
    python -m recipes.controls --folder runs/controls --quick   # one small network, two draws: half a minute
    python -m recipes.controls                                  # the tables of docs/controls.md, from committed results

Ten minutes of one CPU core for each network of modular addition, which are those that the paper's authors have
published, in the folder that ``LIB_REFERENCE_DIR`` names (without it: digits alone), and one for each of digits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lib_lightning import NodeLayer, measure_controls
from lib_lightning.controls import Draws
from recipes.digits_mlp import Digits
from recipes.mlp import MLP
from recipes.modular_addition import AllPairs
from recipes.paper.networks import published_transformer

RESULTS = Path(__file__).parent / "controls.json"
# Number of draws of each. Those of ICA and of the dictionary only start elsewhere.
DRAWS = {"pca": 1, "neuron": 1, "varimax": 1, "ica": 2, "dictionary": 2, "random": 5, "reinit": 5}
NAMES = {
    "lib": "LIB",
    "pca": "PCA",
    "neuron": "neurons",
    "varimax": "varimax",
    "ica": "ICA",
    "dictionary": "sparse dictionary",
    "random": "random rotation",
    "reinit": "LIB of re-initialised weights",
}
METRICS = ("features", "effective_features", "edges", "effective_edges")


def addition(seed: int, folder: Path) -> tuple[nn.Module, list[Tensor], list[str]]:
    """A published network, its training sums in batches, and node layers."""
    data = AllPairs(113, train_fraction=0.3)
    model = published_transformer(folder / f"modular_addition_seed{seed}_weights.safetensors")
    return model, list(data.tokens[: data.n_train].split(1000)), ["embed", "mlp:input", "unembed:input", "output"]


def digits(seed: int, epochs: int = 30) -> tuple[nn.Module, list[Tensor], list[NodeLayer]]:
    """A trained network of ``digits_mlp.yaml`` with another seed, its training images, and node layers."""
    L.seed_everything(seed, verbose=False)
    model, data = MLP((64, 32, 32, 10), lr=3e-3), Digits()
    trainer = L.Trainer(
        max_epochs=epochs, limit_val_batches=0, logger=False, accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=data)
    images = torch.stack([image for image, _ in data.read()[0]])
    layers = [NodeLayer([tap]) for tap in ("layers.0:input", "layers.2:input", "layers.4:input", "output")]
    return model, list(images.split(512)), layers


def subjects(quick: bool) -> Iterator[tuple[str, int, tuple[nn.Module, list[Tensor], Sequence[Any]]]]:
    """Name, seed, and network with samples and node layers."""
    if quick:
        yield "digits", 0, digits(0, epochs=1)
        return
    if folder := os.environ.get("LIB_REFERENCE_DIR"):
        for seed in (0, 1):
            yield "modular addition", seed, addition(seed, Path(folder))
    for seed in (0, 1, 2):
        yield "digits", seed, digits(seed)


def measure(folder: Path, quick: bool = False) -> list[dict[str, Any]]:
    """Measure all networks that are not in the folder yet.

    Args:
        folder: Folder for the results of each.
        quick: Whether to measure a single one, with two draws.

    Returns:
        For each network ``task``, ``seed`` and, by basis and metric, the values of all draws.
    """
    results = []
    for task, seed, (model, batches, layers) in subjects(quick):
        values: dict[str, Any] = {}
        for kind in DRAWS:
            path = folder / f"{task.replace(' ', '-')}-{seed}-{kind}.json"
            if not path.exists():
                found = measure_controls(model, batches, layers, [kind], 2 if quick else DRAWS[kind], effort="exact")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({kind: _values(draws) for kind, draws in found.items()}))
            values |= json.loads(path.read_text())
        results.append({"task": task, "seed": seed, "values": values})
    return results


def _values(draws: Draws) -> dict[str, list[float]]:
    return {metric: [round(x, 2) for x in draws.values[f"{metric}/total"]] for metric in METRICS}


def tables(results: Sequence[Mapping[str, Any]]) -> str:
    """The results as tables in Markdown, one for each task.

    Args:
        results: As `measure` returns them.

    Returns:
        Lines of text: each number is the mean over networks and draws, with the standard deviation between draws of the
        same network, and between networks.
    """
    lines = []
    for task in dict.fromkeys(x["task"] for x in results):
        networks = [x["values"] for x in results if x["task"] == task]
        lines += ["", f"**{task.capitalize()}**, {len(networks)} networks", ""]
        lines += ["| | " + " | ".join(m.replace("_", " ") for m in METRICS) + " |", "|---|" + "---|" * len(METRICS)]
        for kind in networks[0]:
            cells = [_cell([x[kind][metric] for x in networks]) for metric in METRICS]
            lines.append(f"| {NAMES[kind]} | " + " | ".join(cells) + " |")
    return "\n".join(lines[1:])


def _cell(of_networks: Sequence[Sequence[float]]) -> str:
    """A number with its spread over draws (within) and networks (between), where there are several."""
    means = [statistics.fmean(draws) for draws in of_networks]
    parts = [f"{statistics.fmean(means):,.0f}"]
    if all(len(draws) > 1 for draws in of_networks):
        within = statistics.fmean(statistics.variance(draws) for draws in of_networks) ** 0.5
        parts.append(f"± {within:,.0f}")
    if len(means) > 1:
        parts.append(f"({min(means):,.0f} to {max(means):,.0f})")
    return " ".join(parts)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description="How sparse is the LIB, beside other bases and re-initialised weights?"
    )
    parser.add_argument("--folder", type=Path, help="measure what is missing here")
    parser.add_argument("--quick", action="store_true", help="a single network, trained for one epoch, with two draws")
    args = parser.parse_args()
    if args.folder:
        results = measure(args.folder, args.quick)
        if not args.quick:
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    else:
        results = json.loads(RESULTS.read_text())
    sys.stdout.write(tables(results) + "\n")


if __name__ == "__main__":
    main()
