"""
Any module in ten lines
=======================

How many features does a trained network have, what do they respond to, and how do they depend on each other? All it takes
is the model and some data.
"""

# %%
# A model
# -------
# Any ``nn.Module`` will do. This one learns to read the handwritten digits that come with scikit-learn: 1,797 images of
# 8 x 8 pixels.

# sphinx_gallery_thumbnail_path = 'images/graph-grokked.png'
import torch
from sklearn.datasets import load_digits
from torch import nn

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).flatten(1) / 16
classes = torch.tensor(digits.target)
order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
train, test = order[:1400], order[1400:]

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
)
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(300):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images[train]), classes[train]).backward()
    optimizer.step()
print(
    f"test accuracy {(model(images[test]).argmax(1) == classes[test]).float().mean():.2f}"
)

# %%
# Its graph
# ---------
# ``node_layers`` says where to cut the model: here at its input, behind both activation functions, and at its output.
# A batch is what a data loader would return. Labels beside the images are not needed; with them, examples say to
# which class they belong.

from lib_lightning import compute_interaction_graph

graph = compute_interaction_graph(
    model, [(images[train], classes[train])], ["input", "1", "3", "output"]
)
graph

# %%
# Each column is a node layer, each dot a feature: a direction in the activations that makes a difference to the next
# layer. Dots are as large as this difference, lines as wide as the dependence between two features. The numbers below a
# node layer say how many features it has: far fewer than the 64 pixels and 32 units that it is made of.
#
# The same as numbers:

for name, basis in graph.bases.items():
    share = basis.importance / basis.importance.sum()
    print(
        f"{name:>7}: {basis.n_features:2} features, the first three have {share[:3].sum():.0%} of the importance"
    )

# %%
# What is a feature?
# ------------------
# A linear function of the activations. ``encode`` computes all of them, ``decode`` leads back.

hidden = model[:2](images[test])
features = graph.bases["1"].encode(hidden)
back = graph.bases["1"].decode(features)
logits = model[2:](hidden)
print(f"{hidden.shape[1]} activations, {features.shape[1]} features")
print(
    f"of the logits, the features explain {1 - (model[2:](back) - logits).var() / logits.var():.4%}"
)

# %%
# Where is the most important feature large, and where is it small?

values = features[:, 0]
print("largest at images of", classes[test][values.argsort(descending=True)[:8]].tolist())
print("smallest at images of", classes[test][values.argsort()[:8]].tolist())

# %%
# What does it depend on?
# -----------------------
# ``edges`` say how strongly, ``attributions`` with which sign: positive where a feature drives the other, negative where
# it holds against it.

edges = graph.edges["1", "3"]
print(
    "edges",
    tuple(edges.shape),
    "from 1 to 3; half of their strength is in the strongest",
    end=" ",
)
strengths = edges.flatten().sort(descending=True).values
print(int((strengths.cumsum(0) < strengths.sum() / 2).sum()) + 1)
strongest = divmod(int(edges.argmax()), edges.shape[1])
print(
    f"the strongest leads from 1/{strongest[1]} to 3/{strongest[0]}:", f"{edges.max():.3g}"
)

# %%
# Is that few?
# ------------
# The same network, seen as principal components and as single neurons, is the yardstick.

for kind in ("lib", "pca", "neuron"):
    other = compute_interaction_graph(
        model, [images[train]], ["input", "1", "3", "output"], basis=kind
    )
    metrics = other.measure()
    print(f"{kind:>6}: {metrics['effective_edges/total']:7.1f} effective edges")

# %%
# Keep it
# -------
# A graph is a file that is read without running anything in it.

import tempfile

from lib_lightning import InteractionGraph

path = f"{tempfile.mkdtemp()}/digits.safetensors"
graph.save(path)
print(InteractionGraph.load(path))

# %%
# Next: :doc:`the same all through a training </tutorials/2_your_training>`. Where a model can be cut is in
# :doc:`/how_to/node_layers`, what the picture says in :doc:`/reading_the_picture`.
