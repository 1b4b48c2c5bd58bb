"""Values of features on samples: what names them, and what tells them again in the next snapshot."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib_lightning.errors import LIBError
from lib_lightning.graph import InteractionGraph
from lib_lightning.model.batch import first_tensor, is_empty
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.questions import model_session


@dataclass(frozen=True)
class FeatureBatch:
    """Values of features on the samples of one batch, on the CPU.

    Attributes:
        inputs: What the model was given: the first tensor of its inputs, shape ``(n, ...)``.
        features: For each node layer ``fhat``, shape ``(n, S, r)``.
        masks: For each node layer the positions that count, shape ``(n, S)``; None for all.
    """

    inputs: Tensor
    features: dict[str, Tensor]
    masks: dict[str, Tensor | None]


def feature_values(
    instrumented: InstrumentedModel, graph: InteractionGraph, batches: Iterable[Any]
) -> Iterator[FeatureBatch]:
    """Compute the features of every node layer on some batches.

    Args:
        instrumented: The model and its node layers.
        graph: Its interaction graph.
        batches: Batches; empty ones are passed over.

    Yields:
        The values on each batch.

    Raises:
        LIBError: If there is no tensor in a batch.
    """
    with model_session(instrumented), torch.no_grad():
        for instrumented.seed, batch in enumerate(batch for batch in batches if not is_empty(batch)):
            given = first_tensor(instrumented.inputs(batch))
            if given is None:
                raise LIBError(f"There is no tensor in a batch of type {type(batch).__name__}.")
            cuts = dict(zip(graph.bases, instrumented.capture(batch), strict=True))
            yield FeatureBatch(
                given.cpu(),
                {name: graph.bases[name].encode(cut.a).cpu() for name, cut in cuts.items()},
                {name: None if cut.mask is None else cut.mask.cpu() for name, cut in cuts.items()},
            )
