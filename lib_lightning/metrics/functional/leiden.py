"""The Leiden algorithm: a partition of a graph into communities, fast and deterministic."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

# Largest number of runs, of which the best is used. Fewer if two of them agree.
MAX_RUNS = 3
# Smallest gain of modularity, which is at most 1, for another iteration: in each run, and in the final improvement.
RUN_GAIN, FINAL_GAIN = 1e-4, 1e-9
# Largest number of iterations; usually a few suffice.
MAX_ITERATIONS = 50
# Time is proportional to the number of edges, most of which are weak in large graphs. With more than MANY_EDGES, the
# runs use only the strongest edges, which have the share STRONG_SHARE of the total weight, if these are at most half of
# all. The final improvement uses all edges.
MANY_EDGES, STRONG_SHARE = 4000, 0.95


def leiden(n_nodes: int, pairs: Tensor, weights: Tensor, resolution: float = 1.0, seed: int = 0) -> Tensor:
    """Partition an undirected graph to maximize its modularity, with the Leiden algorithm.

    It uses python-igraph, which is under the GNU General Public License (2 or later) and imported nowhere else in this
    package. The random number generator of igraph is replaced during the call, and is its default, Python's `random`,
    afterwards. The state of neither changes.

    Args:
        n_nodes: Number of nodes.
        pairs: The two nodes of each edge, shape ``(m, 2)``, int64.
        weights: Weight of each edge, shape ``(m,)``, float64, positive.
        resolution: Larger than 1 for more and smaller parts, smaller for fewer and larger ones.
        seed: Seed of the random numbers.

    Returns:
        The part of each node, shape ``(n_nodes,)``, int64, in arbitrary order.

    Note:
        Source: Traag, Waltman and van Eck, arXiv 1810.08473.

    Example:
        >>> two_pairs = torch.tensor([[0, 2], [1, 3]])
        >>> parts = leiden(4, two_pairs, torch.ones(2, dtype=torch.float64)).tolist()
        >>> parts[0] == parts[2], parts[1] == parts[3], parts[0] == parts[1]
        (True, True, False)
    """
    # Importing igraph takes a second.
    import igraph

    graph = _igraph(n_nodes, pairs, weights)
    strong = _strong(weights)
    coarse = graph if len(strong) == len(weights) else _igraph(n_nodes, pairs[strong], weights[strong])
    best, best_quality = list(range(n_nodes)), -float("inf")
    igraph.set_random_number_generator(random.Random(seed))
    try:
        for _ in range(MAX_RUNS):
            parts, quality = _improve(coarse, None, resolution, RUN_GAIN)
            agreed = abs(quality - best_quality) < RUN_GAIN
            if quality > best_quality:
                best, best_quality = parts, quality
            if agreed:
                break
        best, _ = _improve(graph, best, resolution, FINAL_GAIN)
    finally:
        igraph.set_random_number_generator(random)
    return torch.tensor(best, dtype=torch.long, device="cpu")


def _igraph(n_nodes: int, pairs: Tensor, weights: Tensor) -> Any:
    import igraph

    # A list of tuples is the fastest input.
    graph = igraph.Graph(n=n_nodes, edges=list(zip(pairs[:, 0].tolist(), pairs[:, 1].tolist(), strict=True)))
    graph.es["weight"] = weights.tolist()
    return graph


def _strong(weights: Tensor) -> Tensor:
    if len(weights) <= MANY_EDGES:
        return torch.arange(len(weights), device="cpu")
    strongest_first, order = weights.sort(descending=True, stable=True)
    cumulative = strongest_first.cumsum(0)
    n_strong = int((cumulative < STRONG_SHARE * cumulative[-1]).sum()) + 1
    return order[:n_strong] if n_strong <= len(weights) / 2 else torch.arange(len(weights), device="cpu")


def _improve(graph: Any, parts: list[int] | None, resolution: float, min_gain: float) -> tuple[list[int], float]:
    """Improve a partition (None: every node is a part) until an iteration gains at most ``min_gain``."""
    quality = -float("inf")
    # With n_iterations=-1, igraph before 1.0 stops after the first iteration with a change.
    for _ in range(MAX_ITERATIONS):
        found = graph.community_leiden(
            objective_function="modularity",
            weights="weight",
            resolution=resolution,
            initial_membership=parts,
            n_iterations=1,
        )
        gain = found.quality - quality
        if parts is None or gain > 0:
            parts, quality = found.membership, found.quality
        if not gain > min_gain:
            break
    assert parts is not None
    return parts, quality
