"""Which node layers have a dictionary, tried with activations of the model, and the memory that they need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lib_lightning.algorithm.memory_plan import MemoryPlan
from lib_lightning.dictionaries.adapted import AdaptedDictionary, check_dictionary
from lib_lightning.errors import NodeLayerError, SettingError, SettingTypeError, did_you_mean, quoted, shortened
from lib_lightning.model.batch import num_elements
from lib_lightning.model.instrumented import InstrumentedModel

# Samples with which dictionaries are tried.
_FEW = 8
# Tensors of the size of all features of a batch, and of derivatives of its active latents, that there are at a time.
_OF_FEATURES, _OF_DERIVATIVES = 4, 4


def check_dictionaries(dictionaries: Any, layers: Sequence[str]) -> dict[str, Any]:
    """Check what the user gives as dictionaries.

    Args:
        dictionaries: Objects with ``encode`` and ``decode``, by node layer; None for none.
        layers: Names of the node layers.

    Returns:
        The objects.

    Raises:
        SettingTypeError: If it is no mapping, or an object has no ``encode`` or ``decode``.
        NodeLayerError: If there is no such node layer.

    Example:
        >>> check_dictionaries(None, ["input", "output"])
        {}
    """
    if dictionaries is None:
        return {}
    if not isinstance(dictionaries, Mapping):
        raise SettingTypeError(
            "dictionaries are objects with encode and decode by node layer, such as {'blocks.3': sae}; got "
            f"{shortened(repr(dictionaries), 80)}."
        )
    for name, dictionary in dictionaries.items():
        if layers and name not in layers:
            raise NodeLayerError(
                f"There is no node layer '{name}' for a dictionary among {quoted(layers)}.{did_you_mean(name, layers)}"
            )
        check_dictionary(dictionary, f"The dictionary of '{name}'")
    return dict(dictionaries)


def try_dictionaries(
    instrumented: InstrumentedModel, batches: Sequence[Any], dictionaries: Mapping[str, Any]
) -> tuple[dict[int, AdaptedDictionary], dict[int, LatentCounts]]:
    """Try the dictionaries of node layers with the activations of a few samples.

    Args:
        instrumented: The model and its node layers. Call this within `model_session`.
        batches: Batches of this process, at least one if there are dictionaries.
        dictionaries: Objects with ``encode`` and ``decode``, by name of the node layer.

    Returns:
        The adapted dictionaries, and how many of their latents are active, by index of the node layer.

    Raises:
        SettingError: If a dictionary does not fit its node layer, or there are no activations to try it with.
        NotFiniteError: If it returns NaN or infinite numbers.
    """
    if not dictionaries:
        return {}, {}
    indices = {layer.name: i for i, layer in enumerate(instrumented.layers)}
    captured = []
    if batches:
        # The longest samples need the most memory.
        largest = max(batches, key=lambda batch: num_elements(batch) / max(1, instrumented.num_samples(batch)))
        with torch.no_grad():
            captured = instrumented.run_on_few(instrumented.capture, largest, _FEW)
    found, counts = {}, {}
    for name, dictionary in dictionaries.items():
        i = indices[name]
        rows = captured[i].rows if captured else torch.zeros(0, 0, device="cpu")
        if not len(rows):
            raise SettingError(f"There are no activations of '{name}' to try its dictionary with.")
        found[i] = AdaptedDictionary(dictionary, rows, name)
        counts[i] = _count_latents(found[i], captured[i].a)
    return found, counts


@dataclass(frozen=True)
class LatentCounts:
    """How many latents of a dictionary are active on a few samples, each with one more for the error.

    Attributes:
        n_latents: Number of latents, active or not.
        positions: Number of positions of a sample.
        row_bytes: Size of the activations at a position.
        per_position: Largest number of active latents at a position.
        per_sample: Largest number of those active at any position of a sample: so many are pushed through a section.
        anywhere: Number of those active in any of the samples. More samples have more features.
    """

    n_latents: int
    positions: int
    row_bytes: int
    per_position: int
    per_sample: int
    anywhere: int


def _count_latents(dictionary: AdaptedDictionary, a: Tensor) -> LatentCounts:
    """Count active latents of a few samples, whose activations are ``(n, S, d)``."""
    per_position, per_sample = 0, 0
    is_active = torch.zeros(dictionary.n_latents, dtype=torch.bool, device=a.device)
    for sample in a:
        with torch.no_grad():
            active = dictionary.encode(sample) != 0
        is_active |= active.any(0)
        per_position = max(per_position, int(active.sum(1).max()))
        per_sample = max(per_sample, int(active.any(0).sum()))
    anywhere = int(is_active.sum())
    row_bytes = a.shape[2] * a.element_size()
    return LatentCounts(dictionary.n_latents, a.shape[1], row_bytes, per_position + 1, per_sample + 1, anywhere + 1)


def plan_for_dictionaries(plan: MemoryPlan, counts: Mapping[int, LatentCounts]) -> MemoryPlan:
    """The memory plan with as many samples at once as there is memory for latents and their derivatives.

    Args:
        plan: The plan without dictionaries.
        counts: How many latents are active, by index of the node layer.

    Returns:
        The plan.
    """
    per_sample = 0
    for of in counts.values():
        features = min(of.n_latents, math.isqrt(plan.edge_bytes // 16))
        of_position = _OF_FEATURES * 8 * features + _OF_DERIVATIVES * of.per_position * of.row_bytes
        per_sample = max(per_sample, of.positions * of_position)
    return replace(plan, samples=max(1, min(plan.samples, plan.edge_bytes // max(1, per_sample))))
