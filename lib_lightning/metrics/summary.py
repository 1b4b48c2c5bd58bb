"""The scalars of one interaction graph, under stable names."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor

from lib_lightning.core.basis import Basis
from lib_lightning.metrics.functional import (
    effective_edges,
    effective_features,
    number_of_edges,
    number_of_features,
)


def graph_scalars(bases: Sequence[Basis], edges: Sequence[Tensor]) -> dict[str, float]:
    """Count features and edges, of each part and in total.

    Args:
        bases: One basis for each node layer, in forward order.
        edges: One matrix ``(r_out, r_in)`` for each pair of neighbouring node layers.

    Returns:
        ``features/<layer>``, ``effective_features/<layer>``, ``edges/<section>``, ``effective_edges/<section>`` and
        ``.../total`` of each.

    Example:
        >>> import torch
        >>> from lib_lightning.core.basis import neuron_basis
        >>> layers = [neuron_basis(name, torch.zeros(2), torch.eye(2)) for name in ("fc:input", "output")]
        >>> graph_scalars(layers, [torch.eye(2)])["edges/fc.input-to-output"]
        2.0
    """
    sections = section_keys([basis.name for basis in bases])
    values: dict[str, float] = {}
    for kind, count_features in (("features", number_of_features), ("effective_features", effective_features)):
        values |= {f"{kind}/{layer_key(basis.name)}": float(count_features(basis.importance)) for basis in bases}
    for kind, count_edges in (("edges", number_of_edges), ("effective_edges", effective_edges)):
        values |= {f"{kind}/{section}": float(count_edges(E)) for section, E in zip(sections, edges, strict=True)}
    for kind in ("features", "effective_features", "edges", "effective_edges"):
        values[f"{kind}/total"] = sum(value for key, value in values.items() if key.startswith(f"{kind}/"))
    return values


def scalar_keys(names: Sequence[str]) -> list[str]:
    """The keys that `graph_scalars` gives for node layers of these names, before there is a graph.

    Args:
        names: Names of the node layers, in forward order.

    Returns:
        The keys.

    Example:
        >>> scalar_keys(["a", "b"])[:3]
        ['features/a', 'features/b', 'features/total']
    """
    layers = [*map(layer_key, names), "total"]
    sections = [*section_keys(names), "total"]
    return [
        *(f"{kind}/{layer}" for kind in ("features", "effective_features") for layer in layers),
        *(f"{kind}/{section}" for kind in ("edges", "effective_edges") for section in sections),
    ]


def layer_key(name: str) -> str:
    """A node layer's name as part of a scalar's name: loggers do not take colons."""
    return name.replace(":", ".")


def section_keys(names: Sequence[str]) -> list[str]:
    """Names of the sections between node layers, as part of a scalar's name."""
    return [f"{layer_key(a)}-to-{layer_key(b)}" for a, b in itertools.pairwise(names)]
