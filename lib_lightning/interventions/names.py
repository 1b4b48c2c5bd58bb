"""Which feature of a graph a name means: an id, a node layer with an index, or a label."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from lib_lightning.algorithm.dictionary_basis import DictionaryBasis
from lib_lightning.errors import LIBError, SettingError, quoted, shortened
from lib_lightning.graph import InteractionGraph

# What a feature is called by: its id or label, or node layer and index.
FeatureName = str | tuple[str, int]
Place = tuple[str, int]


def find_feature(graph: InteractionGraph, which: FeatureName) -> Place:
    """Find a feature by its id, by node layer and index, or by its label.

    Args:
        graph: The interaction graph.
        which: The id, such as ``"resid_post/17"``; node layer and index, such as ``("resid_post", 2)``; or a label that
            no other feature has.

    Returns:
        Node layer and index.

    Raises:
        LIBError: If no feature has this name, with similar names; or if several have it.

    Example:
        >>> import torch
        >>> from lib_lightning import compute_interaction_graph
        >>> graph = compute_interaction_graph(torch.nn.Linear(3, 2), [torch.randn(9, 3)], ["input", "output"])
        >>> graph.labels = {"input": ["colour", ""]}
        >>> find_feature(graph, "colour"), find_feature(graph, "input/1"), find_feature(graph, ("output", 0))
        (('input', 0), ('input', 1), ('output', 0))
    """
    if isinstance(which, tuple) and len(which) == 2:
        feature = graph.feature(which)
        return feature.layer, feature.index
    if not isinstance(which, str):
        raise LIBError(
            "A feature is called by its id, such as 'layer/0', by its label, or by node layer and index, such as "
            f"('layer', 0); got {shortened(repr(which), 80)}."
        )
    ids = {name: (layer, j) for layer in graph.bases for j, name in enumerate(graph.feature_ids(layer))}
    labels: dict[str, list[Place]] = {}
    for layer, names in graph.labels.items():
        for j, label in enumerate(names):
            if label:
                labels.setdefault(label, []).append((layer, j))
    found = list(dict.fromkeys([*([ids[which]] if which in ids else []), *labels.get(which, [])]))
    if len(found) == 1:
        return found[0]
    if found:
        own = [next(name for name, place in ids.items() if place == there) for there in found]
        how = "is the id of one feature and the label of another" if which in ids else f"labels {len(found)} features"
        tuples = " or ".join(str(there) for there in found[:3])
        raise LIBError(
            f"'{which}' {how}: {quoted(own)}. Write node layer and index, such as {tuples}."
            if which in ids
            else f"'{which}' {how}: write the id of one of them, {quoted(own)}."
        )
    layer, _, number = which.rpartition("/")
    if layer in graph.bases and number.isdecimal() and f"{layer}/{int(number)}" != which:
        return find_feature(graph, f"{layer}/{int(number)}")  # such as "fc/03"
    basis = graph.bases.get(layer)
    if isinstance(basis, DictionaryBasis) and number.isdecimal() and int(number) < int(basis.reference["n_latents"]):
        raise LIBError(
            f"Latent {int(number):,} of '{layer}' is no feature of this graph: it is active in none of its samples, or "
            "among those that the error includes for lack of memory."
        )
    near = difflib.get_close_matches(which, [*ids, *labels], n=3) or list(ids)[:3]
    raise LIBError(f"There is no feature '{which}' in this graph. Near matches: {quoted(near)}.")


def find_features(graph: InteractionGraph, names: Iterable[FeatureName]) -> dict[Place, FeatureName]:
    """Find features, none of them twice.

    Args:
        graph: The interaction graph.
        names: Names as for `find_feature`.

    Returns:
        The names by node layer and index, in the given order.

    Raises:
        LIBError: As for `find_feature`.
        SettingError: If two names mean the same feature.
    """
    found: dict[Place, FeatureName] = {}
    for name in names:
        place = find_feature(graph, name)
        if place in found:
            raise SettingError(f"{found[place]!r} and {name!r} are the same feature, index {place[1]} of '{place[0]}'.")
        found[place] = name
    return found
