"""Values of the features of two or more networks on the same samples, at the same positions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
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


@dataclass(frozen=True)
class SameSamples:
    """Values of the features of one node layer of each of several networks, row by row on the same sample and position.

    Attributes:
        values: Of each network, shape ``(N, r)``.
        block: As of `PairedValues`.
    """

    values: tuple[Tensor, ...]
    block: int | None

    def pair(self, i: int, j: int) -> PairedValues:
        """The values of two of the networks.

        Args:
            i: Index of the first one.
            j: Index of the second one.

        Returns:
            Their values, which are not copied.
        """
        return PairedValues(self.values[i], self.values[j], self.block)


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

    Args:
        graphs: The graphs of both networks.
        models: Their models; they are not changed.
        batches: The samples.
        layers: Node layers of the second network, by those of the first.
        count: As for `values_of_all`, which see for ``seed``, ``spec`` and errors, too.
        seed: Seed for the choice of samples and positions.
        spec: Further settings.

    Returns:
        The values, by node layer of the first network.
    """
    found = values_of_all(graphs, models, batches, {pair[0]: pair for pair in layers.items()}, count, seed, **spec)
    return {name: same.pair(0, 1) for name, same in found.items()}


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
        LIBError: As of `stored_values_of_all`.
    """
    found = stored_values_of_all(graphs, {pair[0]: pair for pair in layers.items()})
    return {name: same.pair(0, 1) for name, same in found.items()}


def values_of_all(
    graphs: Sequence[InteractionGraph],
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    layers: Mapping[str, Sequence[str]],
    count: int = NUM_VALUES,
    seed: int = 0,
    **spec: Any,
) -> dict[str, SameSamples]:
    """Run models on the same samples, and evaluate their features at the same positions.

    Each sample contributes equally many positions, chosen at random, the same ones for all networks. Node layers with
    different numbers of positions, such as before and after pooling, are compared by the mean over them.

    Args:
        graphs: The graphs of the networks.
        models: Their models; they are not changed.
        batches: The samples.
        layers: For each node layer of the first network, those of all networks.
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
    instrumented = [
        InstrumentedModel(model, graph.node_layer_specs(), ModelSpec(**spec))
        for model, graph in zip(models, graphs, strict=True)
    ]
    num_samples = sum(instrumented[0].num_samples(batch) for batch in batches)
    if not num_samples:
        raise LIBError("There are no samples to compare features on: all batches are empty.")
    generator = torch.Generator().manual_seed(seed)
    kept = torch.zeros(num_samples, dtype=torch.bool, device="cpu")
    kept[torch.randperm(num_samples, generator=generator, device="cpu")[:count]] = True
    rows: dict[str, list[list[Tensor]]] = {name: [] for name in layers}
    start = 0
    with contextlib.ExitStack() as stack:  # sessions end in the reverse order, unlike those of generators
        for model in instrumented:
            stack.enter_context(model_session(model))
        streams = [feature_values(model, graph, batches) for model, graph in zip(instrumented, graphs, strict=True)]
        for parts in zip(*streams, strict=True):
            size = len(next(iter(parts[0].features.values())))
            chosen = kept[start : start + size]
            start += size
            for name, of_all in layers.items():
                values = [
                    (part.features[layer][chosen], part.masks[layer]) for part, layer in zip(parts, of_all, strict=True)
                ]
                masked = [(x, _valid(x) if mask is None else mask[chosen]) for x, mask in values]
                rows[name].append(_at_same_positions(masked, -(-count // num_samples), generator))
    return {name: _in_blocks(of_layer) for name, of_layer in rows.items()}


def stored_values_of_all(
    graphs: Sequence[InteractionGraph], layers: Mapping[str, Sequence[str]], needed: str = _NEEDED
) -> dict[str, SameSamples]:
    """Take the values of features on the reference samples of runs, which are in their basis files.

    Args:
        graphs: The graphs of the networks.
        layers: For each node layer of the first network, those of all networks.
        needed: What to do about graphs without such values, for errors.

    Returns:
        The values, by node layer of the first network.

    Raises:
        LIBError: If a graph has no such values, or if graphs have them on other samples or positions.
    """
    which = "The two graphs store" if len(graphs) == 2 else "The graphs store"
    hashes = {graph.info.get(REFERENCE_SAMPLES) for graph in graphs}
    found: dict[str, SameSamples] = {}
    for name, of_all in layers.items():
        pairs = list(zip(graphs, of_all, strict=True))
        missing = [layer for graph, layer in pairs if layer not in graph.reference_features]
        if missing:
            raise LIBError(
                f"A graph has no values of the features of '{missing[0]}': only runs that track features store them. "
                + needed
            )
        values = [graph.reference_features[layer] for graph, layer in pairs]
        shapes = {graph.examples[layer].shape if layer in graph.examples else None for graph, layer in pairs}
        if len(hashes) > 1 or None in hashes:
            raise LIBError(
                f"{which} values of their features on different samples, so they cannot be compared. " + needed
            )
        is_one_layer = len(set(of_all)) == 1
        if len(set(map(len, values))) > 1 or len(shapes) > 1 or (not is_one_layer and None in shapes):
            named = " and ".join(f"'{layer}'" for layer in (of_all if len(of_all) == 2 else dict.fromkeys(of_all)))
            raise LIBError(f"{which} values of {named} at different positions, so they cannot be compared. " + needed)
        found[name] = SameSamples(tuple(x.double() for x in values), 1 if shapes == {()} else None)
    return found


def _valid(values: Tensor) -> Tensor:
    return torch.ones(values.shape[:2], dtype=torch.bool, device="cpu")


def _at_same_positions(
    networks: Sequence[tuple[Tensor, Tensor]], count: int, generator: torch.Generator
) -> list[Tensor]:
    """Values at positions chosen for each sample, ``(n, k, r)`` of each network, without samples without a position.

    Networks are given by values ``(n, S, r)`` and masks ``(n, S)``.
    """
    if len({mask.shape[1] for _, mask in networks}) > 1:
        present = torch.stack([mask.any(1) for _, mask in networks]).all(0)
        means = (
            (values * valid.unsqueeze(-1)).sum(1, keepdim=True) / valid.sum(1).clamp(min=1).view(-1, 1, 1)
            for values, valid in networks
        )
        return [x[present].float() for x in means]
    valid = torch.stack([mask for _, mask in networks]).all(0)
    present = valid.any(1)
    valid = valid[present]
    keys = torch.rand(valid.shape, generator=generator, device="cpu") + ~valid
    # Valid positions first, in random order; those of a sample with fewer of them are used several times.
    places = torch.arange(min(count, valid.shape[1]), device="cpu") % valid.sum(1, keepdim=True)
    positions = keys.argsort(1).gather(1, places)
    index = torch.arange(len(positions), device="cpu").unsqueeze(1)
    return [values[present][index, positions].float() for values, _ in networks]


def _in_blocks(parts: Sequence[Sequence[Tensor]]) -> SameSamples:
    block = max(part[0].shape[1] for part in parts)
    # Batches of shorter sequences have fewer positions, which are used several times.
    same = [[x[:, torch.arange(block, device="cpu") % x.shape[1]] for x in part] for part in parts]
    values = [torch.cat(of_network).flatten(0, 1) for of_network in zip(*same, strict=True)]
    if len(values[0]) < 2 * block:
        raise LIBError("There is only one sample to compare features on; at least two are needed, better a thousand.")
    if not all(x.isfinite().all() for x in values):
        raise NotFiniteError("Features have NaN or infinite values on these samples: there is nothing to compare.")
    return SameSamples(tuple(x.double() for x in values), block)
