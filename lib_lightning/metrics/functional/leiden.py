"""The Leiden algorithm: parts of a graph that hang together, found quickly and always the same."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

# Starts from which the best is taken, if no two agree earlier.
STARTS = 3
# What a round must add to the modularity, which is at most 1, to be followed by another: from a start, and at the end.
WORTHWHILE, MEASURABLE = 1e-4, 1e-9
# Rounds of improvement; a few are the rule.
ROUNDS = 50
# Time is proportional to the number of edges, and most of many edges are weak: if there are more than FEW, parts are
# looked for by those that hold the STRONG share of all weight, if that spares half of them. All edges have their say
# in the last improvements.
FEW, STRONG = 4000, 0.95


def leiden(n_nodes: int, pairs: Tensor, weights: Tensor, resolution: float = 1.0, seed: int = 0) -> Tensor:
    """Partition an undirected graph so that its modularity is as large as the Leiden algorithm can make it.

    python-igraph, which it uses, is under the GNU General Public License (2 or later); nothing else in this package
    imports it. Its one generator of random numbers is replaced meanwhile and is Python's `random`, its default,
    afterwards; numbers are drawn from neither.

    Args:
        n_nodes: Number of nodes.
        pairs: The two nodes of each edge, shape ``(m, 2)``, int64.
        weights: Weight of each edge, shape ``(m,)``, float64, positive.
        resolution: More than 1 for more and smaller parts, less for fewer and larger ones.
        seed: Where the random numbers start.

    Returns:
        The part that each node belongs to, shape ``(n_nodes,)``, int64, in no particular numbering.

    Note:
        Source: Traag, Waltman and van Eck, arXiv 1810.08473.

    Example:
        >>> two_pairs = torch.tensor([[0, 2], [1, 3]])
        >>> parts = leiden(4, two_pairs, torch.ones(2, dtype=torch.float64)).tolist()
        >>> parts[0] == parts[2], parts[1] == parts[3], parts[0] == parts[1]
        (True, True, False)
    """
    # Here, for it takes a second to import.
    import igraph

    graph = _igraph(n_nodes, pairs, weights)
    strong = _strong(weights)
    coarse = graph if len(strong) == len(weights) else _igraph(n_nodes, pairs[strong], weights[strong])
    best, best_quality = list(range(n_nodes)), -float("inf")
    igraph.set_random_number_generator(random.Random(seed))
    try:
        for _ in range(STARTS):
            parts, quality = _improve(coarse, None, resolution, WORTHWHILE)
            agreed = abs(quality - best_quality) < WORTHWHILE
            if quality > best_quality:
                best, best_quality = parts, quality
            if agreed:
                break
        best, _ = _improve(graph, best, resolution, MEASURABLE)
    finally:
        igraph.set_random_number_generator(random)
    return torch.tensor(best, dtype=torch.long)


def _igraph(n_nodes: int, pairs: Tensor, weights: Tensor) -> Any:
    import igraph

    # A list of tuples is what igraph reads by far the fastest.
    graph = igraph.Graph(n=n_nodes, edges=list(zip(pairs[:, 0].tolist(), pairs[:, 1].tolist(), strict=True)))
    graph.es["weight"] = weights.tolist()
    return graph


def _strong(weights: Tensor) -> Tensor:
    if len(weights) <= FEW:
        return torch.arange(len(weights))
    strongest_first, order = weights.sort(descending=True, stable=True)
    held = strongest_first.cumsum(0)
    n_strong = int((held < STRONG * held[-1]).sum()) + 1
    return order[:n_strong] if n_strong <= len(weights) / 2 else torch.arange(len(weights))


def _improve(graph: Any, parts: list[int] | None, resolution: float, enough: float) -> tuple[list[int], float]:
    """Improve parts (None: every node alone) until a round adds no more than enough."""
    quality = -float("inf")
    # Left to itself (n_iterations=-1), igraph before 1.0 stops after the first round that changes something.
    for _ in range(ROUNDS):
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
        if not gain > enough:
            break
    assert parts is not None
    return parts, quality
