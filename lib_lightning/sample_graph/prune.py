"""Which nodes and edges of the graph of one sample matter to its outputs.

The rules are those of circuit-tracer, so that thresholds mean the same here and there: a node passes its influence on
to the nodes that lead to it, in proportion to the absolute weights of their edges.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FlatGraph:
    """Nodes and edges of a graph that has no cycles.

    Attributes:
        stage: For each node a number that is larger than those of the nodes from which edges lead to it, ``(N,)``.
        sources: Node from which each edge leads, shape ``(E,)``, int64.
        targets: Node to which it leads, shape ``(E,)``, int64.
        weights: Its weight, shape ``(E,)``, float64.
        probabilities: Weight of each output, zero for other nodes, shape ``(N,)``, float64.
        needs_input: Nodes that are left out without an edge that leads to them, shape ``(N,)``, bool.
        is_kept: Nodes that are never left out, shape ``(N,)``, bool.
        is_counted: Nodes that shares of the influence are counted of, shape ``(N,)``, bool.
    """

    stage: Tensor
    sources: Tensor
    targets: Tensor
    weights: Tensor
    probabilities: Tensor
    needs_input: Tensor
    is_kept: Tensor
    is_counted: Tensor


def influence(graph: FlatGraph, edges: Tensor) -> tuple[Tensor, Tensor]:
    """How much nodes and edges matter to the outputs.

    Args:
        graph: The graph.
        edges: True for edges that are there, shape ``(E,)``.

    Returns:
        Influence of each node, shape ``(N,)``, and of each edge, shape ``(E,)``. The outputs themselves have none.
    """
    size = torch.where(edges, graph.weights.abs(), 0.0)
    total = torch.zeros_like(graph.probabilities).index_add_(0, graph.targets, size)
    share = size / total[graph.targets].clamp(min=torch.finfo(size.dtype).tiny)
    of_node, of_edge = torch.zeros_like(total), torch.zeros_like(size)
    target_stage = graph.stage[graph.targets]
    for stage in graph.stage.unique().flip(0):
        some = (target_stage == stage).nonzero()[:, 0]
        targets = graph.targets[some]
        of_edge[some] = share[some] * (of_node + graph.probabilities)[targets]
        of_node.index_add_(0, graph.sources[some], of_edge[some])
    return of_node, of_edge


def cumulative(scores: Tensor) -> Tensor:
    """For each score, the share of the sum that it and all larger ones make up together, shape ``(N,)``.

    Example:
        >>> cumulative(torch.tensor([1.0, 6.0, 3.0]))
        tensor([1.0000, 0.6000, 0.9000])
    """
    ordered, index = scores.sort(descending=True, stable=True)
    share = ordered.cumsum(0) / ordered.sum().clamp(min=torch.finfo(scores.dtype).tiny)
    return torch.empty_like(scores).scatter_(0, index, share)


def prune(graph: FlatGraph, node_threshold: float, edge_threshold: float) -> tuple[Tensor, Tensor]:
    """Choose the nodes and edges that matter most.

    Args:
        graph: The graph.
        node_threshold: Share of the influence of all counted nodes that the chosen ones among them have together.
            Others are chosen if they have at least as much as the least of these.
        edge_threshold: The same for edges between them; counted are those that lead from counted nodes.

    Returns:
        True for nodes and edges to keep, shapes ``(N,)`` and ``(E,)``.
    """
    everything = torch.ones_like(graph.weights, dtype=torch.bool)
    nodes = _largest(influence(graph, everything)[0], graph.is_counted, node_threshold) | graph.is_kept
    edges = nodes[graph.sources] & nodes[graph.targets]
    edges &= _largest(influence(graph, edges)[1], graph.is_counted[graph.sources], edge_threshold)
    while True:
        has_output = torch.zeros_like(nodes).index_fill_(0, graph.sources[edges], True)
        has_input = torch.zeros_like(nodes).index_fill_(0, graph.targets[edges], True)
        left = nodes & ((has_output & (has_input | ~graph.needs_input)) | graph.is_kept)
        edges &= left[graph.sources] & left[graph.targets]
        if torch.equal(left, nodes):
            return nodes, edges
        nodes = left


def _largest(scores: Tensor, counted: Tensor, threshold: float) -> Tensor:
    """The largest scores, such that the counted ones have a share of their sum together, and others of that size."""
    ordered = scores[counted].sort(descending=True).values
    if not len(ordered):
        return torch.ones_like(counted)
    share = ordered.cumsum(0) / ordered.sum().clamp(min=torch.finfo(scores.dtype).tiny)
    last = min(int(torch.searchsorted(share, threshold)), len(ordered) - 1)
    return scores >= ordered[last]
