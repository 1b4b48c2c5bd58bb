"""
What one feature means, and turning it off
==========================================

Derivatives say what a feature *would* do. Holding it at its mean shows what it does: which answers the network gets wrong
without it.
"""

# %%
# A convolutional network on digits
# ---------------------------------

import torch
from sklearn.datasets import load_digits
from torch import nn

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
classes = torch.tensor(digits.target)
order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
train, test = order[:1400], order[1400:]

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
    nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10),
)  # fmt: skip
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(240):
    batch = torch.randint(1400, (200,))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images[batch]), classes[batch]).backward()
    optimizer.step()


def accuracy_of(model: nn.Module) -> float:
    """Share of the test images that are read correctly."""
    with torch.no_grad():
        return float((model(images[test]).argmax(1) == classes[test]).float().mean())


print(f"test accuracy {accuracy_of(model):.3f}")

# %%
# Its features, with names
# ------------------------
# ``ExampleLabels`` looks for a property that the samples have in common where a feature is active, chooses it on half of
# the samples and scores it on the other half: 0.5 is chance, 1 always right.

from lib_lightning import compute_interaction_graph
from lib_lightning.labels import ExampleLabels, find_labels

samples = [(images[train], classes[train])]
graph = compute_interaction_graph(model, samples, ["input", "8", "output"])
for layer, labels in find_labels(graph, model, samples, ExampleLabels()).items():
    graph.labels[layer], graph.label_scores[layer] = labels.names, labels.scores
for index in range(5):
    feature = graph.feature(("8", index))
    print(
        f"{feature.id}: {feature.label or 'no name that predicts'} ({feature.label_score:.2f})"
    )

# %%
# One feature, closely
# --------------------
# Where is it largest and smallest?

import matplotlib.pyplot as plt

name = "8/0"
values = graph.bases["8"].encode(model[:9](images[train]).detach())[:, 0]
order = values.argsort()
figure, axes = plt.subplots(2, 6, figsize=(7, 2.6))
for row, chosen, title in zip(
    axes, (order.flip(0)[:6], order[:6]), ("largest", "smallest"), strict=True
):
    for axis, sample in zip(row, chosen.tolist(), strict=True):
        axis.imshow(images[train][sample, 0], cmap="gray_r")
        axis.set(xticks=[], yticks=[], title=f"{values[sample]:+.0f}")
    row[0].set_ylabel(title)
figure.tight_layout()

# %%
# What does it do to the answers? ``output_effects`` has the classes that it raises and lowers most.

effects = graph.output_effects["8"]
for output, change in zip(
    effects.outputs[0].tolist(), effects.changes[0].tolist(), strict=True
):
    if output >= 0:
        print(f"class {output}: {change:+.2f} nats")

# %%
# Turning it off
# --------------
# In the block the model itself runs with the feature held at its mean. Afterwards it is as before.

from lib_lightning.interventions import MEAN, edit_features, scale

before = accuracy_of(model)
with edit_features(model, graph, {name: MEAN}):
    without = accuracy_of(model)
    wrong = classes[test][model(images[test]).argmax(1) != classes[test]]
print(f"test accuracy {before:.3f}, without {name} {without:.3f}")
print("images read wrongly then, by class:", wrong.bincount(minlength=10).tolist())

# %%
# It can also be doubled, or become any function of its value:

with edit_features(model, graph, {name: scale(2.0)}):
    print(f"doubled: {accuracy_of(model):.3f}")
with edit_features(model, graph, {name: lambda f: f.clamp(min=0)}):
    print(f"only where it is positive: {accuracy_of(model):.3f}")

# %%
# Which features matter at all?
# -----------------------------
# ``feature_effects`` holds one feature after another at its mean, on samples that the basis was not fitted on, and says which
# changes are more than chance: with a false discovery rate of 5% over all that were tried.

from lib_lightning.ablation import log_likelihood
from lib_lightning.interventions import feature_effects

found = feature_effects(model, [(images[test], classes[test])], graph, log_likelihood)
in_hidden = {key: effect for key, effect in found.items() if key.startswith("8/")}
matter = sum(effect.significant for effect in in_hidden.values())
print(f"{matter} of {len(in_hidden)} features of the hidden layer matter")
for key, effect in list(in_hidden.items())[:5]:
    chance = "" if effect.significant else ", may be chance"
    print(f"{key}: {effect.change:+.3f} ± {effect.error:.3f} nats{chance}")

# %%
# Does the importance predict it?
# -------------------------------
# The importance for the output is the second-order estimate of what holding a feature at its mean costs. Large features do more
# than it says, as turning them off is no small step; the order is right.

predicted = graph.bases["8"].output_importance
measured = torch.tensor([-effect.change for effect in in_hidden.values()])
figure, axis = plt.subplots(figsize=(4.5, 3.2))
axis.loglog(predicted, measured.clamp(min=1e-4), "o")
axis.set(xlabel="importance for the output (nats)", ylabel="log-likelihood lost (nats)")
figure.tight_layout()

# %%
# Next: :doc:`tracing old checkpoints and comparing seeds </tutorials/5_checkpoints_and_seeds>`. What the test assumes, and what else
# can be edited, is in :doc:`/interventions`.
