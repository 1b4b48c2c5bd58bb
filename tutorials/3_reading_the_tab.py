"""
Reading the tab
===============

TensorBoard's tab LIB, the film of a run as one HTML file, and what a notebook shows are the same page. Here it is, live: a
run of a small network that learns an exclusive or.
"""

# %%
# A task with a known answer
# --------------------------
# Four switches, of which the first two matter: the class is 1 if one of them is on and the other off. Whoever solves it has
# to build a feature that no single switch is.

# sphinx_gallery_thumbnail_path = 'images/lib-tab.png'
import tempfile

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lib_lightning import LIBCallback
from lib_lightning.features import TableRenderer
from lib_lightning.labels import ExampleLabels

generator = torch.Generator().manual_seed(0)
switches = torch.randint(2, (2000, 4), generator=generator).float()
switches += 0.1 * torch.randn(2000, 4, generator=generator)
classes = (switches[:, 0].round() != switches[:, 1].round()).long()


class Switches(L.LightningModule):
    """Two hidden layers of eight units."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


columns = ["first", "second", "third", "fourth"]
callback = LIBCallback(
    node_layers=["input", "net.1", "net.3", "output"],
    at_steps=[0, 20, 40, 60, 80, 120, 200, 300],
    effort="exact",
    renderer=TableRenderer(columns),
    labeller=ExampleLabels(),
    output_names=["same", "different"],
)
L.seed_everything(1)
trainer = L.Trainer(
    max_steps=300,
    val_check_interval=20,
    check_val_every_n_epoch=None,
    callbacks=[callback],
    accelerator="cpu",
    logger=L.pytorch.loggers.TensorBoardLogger(tempfile.mkdtemp()),
    enable_progress_bar=False,
    enable_model_summary=False,
    log_every_n_steps=10,
)
data = TensorDataset(switches, classes)
train, val = (
    DataLoader(data, batch_size=100, shuffle=True),
    DataLoader(data, batch_size=1000),
)
trainer.fit(Switches(), train, val)
print(f"accuracy {trainer.callback_metrics['val/accuracy']:.3f}")

# %%
# The film
# --------
# ``Run(folder)`` at the end of a cell is the film; ``lib-lightning view FOLDER -o film.html`` writes it into a file, and
# ``tensorboard --logdir FOLDER`` has it in the tab LIB. Try it:
#
# - **Press play**, or move the slider: columns are node layers, dots features, lines their interactions. At step 0 the
#   switches are mixed at random; in the end few features are left.
# - **Click a dot** to follow a feature and see its page: examples, what drives it, which outputs it raises.
# - **Move "edges above"** to draw more or fewer lines, and **"features per layer"** for more dots.
# - **Below the graph** are a metric and the loss on the same axis, and what happened when.

from lib_lightning.viewer import Run

run = Run(trainer.log_dir)
run

# %%
# What to look for
# ----------------
# *When did it happen?* Loss and effective edges bend at the same steps. The list of events says which features were there
# before and which are new.

for event in run.events()[:8]:
    print(f"step {event['step']:>3}: {event['text']}")

# %%
# *What is the important feature for?* The last hidden layer has one feature that does nearly all of the work:

last = run.graph()
basis = last.bases["net.3"]
for index in range(min(3, basis.n_features)):
    feature = last.feature(("net.3", index))
    share = basis.importance[index] / basis.importance.sum()
    print(
        f"{feature.id}: {share:.0%} of the importance, label: {feature.label or 'none that predicts'}"
    )

# %%
# *Is a switch used that should not be?* The strongest edges from the input say so: the third and fourth switch drive
# nothing.

incoming = last.edges["input", "net.1"].sum(0)  # of each feature of the input
directions = last.bases["input"].from_features.abs()  # what these are made of
used = incoming @ (directions / directions.sum(1, keepdim=True))
for name, share in zip(columns, (used / used.sum()).tolist(), strict=True):
    print(f"{name}: {share:.0%}")

# %%
# *How certain is it?* Hollow dots have a direction that the samples do not determine, numbers in tooltips have standard
# errors.
#
# Next: :doc:`what one feature means, and turning it off </tutorials/4_one_feature>`. More on the page of a feature is in
# :doc:`/feature_page`, on dots, lines and words in :doc:`/reading_the_picture`.
