"""The graph of one sample: its features at their positions, and what they contribute to each other and to outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lib_lightning.errors import check_number, counted
from lib_lightning.model.node_layer import OUTPUT
from lib_lightning.sample_graph.prune import FlatGraph, influence, prune
from lib_lightning.sample_graph.trace import SampleTrace, TracedLayer

if TYPE_CHECKING:
    import networkx as nx

NodeKind = Literal["input", "feature", "error", "output"]
# What identifies a node: kind, node layer, position, and index of the feature or output.
NodeKey = tuple[str, str, int, int]


@dataclass(frozen=True)
class SampleNode:
    """One node of the graph of a sample.

    Attributes:
        kind: ``"feature"`` for a feature at a position; ``"error"`` for what features leave out at a position;
            ``"input"`` for all activations of the first node layer at a position; ``"output"`` for an output.
        layer: Name of its node layer; ``"output"`` for outputs.
        position: Its position in the tensor of the node layer, as flattened.
        index: Index of the feature in the graph, or of the output; -1 for inputs and errors.
        place: Its position in `SampleGraph.num_places`: those of the node layer with most positions.
        id: Id of the feature, such as ``"resid_post/17"``, or name of the output.
        label: Name of the feature, or "".
        value: Value of the feature; of an output, how far it is from that at the mean (of logits, less their average
            over all classes). None for inputs and errors.
        probability: Probability of the output; None for anything else, and for outputs that are numbers.
        influence: How much it matters to the outputs: their probability, divided among the nodes that lead to them.
    """

    kind: NodeKind
    layer: str
    position: int
    index: int
    place: int
    id: str
    label: str
    value: float | None
    probability: float | None
    influence: float

    @property
    def key(self) -> NodeKey:
        """Kind, layer, position and index: the node in `SampleGraph.to_networkx`."""
        return self.kind, self.layer, self.position, self.index


@dataclass(frozen=True)
class SampleGraph:
    """What features contribute to each other, and to the outputs, on a single sample.

    The weight of an edge from feature ``j`` at position ``s`` to feature ``i`` at position ``t`` of the next node layer
    is ``J_ij(s -> t) fhat_j(s)``: edges of an `InteractionGraph` are mean squares of these, summed over ``s``, and its
    attributions mean products with ``fhat_i(t)``.

    The edge from the error of position ``s`` has what the basis leaves out of the activations there, times the
    derivative. What the linear approximation leaves out, the edge from the error at the target's own position has as
    well. So the weights of the edges to a node, plus `left_out`, are exactly its value.

    Attributes:
        nodes: Inputs, features and errors in forward order, then outputs.
        sources: Index of the node from which each edge leads, shape ``(E,)``, int64.
        targets: Index of the node to which it leads, shape ``(E,)``, int64.
        weights: Its weight, shape ``(E,)``, float64.
        linearisation: What the linear approximation of the section before it leaves out of each node, shape ``(N,)``,
            float64; zero for inputs, errors and features of the first node layer.
        node_layers: Names of the node layers that have features, in forward order.
        num_places: Number of positions of the node layer with most of them.
        info: Settings.

    Example:
        >>> from torch import nn
        >>> from lib_lightning import compute_interaction_graph
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(64, 4)
        >>> graph = compute_interaction_graph(model, [x], ["input", "1", "output"])
        >>> one = graph.sample_graph(x[:1], model)
        >>> one.nodes[-1].kind, bool((one.left_out().abs() < 1e-6).all())
        ('output', True)
    """

    nodes: list[SampleNode]
    sources: Tensor
    targets: Tensor
    weights: Tensor
    linearisation: Tensor
    node_layers: list[str]
    num_places: int
    info: dict[str, Any]

    def __repr__(self) -> str:
        kinds = [node.kind for node in self.nodes]
        found = ", ".join(counted(kinds.count(kind), kind) for kind in ("input", "feature", "error", "output"))
        return f"SampleGraph({found}, {counted(len(self.weights), 'edge')})"

    def left_out(self) -> Tensor:
        """What the edges to each node leave out of its value: contributions of features that are no nodes.

        Returns:
            Shape ``(N,)``, float64; zero for inputs and errors.
        """
        values = torch.tensor([node.value or 0.0 for node in self.nodes], dtype=torch.float64, device="cpu")
        return values.index_add(0, self.targets, -self.weights)

    def pruned(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> SampleGraph:
        """The part of the graph that matters most to the outputs.

        Args:
            node_threshold: Share of the influence of all features and inputs that those have together that are kept.
                Outputs and inputs are kept in any case. Errors are kept if they have at least as much as the least of
                these, but are not counted: else a large error would hide all features.
            edge_threshold: The same for the edges between them. Nodes that no longer lead to an output, and features
                to which no edge leads, are left out as well.

        Returns:
            A smaller graph. The influence of its nodes is that in this one.
        """
        for name, value in {"node_threshold": node_threshold, "edge_threshold": edge_threshold}.items():
            check_number(name, value, lambda x: 0 <= x <= 1, "is a share from 0 to 1")
        nodes, edges = prune(self.flat(), node_threshold, edge_threshold)
        number = nodes.cumsum(0) - 1
        return replace(
            self,
            nodes=[node for node, keep in zip(self.nodes, nodes.tolist(), strict=True) if keep],
            sources=number[self.sources[edges]],
            targets=number[self.targets[edges]],
            weights=self.weights[edges],
            linearisation=self.linearisation[nodes],
            info={**self.info, "node_threshold": node_threshold, "edge_threshold": edge_threshold},
        )

    def flat(self) -> FlatGraph:
        """The same as tensors, for `lib_lightning.sample_graph.prune`."""
        stages = {name: i + 1 for i, name in enumerate(self.node_layers)}
        ends = {"input": 0, "output": len(stages) + 1}
        kinds = [node.kind for node in self.nodes]
        return FlatGraph(
            torch.tensor([ends[n.kind] if n.kind in ends else stages[n.layer] for n in self.nodes], device="cpu"),
            self.sources,
            self.targets,
            self.weights,
            torch.tensor(
                [self.info["weights"][n.index] if n.kind == OUTPUT else 0.0 for n in self.nodes],
                dtype=torch.float64,
                device="cpu",
            ),
            torch.tensor([kind == "feature" for kind in kinds], device="cpu"),
            torch.tensor([kind in ("input", "output") for kind in kinds], device="cpu"),
            torch.tensor([kind != "error" for kind in kinds], device="cpu"),
        )

    def to_networkx(self) -> nx.DiGraph[NodeKey]:
        """Convert to a directed graph.

        Returns:
            A graph with nodes ``(kind, node layer, position, index)``, such as ``("feature", "resid_post", 3, 17)``,
            with the other fields of `SampleNode` as attributes, and edges with attribute ``weight``.
        """
        import networkx as nx

        graph: nx.DiGraph[NodeKey] = nx.DiGraph()
        for node in self.nodes:
            graph.add_node(node.key, **{name: x for name, x in asdict(node).items() if x is not None})
        ends = zip(self.sources.tolist(), self.targets.tolist(), self.weights.tolist(), strict=True)
        graph.add_weighted_edges_from((self.nodes[s].key, self.nodes[t].key, weight) for s, t, weight in ends)
        return graph


@dataclass(frozen=True)
class FeatureNames:
    """Names of the features and outputs of an interaction graph.

    Attributes:
        ids: Ids of the features of each node layer.
        labels: Labels of the features of node layers that have any.
        output: Name of an output; "" for none.
    """

    ids: Mapping[str, Sequence[str]]
    labels: Mapping[str, Sequence[str]]
    output: Callable[[int], str]


def assemble(trace: SampleTrace, names: FeatureNames, info: Mapping[str, Any]) -> SampleGraph:
    """Make nodes and edges of the contributions at one sample.

    Args:
        trace: The contributions.
        names: Names of features and outputs.
        info: Settings, to be kept.

    Returns:
        The graph.
    """
    num_places = max(layer.size for layer in trace.layers)
    places = [_places(layer, num_places) for layer in trace.layers]
    nodes: list[SampleNode] = []
    edges: list[tuple[Tensor, Tensor, Tensor]] = []
    linearisation: list[Tensor] = []

    def add(new: list[SampleNode], left_out: Tensor | None = None) -> Tensor:
        start = len(nodes)
        nodes.extend(new)
        linearisation.append(torch.zeros(len(new), dtype=torch.float64, device="cpu") if left_out is None else left_out)
        return torch.arange(start, len(nodes), device="cpu")

    first, sources = trace.layers[0], trace.contributions[0].sources
    inputs = torch.full_like(first.positions, -1)
    inputs[first.valid] = add(_at_positions("input", first, places[0]))
    before = add(_features(trace, 0, places[0], names))
    edges.append((inputs[sources.positions], before, sources.values))
    for l, found in enumerate(trace.contributions):
        layer, place = trace.layers[l], places[l]
        errors = torch.full_like(layer.positions, -1)
        errors[layer.valid] = add(_at_positions("error", layer, place))
        is_last = l == len(trace.contributions) - 1
        new = _outputs(trace, places[-1], names) if is_last else _features(trace, l + 1, places[l + 1], names)
        after = add(new, found.linearisation)
        # What the linear approximation leaves out goes to the error nearest to the target.
        away = (place[None] - places[l + 1][found.targets.positions][:, None]).abs() + num_places * ~layer.valid
        of_errors = found.errors.clone()
        of_errors[torch.arange(len(of_errors), device="cpu"), away.argmin(1)] += found.linearisation
        for start, weights in ((before, found.features), (errors[layer.valid], of_errors[:, layer.valid])):
            i, j = weights.nonzero().T
            edges.append((start[j], after[i], weights[i, j]))
        before = after
    outputs = trace.contributions[-1].targets
    from_, to, weights = (torch.cat(parts) for parts in zip(*edges, strict=True))
    graph = SampleGraph(
        nodes,
        from_,
        to,
        weights,
        torch.cat(linearisation),
        [layer.name for layer in trace.layers[:-1]],
        num_places,
        {
            **info,
            "tokens": trace.tokens if len(trace.tokens or []) == num_places else None,
            "shape": next(layer.shape for layer in trace.layers if layer.size == num_places),
            "weights": dict(zip(outputs.indices.tolist(), outputs.influence.tolist(), strict=True)),
        },
    )
    flat = graph.flat()
    of_node, _ = influence(flat, torch.ones_like(flat.weights, dtype=torch.bool))
    return replace(graph, nodes=[replace(n, influence=x) for n, x in zip(nodes, of_node.tolist(), strict=True)])


def _places(layer: TracedLayer, num_places: int) -> Tensor:
    """The place of each position: its own if there are as many, else at the same share of the length."""
    if layer.size == num_places:
        return layer.positions
    return (layer.positions + 1) * num_places // layer.size - 1


def _at_positions(kind: NodeKind, layer: TracedLayer, places: Tensor) -> list[SampleNode]:
    at = [layer.positions[layer.valid].tolist(), places[layer.valid].tolist()]
    return [
        SampleNode(kind, layer.name, position, -1, place, "", "", None, None, 0.0)
        for position, place in zip(*at, strict=True)
    ]


def _features(trace: SampleTrace, l: int, places: Tensor, names: FeatureNames) -> list[SampleNode]:
    found, layer = trace.contributions[l].sources, trace.layers[l]
    ids, labels = names.ids[layer.name], names.labels.get(layer.name)
    at = [t.tolist() for t in (found.positions, found.indices, found.values)]
    return [
        SampleNode(
            "feature", layer.name, int(layer.positions[s]), j, int(places[s]), ids[j], labels[j] if labels else "",
            value, None, 0.0,
        )
        for s, j, value in zip(*at, strict=True)
    ]  # fmt: skip


def _outputs(trace: SampleTrace, places: Tensor, names: FeatureNames) -> list[SampleNode]:
    found = trace.contributions[-1].targets
    probabilities = [None] * len(found.values) if trace.probabilities is None else trace.probabilities.tolist()
    at = [t.tolist() for t in (found.positions, found.indices, found.values)]
    return [
        SampleNode(
            "output", OUTPUT, t, c, int(places[t]), names.output(c) or f"{OUTPUT}/{c}",
            "", value, p, 0.0,
        )
        for t, c, value, p in zip(*at, probabilities, strict=True)
    ]  # fmt: skip
