"""The signs of features: free in each snapshot, and the same along a lineage.

``f`` and ``-f`` are the same direction, and which of the two an eigensolver returns may change with the last bit of the
weights. Importances, edges, attributions and effects on a score are the same for both.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lib_lightning.graph import InteractionGraph


def reverse_features(graph: InteractionGraph, layer: str, which: Tensor) -> None:
    """Replace some features ``f`` of a node layer by ``-f``, in everything that depends on the sign but for labels.

    Args:
        graph: The graph, which is changed.
        layer: Name of the node layer.
        which: True for the features to reverse, shape ``(r,)``, bool, on the CPU.

    Example:
        >>> from lib_lightning import compute_interaction_graph
        >>> x = torch.randn(50, 4)
        >>> graph = compute_interaction_graph(torch.nn.Linear(4, 2), [x], ["input", "output"])
        >>> before = graph.bases["input"].encode(x)
        >>> reverse_features(graph, "input", torch.tensor([False, True]))
        >>> torch.equal(graph.bases["input"].encode(x), before * torch.tensor([1, -1]))
        True
    """
    if not which.any():
        return
    sign = 1 - 2 * which.float()
    basis = graph.bases[layer]
    of_basis = sign.to(basis.to_features)
    graph.bases[layer] = replace(
        basis, to_features=basis.to_features * of_basis, from_features=basis.from_features * of_basis[:, None]
    )
    if layer in graph.reference_features:
        graph.reference_features[layer] = graph.reference_features[layer] * sign.half()
    if (examples := graph.examples.get(layer)) is not None:
        largest, smallest, _ = examples.counts
        assert largest == smallest  # so that either list has room for the other
        order = torch.arange(examples.values.shape[1], device="cpu").expand_as(examples.values).clone()
        order[which, :largest], order[which, largest : 2 * largest] = (
            order[which, largest : 2 * largest],
            order[which, :largest],
        )
        values = examples.values * sign[:, None]
        # Examples over the range are in descending order, with missing ones at the end.
        spread = values[:, 2 * largest :].nan_to_num(nan=-torch.inf).argsort(dim=1, descending=True, stable=True)
        order[which, 2 * largest :] = 2 * largest + spread[which]
        context = examples.context * sign.half()[:, None, None]
        graph.examples[layer] = replace(
            examples,
            samples=examples.samples.gather(1, order),
            positions=examples.positions.gather(1, order),
            values=values.gather(1, order),
            context=context.gather(1, order[..., None].expand_as(context)),
            histogram=examples.histogram.where(~which[:, None], examples.histogram.flip(1)),
        )
    if (effects := graph.output_effects.get(layer)) is not None:
        # Outputs that are raised are in the first half, those that are lowered in the second.
        halves = [(t, t.roll(t.shape[1] // 2, 1)) for t in (effects.outputs, effects.changes, effects.errors)]
        outputs, changes, errors = (swapped.where(which[:, None], t) for t, swapped in halves)
        graph.output_effects[layer] = replace(effects, outputs=outputs, changes=changes * sign[:, None], errors=errors)
