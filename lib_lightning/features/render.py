"""The samples among the examples of a graph's features, rendered."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lib_lightning.errors import LIBError, brief, log_traceback
from lib_lightning.features.output_names import OutputNames
from lib_lightning.features.renderers import Renderer, Rendering, check_renderer, default_renderer, render
from lib_lightning.features.sample import SampleReader
from lib_lightning.graph import InteractionGraph
from lib_lightning.model.batch import is_empty
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import InputFn, MaskFn, ModelSpec

log = logging.getLogger(__name__)


def mentioned_samples(graph: InteractionGraph) -> list[int]:
    """Numbers of all samples among the examples of a graph's features, ascending."""
    parts = [of_layer.samples.flatten().long() for of_layer in graph.examples.values()]
    return [i for i in torch.cat(parts).unique().tolist() if i >= 0] if parts else []


def render_samples(
    graph: InteractionGraph,
    batches: Iterable[Any],
    renderer: Renderer | None = None,
    model: nn.Module | None = None,
    input_fn: InputFn | None = None,
    mask: str | int | MaskFn | None = None,
) -> dict[int, Rendering]:
    """Render the samples that are among the examples of a graph's features.

    Args:
        graph: The graph.
        batches: The batches that it was computed on, in the same order.
        renderer: How a sample looks, such as `TokenRenderer`; None for a fitting one, see
            `lib_lightning.features.renderers.default_renderer`.
        model: The model, where its own step computes what it is called with, or for a better choice of the renderer.
        input_fn: As for `compute_interaction_graph`, if it was given there.
        mask: As for `compute_interaction_graph`: positions that it leaves out are not shown.

    Returns:
        A rendering for each sample, by its number in ``graph.examples``: a dict of what JSON can represent. Samples
        that the renderer fails on are left out, and the log says why.

    Raises:
        LIBError: If the renderer does not fit the samples.

    Example:
        >>> from lib_lightning import compute_interaction_graph
        >>> model, x = nn.Linear(3, 2), torch.randn(20, 3)
        >>> graph = compute_interaction_graph(model, [x], ["input", "output"])
        >>> renderings = render_samples(graph, [x])
        >>> renderings.keys() == set(mentioned_samples(graph))
        True
    """
    check_renderer(renderer)
    batches = [batch for batch in batches if not is_empty(batch)]
    wanted = mentioned_samples(graph)
    if not wanted or not batches:
        return {}
    spec, names = ModelSpec(input_fn, mask).called_as(graph.model_call), OutputNames.of_graph(graph)
    if model is None:
        return render_each(SampleReader.of_graph(graph, spec).with_names(names.of), renderer, batches, wanted)
    instrumented = InstrumentedModel(model, [], spec)
    with instrumented.session():
        batches = instrumented.parts(batches)
        reader = SampleReader.of_model(instrumented, batches[0]).with_names(names.of)
        renderer = renderer or fitting_renderer(reader, batches[0], instrumented.model)
        return render_each(reader, renderer, batches, wanted)


def fitting_renderer(reader: SampleReader, batch: Any, model: nn.Module | None = None) -> Renderer:
    """The default renderer for the samples of a batch.

    Args:
        reader: Takes samples out of batches.
        batch: One batch.
        model: The model, if it is known.

    Returns:
        The renderer.
    """
    return default_renderer(next(sample for _, sample in reader.read([batch], [0])), model)


def render_each(
    reader: SampleReader,
    renderer: Renderer | None,
    batches: Sequence[Any],
    wanted: Collection[int],
    first: int = 0,
    on_failure: Callable[[int, Exception], None] | None = None,
) -> dict[int, Rendering]:
    """Render samples; those that the renderer fails on are left out.

    Args:
        reader: Takes samples out of batches.
        renderer: The renderer; None for the default one.
        batches: Batches.
        wanted: Numbers of the samples.
        first: Number of the first sample of the first batch.
        on_failure: Called with the number of a sample that the renderer has failed on, and the error. None logs the
            first one, and raises errors of settings.

    Returns:
        Renderings by number.
    """
    renderer, found, has_failed = renderer or fitting_renderer(reader, batches[0]), dict[int, Rendering](), False
    for i, sample in reader.read(batches, wanted, first):
        try:
            found[i] = render(renderer, sample)
        except Exception as error:
            if on_failure is not None:
                on_failure(i, error)
            elif isinstance(error, LIBError):
                raise
            elif not has_failed:
                has_failed = True
                log.warning(
                    "Sample %d could not be rendered (%s); others that fail are left out as well.", i, brief(error)
                )
                log_traceback(error)
    return found
