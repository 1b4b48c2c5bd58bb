"""Values of features on samples: what names them, and what tells them again in the next snapshot."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lib_lightning.core.errors import LIBError
from lib_lightning.core.live import InputFn, LiveModel, MaskFn
from lib_lightning.core.nested import batch_size, first_tensor, is_empty, map_tensors
from lib_lightning.core.together import ALONE, Together
from lib_lightning.graph import InteractionGraph
from lib_lightning.lineage.matching import standardised
from lib_lightning.questions import as_mask_fn, session

# Values of a feature that are enough to tell it by: chance correlations of so many are 0.03.
PROBES = 1024


@dataclass(frozen=True)
class BatchValues:
    """Values of features on the samples of one batch, on the CPU.

    Attributes:
        inputs: What the model was given: the first tensor of its inputs, shape ``(n, ...)``.
        features: For each node layer ``fhat``, shape ``(n, S, r)``.
        masks: For each node layer the positions that count, shape ``(n, S)``; None for all.
    """

    inputs: Tensor
    features: dict[str, Tensor]
    masks: dict[str, Tensor | None]


def feature_values(live: LiveModel, graph: InteractionGraph, batches: Iterable[Any]) -> Iterator[BatchValues]:
    """Compute the features of every node layer on some batches.

    Args:
        live: The model and its node layers.
        graph: Its interaction graph.
        batches: Batches; empty ones are passed over.

    Yields:
        The values on each batch.

    Raises:
        LIBError: If there is no tensor in a batch.
    """
    with session(live), torch.no_grad():
        for live.seed, batch in enumerate(batch for batch in batches if not is_empty(batch)):
            given = first_tensor(live.inputs(batch))
            if given is None:
                raise LIBError(f"There is no tensor in a batch of type {type(batch).__name__}.")
            cuts = dict(zip(graph.bases, live.cut(batch), strict=True))
            yield BatchValues(
                given.cpu(),
                {name: graph.bases[name].encode(cut.a).cpu() for name, cut in cuts.items()},
                {name: None if cut.mask is None else cut.mask.cpu() for name, cut in cuts.items()},
            )


def probe_features(
    graph: InteractionGraph,
    model: nn.Module,
    batches: Iterable[Any],
    seed: int = 0,
    count: int = PROBES,
    input_fn: InputFn | None = None,
    mask: str | int | MaskFn | None = None,
    dtype: torch.dtype | None = None,
    together: Together = ALONE,
) -> dict[str, Tensor]:
    """Look at the features of every node layer on probe samples, for ``graph.probes``: what they are followed by.

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
        together: Processes that each call this with batches of their own, and all get the values of all of them.

    Returns:
        For each node layer the values, each feature scaled to mean 0 and variance 1, shape ``(N, r)``, float16.

    Raises:
        LIBError: If the graph does not say where its node layers are, or there are no samples.
        NodeLayerError: If the model has no such node layers.

    Example:
        >>> from lib_lightning import compute_interaction_graph
        >>> model, x = nn.Linear(3, 2), torch.randn(20, 3)
        >>> graph = compute_interaction_graph(model, [x], ["input", "output"])
        >>> probe_features(graph, model, [x])["output"].shape
        torch.Size([20, 2])
    """
    live = LiveModel(model, graph.layers(), input_fn, dtype, as_mask_fn(mask))
    batches = list(batches)
    samples = sum(int(t) for t in together.gather(torch.tensor([sum(map(batch_size, batches))])))
    if not samples:
        raise LIBError("There are no samples to look at features on.")
    positions = -(-count // samples)
    rows: dict[str, list[Tensor]] = {name: [] for name in graph.node_layers}
    # Its own, so that nobody else's random numbers are used up.
    generator = torch.Generator().manual_seed(seed + together.rank)
    for values in feature_values(live, graph, batches):
        for name, features in values.features.items():
            mask_here = values.masks[name]
            there = features.flatten(0, 1) if mask_here is None else features[mask_here]
            wanted = min(len(there), positions * len(features))
            chosen = torch.randperm(len(there), generator=generator)[:wanted].sort().values
            rows[name].append(there[chosen].double())
    found = {}
    for name, parts in rows.items():
        own = torch.cat([torch.zeros(0, graph.bases[name].n_features, dtype=torch.float64), *parts])
        whole = torch.cat([part.cpu() for part in together.gather(own)])
        found[name] = (standardised(whole) * len(whole) ** 0.5).half()
    return found


def fingerprint(batches: Iterable[Any], together: Together = ALONE) -> str:
    """Tell samples from other samples.

    Args:
        batches: Batches of this process.
        together: The processes.

    Returns:
        A hash of all their tensors, the same on every process.

    Example:
        >>> fingerprint([torch.zeros(2)]) == fingerprint([torch.zeros(2)]) != fingerprint([torch.ones(2)])
        True
    """
    digest = hashlib.sha256()

    def add(t: Tensor) -> Tensor:
        digest.update(f"{t.dtype} {tuple(t.shape)}".encode())
        # Any type's bytes, also those that NumPy does not know.
        digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return t

    for batch in batches:
        map_tensors(batch, add)
    own = torch.tensor(list(digest.digest()), dtype=torch.uint8)
    return hashlib.sha256(b"".join(bytes(t.tolist()) for t in together.gather(own))).hexdigest()[:16]
