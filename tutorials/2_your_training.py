"""
The callback on your own training
=================================

One line in the trainer takes snapshots of the features while the model learns. Nothing in the model has to be changed,
and the training is bit for bit the same.
"""

# %%
# A LightningModule
# -----------------
# As you would write it: the callback finds out from ``validation_step`` how the model is called.

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Digits(L.LightningModule):
    """A small classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = (
            nn.Linear(64, 32),
            nn.Linear(32, 32),
            nn.Linear(32, 10),
        )

    def forward(self, x):
        return self.fc3(self.fc2(self.fc1(x).relu()).relu())

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val/accuracy", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
data = TensorDataset(images, torch.tensor(digits.target))
for_training, held_out = torch.utils.data.random_split(
    data, [1400, 397], torch.Generator().manual_seed(0)
)
train, val = (
    DataLoader(for_training, batch_size=64, shuffle=True),
    DataLoader(held_out, batch_size=397),
)

# %%
# One more line
# -------------
# ``LIBCallback()`` alone would do: it proposes node layers and takes at most 3% of the training time. In a training of
# seconds that is little, so this one asks for exact snapshots, two per tenfold increase of the step.

import tempfile

from lib_lightning import LIBCallback
from lib_lightning.features import ImageRenderer
from lib_lightning.labels import ExampleLabels

callback = LIBCallback(
    node_layers=["fc1:input", "fc2:input", "fc3:input", "output"],
    log_spaced=2,
    effort="exact",
    renderer=ImageRenderer(shape=(8, 8)),
    labeller=ExampleLabels(),
)
logs = tempfile.mkdtemp()
L.seed_everything(0)
trainer = L.Trainer(
    max_epochs=12,
    callbacks=[callback],
    accelerator="cpu",
    logger=L.pytorch.loggers.TensorBoardLogger(logs),
    enable_progress_bar=False,
    enable_model_summary=False,
    log_every_n_steps=10,
)
trainer.fit(Digits(), train, val)
print(
    f"accuracy {trainer.callback_metrics['val/accuracy']:.3f} after {trainer.global_step} steps"
)

# %%
# What is in the log directory
# ----------------------------
# Scalars are in TensorBoard's own file, as for every callback; all else is in the folder ``lib``.

from pathlib import Path

folder = Path(trainer.log_dir, "lib")
for path in sorted(folder.iterdir()):
    size = (
        sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
        if path.is_dir()
        else path.stat().st_size
    )
    print(f"{path.name:22} {size / 1024:8.0f} kB")

# %%
# The run
# -------
# ``Run`` reads it, here or anywhere else, also while the training goes on.

from lib_lightning.viewer import Run

run = Run(folder)
print(run)
print(
    "effective edges:",
    [round(value, 1) for value in run.scalars()["lib/effective_edges/total"][1]],
)

# %%
# What happened? (Changes of trend, *emerged* and *faded*, need more snapshots than these.)

for event in run.events()[:6]:
    print(event["text"])

# %%
# The graph at the end, the 12 most important features of each layer:

figure = run.graph().plot(max_features=12)

# %%
# Other callbacks can use the numbers
# -----------------------------------
# The scalars are there at every validation:

from lightning.pytorch.callbacks import EarlyStopping

early_stopping = EarlyStopping("lib/effective_edges/total", patience=5, check_finite=False)
for name in (
    "lib/features/total",
    "lib/effective_features/total",
    "lib/effective_edges/total",
):
    print(f"{name:30} {trainer.callback_metrics[name]:.1f}")

# %%
# Next: :doc:`reading the tab </tutorials/3_reading_the_tab>`. All settings are in :doc:`/callback`, all keys in
# :doc:`/reference/logged`.
