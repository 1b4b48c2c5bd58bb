"""Short names for features: what each one responds to, found from its values and the model's inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lib_lightning.core.errors import LIBError
from lib_lightning.core.live import InputFn, LiveModel, MaskFn
from lib_lightning.graph import InteractionGraph
from lib_lightning.metrics.functional.fourier import KINDS, fourier_variance
from lib_lightning.questions import as_mask_fn
from lib_lightning.values import feature_values

# Of what a and b carry together, the least that the weaker one of them must carry for both to be named.
_BOTH = 0.1


class Labeller(Protocol):
    """Anything that names features: a function, or an object such as `FourierLabels`.

    Example:
        >>> def largest_at(features: Tensor, inputs: Tensor) -> list[str]:
        ...     return [str(inputs[i].tolist()) for i in features[:, -1].argmax(0)]
        >>> labeller: Labeller = largest_at
        >>> labeller(torch.tensor([[[0.5, 2.0]], [[1.5, 1.0]]]), torch.tensor([[3, 4], [5, 6]]))
        ['[5, 6]', '[3, 4]']
    """

    def __call__(self, features: Tensor, inputs: Tensor, /) -> list[str]:
        """Name the features of one node layer.

        Args:
            features: ``fhat``, shape ``(n, S, r)``; 0, its mean, at positions that a mask leaves out.
            inputs: What the model was given for these samples: the first tensor of its inputs, shape ``(n, ...)``.

        Returns:
            A name for each of the ``r`` features; "" for none.
        """
        ...


@dataclass(frozen=True)
class FeatureLabel:
    """What a feature of a model for modular addition mainly responds to.

    Attributes:
        frequency: ``k`` of its wave.
        kind: What the wave runs over: ``"a+b"``, ``"a"``, ``"b"``, or ``"a,b"`` for waves of both, side by side.
        explained: Share of its variance that the wave explains, between 0 and 1.

    Example:
        >>> str(FeatureLabel(17, "a+b", 0.931))
        'k=17 a+b 93%'
    """

    frequency: int
    kind: str
    explained: float

    def __str__(self) -> str:
        return f"k={self.frequency} {self.kind} {self.explained:.0%}"


@dataclass(frozen=True)
class FourierLabels:
    """Names features of a model for modular addition by the frequency that explains most of their variance.

    Args:
        modulus: ``p``; even ones are fine.
        first: Where ``a`` stands in the model's input tokens ``(n, length)``.
        second: Where ``b`` stands.
        threshold: Least share of the variance for a name.

    Raises:
        ValueError: If the modulus or the threshold is outside its range.

    Example:
        >>> tokens = torch.cartesian_prod(torch.arange(7), torch.arange(7))
        >>> feature = torch.sin(2 * torch.pi * 3 * tokens.sum(1) / 7).reshape(49, 1, 1)
        >>> FourierLabels(modulus=7)(feature, tokens)
        ['k=3 a+b 100%']
    """

    modulus: int
    first: int = 0
    second: int = 1
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if self.modulus < 2:
            raise ValueError(f"modulus is an integer from 2 on; got {self.modulus}.")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is a share of the variance, from 0 to 1; got {self.threshold}.")

    def __call__(self, features: Tensor, inputs: Tensor, /) -> list[str]:
        """Name the features of one node layer, as a `Labeller`."""
        return [str(x) if x.explained > 0 and x.explained >= self.threshold else "" for x in self.of(features, inputs)]

    def of(self, features: Tensor, inputs: Tensor) -> list[FeatureLabel]:
        """Find the main wave of each feature, whatever it explains.

        Args:
            features: ``fhat``, shape ``(n, S, r)``.
            inputs: Tokens, shape ``(n, length)``.

        Returns:
            One for each feature.

        Raises:
            LIBError: If there are no such tokens.

        Note:
            ``a`` and ``b`` are named together only where the weaker one carries a tenth of what both do: with more
            waves to fit, the two always explain a little more than one.
        """
        length = inputs.shape[1] if inputs.ndim == 2 else 0
        if not all(-length <= place < length for place in (self.first, self.second)):
            raise LIBError(
                f"Inputs of shape {tuple(inputs.shape)} have no tokens {self.first} and {self.second}: frequencies are "
                "those of modular addition, whose inputs are (n, length). first= and second= say where a and b stand."
            )
        tokens = inputs.to(features.device)
        explained = fourier_variance(features, tokens[:, self.first], tokens[:, self.second], self.modulus)
        _, both, a, b = explained
        together = KINDS.index("a,b")
        explained[together] = torch.where(torch.minimum(a, b) >= _BOTH * both, both, 0.0)
        share, index = explained.flatten(0, 1).max(0)
        kind, k = index // (self.modulus // 2), index % (self.modulus // 2) + 1
        found = zip(k.tolist(), kind.tolist(), share.tolist(), strict=True)
        return [FeatureLabel(k, KINDS[i], share) for k, i, share in found]


def label_features(
    graph: InteractionGraph,
    model: nn.Module,
    batches: Iterable[Any],
    labeller: Labeller,
    input_fn: InputFn | None = None,
    mask: str | int | MaskFn | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, list[str]]:
    """Name the features of every node layer by what they do on some batches, for `InteractionGraph.labels`.

    A last node layer of neurons is left out: its entries have names already, such as classes.

    Args:
        graph: The interaction graph of the model.
        model: The model as it was then; left exactly as it was found.
        batches: Iterable of batches; their samples are looked at all at once.
        labeller: What finds the names.
        input_fn: As for `compute_interaction_graph`.
        mask: As for `compute_interaction_graph`.
        dtype: As for `compute_interaction_graph`.

    Returns:
        A name for each feature, by node layer.

    Raises:
        LIBError: If the graph does not say where its node layers are, there are no samples, samples differ in length,
            or a labeller gives another number of names than there are features.
        NodeLayerError: If the model has no such node layers.

    Example:
        >>> from lib_lightning import compute_interaction_graph
        >>> model, x = nn.Linear(3, 2), torch.randn(20, 3)
        >>> graph = compute_interaction_graph(model, [x], ["input", "output"])
        >>> graph.labels = label_features(graph, model, [x], lambda features, inputs: ["first", "second"])
        >>> graph.labels
        {'input': ['first', 'second']}
    """
    layers = graph.layers()
    live = LiveModel(model, layers, input_fn, dtype, as_mask_fn(mask))
    last = graph.bases[layers[-1].name]
    named = layers[:-1] if last.kind == "neuron" else layers

    features: dict[str, list[Tensor]] = {layer.name: [] for layer in named}
    inputs: list[Tensor] = []
    for values in feature_values(live, graph, batches):
        inputs.append(values.inputs)
        for name, parts in features.items():
            mask_here = values.masks[name]
            found = values.features[name]
            parts.append(found if mask_here is None else found.where(mask_here[..., None], 0.0))
    if not inputs:
        raise LIBError("There are no samples to name features by.")
    whole = _joined(inputs)
    return {name: _names(labeller(_joined(parts), whole), name, graph) for name, parts in features.items()}


def _joined(parts: list[Tensor]) -> Tensor:
    if len({part.shape[1:] for part in parts}) > 1:
        raise LIBError(
            "Batches differ in the length of their samples, and features are named on all of them at once: take "
            "batches of one length, or look at single positions (NodeLayer(..., positions=-1)) of padded ones."
        )
    return torch.cat(parts)


def _names(names: list[str], layer: str, graph: InteractionGraph) -> list[str]:
    if len(names) != graph.bases[layer].n_features:
        raise LIBError(
            f"The labeller gave {len(names)} names for the {graph.bases[layer].n_features} features of '{layer}'."
        )
    return list(names)
