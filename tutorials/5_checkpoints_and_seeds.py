"""
Tracing old checkpoints, and comparing seeds
============================================

A training is over and had no callback. Its checkpoints tell the same story. And a second training, with another seed, tells
which part of the story is the task's and which is chance.
"""

# %%
# Two trainings without this library
# ----------------------------------
# A plain loop that saves state dicts. Lightning's checkpoints, Hugging Face's folders, FSDP's and DeepSpeed's would do as
# well.

import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
classes = torch.tensor(digits.target)
order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
seen, held_out = order[:1400], order[1400:]
folder = Path(tempfile.mkdtemp())


def build() -> nn.Module:
    """A new network."""
    return nn.Sequential(
        nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 10)
    )


def train(seed: int) -> nn.Module:
    """Train one, and save it at some steps."""
    torch.manual_seed(seed)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    (folder / f"seed{seed}").mkdir()
    for step in range(401):
        if step in (0, 10, 40, 100, 200, 400):
            torch.save(model.state_dict(), folder / f"seed{seed}" / f"step{step}.pt")
        if step == 400:
            break
        batch = seen[torch.randint(1400, (200,))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), classes[batch]).backward()
        optimizer.step()
    return model


models = [train(seed) for seed in (0, 1)]

# %%
# The run that they would have left
# ---------------------------------
# ``trace`` goes through the checkpoints in order of their steps: snapshots, lineages, events, figures, scalars. On the command
# line it is ``lib-lightning trace --config run.yaml --checkpoints 'checkpoints/*.ckpt'``.

from lib_lightning import trace

batches = [(images[held_out], classes[held_out])]
node_layers = ["input", "1", "3", "output"]
runs = []
for seed in (0, 1):
    logs = folder / "logs" / f"seed{seed}"
    runs.append(trace(build(), folder / f"seed{seed}", batches, node_layers, logs))
print(runs[0], runs[0].steps)

# %%
# How many features and edges over the training, in both:

import matplotlib.pyplot as plt

figure, axes = plt.subplots(1, 2, figsize=(7.5, 2.8))
for axis, name in zip(axes, ("features/total", "effective_edges/total"), strict=True):
    for seed, run in enumerate(runs):
        steps, values = run.scalars()[f"lib/{name}"]
        axis.plot([max(step, 0.5) for step in steps], values, "o-", label=f"seed {seed}")
    axis.set(xscale="log", xlabel="step", title=name)
axes[0].legend()
figure.tight_layout()

# %%
# Since when is a final feature recognisable?

last = runs[0].graph()
for layer in node_layers[:-1]:
    pages = [runs[0].feature(name) for name in last.feature_ids(layer)[:3]]
    print(
        f"{layer:>5}:",
        ", ".join(f"{page.id} since step {page.final_since}" for page in pages),
    )

# %%
# The same features in another seed?
# ----------------------------------
# ``compare`` matches features by their values on the same samples, and claims a match only if it is more than chance:
# permuted samples, and random bases of the same subspace.

from lib_lightning import compare

found = compare(
    runs[0].graph(), runs[1].graph(), *models, batches, names=("seed 0", "seed 1")
)
print(found)

# %%
# The strongest matches:

for match in found.matches[:6]:
    print(
        f"{match.a:>10} = {match.b:<10} {match.kind}, similarity {match.similarity:.2f}, p = {match.p_value:.1g}"
    )

# %%
# Side by side, shared features at the same height and in the same colour:

figure = found.plot()

# %%
# Before training
# ---------------
# Would two untrained networks have as much in common? Their first snapshots say so.

untrained = compare(runs[0].graph(0), runs[1].graph(0), names=("seed 0", "seed 1"))
for when, one in (("before", untrained), ("after", found)):
    shared = [match for match in one.matches if match.kind == "shared"]
    print(f"{when} training: {len(shared)} shared features")

# %%
# Next: :doc:`a pretrained language model </tutorials/6_language_model>`. More on checkpoints is in :doc:`/trace`, on
# comparisons in :doc:`/compare`, on many runs at once in :doc:`/many_runs`.
