"""The protocol of labellers, and the functions that apply one to a graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib_lightning.errors import LIBError
from lib_lightning.features.output_names import OutputNames, find_output_names
from lib_lightning.features.values import feature_values
from lib_lightning.graph import InteractionGraph
from lib_lightning.labels.targets import TargetReader
from lib_lightning.model.batch import is_empty
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import InputFn, MaskFn, ModelSpec
from lib_lightning.model.node_layer import NodeLayer
from lib_lightning.model.skip_positions import SkipPositions

# Of the choice of positions.
_SEED = 0
# Positions that a labeller with scores looks at, unless it says how many.
MAX_POSITIONS = 32768


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


@dataclass(frozen=True)
class FeatureSamples:
    """The features of one node layer on all samples, and what is known of these.

    Attributes:
        features: ``fhat``, shape ``(n, P, r)``; 0, its mean, at masked positions.
        positions: Index of each of the ``P`` positions among the positions of the sample, shape ``(n, P)``, int64.
        num_positions: Number of positions of a sample.
        inputs: The first tensor of the model's inputs for these samples, shape ``(n, ...)``.
        mask: True at valid positions, shape ``(n, P)``; None if all are valid.
        classes: Classes of the samples, shape ``(n,)``, int64; None if there are none.
        targets: Numbers that the model is to predict, shape ``(n,)``; None if there are none.
        class_names: Names of the classes, as far as they are known.
    """

    features: Tensor
    positions: Tensor
    num_positions: int
    inputs: Tensor
    mask: Tensor | None = None
    classes: Tensor | None = None
    targets: Tensor | None = None
    class_names: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, features: Tensor, inputs: Tensor) -> FeatureSamples:
        """All positions of samples of which nothing else is known."""
        n, S, _ = features.shape
        return cls(features, torch.arange(S, device=features.device).expand(n, S), S, inputs)

    @property
    def valid(self) -> Tensor:
        """True at valid positions, shape ``(n, P)``."""
        return torch.ones_like(self.positions, dtype=torch.bool) if self.mask is None else self.mask


@dataclass(frozen=True)
class Labels:
    """Labels of the features of one node layer.

    Attributes:
        names: A label for each feature; "" for none.
        scores: How well each label predicts where its feature is active, shape ``(r,)``, float32; NaN for none. None
            if the labeller has no scores.
    """

    names: list[str]
    scores: Tensor | None = None


class ScoringLabeller(Protocol):
    """A labeller such as `ExampleLabels` that sees more than the model's first input, and scores its labels.

    It may have an attribute ``max_positions``, by default 32,768: with more samples than this, it is given the first
    ones; of longer samples, some positions of each, chosen at random.
    """

    def label(self, samples: FeatureSamples) -> Labels:
        """Label the features of one node layer.

        Args:
            samples: The features and what is known of the samples.

        Returns:
            Labels and scores.
        """
        ...


def label_features(
    graph: InteractionGraph,
    model: nn.Module,
    batches: Iterable[Any],
    labeller: Labeller | ScoringLabeller,
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
    spec = ModelSpec(input_fn, mask, dtype, skip_positions)
    found = find_labels(graph, model, batches, labeller, **vars(spec))
    return {name: labels.names for name, labels in found.items()}


def find_labels(
    graph: InteractionGraph,
    model: nn.Module,
    batches: Iterable[Any],
    labeller: Labeller | ScoringLabeller,
    **spec: Any,
) -> dict[str, Labels]:
    """Label the features of every node layer as `label_features` does, with scores if the labeller has any.

    Args:
        graph: The interaction graph of the model.
        model: The model that the graph was computed on; it is not changed.
        batches: Iterable of batches; the labeller is called with all of their samples at once.
        labeller: The labeller.
        spec: ``input_fn``, ``mask``, ``dtype`` and ``skip_positions``, as for `compute_interaction_graph`.

    Returns:
        Labels of each node layer, for `InteractionGraph.labels` and `InteractionGraph.label_scores`.

    Raises:
        LIBError: As for `label_features`.

    Example:
        >>> from lib_lightning import compute_interaction_graph
        >>> from lib_lightning.labels import ExampleLabels
        >>> model, x = nn.Linear(3, 2), torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        >>> graph = compute_interaction_graph(model, [x], ["input", "output"])
        >>> find_labels(graph, model, [x], ExampleLabels(columns=["age", "height", "weight"])).keys()
        dict_keys(['input'])
    """
    layers = graph.node_layer_specs()
    instrumented = InstrumentedModel(model, layers, ModelSpec(**spec))
    labelled = layers[:-1] if graph.bases[layers[-1].name].kind == "neuron" else layers
    parts = instrumented.parts(batch for batch in batches if not is_empty(batch))
    if not parts:
        raise LIBError("There are no samples to label features with: all batches are empty.")
    collect = _scored if hasattr(labeller, "label") else _plain
    found = collect(labeller, [layer.name for layer in labelled], instrumented, graph, parts)
    for name, labels in found.items():
        if len(labels.names) != graph.bases[name].n_features:
            raise LIBError(
                f"The labeller returned {len(labels.names)} labels for the {graph.bases[name].n_features} features of "
                f"'{name}'."
            )
    return found


def _plain(
    labeller: Any, names: Sequence[str], instrumented: InstrumentedModel, graph: InteractionGraph, batches: list[Any]
) -> dict[str, Labels]:
    """Call a labeller with the features and inputs of all samples."""
    features: dict[str, list[Tensor]] = {name: [] for name in names}
    inputs: list[Tensor] = []
    for values in feature_values(instrumented, graph, batches):
        inputs.append(values.inputs)
        for name, parts in features.items():
            valid, fhat = values.masks[name], values.features[name]
            parts.append(fhat if valid is None else fhat.where(valid[..., None], 0.0))
    all_inputs = _concatenate(inputs)
    return {name: Labels(list(labeller(_concatenate(parts), all_inputs))) for name, parts in features.items()}


def _concatenate(parts: list[Tensor]) -> Tensor:
    if len({part.shape[1:] for part in parts}) > 1:
        raise LIBError(
            "Batches differ in the length of their samples, but a labeller is called with all samples at once. Use "
            "batches of one length, or pad them and use single positions: NodeLayer(..., positions=-1)."
        )
    return torch.cat(parts)


def _scored(
    labeller: Any, names: Sequence[str], instrumented: InstrumentedModel, graph: InteractionGraph, batches: list[Any]
) -> dict[str, Labels]:
    """Call a labeller with some positions of each sample, and what is known of the samples."""
    limit: int = getattr(labeller, "max_positions", MAX_POSITIONS)
    batches = _first(batches, limit, instrumented)
    num_samples = sum(map(instrumented.num_samples, batches))
    layers = {layer.name: layer for layer in graph.node_layer_specs()}
    features: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in names}
    num_positions: dict[str, int] = {}
    inputs: list[Tensor] = []
    known = TargetReader()
    generator = torch.Generator().manual_seed(_SEED)
    for batch, values in zip(batches, feature_values(instrumented, graph, batches), strict=True):
        n = len(values.inputs)
        known.add(batch, instrumented.inputs(batch), n)
        inputs.append(_without_padding(values.inputs, instrumented.spec.mask_of(batch)))
        for name, parts in features.items():
            fhat, mask = values.features[name], values.masks[name]
            places, length = _positions(layers[name], fhat.shape[1], inputs[-1])
            chosen = _some(n, fhat.shape[1], max(1, limit // num_samples), generator)
            valid = torch.ones_like(chosen, dtype=torch.bool) if mask is None else mask.gather(1, chosen)
            fhat = fhat.gather(1, chosen[..., None].expand(-1, -1, fhat.shape[2])).float()
            parts.append((fhat.where(valid[..., None], 0.0), places[chosen], valid))
            num_positions[name] = max(length, num_positions.get(name, 0))
    all_inputs, classes = _padded(inputs), known.classes
    names_of_graph = OutputNames.of_graph(graph)
    if not names_of_graph.count:
        names_of_graph = find_output_names(None, None, instrumented, batches[0]) or names_of_graph
    class_names = known.class_names or names_of_graph.of([] if classes is None else classes.unique().tolist())
    found = {}
    for name, parts in features.items():
        fhat, positions, valid = (_padded([part[i] for part in parts], 0) for i in range(3))
        mask = None if valid.all() else valid
        samples = FeatureSamples(
            fhat, positions, num_positions[name], all_inputs, mask, classes, known.targets, class_names,
        )  # fmt: skip
        found[name] = labeller.label(samples)
    return found


def _first(batches: Sequence[Any], limit: int, instrumented: InstrumentedModel) -> list[Any]:
    """Batches of the first samples, up to a number of these."""
    found: list[Any] = []
    for batch in batches:
        n = instrumented.num_samples(batch)
        if limit > 0:
            found.append(batch if n <= limit else instrumented.select(batch, slice(0, limit)))
        limit -= n
    return found


def _some(n: int, S: int, P: int, generator: torch.Generator) -> Tensor:
    """At most ``P`` of ``S`` positions of each sample, in order, shape ``(n, P)``."""
    if P >= S:
        return torch.arange(S, device="cpu").expand(n, S)
    return torch.rand(n, S, generator=generator, device="cpu").topk(P, dim=1).indices.sort(1).values


def _positions(layer: NodeLayer, S: int, inputs: Tensor) -> tuple[Tensor, int]:
    """Places of a node layer's positions among those of a sample, shape ``(S,)``, and how many these are."""
    if layer.positions is None or inputs.is_floating_point() or inputs.ndim != 2:
        return torch.arange(S, device="cpu"), S
    every = torch.arange(inputs.shape[1], device="cpu")
    chosen = every[torch.tensor(layer.positions, device="cpu").reshape(-1)]
    return chosen, inputs.shape[1]


def _without_padding(inputs: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens, -1 where there is only padding."""
    if mask is None or inputs.is_floating_point() or mask.shape != inputs.shape:
        return inputs
    return inputs.long().where(mask.cpu() != 0, -1)


def _padded(parts: list[Tensor], padding: int = -1) -> Tensor:
    """Samples of all batches, shorter ones with padding at the end."""
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1 and not (parts[0].is_floating_point() and padding < 0):
        longest = max(part.shape[1] for part in parts)
        parts = [F.pad(part, (*[0] * 2 * (part.ndim - 2), 0, longest - part.shape[1]), value=padding) for part in parts]
    return _concatenate(parts)
