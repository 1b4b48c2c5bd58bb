"""What two networks have in common: their features, the subspaces that these span, and their edges."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from lib_lightning.comparison.layers import LOST, NEW, FeatureMatch, LayerComparison, Names, compare_layers
from lib_lightning.comparison.page import PageSection, comparison_page
from lib_lightning.comparison.paired_values import NUM_VALUES, computed_values, stored_values
from lib_lightning.comparison.scene import pictures_of
from lib_lightning.comparison.sections import EdgeChange, SectionComparison, compare_section
from lib_lightning.comparison.table import table_of
from lib_lightning.comparison.weights import check_weights
from lib_lightning.errors import SettingError, SettingTypeError, check_list, check_number, did_you_mean, quoted
from lib_lightning.graph import InteractionGraph
from lib_lightning.io.basis_file import write_bytes
from lib_lightning.io.basis_format import STEP, WEIGHTS_HASH
from lib_lightning.io.fingerprint import fingerprint

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FALSE_DISCOVERY_RATE = 0.05
# Version of the JSON file.
_FORMAT = 1


@dataclass(frozen=True)
class Comparison:
    """Which features and edges of one network are in another.

    Attributes:
        names: What the networks are called.
        layers: The comparison of each node layer, in forward order of the first network.
        sections: The comparison of the edges of each section that both networks have.
        level: False discovery rate of the matches.

    Example:
        >>> import torch
        >>> from lib_lightning import compare, compute_interaction_graph
        >>> model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3))
        >>> batches, layers = [torch.randn(500, 5)], ["input", "1", "output"]
        >>> graph = compute_interaction_graph(model, batches, layers)
        >>> found = compare(graph, graph, model, model, batches)
        >>> found.lost, found.new, found.changed_edges
        ([], [], [])
        >>> found.match("1/0").b, round(found.layers[1].overlap, 6)
        ('1/0', 1.0)
    """

    names: tuple[str, str]
    layers: list[LayerComparison]
    sections: list[SectionComparison]
    level: float
    graphs: tuple[InteractionGraph, InteractionGraph] = field(repr=False, compare=False)

    @property
    def matches(self) -> list[FeatureMatch]:
        """All matches, by node layer, with their kinds, similarities and p-values."""
        return [match for layer in self.layers for match in layer.matches]

    @property
    def lost(self) -> list[str]:
        """Ids of the features of the first network that the second one does not have."""
        return [name for x in self.layers for name, kind in zip(x.a.ids, x.a.kinds, strict=True) if kind == LOST]

    @property
    def new(self) -> list[str]:
        """Ids of the features of the second network that the first one does not have."""
        return [name for x in self.layers for name, kind in zip(x.b.ids, x.b.kinds, strict=True) if kind == NEW]

    @property
    def p_values(self) -> dict[tuple[str, str], float]:
        """How probable it is that a match is chance, by ids of its features in both networks."""
        return {(match.a, match.b): match.p_value for match in self.matches}

    @property
    def changed_edges(self) -> list[EdgeChange]:
        """Edges that one network has and the other has not, or has with another strength."""
        return [change for section in self.sections for change in section.changed]

    def match(self, feature_id: str) -> FeatureMatch | None:
        """The match of a feature of the first network.

        Args:
            feature_id: Its id.

        Returns:
            Its first match; None if it has none.

        Raises:
            SettingError: If the first network has no such feature among those that were compared.
        """
        known = [name for layer in self.layers for name in layer.a.ids]
        if feature_id not in known:
            raise SettingError(f"There is no feature '{feature_id}' here.{did_you_mean(feature_id, known)}")
        return next((match for match in self.matches if match.a == feature_id), None)

    def table(self) -> str:
        """A table of all node layers and sections, and of what differs, as text."""
        return table_of(self.names, self.layers, self.sections, self.level)

    def __str__(self) -> str:
        return self.table()

    def plot(self) -> Figure:
        """Draw both graphs side by side: matched features at the same height and in the same colour.

        Returns:
            A matplotlib figure that is not registered with pyplot.
        """
        from lib_lightning.comparison.picture import draw_comparison

        return draw_comparison(self.graphs, self.names, self.layers, self.sections)

    def view(self, path: str | PathLike[str] = "comparison.html") -> Path:
        """Write both graphs side by side, with the table, as one HTML file that needs no server and loads nothing.

        Args:
            path: The file; missing folders are created.

        Returns:
            Its path.
        """
        return write_page([self], path)

    def to_dict(self) -> dict[str, Any]:
        """All results as plain values, as `save` writes them: NaN is None."""

        def side(x: Any) -> dict[str, Any]:
            return {
                "layer": x.layer,
                "shared_importance": x.shared_importance,
                "explained_importance": x.explained_importance,
                "features": [
                    {"id": i, "kind": k, "similarity": s, "p_value": p, "explained": e, "importance": w}
                    for i, k, s, p, e, w in zip(
                        x.ids, x.kinds, *(t.tolist() for t in (x.similarity, x.p_values, x.explained, x.importance)),
                        strict=True,
                    )
                ],
            }  # fmt: skip

        layers = [
            {
                "a": side(layer.a),
                "b": side(layer.b),
                "overlap": layer.overlap,
                "overlap_p_value": layer.overlap_p_value,
                "num_values": layer.num_values,
                "matches": [asdict(match) for match in layer.matches],
            }
            for layer in self.layers
        ]
        sections = [
            {key: None if isinstance(x, float) and math.isnan(x) else x for key, x in asdict(section).items()}
            for section in self.sections
        ]
        return {
            "format": _FORMAT,
            "names": self.names,
            "fingerprints": [_fingerprint(graph) for graph in self.graphs],
            "level": self.level,
            "layers": layers,
            "sections": sections,
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write all results as JSON. An existing file is replaced atomically.

        Args:
            path: The file; missing folders are created.
        """
        write_bytes(Path(path), (json.dumps(self.to_dict(), indent=1) + "\n").encode())


