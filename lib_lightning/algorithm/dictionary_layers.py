"""Which node layers have a dictionary, tried with activations of the model, and the memory that they need."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lib_lightning.algorithm.memory_plan import MemoryPlan
from lib_lightning.dictionaries.adapted import AdaptedDictionary, check_dictionary
from lib_lightning.errors import NodeLayerError, SettingError, SettingTypeError, did_you_mean, quoted, shortened
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
        check_dictionary(dictionary, name)
    return dict(dictionaries)


def try_dictionaries(
    instrumented: InstrumentedModel, batches: Sequence[Any], dictionaries: Mapping[str, Any]
) -> dict[int, AdaptedDictionary]:
    """Try the dictionaries of node layers with some activations.

    Args:
        instrumented: The model and its node layers. Call this within `model_session`.
        batches: Batches of this process, at least one if there are dictionaries.
        dictionaries: Objects with ``encode`` and ``decode``, by name of the node layer.

    Returns:
        The adapted dictionaries, by index of the node layer.

    Raises:
        SettingError: If a dictionary does not fit its node layer, or there are no activations to try it with.
    """
    if not dictionaries:
        return {}
    indices = {layer.name: i for i, layer in enumerate(instrumented.layers)}
    captured = []
    if batches:
        with torch.no_grad():
            captured = instrumented.run_on_few(instrumented.capture, batches[0], _FEW)
    found = {}
    for name, dictionary in dictionaries.items():
        rows = captured[indices[name]].rows if captured else torch.zeros(0, 0, device="cpu")
        if not len(rows):
            raise SettingError(f"There are no activations of '{name}' to try its dictionary with.")
        found[indices[name]] = AdaptedDictionary(dictionary, rows, name)
    return found


def plan_for_dictionaries(
    plan: MemoryPlan, dictionaries: Mapping[int, AdaptedDictionary], activations: Sequence[Tensor]
) -> MemoryPlan:
    """The memory plan with as many samples at once as there is memory for latents and their derivatives.

    Args:
        plan: The plan without dictionaries.
        dictionaries: The dictionaries, by index of the node layer.
        activations: Activations of every node layer on one sample, shape ``(1, S, d)``.

    Returns:
        The plan.
    """
    per_sample = 0
    for i, dictionary in dictionaries.items():
        a = activations[i]
        with torch.no_grad():
            active = int((dictionary.encode(a) != 0).sum(-1).max()) + 1
        features = min(dictionary.n_latents, math.isqrt(plan.edge_bytes // 16))
        of_position = _OF_FEATURES * 8 * features + _OF_DERIVATIVES * a.element_size() * active * dictionary.d
        per_sample = max(per_sample, a.shape[1] * of_position)
    return replace(plan, samples=max(1, min(plan.samples, plan.edge_bytes // max(1, per_sample))))


def affordable_latents(
    dictionaries: Mapping[int, AdaptedDictionary],
    activations: Sequence[Tensor],
    edges: Sequence[float],
    allowed: float,
) -> int | None:
    """How many active latents of each sample can be pushed forward.

    Args:
        dictionaries: The dictionaries, by index of the node layer.
        activations: Activations of every node layer on one sample, shape ``(1, S, d)``.
        edges: Operations of the edges of each section, if as many features are pushed as a node layer has dimensions.
        allowed: Operations that edges may take.

    Returns:
        The number; None if all of them can be.
    """
    total = of_one = 0.0
    for i, operations in enumerate(edges):
        if i in dictionaries:
            a = activations[i]
            with torch.no_grad():
                active = int((dictionaries[i].encode(a) != 0).any(1).sum())
            of_one += operations / a.shape[-1]
            total += operations / a.shape[-1] * active
    return None if total <= allowed else max(1, int(allowed / of_one))
