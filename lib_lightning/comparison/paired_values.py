"""Values of the features of two networks on the same samples, at the same positions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lib_lightning.errors import LIBError, NotFiniteError, SettingTypeError
from lib_lightning.features.values import feature_values
from lib_lightning.graph import InteractionGraph
from lib_lightning.io.basis_format import REFERENCE_SAMPLES
from lib_lightning.model.batch import is_empty
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.model_spec import ModelSpec

# Number of values of each feature: the standard deviation of chance correlations is then 1/64.
NUM_VALUES = 4096
_NEEDED = "Give both models and the samples: compare(graph_a, graph_b, model_a, model_b, batches)."


@dataclass(frozen=True)
class PairedValues:
    """Values of the features of one node layer of each network, row by row on the same sample and position.

    Attributes:
        a: Of the first network, shape ``(N, r)``.
        b: Of the second one, shape ``(N, q)``.
        block: Number of consecutive rows that belong to one sample; None where that is unknown, and only neighbouring
            rows are known to belong to the same sample or to neighbouring ones.
    """

    a: Tensor
    b: Tensor
    block: int | None


def computed_values(
    graphs: tuple[InteractionGraph, InteractionGraph],
    models: tuple[nn.Module, nn.Module],
    batches: Iterable[Any],
    layers: Mapping[str, str],
    count: int = NUM_VALUES,
    seed: int = 0,
    **spec: Any,
) -> dict[str, PairedValues]:
    """Run both models on the same samples, and evaluate their features at the same positions.

    Each sample contributes equally many positions, chosen at random, the same ones for both networks. A pair of node
    layers with different numbers of positions, such as before and after pooling, is compared by the mean over them.

    Args:
        graphs: The graphs of both networks.
        models: Their models; they are not changed.
        batches: The samples.
        layers: Node layers of the second network, by those of the first.
        count: Number of values of each feature, if there are as many.
        seed: Seed for the choice of samples and positions.
        spec: ``input_fn``, ``mask``, ``dtype`` and ``skip_positions``, as for
            `lib_lightning.compute_interaction_graph`.

    Returns:
        The values, by node layer of the first network.

    Raises:
        LIBError: If there are no samples.
        NodeLayerError: If a model does not have its node layers.
        NotFiniteError: If a feature has a value that is NaN or infinite.
    """
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise SettingTypeError(
            f"batches must be an iterable of batches; got {type(batches).__name__}. For a single batch, write [batch]."
        )
    batches = [batch for batch in batches if not is_empty(batch)]
    both = [
        InstrumentedModel(model, graph.node_layer_specs(), ModelSpec(**spec))
        for model, graph in zip(models, graphs, strict=True)
    ]
    num_samples = sum(both[0].num_samples(batch) for batch in batches)
    if not num_samples:
        raise LIBError("There are no samples to compare features on: all batches are empty.")
    generator = torch.Generator().manual_seed(seed)
    kept = torch.zeros(num_samples, dtype=torch.bool, device="cpu")
    kept[torch.randperm(num_samples, generator=generator, device="cpu")[:count]] = True
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in layers}
    start = 0
    with model_session(both[0]), model_session(both[1]):  # which end in the reverse order, unlike two generators
        streams = [feature_values(model, graph, batches) for model, graph in zip(both, graphs, strict=True)]
        for in_a, in_b in zip(*streams, strict=True):
            size = len(next(iter(in_a.features.values())))
            chosen = kept[start : start + size]
            start += size
            for a, b in layers.items():
                values = [(in_a.features[a][chosen], in_a.masks[a]), (in_b.features[b][chosen], in_b.masks[b])]
                masked = [(x, _valid(x) if mask is None else mask[chosen]) for x, mask in values]
                rows[a].append(_at_same_positions(masked[0], masked[1], -(-count // num_samples), generator))
    return {name: _in_blocks(parts) for name, parts in rows.items()}


def stored_values(
    graphs: tuple[InteractionGraph, InteractionGraph], layers: Mapping[str, str]
) -> dict[str, PairedValues]:
    """Take the values of features on the reference samples of two runs, which are in their basis files.

    Args:
        graphs: The graphs of both networks.
        layers: Node layers of the second network, by those of the first.

    Returns:
        The values, by node layer of the first network.

    Raises:
        LIBError: If a graph has no such values, or if the two graphs have them on other samples or positions.
    """
    hashes = [graph.info.get(REFERENCE_SAMPLES) for graph in graphs]
    found: dict[str, PairedValues] = {}
    for a, b in layers.items():
        values = graphs[0].reference_features.get(a), graphs[1].reference_features.get(b)
        missing = [layer for layer, x in zip((a, b), values, strict=True) if x is None]
        if missing or values[0] is None or values[1] is None:
            raise LIBError(
                f"A graph has no values of the features of '{missing[0]}': only runs that track features store them. "
                + _NEEDED
            )
        shapes = [
            graph.examples[layer].shape if layer in graph.examples else None
            for graph, layer in zip(graphs, (a, b), strict=True)
        ]
        if hashes[0] is None or hashes[0] != hashes[1]:
            raise LIBError(
                "The two graphs store values of their features on different samples, so they cannot be compared. "
                + _NEEDED
            )
        if len(values[0]) != len(values[1]) or shapes[0] != shapes[1] or (a != b and shapes[0] is None):
            raise LIBError(
                f"The two graphs store values of '{a}' and '{b}' at different positions, so they cannot be compared. "
                + _NEEDED
            )
        found[a] = PairedValues(values[0].double(), values[1].double(), 1 if shapes[0] == () else None)
    return found


def _valid(values: Tensor) -> Tensor:
    return torch.ones(values.shape[:2], dtype=torch.bool, device="cpu")


def _at_same_positions(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Values at positions chosen for each sample: two tensors ``(n, k, r)``, without samples that have no position."""
    if a[1].shape[1] != b[1].shape[1]:
        present = a[1].any(1) & b[1].any(1)
        x, y = (
            (values * valid.unsqueeze(-1)).sum(1, keepdim=True) / valid.sum(1).clamp(min=1).view(-1, 1, 1)
            for values, valid in (a, b)
        )
        return x[present].float(), y[present].float()
    valid = a[1] & b[1]
    present = valid.any(1)
    valid = valid[present]
    keys = torch.rand(valid.shape, generator=generator, device="cpu") + ~valid
    # Valid positions first, in random order; those of a sample with fewer of them are used several times.
    places = torch.arange(min(count, valid.shape[1]), device="cpu") % valid.sum(1, keepdim=True)
    positions = keys.argsort(1).gather(1, places)
    index = torch.arange(len(positions), device="cpu").unsqueeze(1)
    return a[0][present][index, positions].float(), b[0][present][index, positions].float()


def _in_blocks(parts: list[tuple[Tensor, Tensor]]) -> PairedValues:
    block = max(a.shape[1] for a, _ in parts)
    # Batches of shorter sequences have fewer positions, which are used several times.
    same = [(x[:, torch.arange(block, device="cpu") % x.shape[1]] for x in part) for part in parts]
    a, b = (torch.cat(of_network).flatten(0, 1) for of_network in zip(*same, strict=True))
    if len(a) < 2 * block:
        raise LIBError("There is only one sample to compare features on; at least two are needed, better a thousand.")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise NotFiniteError("Features have NaN or infinite values on these samples: there is nothing to compare.")
    return PairedValues(a.double(), b.double(), block)
