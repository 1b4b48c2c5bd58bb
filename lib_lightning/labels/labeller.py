"""The protocol of labellers, and the function that applies one to a graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lib_lightning.errors import LIBError
from lib_lightning.features.values import feature_values
from lib_lightning.graph import InteractionGraph
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import InputFn, MaskFn, ModelSpec
from lib_lightning.model.skip_positions import SkipPositions


class Labeller(Protocol):
    """A function, or an object such as `FourierLabels`, that labels features.

    Example:
        >>> def largest_at(features: Tensor, inputs: Tensor) -> list[str]:
        ...     return [str(inputs[i].tolist()) for i in features[:, -1].argmax(0)]
        >>> labeller: Labeller = largest_at
        >>> labeller(torch.tensor([[[0.5, 2.0]], [[1.5, 1.0]]]), torch.tensor([[3, 4], [5, 6]]))
        ['[5, 6]', '[3, 4]']
    """

    def __call__(self, features: Tensor, inputs: Tensor, /) -> list[str]:
        """Label the features of one node layer.

        Args:
            features: ``fhat``, shape ``(n, S, r)``; 0, its mean, at masked positions.
            inputs: The first tensor of the model's inputs for these samples, shape ``(n, ...)``.

        Returns:
            A label for each of the ``r`` features; "" for none.
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
    skip_positions: SkipPositions | None = None,
) -> dict[str, list[str]]:
    """Label the features of every node layer by their values on some batches, for `InteractionGraph.labels`.

    A last node layer in the neuron basis is not labelled: its features are already identified, for example as classes.

    Args:
        graph: The interaction graph of the model.
        model: The model that the graph was computed on; it is not changed.
        batches: Iterable of batches; the labeller is called with all of their samples at once.
        labeller: The labeller.
        input_fn: As for `compute_interaction_graph`.
        mask: As for `compute_interaction_graph`.
        dtype: As for `compute_interaction_graph`.
        skip_positions: As for `compute_interaction_graph`. The graph remembers its own.

    Returns:
        A label for each feature, by node layer, in the order of the graph's indices: label ``k`` is that of
        ``graph.feature((layer, k))``, whose id has another number in a run.

    Raises:
        LIBError: If the graph does not know where its node layers are, there are no samples, samples differ in length,
            or the number of labels is not that of features.
        NodeLayerError: If the model does not have its node layers.

    Example:
        >>> from lib_lightning import compute_interaction_graph
        >>> model, x = nn.Linear(3, 2), torch.randn(20, 3)
        >>> graph = compute_interaction_graph(model, [x], ["input", "output"])
        >>> graph.labels = label_features(graph, model, [x], lambda features, inputs: ["first", "second"])
        >>> graph.labels
        {'input': ['first', 'second']}
    """
    layers = graph.node_layer_specs()
    instrumented = InstrumentedModel(model, layers, ModelSpec(input_fn, mask, dtype, skip_positions))
    last = graph.bases[layers[-1].name]
    labelled = layers[:-1] if last.kind == "neuron" else layers

    features: dict[str, list[Tensor]] = {layer.name: [] for layer in labelled}
    inputs: list[Tensor] = []
    for values in feature_values(instrumented, graph, batches):
        inputs.append(values.inputs)
        for name, parts in features.items():
            valid, fhat = values.masks[name], values.features[name]
            parts.append(fhat if valid is None else fhat.where(valid[..., None], 0.0))
    if not inputs:
        raise LIBError("There are no samples to label features with: all batches are empty.")
    all_inputs = _concatenate(inputs)
    return {name: _checked(labeller(_concatenate(parts), all_inputs), name, graph) for name, parts in features.items()}


def _concatenate(parts: list[Tensor]) -> Tensor:
    if len({part.shape[1:] for part in parts}) > 1:
        raise LIBError(
            "Batches differ in the length of their samples, but a labeller is called with all samples at once. Use "
            "batches of one length, or pad them and use single positions: NodeLayer(..., positions=-1)."
        )
    return torch.cat(parts)


def _checked(labels: list[str], layer: str, graph: InteractionGraph) -> list[str]:
    if len(labels) != graph.bases[layer].n_features:
        raise LIBError(
            f"The labeller returned {len(labels)} labels for the {graph.bases[layer].n_features} features of '{layer}'."
        )
    return list(labels)
