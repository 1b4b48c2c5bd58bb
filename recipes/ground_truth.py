"""Networks whose features and modules are known by construction, and which of them each basis finds.

``python -m recipes.ground_truth`` prints a table over ten random networks, in half a minute on one CPU core.

Both tasks use one construction, `planted_network`. Its node layers consist of blocks of hidden coordinates, which a
random invertible matrix mixes into activations, and which the next layer's weights separate again.
Neither single activations nor, since the matrix is no rotation, directions of large variance show the blocks.

Modules: four blocks that do not depend on each other. In a basis that separates the blocks there are no edges between
them, so they are the modules. This depends on three choices, without which the LIB is worse:

- Every combination of the blocks' inputs is a sample: the blocks are independent on the data, too. On as many random
  samples, chance correlations rotate features of nearly equal importance into each other: nine networks in ten still
  come out right, the mean index is 0.97.
- Pre-activations have mean 0 and variance 1 over the samples, as batch norm would leave them. Without that, many ReLU
  are nearly always on or off; blocks are then nearly linear, features interact nearly one to one, and form more modules
  than there are blocks: four networks in ten come out right, the mean index is 0.92.
- The search for modules takes the edges' amplitudes, for strengths are squares. With strengths six networks in ten come
  out right, the mean index is 0.95: weak features become separate modules. This is not due to the LIB: there is
  still no edge between blocks, but the finer partition has a larger modularity.

Features: two blocks, of which the second depends on the first, while neither the first nor the output depends on the
second. The output depends on as many directions of a node layer as the first block has coordinates there, since three
times as many ReLU read them; the directions of the second block are more, and ten times as large. They affect the next
layer's activations, so only a basis computed from the output backwards shows that they do not affect the output.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lib_lightning import InteractionGraph, compute_interaction_graph
from lib_lightning.errors import LIBError
from lib_lightning.metrics import find_modules

BASES = ("lib", "pca", "neuron")
SEEDS = range(10)
# Coordinates of each block, node layer by node layer; the last one is the output.
MODULES = ((6, 5, 4, 3), (6, 5, 4, 3), (6, 5, 4, 3), (3, 2, 2, 2))
FEATURES = ((5, 6), (7, 8), (4, 9), (3, 0))


@dataclass(frozen=True)
class Planted:
    """A network with known blocks.

    Attributes:
        model: A plain chain of linear layers and ReLU.
        x: All samples, shape ``(n, d_0)``.
        node_layers: Where its blocks are mixed, the input first, and the output.
        widths: Coordinates of each block, for each node layer.
        mixing: For each node layer the matrix ``A`` that mixes coordinates: ``a = u A^T``, shape ``(d, d)``, float64.
    """

    model: nn.Sequential
    x: Tensor
    node_layers: list[str]
    widths: Sequence[Sequence[int]]
    mixing: list[Tensor]


def planted_network(
    u: Tensor, widths: Sequence[Sequence[int]], reads: Sequence[Sequence[bool]], scale: Sequence[float], seed: int
) -> Planted:
    """Make a random network of blocks that single activations do not show.

    Between two node layers, each block has three hidden ReLU for each coordinate that it reads in its own block.

    Args:
        u: Samples in the unmixed coordinates of the input, shape ``(n, d_0)``.
        widths: Coordinates of each block, for each node layer; ``(4, 2)`` blocks are coordinates 0 to 3, and 4 to 5.
        reads: Whether block ``i`` reads block ``j``, a square table.
        scale: Factor of the coordinates of each block at inner node layers.
        seed: For the random weights.

    Returns:
        The network.
    """
    generator = torch.Generator().manual_seed(seed)
    mixing = [invertible(sum(width), generator) for width in widths[:-1]]
    mixing.append(torch.eye(sum(widths[-1]), dtype=torch.float64))
    layers: list[nn.Module] = []
    x, u = u.double() @ mixing[0].T, u.double()
    for l, (before, after) in enumerate(itertools.pairwise(widths)):
        # A block without outputs has no neurons.
        hidden = [3 * width if later else 0 for width, later in zip(before, after, strict=True)]
        own = [[i == j for j in range(len(hidden))] for i in range(len(hidden))]
        W_in, W_out = (block_matrix(*sizes, generator) for sizes in ((hidden, before, reads), (after, hidden, own)))
        deviation, mean = torch.std_mean(u @ W_in.T, 0)
        W_in, bias = W_in / deviation[:, None], -mean / deviation
        u = (u @ W_in.T + bias).relu() @ W_out.T
        if l < len(widths) - 2:
            factors = torch.tensor(scale, dtype=torch.float64).repeat_interleave(torch.tensor(after))
            u, W_out = u * factors, W_out * factors[:, None]
        layers += [linear(W_in @ mixing[l].inverse(), bias), nn.ReLU(), linear(mixing[l + 1] @ W_out)]
    names = ["input", *(str(k) for k in range(2, len(layers) - 1, 3)), "output"]
    return Planted(nn.Sequential(*layers), x.float(), names, widths, mixing)


def invertible(d: int, generator: torch.Generator, stretch: float = 3.0) -> Tensor:
    """A random matrix ``(d, d)``, float64, that turns, stretches by ``1 / stretch`` to ``stretch``, and turns again."""
    before, after = (torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    return before @ torch.diag(stretch ** torch.linspace(-1, 1, d, dtype=torch.float64)) @ after


def block_matrix(
    rows: Sequence[int], columns: Sequence[int], filled: Sequence[Sequence[bool]], generator: torch.Generator
) -> Tensor:
    """A matrix of random blocks, with zeros where block ``i`` of the rows does not read block ``j`` of the columns."""
    W = torch.randn(sum(rows), sum(columns), generator=generator, dtype=torch.float64)
    block_of_row, block_of_column = (torch.arange(len(s)).repeat_interleave(torch.tensor(s)) for s in (rows, columns))
    return W * torch.tensor(filled)[block_of_row][:, block_of_column]


def linear(W: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A layer with these weights, in float32."""
    layer = nn.Linear(W.shape[1], W.shape[0], bias=bias is not None)
    layer.weight.data = W.float()
    if bias is not None:
        layer.bias.data = bias.float()
    return layer


