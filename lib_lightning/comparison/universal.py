"""Which features many networks have: seeds of one training, widths, architectures."""

from __future__ import annotations

import heapq
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lib_lightning.comparison.comparison import FALSE_DISCOVERY_RATE
from lib_lightning.comparison.layers import Names, shared_pairs
from lib_lightning.comparison.paired_values import NUM_VALUES, SameSamples, stored_values_of_all, values_of_all
from lib_lightning.comparison.universal_table import table_of
from lib_lightning.errors import SettingError, SettingTypeError, check_list, check_number, did_you_mean, quoted
from lib_lightning.graph import InteractionGraph
from lib_lightning.io.basis_file import write_bytes
from lib_lightning.io.universal_file import FORMAT
from lib_lightning.lineage.matching import standardised

# Smallest absolute correlation of features that have the same values, beyond the rounding of half precision.
_IDENTICAL = 0.9999
_NEEDED = "Give the models and the samples, too: universal_features(graphs, models, batches)."

# A feature: index of its network, and of the feature in it.
_Node = tuple[int, int]


@dataclass(frozen=True)
class UniversalFeature:
    """A feature that several networks have.

    Attributes:
        layer: Name of the node layer.
        members: Id of the feature in each network that has it, by the name of the network.
        central: Name of the network whose feature all others are matched with.
        share: Share of the networks that have it, from 0 to 1.
        importance: Share of the feature in the importance of the node layer, mean over the networks that have it.
        similarity: Absolute correlation with the feature of the central network, mean over the others.
        p_value: How probable it is that chance makes features as similar, of the least certain match.
        labels: Labels of the members that have one, by the name of the network.
    """

    layer: str
    members: dict[str, str]
    central: str
    share: float
    importance: float
    similarity: float
    p_value: float
    labels: dict[str, str]


@dataclass(frozen=True)
class UniversalLayer:
    """The features of a node layer in all networks, by how many have them. There are ``n`` networks.

    Attributes:
        layer: Name of the node layer.
        num_features: Number of features that vary, of each network.
        features: The features that at least two networks have: those of most networks first, then by importance.
        counts: Number of features per network that ``k`` networks have, for ``k`` from 1 to ``n``.
        importance: Share of the importance in these, mean over networks.
        identical: Whether every feature has the same values in all networks, one by one. They are then those of the
            data, such as the neurons or the principal components of the input, or of weights that the networks share:
            that all have them says nothing about training.
        num_values: Number of values of each feature that this was found with.
    """

    layer: str
    num_features: list[int]
    features: list[UniversalFeature]
    counts: list[float]
    importance: list[float]
    identical: bool
    num_values: int


