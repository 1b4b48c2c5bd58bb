"""Values of a graph's features on samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib_lightning.errors import LIBError
from lib_lightning.graph import InteractionGraph
from lib_lightning.model.batch import first_tensor, is_empty
from lib_lightning.model.instrumented import InstrumentedModel, model_session


@dataclass(frozen=True)
class FeatureBatch:
    """Feature values on the samples of one batch, on the CPU.

    Attributes:
        inputs: The first tensor of the model's inputs, shape ``(n, ...)``.
        features: Feature values ``fhat`` of each node layer, shape ``(n, S, r)``, in the order of the graph's indices
            (`InteractionGraph.feature_ids` has the ids).
        masks: For each node layer, True at valid positions, shape ``(n, S)``; None if all positions are valid.
    """

    inputs: Tensor
    features: dict[str, Tensor]
    masks: dict[str, Tensor | None]


def feature_values(
    instrumented: InstrumentedModel, graph: InteractionGraph, batches: Iterable[Any]
) -> Iterator[FeatureBatch]:
    """Compute the feature values of every node layer.

    Args:
        instrumented: The model and its node layers.
        graph: Its interaction graph.
        batches: Batches; empty ones are skipped.

    Yields:
        The values on each batch.

    Raises:
        LIBError: If the model's input contains no tensor, or the graph is that of a model of another size.

    Example:
        >>> from lib_lightning import compute_interaction_graph
        >>> model, x = torch.nn.Linear(3, 2), torch.randn(20, 3)
        >>> graph = compute_interaction_graph(model, [x], ["input", "output"])
        >>> instrumented = InstrumentedModel(model, graph.node_layer_specs())
        >>> [batch.features["output"].shape for batch in feature_values(instrumented, graph, [x])]
        [torch.Size([20, 1, 2])]
    """
    with model_session(instrumented):
        for seed, batch in enumerate(instrumented.parts(batch for batch in batches if not is_empty(batch))):
            # Not around the loop: the code that takes the values would run without gradients, and two of these
            # generators that end in another order than they began would leave gradients switched off.
            with torch.no_grad():
                instrumented.manual_seed(seed)
                values = _values_on(instrumented, graph, batch)
            yield values


def _values_on(instrumented: InstrumentedModel, graph: InteractionGraph, batch: Any) -> FeatureBatch:
    inputs = first_tensor(instrumented.inputs(batch))
    if inputs is None:
        raise LIBError(f"The model's input for a batch of type {type(batch).__name__} contains no tensor.")
    captured = dict(zip(graph.bases, instrumented.capture(batch), strict=True))
    for name, layer in captured.items():
        if layer.a.shape[-1] != len(graph.bases[name].mean):
            raise LIBError(
                f"This is not the graph of this model: at '{name}' it has {len(graph.bases[name].mean):,} activations, "
                f"and the model {layer.a.shape[-1]:,}."
            )
    return FeatureBatch(
        inputs.cpu(),
        {name: graph.bases[name].encode(layer.a).cpu() for name, layer in captured.items()},
        {name: None if layer.mask is None else layer.mask.cpu() for name, layer in captured.items()},
    )
