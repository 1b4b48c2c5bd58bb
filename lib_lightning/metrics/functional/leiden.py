"""The Leiden algorithm for parts of a graph that hang together, always with the same result."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import torch
from torch import Tensor

# Starts before the best result counts as the best there is, unless two agree earlier.
STARTS = 5
# Rounds of improvement from one start; a few are the rule.
ROUNDS = 50
# Differences in modularity, which is at most 1, below which two partitions are as good as each other.
EQUAL = 1e-9

# Several numbers describe the same modules, and finding these costs more than everything else about a graph: the last
# results are kept, each under a hash of all that it depends on.
_KEPT = 128
_results: dict[bytes, Tensor] = {}


def leiden(n_nodes: int, pairs: Tensor, weights: Tensor, resolution: float = 1.0, seed: int = 0) -> Tensor:
    """Partition an undirected graph so that its modularity is as large as the Leiden algorithm can make it.

    It starts from several seeds, until two results agree, and takes the best.

    python-igraph, which it uses, is under the GNU General Public License (2 or later); nothing else in this package
    imports it. Its one generator of random numbers is replaced meanwhile and is Python's `random`, its default,
    afterwards; numbers are drawn from neither.

    Args:
        n_nodes: Number of nodes.
        pairs: The two nodes of each edge, shape ``(m, 2)``, int64, on the CPU.
        weights: Weight of each edge, shape ``(m,)``, float64, positive, on the CPU.
        resolution: More than 1 for more and smaller parts, less for fewer and larger ones.
        seed: Where the random numbers start.

    Returns:
        The part that each node belongs to, shape ``(n_nodes,)``, int64, in no particular numbering.

    Note:
        Source: Traag, Waltman and van Eck, arXiv 1810.08473.

    Example:
        >>> import torch
        >>> two_pairs = torch.tensor([[0, 2], [1, 3]])
        >>> parts = leiden(4, two_pairs, torch.ones(2, dtype=torch.float64))
        >>> bool(parts[0] == parts[2] != parts[1]), bool(parts[1] == parts[3])
        (True, True)
    """
    key = hashlib.blake2b(repr((n_nodes, resolution, seed)).encode())
    key.update(pairs.numpy().tobytes())
    key.update(weights.numpy().tobytes())
    if (known := _results.get(key.digest())) is None:
        known = _best_partition(n_nodes, pairs, weights, resolution, seed)
        while len(_results) >= _KEPT:
            _results.pop(next(iter(_results)))
        _results[key.digest()] = known
    return known.clone()


def _best_partition(n_nodes: int, pairs: Tensor, weights: Tensor, resolution: float, seed: int) -> Tensor:
    # Here, for it takes a second to import.
    import igraph

    graph = igraph.Graph(n=n_nodes, edges=pairs.numpy())
    graph.es["weight"] = weights.tolist()
    best, best_quality = list(range(n_nodes)), -float("inf")
    igraph.set_random_number_generator(random.Random(seed))
    try:
        for _ in range(STARTS):
            membership, quality = _improve(graph, resolution)
            if quality > best_quality + EQUAL:
                best, best_quality = membership, quality
            elif quality > best_quality - EQUAL:
                break
    finally:
        igraph.set_random_number_generator(random)
    return torch.tensor(best, dtype=torch.long)


def _improve(graph: Any, resolution: float) -> tuple[list[int], float]:
    # Left to itself (n_iterations=-1), igraph before 1.0 stops after the first round that changes something.
    membership, quality = None, -float("inf")
    for _ in range(ROUNDS):
        found = graph.community_leiden(
            objective_function="modularity",
            weights="weight",
            resolution=resolution,
            initial_membership=membership,
            n_iterations=1,
        )
        if membership is not None and not found.quality > quality + EQUAL:
            break
        membership, quality = found.membership, found.quality
    assert membership is not None
    return membership, quality
