"""Which features does every seed have? Handwritten digits, two widths, six seeds each.

    python -m recipes.many_seeds --folder runs/many_seeds   # train the networks that are missing, and compare them
    python -m recipes.many_seeds                            # the tables of docs/many_runs.md, from committed results

About six minutes of one CPU core. Networks are those of ``digits_mlp.yaml`` with other widths and seeds, on the same
images.
Afterwards, ``tensorboard --logdir runs/many_seeds`` shows all of them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lib_lightning import universal_features
from lib_lightning.training.cli import main as lib_lightning
from lib_lightning.viewer.run import runs_below

RESULTS = Path(__file__).parent / "many_seeds.json"
WIDTHS = {"narrow": 16, "wide": 64}
SEEDS = range(6)
EPOCHS = 20


def train(folder: Path, seed: int, width: int, epochs: int = EPOCHS, log_spaced: int = 6) -> None:
    """Train one network with the callback, if its run is not there yet.

    Args:
        folder: Log directory.
        seed: Seed of weights and of the order of images; the split is that of seed 0 in all of them.
        width: Width of both hidden layers.
        epochs: Number of epochs.
        log_spaced: Number of snapshots per tenfold increase of the step.
    """
    if (folder / "lib" / "final.safetensors").exists():
        return
    callback = {
        "node_layers": [
            {"name": "pixels", "taps": ["layers.0:input"]},
            {"name": "hidden1", "taps": ["layers.2:input"]},
            {"name": "hidden2", "taps": ["layers.4:input"]},
            "output",
        ],
        "effort": "exact",
        "log_spaced": log_spaced,
        "renderer": {"class_path": "lib_lightning.features.ImageRenderer", "init_args": {"shape": [8, 8]}},
        "labeller": {"class_path": "lib_lightning.labels.ExampleLabels"},
    }
    config = {
        "seed_everything": seed,
        "model": {"class_path": "recipes.mlp.MLP", "init_args": {"sizes": [64, width, width, 10], "lr": 3e-3}},
        "data": {"class_path": "recipes.digits_mlp.Digits", "init_args": {"batch_size": 32, "split_seed": 0}},
        "trainer": {
            "max_epochs": epochs,
            "accelerator": "cpu",
            "log_every_n_steps": 10,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": str(folder.parent), "name": folder.name, "version": ""},
            },
            "callbacks": [{"class_path": "lib_lightning.LIBCallback", "init_args": callback}],
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    lib_lightning(["fit", "--config", str(folder / "run.yaml")])


def measure(folder: Path) -> dict[str, Any]:
    """Find the features that the networks have in common, before and after training.

    Args:
        folder: Folder of all log directories.

    Returns:
        ``runs``, and for ``untrained`` and ``trained`` networks each node ``layer``: the number of ``features`` of a
        network, how many of them are in all networks, in at least half of them, and in one only, as pairs with their
        share of the importance; and the ``universal`` features of trained ones.
    """
    runs = runs_below(folder)
    names = [run.folder.relative_to(folder.resolve()).as_posix() for run in runs]
    found: dict[str, Any] = {"runs": names}
    for when, step in (("untrained", 0), ("trained", None)):
        universal = universal_features([run.graph(step) for run in runs], names=names)
        n = len(names)
        found[when] = [
            {
                "layer": layer.layer,
                "features": sum(layer.num_features) / n,
                "all": [layer.counts[-1], layer.importance[-1]],
                "half": [sum(layer.counts[-(-n // 2) - 1 :]), sum(layer.importance[-(-n // 2) - 1 :])],
                "one": [layer.counts[0], layer.importance[0]],
            }
            for layer in universal.layers
        ]
        found["universal"] = [
            {
                "layer": feature.layer,
                "label": max(feature.labels.values(), key=list(feature.labels.values()).count, default=""),
                "importance": feature.importance,
                "similarity": feature.similarity,
            }
            for feature in universal.universal
        ]
    return found


def table(results: Mapping[str, Any]) -> str:
    """The results as a table in Markdown.

    Args:
        results: As `measure` returns them.

    Returns:
        Lines of text.
    """
    n = len(results["runs"])
    rows = [f"| | features | in all {n} | in at least {-(-n // 2)} | in one only |", "|---|---|---|---|---|"]
    for when in ("trained", "untrained"):
        for layer in results[when]:
            cells = [f"{layer[key][0]:.1f} ({layer[key][1]:.0%})" for key in ("all", "half", "one")]
            rows.append(f"| {layer['layer']}, {when} | {layer['features']:.1f} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: Arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(description="Which features does every seed have?")
    parser.add_argument("--folder", type=Path, help="train the networks that are missing here, compare, write results")
    options = parser.parse_args(args)
    if options.folder:
        for seed in SEEDS:
            for name, width in WIDTHS.items():
                train(options.folder / name / f"seed{seed}", seed, width)
        RESULTS.write_text(json.dumps(measure(options.folder), indent=1) + "\n")
        lib_lightning(["universal", str(options.folder)])
    sys.stdout.write(table(json.loads(RESULTS.read_text())) + "\n")


if __name__ == "__main__":
    main()
