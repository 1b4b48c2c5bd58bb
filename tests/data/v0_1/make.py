"""How these files were written, with version 0.1.0 (commit 935bd22): ``python make.py FOLDER``.

A run of 40 steps with two bases, tracking, labels and an ablation; its checkpoint after 20 steps, at the end of an
epoch; and a single graph.
Only the present version is imported here, so that this still says how to do it again.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lib_lightning import LIBCallback, compute_interaction_graph
from lib_lightning.ablation import AblationPlan

NODE_LAYERS = ["net.0:input", "net.2:input", "output"]


class Model(pl.LightningModule):
    """Nothing in it depends on random states, which Lightning's checkpoints do not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.03)

    def _data(self, n: int) -> DataLoader[Any]:
        x = torch.randn(n, 5, generator=torch.Generator().manual_seed(n))
        return DataLoader(TensorDataset(x, x.sum(1).gt(0).long()), batch_size=8)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._data(80)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._data(64)


def callback() -> LIBCallback:
    """The callback of the run."""
    return LIBCallback(
        NODE_LAYERS,
        num_samples=32,
        every_n_steps=8,
        baselines=["pca"],
        labeller=lambda features, inputs: [f"feature {j}" for j in range(features.shape[-1])],
        ablation=AblationPlan("accuracy", tolerance=0.05, every_n_snapshots=2),
    )


def main(folder: Path) -> None:
    """Write everything into a folder."""
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    model, lib = Model(), callback()
    trainer = pl.Trainer(
        default_root_dir=folder, max_epochs=4, accelerator="cpu", devices=1, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=4, logger=CSVLogger(folder, name="run", version=""),
        callbacks=[lib, ModelCheckpoint(folder / "checkpoints", every_n_epochs=2, save_top_k=-1, filename="{step}")],
    )  # fmt: skip
    trainer.fit(model)
    graph = compute_interaction_graph(model, [torch.randn(40, 5)], NODE_LAYERS, n_probes=4, final_basis="centered")
    graph.save(folder / "graph.safetensors")
    assert lib.graph is not None
    (folder / "expected.json").write_text(
        json.dumps(
            {
                "callback_metrics": {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("lib")},
                "lineages": {k: v.ids.tolist() for k, v in lib.graph.lineages.items()},
                "steps": [0, 8, 16, 24, 32, 40],
                "events": [json.loads(line) for line in (folder / "run/lib/events.jsonl").read_text().splitlines()]
                if (folder / "run/lib/events.jsonl").exists()
                else [],
            },
            indent=1,
        )
    )
    checkpoint, last = sorted((folder / "checkpoints").glob("*.ckpt"))
    state = torch.load(checkpoint, weights_only=True)
    (of_callback,) = (v for k, v in state["callbacks"].items() if k.startswith("LIBCallback"))
    # Where the run was is of no interest, and tests put their own folder there.
    of_callback["samples"]["written_to"], of_callback["report"]["folders"] = "FOLDER/run/lib", ["FOLDER/run/lib"]
    state["callbacks"] = {k: v for k, v in state["callbacks"].items() if k.startswith("LIBCallback")}
    torch.save(state, checkpoint.with_name("step-20.ckpt"))
    checkpoint.unlink()
    last.unlink()
    for image in folder.rglob("*.png"):
        image.unlink()
    for empty in [p for p in folder.rglob("*") if p.is_dir() and not any(p.iterdir())]:
        shutil.rmtree(empty)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
