"""Values of features on reference samples, by which features are matched between snapshots."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lib_lightning._deprecated import renamed_arguments
from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from lib_lightning.errors import LIBError
from lib_lightning.features.values import feature_values
from lib_lightning.graph import InteractionGraph
from lib_lightning.lineage.matching import standardised
from lib_lightning.model.batch import is_empty
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import ModelSpec

# Number of values of each feature. The standard deviation of chance correlations is then 1/32.
NUM_REFERENCE_VALUES = 1024


@renamed_arguments(together="process_group")
def reference_features(
    graph: InteractionGraph,
    model: nn.Module,
    batches: Iterable[Any],
    seed: int = 0,
    count: int = NUM_REFERENCE_VALUES,
    *,
    process_group: ProcessGroup = SINGLE_PROCESS,
    **spec: Any,
) -> dict[str, Tensor]:
    """Evaluate the features of every node layer on reference samples, for ``graph.reference_features``.

    The same batches and seed give the same samples and positions, on every process.

    Args:
        graph: The interaction graph of the model.
        model: The model that the graph was computed on; it is not changed.
        batches: The reference samples, the same for all graphs that are compared.
        seed: Seed for the choice of positions.
        count: Smallest number of values of each feature, if samples have enough positions.
        process_group: Processes that call this with different batches; each gets the values on all batches.
        spec: ``input_fn``, ``mask`` and ``dtype``, as for `compute_interaction_graph`.

    Returns:
        For each node layer the values, each feature scaled to mean 0 and variance 1, shape ``(N, r)``, float16.

    Raises:
        LIBError: If the graph does not know where its node layers are, or there are no samples.
        NodeLayerError: If the model does not have its node layers.

    Example:
        >>> from lib_lightning import compute_interaction_graph
        >>> model, x = nn.Linear(3, 2), torch.randn(20, 3)
        >>> graph = compute_interaction_graph(model, [x], ["input", "output"])
        >>> reference_features(graph, model, [x])["output"].shape
        torch.Size([20, 2])
    """
    instrumented = InstrumentedModel(model, graph.node_layer_specs(), ModelSpec(**spec))
    batches = list(batches)
    own = sum(instrumented.num_samples(batch) for batch in batches if not is_empty(batch))
    samples = sum(int(t) for t in process_group.gather(torch.tensor([own], device="cpu")))
    if not samples:
        raise LIBError("There are no reference samples: all batches are empty.")
    positions = -(-count // samples)
    rows: dict[str, list[Tensor]] = {name: [] for name in graph.node_layers}
    # A separate generator leaves the global random state unchanged.
    generator = torch.Generator().manual_seed(seed + process_group.rank)
    for values in feature_values(instrumented, graph, batches):
        for name, features in values.features.items():
            valid = values.masks[name]
            flat = features.flatten(0, 1) if valid is None else features[valid]
            size = min(len(flat), positions * len(features))
            chosen = torch.randperm(len(flat), generator=generator, device="cpu")[:size].sort().values
            rows[name].append(flat[chosen].double())
    gathered = {}
    for name, parts in rows.items():
        local = torch.cat([torch.zeros(0, graph.bases[name].n_features, dtype=torch.float64, device="cpu"), *parts])
        all_values = torch.cat([part.cpu() for part in process_group.gather(local)])
        gathered[name] = (standardised(all_values) * len(all_values) ** 0.5).half()
    return gathered
