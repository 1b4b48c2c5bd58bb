"""Which outputs features raise and lower, for features and samples of one's choice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lib_lightning.algorithm.config import LIBConfig, check_choice
from lib_lightning.algorithm.memory_plan import MemoryPlan
from lib_lightning.algorithm.output_changes import OutputEffects
from lib_lightning.algorithm.output_effects import find_output_effects
from lib_lightning.algorithm.output_gradients import is_output
from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup, first_given
from lib_lightning.errors import LIBError, check_number
from lib_lightning.graph import InteractionGraph
from lib_lightning.interventions.effects import known_output
from lib_lightning.interventions.names import FeatureName, find_features
from lib_lightning.model.batch import is_empty
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.output_distribution import OutputDistribution

OutputEffectsBy = Literal["auto", "steps", "derivatives"]


def output_effects(
    model: nn.Module,
    batches: Iterable[Any],
    graph: InteractionGraph,
    features: Iterable[FeatureName] | None = None,
    num_samples: int = 64,
    by: OutputEffectsBy = "auto",
    process_group: ProcessGroup = SINGLE_PROCESS,
    **options: Any,
) -> dict[str, OutputEffects]:
    """Find the outputs, such as classes or tokens, that features raise and lower most.

    Graphs have these already (``graph.output_effects``), as far as they take little time; this function is for other
    features, other samples, or more of them.

    Args:
        model: The model that the graph was computed on, or one of the same shape; it is not changed.
        batches: Batches to run it on.
        graph: An interaction graph in any basis.
        features: Which features, by names as for `edit_features`; by default all but those of the model's output.
        num_samples: Number of samples, over all processes, evenly spread over the batches.
        by: ``"steps"`` runs the model with each feature one standard deviation higher and lower, ``"derivatives"`` is
            the same to first order, from as many backward passes as the output has directions to move in; ``"auto"``
            is what needs fewer passes.
        process_group: The processes, each with its own batches; effects are those on the samples of all of them.
        options: ``input_fn``, ``mask`` and ``dtype``, as for `lib_lightning.compute_interaction_graph`.

    Returns:
        The effects by node layer, with rows for all features; those of features that were not asked for are -1 and NaN.

    Raises:
        LIBError: If a feature is not found, is one of the model's output, or if there are no samples; if it is unknown
            what the output stands for; or if derivatives are asked for and the output is no linear map of few numbers.
        NodeLayerError: If the graph belongs to a model of a different shape.

    Example:
        >>> from lib_lightning import compute_interaction_graph
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(50, 4)
        >>> graph = compute_interaction_graph(model, [x], ["1", "output"])
        >>> found = output_effects(model, [x], graph, ["1/0"])["1"]
        >>> found.outputs.shape, int((found.outputs >= 0).any(1).sum())
        (torch.Size([3, 10]), 1)
    """
    check_number("num_samples", num_samples, lambda n: n >= 1, "must be at least 1", integer=True)
    check_choice("by", by, get_args(OutputEffectsBy))
    specs = graph.node_layer_specs()
    of_output = {layer.name for layer in specs if is_output(layer.taps)}
    if features is None:
        places = [(layer, j) for layer, basis in graph.bases.items() for j in range(basis.n_features)]
        places = [place for place in places if place[0] not in of_output]
    else:
        places = list(find_features(graph, features))
        if any(layer in of_output for layer, _ in places):
            raise LIBError("Features of the model's output are made of outputs. Ask for those of other node layers.")
    output = known_output(graph)
    if output is None:
        raise LIBError("It is unknown what the model's output stands for: compute the graph with output_distribution=.")
    instrumented = InstrumentedModel(model, specs, ModelSpec(**options))
    with process_group.sync_errors(), model_session(instrumented):
        own = instrumented.parts(batch for batch in batches if not is_empty(batch))
        width = first_given([instrumented.capture_to_output(own[0])[-1].a.shape[-1]] if own else [], process_group)
        if not width:
            raise LIBError("There are no samples: all batches are empty.")
        output = replace(output, width=int(width[0]))
        indices = {
            name: torch.tensor(sorted(j for layer, j in places if layer == name), dtype=torch.int64, device="cpu")
            for name in dict.fromkeys(layer for layer, _ in places)
        }
        steps = LIBConfig(effect_samples=num_samples)
        # A linear map reads the output from numbers that are no wider than a node layer.
        widest = max(len(basis.mean) for name, basis in graph.bases.items() if name not in of_output)
        derivatives = replace(steps, effect_directions=min(output.width, widest))
        fewer = 2 * len(places) > (derivatives.effect_directions or 0)
        differentiates = by == "derivatives" or (by == "auto" and fewer)
        found: dict[str, OutputEffects] = {}
        if differentiates:
            found, _ = effects_in_graph(instrumented, own, graph, indices, output, derivatives, process_group)
            if not found and by == "derivatives":
                raise LIBError(
                    "The output is no linear map of few numbers, which by='derivatives' needs. Use by='steps'."
                )
        if not found:
            found, _ = effects_in_graph(instrumented, own, graph, indices, output, steps, process_group)
    return found


def effects_in_graph(
    instrumented: InstrumentedModel,
    batches: Sequence[Any],
    graph: InteractionGraph,
    features: Mapping[str, Tensor],
    output: OutputDistribution,
    config: LIBConfig,
    process_group: ProcessGroup,
) -> tuple[dict[str, OutputEffects], int]:
    """Effects of features of a graph on the output.

    Args:
        instrumented: The model, after a first `capture`. Call this within `model_session`.
        batches: The batches of this process, none of them empty.
        graph: The graph.
        features: Indices of the features, by node layer.
        output: What the output stands for, and its width.
        config: How many samples to use, and how.
        process_group: The processes.

    Returns:
        The effects by node layer, and the number of samples; none if there are no derivatives.
    """
    bases = list(graph.bases.values())
    if batches:
        captured = instrumented.capture(batches[0])
        bases = [basis.to(layer.a.device) for basis, layer in zip(bases, captured, strict=True)]
    none = torch.zeros(0, dtype=torch.int64, device="cpu")
    indices = [features.get(layer, none) for layer in graph.bases]
    return find_output_effects(
        instrumented, batches, bases, indices, output, config, MemoryPlan().stack_elements, process_group
    )
