"""Short names for features: what each one responds to, found from its values and the model's inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lib_lightning.errors import LIBError
from lib_lightning.features import feature_values
from lib_lightning.graph import InteractionGraph
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import InputFn, MaskFn, ModelSpec


class Labeller(Protocol):
    """Anything that names features: a function, or an object such as `FourierLabels`.

    Example:
        >>> def largest_at(features: Tensor, inputs: Tensor) -> list[str]:
        ...     return [str(inputs[i].tolist()) for i in features[:, -1].argmax(0)]
        >>> labeller: Labeller = largest_at
        >>> labeller(torch.tensor([[[0.5, 2.0]], [[1.5, 1.0]]]), torch.tensor([[3, 4], [5, 6]]))
        ['[5, 6]', '[3, 4]']
    """

    def __call__(self, features: Tensor, inputs: Tensor, /) -> list[str]:
        """Name the features of one node layer.

        Args:
            features: ``fhat``, shape ``(n, S, r)``; 0, its mean, at positions that a mask leaves out.
            inputs: What the model was given for these samples: the first tensor of its inputs, shape ``(n, ...)``.

        Returns:
            A name for each of the ``r`` features; "" for none.
        """
        ...


def label_features(
    graph: InteractionGraph,
    model: nn.Module,
    batches: Iterable[Any],
    labeller: Labeller,
    input_fn: InputFn | None = None,
    mask: str | int | MaskFn | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, list[str]]:
    """Name the features of every node layer by what they do on some batches, for `InteractionGraph.labels`.

    A last node layer of neurons is left out: its entries have names already, such as classes.

    Args:
        graph: The interaction graph of the model.
        model: The model as it was then; left exactly as it was found.
        batches: Iterable of batches; their samples are looked at all at once.
        labeller: What finds the names.
        input_fn: As for `compute_interaction_graph`.
        mask: As for `compute_interaction_graph`.
        dtype: As for `compute_interaction_graph`.

    Returns:
        A name for each feature, by node layer.

    Raises:
        LIBError: If the graph does not say where its node layers are, there are no samples, samples differ in length,
            or a labeller gives another number of names than there are features.
        NodeLayerError: If the model has no such node layers.

    Example:
        >>> from lib_lightning import compute_interaction_graph
        >>> model, x = nn.Linear(3, 2), torch.randn(20, 3)
        >>> graph = compute_interaction_graph(model, [x], ["input", "output"])
        >>> graph.labels = label_features(graph, model, [x], lambda features, inputs: ["first", "second"])
        >>> graph.labels
        {'input': ['first', 'second']}
    """
    layers = graph.node_layer_specs()
    instrumented = InstrumentedModel(model, layers, ModelSpec(input_fn, mask, dtype))
    last = graph.bases[layers[-1].name]
    named = layers[:-1] if last.kind == "neuron" else layers

    features: dict[str, list[Tensor]] = {layer.name: [] for layer in named}
    inputs: list[Tensor] = []
    for values in feature_values(instrumented, graph, batches):
        inputs.append(values.inputs)
        for name, parts in features.items():
            mask_here = values.masks[name]
            found = values.features[name]
            parts.append(found if mask_here is None else found.where(mask_here[..., None], 0.0))
    if not inputs:
        raise LIBError("There are no samples to name features by.")
    whole = _joined(inputs)
    return {name: _names(labeller(_joined(parts), whole), name, graph) for name, parts in features.items()}


def _joined(parts: list[Tensor]) -> Tensor:
    if len({part.shape[1:] for part in parts}) > 1:
        raise LIBError(
            "Batches differ in the length of their samples, and features are named on all of them at once: take "
            "batches of one length, or look at single positions (NodeLayer(..., positions=-1)) of padded ones."
        )
    return torch.cat(parts)


def _names(names: list[str], layer: str, graph: InteractionGraph) -> list[str]:
    if len(names) != graph.bases[layer].n_features:
        raise LIBError(
            f"The labeller gave {len(names)} names for the {graph.bases[layer].n_features} features of '{layer}'."
        )
    return list(names)