@dataclass(frozen=True)
class UniversalFeatures:
    """Which features of several networks are the same feature, and how many of the networks have it.

    Attributes:
        names: What the networks are called.
        layers: The features of each node layer.
        level: False discovery rate of the matches.

    Example:
        >>> import torch
        >>> from lib_lightning import compute_interaction_graph, universal_features
        >>> model = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 3))
        >>> batches, layers = [torch.randn(500, 5)], ["input", "1", "output"]
        >>> graph = compute_interaction_graph(model, batches, layers)
        >>> found = universal_features([graph] * 3, [model] * 3, batches)
        >>> len(found.universal) == sum(map(len, [graph.feature_ids(layer) for layer in layers]))
        True
        >>> found.find("0", "1/0").members
        {'0': '1/0', '1': '1/0', '2': '1/0'}
    """

    names: list[str]
    layers: list[UniversalLayer]
    level: float

    @property
    def features(self) -> list[UniversalFeature]:
        """All features that at least two networks have, by node layer."""
        return [feature for layer in self.layers for feature in layer.features]

    @property
    def universal(self) -> list[UniversalFeature]:
        """Those that all networks have."""
        return [feature for feature in self.features if len(feature.members) == len(self.names)]

    def find(self, network: str, feature_id: str) -> UniversalFeature | None:
        """Find out which networks have a feature of one of them.

        Args:
            network: Name of the network.
            feature_id: Id of its feature.

        Returns:
            The feature with its members; None if no other network has it.

        Raises:
            SettingError: If there is no such network.
        """
        if network not in self.names:
            raise SettingError(f"There is no network '{network}' here.{did_you_mean(network, self.names)}")
        return next((feature for feature in self.features if feature.members.get(network) == feature_id), None)

    def table(self) -> str:
        """A table of all node layers, and of the features that most networks have, as text."""
        rows = [(x.layer, x.num_features, x.counts, x.importance, x.identical) for x in self.layers]
        listed = [
            (x.layer, len(x.members), x.importance, x.similarity, x.members[x.central], common_label(x.labels))
            for x in self.features
        ]
        values = min((layer.num_values for layer in self.layers), default=0)
        return table_of(self.names, rows, listed, f"{values:,} values of each feature", self.level)

    def __str__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """All results as plain values, as `save` writes them."""
        layers = [
            {
                "layer": layer.layer,
                "num_features": layer.num_features,
                "counts": layer.counts,
                "importance": layer.importance,
                "identical": layer.identical,
                "num_values": layer.num_values,
                "features": [
                    {
                        "members": [feature.members.get(name) for name in self.names],
                        "labels": [feature.labels.get(name, "") for name in self.names],
                        "central": self.names.index(feature.central),
                        "label": common_label(feature.labels),
                        "importance": feature.importance,
                        "similarity": feature.similarity,
                        "p_value": feature.p_value,
                    }
                    for feature in layer.features
                ],
            }
            for layer in self.layers
        ]
        return {"format": FORMAT, "names": self.names, "level": self.level, "layers": layers}

    def save(self, path: str | PathLike[str]) -> None:
        """Write all results as JSON. An existing file is replaced atomically.

        Args:
            path: The file; missing folders are created.
        """
        write_bytes(Path(path), (json.dumps(self.to_dict(), indent=1) + "\n").encode())