def _fingerprint(graph: InteractionGraph) -> str:
    """By which the viewer recognises the snapshot of this graph."""
    layers = [
        (name, np.array([int(i.rpartition("/")[2]) for i in graph.feature_ids(name)]), basis.importance.numpy())
        for name, basis in graph.bases.items()
    ]
    return fingerprint(graph.info.get(STEP), graph.info.get(WEIGHTS_HASH), layers)


def write_page(comparisons: Sequence[Comparison], path: str | PathLike[str]) -> Path:
    """Write comparisons as one HTML file that needs no server and loads nothing.

    Args:
        comparisons: The comparisons, one below the other.
        path: The file; missing folders are created.

    Returns:
        Its path.
    """
    sections = [
        PageSection(one.names, pictures_of(one.graphs, one.layers, one.sections), one.table()) for one in comparisons
    ]
    write_bytes(path, comparison_page(sections).encode())
    return Path(path)


def compare(
    graph_a: InteractionGraph,
    graph_b: InteractionGraph,
    model_a: nn.Module | None = None,
    model_b: nn.Module | None = None,
    batches: Iterable[Any] | None = None,
    *,
    layers: Mapping[str, str] | None = None,
    names: tuple[str, str] = ("A", "B"),
    level: float = FALSE_DISCOVERY_RATE,
    num_values: int = NUM_VALUES,
    seed: int = 0,
    **spec: Any,
) -> Comparison:
    """Find which features of one network are in another one, and whether they interact in the same way.

    Features are matched by their values on the same samples, as lineages are from snapshot to snapshot: across seeds,
    widths, runs, fine-tuning and node layers. A match is claimed if chance does not make features as similar: neither
    with samples permuted within one network, nor with a random basis of the same subspace.

    Args:
        graph_a: The graph of the first network.
        graph_b: The graph of the second one.
        model_a: The first model, with the weights of its graph; it is not changed. None, together with ``model_b`` and
            ``batches``, for the values that the graphs of two runs store, if these are on the same samples.
        model_b: The second model; it is not changed.
        batches: Samples that both models can be called with, best about a thousand; other ones than the graphs were
            computed on are fine.
        layers: Node layers of the second network, by those of the first one they are compared with. By default those
            with the same names.
        names: What the networks are called.
        level: The false discovery rate of matches: the largest expected share of wrong ones.
        num_values: Number of values of each feature. It should be several times the number of features of the largest
            node layer.
        seed: Seed of permutations, and of the choice of positions.
        spec: ``input_fn``, ``mask``, ``dtype`` and ``skip_positions``, as for
            `lib_lightning.compute_interaction_graph`.

    Returns:
        The comparison. Printed, it is a table.

    Raises:
        SettingError: If node layers cannot be paired, or a number is outside its range.
        SettingTypeError: If only one of models and samples is given.
        LIBError: If there are no samples, models are swapped, or graphs without models have no values on the same
            samples.
        NodeLayerError: If a model does not have the node layers of its graph.

    Example:
        >>> import torch
        >>> from lib_lightning import compute_interaction_graph
        >>> models, batches = [nn.Linear(5, 3), nn.Linear(5, 3)], [torch.randn(500, 5)]
        >>> graphs = [compute_interaction_graph(model, batches, ["input", "output"]) for model in models]
        >>> [layer.a.layer for layer in compare(*graphs, *models, batches).layers]
        ['input', 'output']
    """
    check_number("level", level, lambda x: 0 < x < 1, "is a share above 0 and below 1")
    check_number("num_values", num_values, lambda x: x >= 2, "is a number of values, at least 2")
    graphs = graph_a, graph_b
    for graph in graphs:
        if not isinstance(graph, InteractionGraph):
            raise SettingTypeError(
                f"compare takes two graphs first, then two models, then samples; got {type(graph).__name__} as a graph."
            )
    if len(check_list("names", names, "two names", lambda name: isinstance(name, str))) != 2:
        raise SettingError(f"names are those of two networks; got {names!r}.")
    pairs = paired_layers(graph_a, graph_b, layers)
    given = [x is not None for x in (model_a, model_b, batches)]
    if model_a is not None and model_b is not None and batches is not None:
        check_weights(graphs, (model_a, model_b))
        values = computed_values(graphs, (model_a, model_b), batches, pairs, int(num_values), seed, **spec)
    elif any(given):
        raise SettingTypeError("compare needs both models and the samples, or none of them.")
    else:
        values = stored_values(graphs, pairs)
    of_layers = [(_names(graph_a, a), _names(graph_b, b)) for a, b in pairs.items()]
    compared = compare_layers([values[a] for a in pairs], of_layers, level, seed)
    by_name = {(layer.a.layer, layer.b.layer): layer for layer in compared}
    sections = []
    for first, second in itertools.pairwise(pairs.items()):
        keys = tuple(zip(first, second, strict=True))
        if all(key in graph.edges for key, graph in zip(keys, graphs, strict=True)):
            edges = graph_a.edges[keys[0]], graph_b.edges[keys[1]]
            errors = graph_a.edge_errors.get(keys[0]), graph_b.edge_errors.get(keys[1])
            sections.append(compare_section((by_name[first], by_name[second]), edges, errors, seed))
    return Comparison((str(names[0]), str(names[1])), compared, sections, level, graphs)


