"""From a module and some batches to its interaction graph: the entry point that needs no trainer."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lib_lightning.core.build import BasisKind, Built, FinalBasisKind, FinalMetric, Settings, build
from lib_lightning.core.check import check
from lib_lightning.core.errors import ActivationError
from lib_lightning.core.groups import standard_error
from lib_lightning.core.layers import NodeLayer, as_node_layers
from lib_lightning.core.live import InputFn, LiveModel, MaskFn
from lib_lightning.core.memory import Chunks, Demand, in_chunks, is_out_of_memory, plan_chunks
from lib_lightning.core.nested import batch_size, is_empty, numbers_in
from lib_lightning.core.steps import finished
from lib_lightning.core.together import ALONE, Together
from lib_lightning.graph import InteractionGraph, Replicates
from lib_lightning.questions import as_mask_fn, propose_node_layers, session
from lib_lightning.version import __version__

log = logging.getLogger(__name__)

# In GiB.
MEMORY_LIMIT = 2.0
# How often chunks are halved before memory is given up on.
_HALVINGS = 6


def compute_interaction_graph(
    model: nn.Module,
    batches: Iterable[Any],
    node_layers: Sequence[str | NodeLayer] | None = None,
    basis: BasisKind = "lib",
    final_basis: FinalBasisKind = "auto",
    rtol: float = 1e-6,
    n_probes: int | None = None,
    integration_steps: int = 0,
    dtype: torch.dtype | None = None,
    input_fn: InputFn | None = None,
    mask: str | int | MaskFn | None = None,
    memory_limit: float = MEMORY_LIMIT,
    together: Together = ALONE,
    progress: bool = False,
    final_metric: FinalMetric | None = None,
) -> InteractionGraph:
    """Compute the Local Interaction Basis of a model's activations and the interactions between its features.

    The model is run in evaluation mode and left exactly as it was found.

    Args:
        model: Any module.
        batches: Batches as a data loader gives them: tensors, tuples, lists or dicts. They are gone through several
            times, so an iterator is read into memory first.
        node_layers: Where to cut the model, in forward order: ``"module.path"`` for a module's output,
            ``"module.path:input"`` for its input, ``"input"`` and ``"output"`` for the model's own, or a `NodeLayer`.
            None takes those that `list_node_layers` proposes, and a warning says which.
        basis: ``"lib"``, or the baselines ``"pca"`` and ``"neuron"``.
        final_basis: Basis of the last node layer, which has no next one: ``"neuron"``, ``"pca"``, or ``"centered"`` for
            logits less their mean over the classes; ``"auto"`` takes neurons for ``"output"`` and PCA for anything
            else.
        rtol: Directions of metric and importance (PCA: variance) below this share of the largest are dropped; 0 drops
            only what rounding cannot tell from zero.
        n_probes: None for the exact metric; a number for that many random-sign probes per sample, which makes the
            cost independent of the number of output positions and features.
        integration_steps: 0 takes gradients at the activations; a number averages them over that many Gauss-Legendre
            points on the way from the mean.
        dtype: Floating-point type to compute in, the model's own by default. Sums are always float64.
        input_fn: Turns a batch into what the model is called with: a dict becomes keyword arguments, a tuple positional
            ones. By default the first entry of a tuple or list, and any other batch as it is.
        mask: Marks the positions that count, where some are padding: the name or index of the batch's entry that does,
            such as ``"attention_mask"``, or a function from a batch to a tensor ``(n, S)``.
        memory_limit: Memory to use beside model and batches, in GiB: batches go through the model in chunks of samples
            that keep within it. Should memory run out nevertheless, the chunks are halved.
        together: Processes that each call this with batches of their own, and all get the graph of all samples:
            `lib_lightning.processes.Processes()`. By default this process is alone.
        progress: Whether to show a progress bar.
        final_metric: ``"fisher"`` measures the last node layer, which are logits, by the distribution that they stand
            for: importance then means effect on what the model predicts.

    Returns:
        The interaction graph: a basis for each node layer, edges between neighbouring ones.

    Raises:
        NodeLayerError: If a node layer is unknown, never run, out of order, or does not cut the computation.
        ActivationError: If activations are integers, NaN or infinite, or there are no samples.
        ValueError: If a setting is outside its range.
        TypeError: If ``batches`` is a single tensor, or ``dtype`` no floating-point type.

    Note:
        Source: arXiv 2405.10928; see `lib_lightning.core.build` for the steps.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> graph = compute_interaction_graph(model, [torch.randn(64, 4)], ["input", "1", "output"])
        >>> graph.node_layers
        ['input', '1', 'output']
        >>> graph.edges["1", "output"].shape[0]
        2
    """
    settings = Settings(basis, final_basis, rtol, n_probes, integration_steps, final_metric)
    if isinstance(batches, (Tensor, Mapping)):
        raise TypeError("batches is a list (or any iterable) of batches; for a single one write [batch].")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype is a floating-point type such as torch.float64, or None; got {dtype!r}.")
    batches = list(batches)
    mask_fn = as_mask_fn(mask)
    if node_layers is None:
        node_layers = _proposed(model, batches, input_fn, mask_fn)
    live = LiveModel(model, as_node_layers(node_layers), input_fn, dtype, mask_fn)
    graph = graph_of(live, batches, settings, memory_limit, together, check_first=True, progress=progress)
    for note in graph.info["notes"]:
        log.warning(note)
    return graph


def graph_of(
    live: LiveModel,
    batches: Sequence[Any],
    settings: Settings,
    memory_limit: float = MEMORY_LIMIT,
    together: Together = ALONE,
    check_first: bool = False,
    progress: bool = False,
) -> InteractionGraph:
    """Compute the interaction graph of a live model: `compute_interaction_graph`, with everything made up beforehand.

    Args:
        live: The model and its node layers.
        batches: All batches.
        settings: What to compute.
        memory_limit: As for `compute_interaction_graph`.
        together: As for `compute_interaction_graph`.
        check_first: Whether to hold the node layers to account before anything else.
        progress: Whether to show a progress bar.

    Returns:
        The interaction graph, on the CPU.
    """
    batches = [batch for batch in batches if not is_empty(batch)]
    largest = max(map(batch_size, batches), default=1)
    passes = 2 + (len(live.layers) - 1 if settings.basis == "lib" else 0) + (settings.final_metric is not None)
    chunks: Chunks | None = None
    for attempt in itertools.count():
        try:
            with together.agreed(), session(live):
                if chunks is None:
                    if check_first and batches:
                        check(live, batches[0])
                    chunks = _plan(live, batches, settings, memory_limit)
                parts = in_chunks(live, batches, chunks.samples)
                finished("checks and chunks")
                with tqdm(total=passes * len(parts), disable=not progress, unit="chunk") as bar:

                    def tick(step: str, bar: Any = bar) -> None:
                        bar.set_description(step, refresh=False)
                        bar.update()

                    built = build(live, parts, settings, tick, chunks, together)
                return _as_graph(built, settings, live)
        except Exception as error:
            if attempt == _HALVINGS or not is_out_of_memory(error):
                raise
        chunks = (chunks or Chunks()).halved(largest)
    raise AssertionError("the loop ends by itself")


def _plan(live: LiveModel, batches: Sequence[Any], settings: Settings, memory_limit: float) -> Chunks:
    if not batches:  # another process has some
        return Chunks()
    # Batches may differ in length; the longest samples take the most.
    longest = max(batches, key=lambda batch: numbers_in(batch) / max(1, batch_size(batch)))
    demand = Demand(
        sum(map(batch_size, batches)),
        settings.integration_steps,
        settings.basis == "lib",
        settings.final_metric == "fisher",
    )
    return plan_chunks(live, longest, int(memory_limit * 2**30), demand)


def _as_graph(built: Built, settings: Settings, live: LiveModel) -> InteractionGraph:
    info = {
        "settings": {**asdict(settings), "dtype": None if live.dtype is None else str(live.dtype).split(".")[-1]},
        "node_layers": [
            {"name": x.name, "taps": list(x.taps), "positions": x.positions, "feature_dim": x.feature_dim}
            for x in live.layers
        ],
        "n_samples": built.n_samples,
        "metric_errors": built.metric_errors,
        "notes": built.notes,
        "versions": {"lib_lightning": __version__, "torch": str(torch.__version__)},
    }
    names = [basis.name for basis in built.bases]
    bases = {basis.name: basis.to("cpu") for basis in built.bases}
    pairs = list(itertools.pairwise(names))
    edges = {pair: E.cpu() for pair, E in zip(pairs, built.edges, strict=True)}
    replicates = Replicates(
        {name: x.cpu() for name, x in zip(names, built.importance_replicates, strict=True)},
        {pair: x.cpu() for pair, x in zip(pairs, built.edge_replicates, strict=True)},
    )
    errors = {pair: standard_error(x) for pair, x in replicates.edges.items() if len(x) > 1}
    return InteractionGraph(bases, edges, info, errors, replicates=replicates)


def _proposed(model: nn.Module, batches: Sequence[Any], input_fn: InputFn | None, mask_fn: MaskFn | None) -> list[str]:
    batch = next((batch for batch in batches if not is_empty(batch)), None)
    if batch is None:
        raise ActivationError("There are no samples to choose node layers with.")
    node_layers = propose_node_layers(model, batch, input_fn, mask_fn)
    log.warning("No node layers were given; %s is cut at node_layers=%s.", type(model).__name__, node_layers)
    return node_layers