def universal_features(
    graphs: Sequence[InteractionGraph],
    models: Sequence[nn.Module] | None = None,
    batches: Iterable[Any] | None = None,
    *,
    names: Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
    level: float = FALSE_DISCOVERY_RATE,
    num_values: int = NUM_VALUES,
    seed: int = 0,
    **spec: Any,
) -> UniversalFeatures:
    """Find which features every network has, and which share of the networks has the others.

    Each network is matched with each other one by the values of features on the same samples, like
    `lib_lightning.compare` does: one to one, with at least half of the variance in common, and more similar than
    samples permuted within one network and random bases of the same subspace make them. The false discovery rate is
    one over the features of all node layers of all pairs. Matches are gathered around central features: the one with
    counterparts in most networks first, together with these. All members of a group are therefore matched with its
    central feature itself, and not by way of others.

    Args:
        graphs: The graphs of the networks, at least two.
        models: Their models; they are not changed. None, together with ``batches``, for the values that the graphs of
            runs store, if these are on the same samples.
        batches: Samples that all models can be called with, best about a thousand.
        names: What the networks are called; by default ``"0"``, ``"1"`` and so on.
        layers: Names of the node layers; by default those that all graphs have.
        level: The false discovery rate of matches: the largest expected share of wrong ones.
        num_values: Number of values of each feature. It should be several times the number of features of the largest
            node layer.
        seed: Seed of permutations, and of the choice of positions.
        spec: ``input_fn``, ``mask``, ``dtype`` and ``skip_positions``, as for
            `lib_lightning.compute_interaction_graph`.

    Returns:
        The features. Printed, they are a table.

    Raises:
        SettingError: If there are less than two graphs, no common node layer, or a number is outside its range.
        SettingTypeError: If only one of models and samples is given.
        LIBError: If there are no samples, or graphs without models have no values on the same samples.
        NodeLayerError: If a model does not have the node layers of its graph.

    Example:
        >>> import torch
        >>> from lib_lightning import compute_interaction_graph, universal_features
        >>> models, batches = [nn.Linear(5, 3) for _ in range(3)], [torch.randn(500, 5)]
        >>> graphs = [compute_interaction_graph(model, batches, ["input", "output"]) for model in models]
        >>> [layer.num_features for layer in universal_features(graphs, models, batches).layers]
        [[3, 3, 3], [3, 3, 3]]
    """
    check_number("level", level, lambda x: 0 < x < 1, "is a share above 0 and below 1")
    check_number("num_values", num_values, lambda x: x >= 2, "is a number of values, at least 2")
    graphs = check_list("graphs", graphs, "graphs", lambda graph: isinstance(graph, InteractionGraph))
    if len(graphs) < 2:
        raise SettingError(f"universal_features needs at least two graphs; got {len(graphs)}.")
    called = [str(k) for k in range(len(graphs))] if names is None else list(names)
    if len(called) != len(graphs) or len(set(called)) != len(graphs):
        raise SettingError(f"names are those of {len(graphs)} networks, all different; got {called!r}.")
    common = _common_layers(graphs, layers)
    of_all = {layer: [layer] * len(graphs) for layer in common}
    if models is not None and batches is not None:
        if len(models) != len(graphs):
            raise SettingError(f"There are {len(graphs)} graphs, but {len(models)} models.")
        values = values_of_all(graphs, models, batches, of_all, int(num_values), seed, **spec)
    elif models is not None or batches is not None:
        raise SettingTypeError("universal_features needs both models and samples, or none of them.")
    else:
        values = stored_values_of_all(graphs, of_all, _NEEDED)
    own = {
        layer: [Names(layer, graph.feature_ids(layer), graph.bases[layer].importance) for graph in graphs]
        for layer in common
    }
    identical = {layer: _is_identical(values[layer]) for layer in common}
    matches: dict[str, dict[_Node, dict[_Node, tuple[float, float]]]] = {layer: {} for layer in common}
    # The matches of what is identical anyway would let more of the others pass, if all had one false discovery rate.
    for family in (True, False):
        of_family = [layer for layer in common if identical[layer] == family]
        pairs = itertools.combinations(range(len(graphs)), 2)
        tested = [(layer, i, j) for i, j in pairs for layer in of_family]
        shared = shared_pairs(
            [values[layer].pair(i, j) for layer, i, j in tested],
            [(own[layer][i], own[layer][j]) for layer, i, j in tested],
            level,
            seed,
        )
        for (layer, i, j), found in zip(tested, shared, strict=True):
            for pair in found:
                for x, y in (((i, pair.a), (j, pair.b)), ((j, pair.b), (i, pair.a))):
                    matches[layer].setdefault(x, {})[y] = pair.similarity, pair.p_value
    labels = [{layer: graph.labels.get(layer) or [] for layer in common} for graph in graphs]
    return UniversalFeatures(
        called,
        [
            _of_layer(
                called,
                own[layer],
                matches[layer],
                [of_graph[layer] for of_graph in labels],
                identical[layer],
                len(values[layer].values[0]),
            )
            for layer in common
        ],
        level,
    )


def _common_layers(graphs: Sequence[InteractionGraph], layers: Sequence[str] | None) -> list[str]:
    first = graphs[0]
    common = [name for name in first.node_layers if all(name in graph.bases for graph in graphs)]
    if layers is None:
        if not common:
            raise SettingError(
                f"The graphs have no node layer in common: the first one has {quoted(first.node_layers)}, the last one "
                f"{quoted(graphs[-1].node_layers)}."
            )
        return common
    for name in layers:
        if name not in common:
            raise SettingError(f"Not all graphs have a node layer '{name}'.{did_you_mean(name, common)}")
    return [name for name in common if name in layers]