def _names(graph: InteractionGraph, layer: str) -> Names:
    return Names(layer, graph.feature_ids(layer), graph.bases[layer].importance)


def paired_layers(a: InteractionGraph, b: InteractionGraph, layers: Mapping[str, str] | None = None) -> dict[str, str]:
    """Decide which node layers are compared.

    Args:
        a: The first graph.
        b: The second one.
        layers: As for `compare`.

    Returns:
        Node layers of the second graph by those of the first, in forward order of the first.

    Raises:
        SettingError: If there are none, or no such ones.
    """
    if layers is None:
        found = {name: name for name in a.node_layers if name in b.bases}
        if not found:
            raise SettingError(
                f"The graphs have no node layer in common: {quoted(a.node_layers)}, and {quoted(b.node_layers)}. "
                f'Say which ones to compare, such as layers={{"{a.node_layers[0]}": "{b.node_layers[0]}"}}.'
            )
        return found
    for wanted, graph, which in ((layers.keys(), a, "first"), (layers.values(), b, "second")):
        for name in wanted:
            if name not in graph.bases:
                raise SettingError(
                    f"layers= names '{name}', but the {which} graph has {quoted(graph.node_layers)}."
                    f"{did_you_mean(name, graph.node_layers)}"
                )
    return {name: layers[name] for name in a.node_layers if name in layers}
