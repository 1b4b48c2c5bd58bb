"""Values of features on reference samples: what a feature is recognised by in the next snapshot."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lib_lightning._deprecated import renamed_arguments
from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from lib_lightning.errors import LIBError
from lib_lightning.features import feature_values
from lib_lightning.graph import InteractionGraph
from lib_lightning.lineage.matching import standardised
from lib_lightning.model.batch import batch_size
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import InputFn, MaskFn, ModelSpec

# Values of a feature that are enough to tell it by: chance correlations of so many are 0.03.
NUM_REFERENCE_VALUES = 1024


@renamed_arguments(together="process_group")
def reference_features(
    graph: InteractionGraph,
    model: nn.Module,
    batches: Iterable[Any],
    seed: int = 0,
    count: int = NUM_REFERENCE_VALUES,
    input_fn: InputFn | None = None,
    mask: str | int | MaskFn | None = None,
    dtype: torch.dtype | None = None,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, Tensor]:
    """Evaluate the features of every node layer on reference samples, for ``graph.reference_features``.

    With the same batches and the same seed the values are those of the same samples and positions, on every process.

    Args:
        graph: The interaction graph of the model.
        model: The model as it was then; left exactly as it was found.
        batches: Iterable of batches, the same for all graphs that are to be compared.
        seed: Chooses positions, where samples have many.
        count: Number of values wanted for each feature: so many positions of each sample are taken.
        input_fn: As for `compute_interaction_graph`.
        mask: As for `compute_interaction_graph`.
        dtype: As for `compute_interaction_graph`.
        process_group: Processes that each call this with batches of their own, and all get the values of all of them.

    Returns:
        For each node layer the values, each feature scaled to mean 0 and variance 1, shape ``(N, r)``, float16.

    Raises:
        LIBError: If the graph does not say where its node layers are, or there are no samples.
        NodeLayerError: If the model has no such node layers.

    Example:
        >>> from lib_lightning import compute_interaction_graph
        >>> model, x = nn.Linear(3, 2), torch.randn(20, 3)
        >>> graph = compute_interaction_graph(model, [x], ["input", "output"])
        >>> reference_features(graph, model, [x])["output"].shape
        torch.Size([20, 2])
    """
    instrumented = InstrumentedModel(model, graph.node_layer_specs(), ModelSpec(input_fn, mask, dtype))
    batches = list(batches)
    samples = sum(int(t) for t in process_group.gather(torch.tensor([sum(map(batch_size, batches))])))
    if not samples:
        raise LIBError("There are no samples to look at features on.")
    positions = -(-count // samples)
    rows: dict[str, list[Tensor]] = {name: [] for name in graph.node_layers}
    # Its own, so that nobody else's random numbers are used up.
    generator = torch.Generator().manual_seed(seed + process_group.rank)
    for values in feature_values(instrumented, graph, batches):
        for name, features in values.features.items():
            mask_here = values.masks[name]
            there = features.flatten(0, 1) if mask_here is None else features[mask_here]
            wanted = min(len(there), positions * len(features))
            chosen = torch.randperm(len(there), generator=generator)[:wanted].sort().values
            rows[name].append(there[chosen].double())
    found = {}
    for name, parts in rows.items():
        own = torch.cat([torch.zeros(0, graph.bases[name].n_features, dtype=torch.float64), *parts])
        whole = torch.cat([part.cpu() for part in process_group.gather(own)])
        found[name] = (standardised(whole) * len(whole) ** 0.5).half()
    return found