def gathered(matches: Mapping[_Node, Mapping[_Node, tuple[float, float]]]) -> list[tuple[_Node, list[_Node]]]:
    """Gather features that are matched in pairs into groups around a central one.

    The feature with most counterparts, and among these the one most similar to them, is the centre of the first group,
    and its counterparts are the members; so on with those that are left. Connected components would also contain
    features that are related only by way of others, which may not be similar at all.

    Args:
        matches: By feature, with similarity and p-value, those it is matched with: at most one of each network.

    Returns:
        Centre and other members of each group, which no other group contains.

    Example:
        >>> chain = {(0, 0): {(1, 0): (0.8, 0.0)}, (1, 0): {(0, 0): (0.8, 0.0), (2, 0): (0.8, 0.0)}}
        >>> chain |= {(2, 0): {(1, 0): (0.8, 0.0), (3, 0): (0.8, 0.0)}, (3, 0): {(2, 0): (0.8, 0.0)}}
        >>> gathered(chain)
        [((1, 0), [(0, 0), (2, 0)])]
    """
    left = set(matches)

    def score(node: _Node) -> tuple[int, float]:
        similarities = [similarity for other, (similarity, _) in matches[node].items() if other in left]
        return -len(similarities), -sum(x * x for x in similarities)

    queue = [(score(node), node) for node in sorted(matches)]
    heapq.heapify(queue)
    groups = []
    while queue:
        known, node = heapq.heappop(queue)
        if node not in left:
            continue
        # Scores only get worse, as other groups take members away.
        if (now := score(node)) != known:
            heapq.heappush(queue, (now, node))
            continue
        members = sorted(other for other in matches[node] if other in left)
        if not members:
            break
        groups.append((node, members))
        left.difference_update([node, *members])
    return groups


def _of_layer(
    called: Sequence[str],
    own: Sequence[Names],
    matches: Mapping[_Node, Mapping[_Node, tuple[float, float]]],
    labels: Sequence[Sequence[str]],
    identical: bool,
    num_values: int,
) -> UniversalLayer:
    n = len(called)
    shares = [_shares(names.importance) for names in own]
    features, counts, importance = [], [0.0] * n, [0.0] * n
    for centre, others in gathered(matches):
        members = sorted([centre, *others])
        with_centre = [matches[centre][other] for other in others]
        of_members = [float(shares[i][k]) for i, k in members]
        features.append(
            UniversalFeature(
                own[0].layer,
                {called[i]: own[i].ids[k] for i, k in members},
                called[centre[0]],
                len(members) / n,
                sum(of_members) / len(members),
                sum(similarity for similarity, _ in with_centre) / len(with_centre),
                max(p_value for _, p_value in with_centre),
                {called[i]: labels[i][k] for i, k in members if labels[i] and labels[i][k]},
            )
        )
        counts[len(members) - 1] += len(members) / n
        importance[len(members) - 1] += sum(of_members) / n
    varying = [int((share > 0).sum()) for share in shares]
    # What is in no group is in a single network.
    counts[0] = sum(varying) / n - sum(counts)
    importance[0] = 1 - sum(importance)
    features.sort(key=lambda feature: (-len(feature.members), -feature.importance))
    return UniversalLayer(own[0].layer, varying, features, counts, importance, identical, num_values)


def _shares(importance: Tensor) -> Tensor:
    return importance.double() / importance.double().sum().clamp_min(torch.finfo(torch.float64).tiny)


def _is_identical(values: SameSamples) -> bool:
    """Whether feature k of each network has the same values as feature k of the first one, but for sign and scale."""
    first, *others = (standardised(x) for x in values.values)
    if any(x.shape != first.shape for x in others):
        return False
    constant = ~first.any(0)
    return all(bool((((first * x).sum(0).abs() > _IDENTICAL) | (constant & ~x.any(0))).all()) for x in others)


def common_label(labels: Mapping[str, str]) -> str:
    """The label that most members of a group have.

    Args:
        labels: Labels by network.

    Returns:
        The label, the first one if there are several; "" if there is none.

    Example:
        >>> common_label({"0": "class 4", "1": "class 9", "2": "class 9"})
        'class 9'
    """
    counts = dict.fromkeys(labels.values(), 0)
    for label in labels.values():
        counts[label] += 1
    return max(counts, key=lambda label: counts[label], default="")
