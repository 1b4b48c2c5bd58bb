"""A model at one sample: its outputs, followed back to the features that they are made of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.output_gradients import is_output
from lib_lightning.algorithm.sample_attributions import Contributions, Targets, sample_section, trace_back
from lib_lightning.errors import ActivationError, LIBError, NodeLayerError, NotFiniteError, SettingError, counted
from lib_lightning.jacobian.integrated_gradients import sections, sections_between
from lib_lightning.jacobian.section import STACK_ELEMENTS, Section
from lib_lightning.model.batch import first_tensor, is_empty
from lib_lightning.model.capture import CapturedLayer
from lib_lightning.model.forward_errors import wrap_forward_errors
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.node_layer import OUTPUT
from lib_lightning.model.precision import to_float64

# Of the most likely outputs, as many as have this probability together, up to so many. These are circuit-tracer's.
MOST_OUTPUTS, PROBABILITY = 10, 0.95


@dataclass(frozen=True)
class TraceSettings:
    """What is traced, and how.

    Attributes:
        outputs: Indices of outputs to trace; None for the most likely ones.
        position: Output position to trace, negative from the end; None for the last valid one.
        max_features: Number of features at positions to keep in each node layer.
        memory_limit: Memory in GiB for contributions.
        integration_steps: Points on the path from the mean over which gradients are averaged; 0 for the gradient.
        kind: What the output stands for, as in `lib_lightning.model.output_distribution.OutputDistribution`.
    """

    outputs: Sequence[int] | None
    position: int | None
    max_features: int
    memory_limit: float
    integration_steps: int
    kind: str


@dataclass(frozen=True)
class TracedLayer:
    """The positions of one node layer at the sample.

    Attributes:
        name: The node layer.
        positions: Number of each position in the tapped tensor, shape ``(S,)``, int64.
        size: Number of positions of that tensor.
        valid: True at positions with features, shape ``(S,)``.
        shape: Shape of the positions of that tensor: ``()`` for one, ``(T,)`` for a sequence, ``(H, W)`` for an image.
    """

    name: str
    positions: Tensor
    size: int
    valid: Tensor
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SampleTrace:
    """Contributions of features to features, and to outputs, at one sample.

    Attributes:
        layers: The node layers with features, and last the output.
        contributions: One entry for the section after each node layer with features.
        probabilities: Probabilities of the traced outputs, shape ``(k,)``; None if they have none.
        tokens: The model's input if that is a sequence of integers.
    """

    layers: list[TracedLayer]
    contributions: list[Contributions]
    probabilities: Tensor | None
    tokens: list[int] | None


def trace_sample(
    instrumented: InstrumentedModel, sample: Any, index: int | None, bases: Sequence[Basis], settings: TraceSettings
) -> SampleTrace:
    """Run a model on one sample, and follow its outputs back.

    Args:
        instrumented: The model and its node layers.
        sample: A batch with one sample.
        index: Which sample, if it has several.
        bases: Basis of each node layer.
        settings: What is traced, and how.

    Returns:
        The contributions, on the CPU.
    """
    with wrap_forward_errors(instrumented.model, instrumented.spec), model_session(instrumented):
        sample = _single(instrumented, sample, index)
        cut = instrumented.to_output
        captured = cut.capture(sample)
        if len(captured[-1].a) != 1:
            raise ActivationError(f"The model's output has {len(captured[-1].a):,} rows for one sample.")
        for basis, layer in zip(bases, captured, strict=False):
            _check(basis, layer)
        # Features of the output itself are the outputs.
        count = len(bases) - is_output(instrumented.layers[-1].taps)
        a = to_float64(captured[-1].a.detach())[0]
        if not torch.isfinite(a).all():
            raise NotFiniteError("The model's output on this sample is NaN or infinite.")
        position = _position(captured[-1], settings.position)
        baseline = (
            to_float64(bases[-1].mean).to(a.device).expand_as(a)
            if count < len(bases)
            else _output_at_mean(cut, sample, captured, bases[-1])
        )
        outputs, probabilities = _output_targets(a[position], baseline[position], position, settings)
        found = _sections(cut, sample, captured, bases, settings.integration_steps)
        traced = [sample_section(section, basis) for section, basis in zip(found, bases[:count], strict=True)]
        memory = int(settings.memory_limit * 2**30)
        contributions = trace_back(traced, outputs, settings.max_features, memory)
        names = [basis.name for basis in bases[:count]]
        layers = [
            _layer(name, layer) for name, layer in zip([*names, OUTPUT], [*captured[:count], captured[-1]], strict=True)
        ]
        x = first_tensor(instrumented.inputs(sample))
    is_tokens = x is not None and x.ndim == 2 and not x.is_floating_point() and not x.is_complex()
    tokens = x[0].tolist() if x is not None and is_tokens else None
    return SampleTrace(layers, [_on_cpu(c) for c in contributions], _cpu(probabilities), tokens)


def _single(instrumented: InstrumentedModel, sample: Any, index: int | None) -> Any:
    """The batch with the chosen sample alone."""
    n = 0 if is_empty(sample) else instrumented.num_samples(sample)
    if index is None and n == 1:
        return sample
    if index is None or not -n <= index < n:
        which = "say which one with index=0" if index is None else f"index={index} is none of them"
        raise SettingError(f"The graph of one sample is wanted of a batch with {counted(n, 'sample')}: {which}.")
    one = instrumented.select(sample, slice(index % n, index % n + 1))
    if instrumented.num_samples(one) != 1:
        raise LIBError(f"Single samples of this batch of type {type(sample).__name__} cannot be selected.")
    return one


def _check(basis: Basis, layer: CapturedLayer) -> None:
    if layer.a.shape[-1] != basis.mean.shape[0]:
        raise NodeLayerError(
            f"The basis of '{basis.name}' has width {basis.mean.shape[0]}, but the model has {layer.a.shape[-1]} "
            "activations per position there: the graph was computed on another model, or at another place in it."
        )
    if not torch.isfinite(layer.a).all():
        raise NotFiniteError(f"Activations of '{basis.name}' on this sample are NaN or infinite.")


def _position(output: CapturedLayer, wanted: int | None) -> int:
    """The output position to trace."""
    S = output.a.shape[1]
    valid = torch.ones(S, dtype=torch.bool, device="cpu") if output.mask is None else output.mask[0].cpu()
    if wanted is None:
        found = valid.nonzero()
        if not len(found):
            raise ActivationError("All output positions of this sample are masked.")
        return int(found[-1])
    if not -S <= wanted < S or not valid[wanted]:
        raise SettingError(f"position={wanted} is none of the {S:,} output positions, or is masked.")
    return wanted % S


def _output_at_mean(cut: InstrumentedModel, sample: Any, captured: Sequence[CapturedLayer], basis: Basis) -> Tensor:
    """The model's output ``(S, d)`` with the last node layer at its mean."""
    last = captured[-2]
    mean = basis.mean.to(last.a).expand_as(last.a)
    if last.mask is not None:
        mean = torch.where(last.mask[..., None], mean, last.a)
    with torch.no_grad():
        output = first_tensor(cut.output(sample, {len(captured) - 2: mean}))
    assert output is not None  # it was there with other activations
    return to_float64(captured[-1].layer.read([output]))[0]


