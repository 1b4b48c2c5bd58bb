"""Which features does every seed have? Handwritten digits, two widths, six seeds each.

    python -m recipes.many_seeds --folder runs/many_seeds   # train the networks that are missing, and compare them
    python -m recipes.many_seeds                            # the tables of docs/many_runs.md, from committed results

Ten minutes of one CPU core. Networks are those of ``digits_mlp.yaml`` with other widths and seeds, on the same images.
Afterwards, ``tensorboard --logdir runs/many_seeds`` shows all of them.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from lib_lightning.training.cli import main as lib_lightning

RESULTS = Path(__file__).parent / "many_seeds.json"
WIDTHS = {"narrow": 16, "wide": 64}
SEEDS = range(6)
EPOCHS = 20


def train(folder: Path, seed: int, width: int, epochs: int = EPOCHS) -> None:
    """Train one network with the callback, if its run is not there yet.

    Args:
        folder: Log directory.
        seed: Seed of weights and of the order of images; the split is that of seed 0 in all of them.
        width: Width of both hidden layers.
        epochs: Number of epochs.
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
        "log_spaced": 6,
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