def network_of_modules(seed: int, values: int = 8) -> Planted:
    """Four blocks of different sizes that never read each other.

    Args:
        seed: For weights and inputs.
        values: Different inputs of each block; every combination of them is one of the ``values ** 4`` samples.

    Returns:
        The network. Its modules are its blocks.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    inputs = [torch.randn(values, width, generator=generator) for width in MODULES[0]]
    every = torch.cartesian_prod(*[torch.arange(values)] * len(inputs))
    u = torch.cat([points[index] for points, index in zip(inputs, every.T, strict=True)], 1)
    own = [[i == j for j in range(len(inputs))] for i in range(len(inputs))]
    return planted_network(u, MODULES, own, [1.0] * len(inputs), seed)


def network_of_features(seed: int, n: int = 2000) -> Planted:
    """A block that determines the output, and a larger one that does not affect it.

    Args:
        seed: For weights and inputs.
        n: Samples.

    Returns:
        The network. At each node layer it has as many features as the first block has coordinates there.
    """
    scale = torch.tensor([1.0, 10.0]).repeat_interleave(torch.tensor(FEATURES[0]))
    u = torch.randn(n, len(scale), generator=torch.Generator().manual_seed(1000 + seed)) * scale
    return planted_network(u, FEATURES, [[True, False], [True, True]], [1.0, 10.0], seed)


def true_modules(planted: Planted, graph: InteractionGraph) -> list[Tensor]:
    """The block of each feature: the one whose coordinates alone give the largest share of its variance.

    Args:
        planted: The network.
        graph: Its features.

    Returns:
        Numbers of blocks for each node layer, shape ``(r,)``.
    """
    a, found = planted.x, []
    for l, (A, basis) in enumerate(zip(planted.mixing, graph.bases.values(), strict=True)):
        if l:
            a = planted.model[3 * l - 3 : 3 * l](a).detach()
        u = (a.double() - basis.mean) @ A.inverse().T
        widths = list(planted.widths[l])
        parts = zip(u.split(widths, 1), (A.T @ basis.to_features).split(widths), strict=True)
        found.append(torch.stack([(u_block @ C_block).var(0) for u_block, C_block in parts]).argmax(0))
    return found


def rand_index(seed: int, basis: Any, weights: Any = "amplitude") -> float:
    """How well the modules of the interaction graph agree with the blocks of a network, over features of all layers.

    Args:
        seed: Of the network.
        basis: As for `compute_interaction_graph`.
        weights: As for `find_modules`.

    Returns:
        The adjusted Rand index: 1 for the same partition, around 0 for an unrelated one.

    Raises:
        LIBError: If scikit-learn is not installed.
    """
    try:
        from sklearn.metrics import adjusted_rand_score
    except ImportError as error:
        raise LIBError("The adjusted Rand index is scikit-learn's: pip install scikit-learn.") from error
    planted = network_of_modules(seed)
    graph = compute_interaction_graph(planted.model, [planted.x], planted.node_layers, basis=basis)
    modules = find_modules(list(graph.edges.values()), weights=weights, seed=seed)
    return float(adjusted_rand_score(torch.cat(true_modules(planted, graph)).tolist(), torch.cat(modules).tolist()))


def features_found(seed: int, basis: Any) -> list[int]:
    """Number of features that a basis has at each node layer but the output.

    Args:
        seed: Of the network.
        basis: As for `compute_interaction_graph`.

    Returns:
        The numbers; the planted ones are the first of each pair in `FEATURES`.
    """
    planted = network_of_features(seed)
    graph = compute_interaction_graph(planted.model, [planted.x], planted.node_layers, basis=basis)
    return [basis.n_features for basis in graph.bases.values()][:-1]


def table(seeds: Sequence[int] = SEEDS) -> str:
    """Results of all bases as lines of Markdown.

    Args:
        seeds: Of the networks, two or more.

    Returns:
        The table.
    """
    lines = ["| basis | adjusted Rand index of the modules | features found / planted |", "|---|---|---|"]
    planted = ", ".join(str(width[0]) for width in FEATURES[:-1])
    for basis in BASES:
        index = torch.tensor([rand_index(seed, basis) for seed in seeds])
        counts = torch.tensor([features_found(seed, basis) for seed in seeds]).double().mean(0)
        found = ", ".join(f"{count:g}" for count in counts.tolist())
        lines.append(f"| {basis} | {index.mean():.2f} ± {index.std() / len(seeds) ** 0.5:.2f} | {found} / {planted} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