def _output_targets(
    a: Tensor, baseline: Tensor, position: int, settings: TraceSettings
) -> tuple[Targets, Tensor | None]:
    """The outputs to trace, from the output ``(d,)`` at one position, and their probabilities."""
    d = len(a)
    p = {"categorical": a.softmax(0), "bernoulli": a.sigmoid()}.get(settings.kind)
    z = a - baseline
    if settings.kind == "categorical":  # a constant added to all logits changes nothing
        z = z - z.mean()
    chosen = _chosen(p if p is not None else z.abs(), settings, d).to(a.device)
    directions = torch.zeros(len(chosen), d, dtype=a.dtype, device=a.device)
    directions[torch.arange(len(chosen), device=a.device), chosen] = 1.0
    if settings.kind == "categorical":
        directions -= 1 / d
    weights = z.abs()[chosen] if p is None else p[chosen]
    if not weights.any():
        weights = torch.ones_like(weights)
    if p is None:
        weights = weights / weights.sum()
    positions = torch.full_like(chosen, position)
    return Targets(positions, chosen, directions, z[chosen], weights), None if p is None else p[chosen]


def _chosen(score: Tensor, settings: TraceSettings, d: int) -> Tensor:
    if settings.outputs is not None:
        wanted = [int(c) for c in settings.outputs]
        if not wanted or any(not 0 <= c < d for c in wanted) or len(set(wanted)) < len(wanted):
            raise SettingError(f"outputs are different indices from 0 to {d - 1:,}; got {list(settings.outputs)}.")
        return torch.tensor(wanted, device="cpu")
    top, chosen = score.topk(min(MOST_OUTPUTS, d))
    if settings.kind == "categorical":
        enough = int((top.cumsum(0) < PROBABILITY).sum()) + 1
        chosen = chosen[:enough]
    return chosen


def _sections(
    cut: InstrumentedModel,
    sample: Any,
    captured: Sequence[CapturedLayer],
    bases: Sequence[Basis],
    integration_steps: int,
) -> list[Section]:
    """The sections from the first node layer to the output."""
    if not integration_steps:
        return sections_between(captured, STACK_ELEMENTS)
    means = [*(basis.mean for basis in bases), torch.zeros(1, device="cpu")][: len(cut.layers)]
    return sections(cut, sample, means, integration_steps, STACK_ELEMENTS)


def _layer(name: str, captured: CapturedLayer) -> TracedLayer:
    layer, S = captured.layer, captured.a.shape[1]
    size, positions = S, torch.arange(S, device="cpu")
    if layer.positions is not None:
        size = dataclasses.replace(layer, positions=None).read(captured.outputs).shape[1]
        wanted = (layer.positions,) if isinstance(layer.positions, int) else layer.positions
        positions = torch.tensor([p % size for p in wanted], device="cpu")
    valid = torch.ones(S, dtype=torch.bool, device="cpu") if captured.mask is None else captured.mask[0].cpu()
    shape = list(captured.outputs[0].shape)
    if len(shape) > 1:
        del shape[layer.feature_axis(len(shape)) % len(shape)]
    is_whole = math.prod(shape[1:]) == size  # and not several tensors, or the nodes of a graph
    return TracedLayer(name, positions, size, valid, tuple(shape[1:]) if is_whole else (size,))


def _cpu(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.cpu()


def _on_cpu(value: Any) -> Any:
    """Contributions with all of their tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    names = [field.name for field in dataclasses.fields(value)]
    return dataclasses.replace(value, **{name: _on_cpu(getattr(value, name)) for name in names})
