"""Where in the input the positions of node layers lie: receptive regions of convolutions, patches, tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lib_lightning.features.sample import Sample
from lib_lightning.io.places import Places
from lib_lightning.model.batch import map_tensors
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.node_layer import INPUT, NodeLayer

# Samples on which it is seen what positions depend on.
_FEW = 2
# Numbers of tokens in front of patches: a class token, one for distillation, four registers.
_SKIPPED = (0, 1, 2, 4, 5)


def find_places(
    instrumented: InstrumentedModel,
    batch: Any,
    sample: Sample,
    rendering: Mapping[str, Any],
    longest: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> dict[str, dict[str, Any]]:
    """Find where in the input each node layer's positions are shown.

    In images, at the region that a position depends on, where that is a part of the image, as after convolutions; at
    the patch of a vision transformer; else at the place that it would have if the image were divided evenly. In
    sequences, at the token or step of the same index; after strided operations in the middle of its part. Positions in
    front of those of the input, such as a class token, are shown nowhere.

    Args:
        instrumented: The model and its node layers. Call this in a session of it.
        batch: One batch.
        sample: Its first sample.
        rendering: How that looks.
        longest: By node layer, the shape of the positions of the longest sample, which other batches may have.

    Returns:
        For each node layer whose positions can be shown, `lib_lightning.io.places.Places.plain`.
    """
    shape = input_shape(sample, rendering)
    if shape is None:
        return {}
    few = instrumented.select(batch, slice(0, _FEW))
    with torch.no_grad():
        captured = instrumented.capture(few)
    found: dict[str, dict[str, Any]] = {}
    for layer in captured:
        if layer.layer.join == "positions" and len(layer.layer.taps) > 1:
            continue  # positions of several tensors, of which the input has at most one
        grid = layer.layer.position_shape(layer.outputs)
        places = places_in_image(grid, shape) if len(shape) == 2 else places_in_sequence(grid, shape)
        if len(grid) == len(shape) and (len(shape) == 2 or rendering["kind"] == "series"):
            places = _receptive(instrumented, few, layer.layer, grid, shape, rendering) or places
        if places is not None and len(places.grid) == 1:
            places = _extended(places, longest.get(layer.layer.name, ()))
        if places is not None:
            found[layer.layer.name] = places.plain
    return found


def input_shape(sample: Sample, rendering: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Shape of what a rendering shows: ``(H, W)`` or ``(T,)``; None for a row or a text.

    Args:
        sample: The sample.
        rendering: Its rendering.

    Returns:
        The shape, with padding.
    """
    if rendering["kind"] == "image":
        return tuple(rendering["size"])
    if rendering["kind"] == "series":
        return (rendering.get("length", len(rendering["values"][0]) if rendering["values"] else 0),)
    if rendering["kind"] == "tokens":
        ids = next((t for t in sample.data.values() if t.ndim == 1 and not t.is_floating_point()), None)
        return (len(rendering["tokens"]) if ids is None else len(ids),)
    return None


def places_in_image(grid: Sequence[int], image: Sequence[int]) -> Places | None:
    """Divide an image evenly among positions.

    Args:
        grid: Shape of the positions of a sample.
        image: Height and width.

    Returns:
        The places; None for a single position, and where positions are no grid of patches.

    Example:
        >>> places_in_image((197,), (224, 224)).part(1)
        (0, 0, 16, 16)
    """
    skipped, cells = 0, tuple(grid)
    if len(grid) == 1:
        found = _patches(grid[0], image)
        if found is None:
            return None
        skipped, cells = found
    if len(cells) != 2 or math.prod(cells) < 2:
        return None
    stride = tuple(length / n for length, n in zip(image, cells, strict=True))
    return Places(cells, (0.0, 0.0), stride, stride, tuple(image), skipped)


def _patches(count: int, image: Sequence[int]) -> tuple[int, tuple[int, int]] | None:
    """Number of tokens in front of the patches, and rows and columns of these: patches are squares of whole pixels."""
    height, width = image
    for skipped in _SKIPPED:
        rows = round(math.sqrt(max(0, count - skipped) * height / width))
        if rows < 1 or (count - skipped) % rows or 3 * skipped > count:
            continue
        columns = (count - skipped) // rows
        if height % rows == 0 and width % columns == 0 and height // rows == width // columns:
            return skipped, (rows, columns)
    return None


def places_in_sequence(grid: Sequence[int], length: Sequence[int]) -> Places | None:
    """Assign positions to the tokens or steps of a sequence, by their numbers.

    Args:
        grid: Shape of the positions of a sample.
        length: Number of tokens or steps, as a tuple.

    Returns:
        Of equally many, each its own. Of up to half as many, equal parts, as after strides. Of a few less, those in
        the middle, as after convolutions without padding; of more, those behind the additional ones, as after a class
        token or a prompt. None for a single position.

    Example:
        >>> places_in_sequence((9,), (8,)).step(1), places_in_sequence((4,), (8,)).part(1)
        (0, (2, 2))
    """
    (T,) = length
    if len(grid) != 1 or grid[0] < 2 or T < 1:
        return None
    (S,) = grid
    if S >= T:
        return Places((T,), (0.0,), (1.0,), (1.0,), (T,), skipped=S - T)
    if 2 * S <= T:
        return Places((S,), (0.0,), (T / S,), (T / S,), (T,))
    return Places((S,), (float((T - S) // 2),), (1.0,), (1.0,), (T,))


def _extended(places: Places, longest: Sequence[int]) -> Places:
    """The same for sequences that may be longer."""
    more = (longest[0] if len(longest) == 1 else 0) - places.skipped - places.grid[0]
    if more <= 0 or places.is_region:
        return places
    length = places.input[0] + math.ceil(more * places.stride[0])
    return dataclasses.replace(places, grid=(places.grid[0] + more,), input=(length,))


def _receptive(
    instrumented: InstrumentedModel,
    few: Any,
    layer: NodeLayer,
    grid: Sequence[int],
    shape: Sequence[int],
    rendering: Mapping[str, Any],
) -> Places | None:
    """The regions of the input that positions depend on; None if that cannot be told, or is no small part of it."""
    if min(grid) < 2 or layer.taps == (INPUT,):
        return None
    whole = dataclasses.replace(layer, positions=None, skip_positions=0)
    section = InstrumentedModel(instrumented.model, [NodeLayer(INPUT), whole], instrumented.spec)
    try:
        with section.session():
            return _measured(section, few, grid, shape)
    except Exception:  # the input is no tensor of numbers, or its own step takes more of the batch than that
        return None


def _measured(section: InstrumentedModel, few: Any, grid: Sequence[int], shape: Sequence[int]) -> Places | None:
    generator = torch.Generator().manual_seed(0)

    def noisy(t: Tensor) -> Tensor:
        # Where neighbouring values are the same, the maximum is taken to be the first of them.
        if not t.is_floating_point() or t.ndim <= len(shape):
            return t
        noise = torch.randn(t.shape, generator=generator, device="cpu").to(t)
        return t + noise * (t.std() + 1e-3)

    captured = section.capture(map_tensors(few, noisy))
    leaf, a = captured[0].leaves[0], captured[1].a
    axes = _axes_of(leaf, shape)
    if axes is None:
        return None
    signs = torch.randn(a.shape[0], a.shape[2], generator=generator, device="cpu").to(a)

    def region(indices: Sequence[int]) -> list[tuple[int, int]]:
        """First and last pixel along each axis that the position with these indices depends on."""
        position = 0
        for k, n in zip(indices, grid, strict=True):
            position = position * n + k
        (gradient,) = torch.autograd.grad((a[:, position] * signs).sum(), leaf, retain_graph=True)
        ends = []
        for axis in axes:
            others = [i for i in range(leaf.ndim) if i != axis]
            depends = gradient.abs().sum(others).nonzero().flatten()
            ends.append((int(depends[0]), int(depends[-1])))
        return ends

    # The first position has its last pixel inside the image, and the last ones their first.
    first, before, last, middle = (
        region([index(n) for n in grid]) for index in (lambda n: 0, lambda n: n - 2, lambda n: n - 1, lambda n: n // 2)
    )
    start, stride, size = list[float](), list[float](), list[float]()
    for axis, (n, length) in enumerate(zip(grid, shape, strict=True)):
        step = last[axis][0] - before[axis][0]
        origin = last[axis][0] - step * (n - 1)
        extent = first[axis][1] + 1 - origin
        # Regions that reach from one end to the other, or do not move, say nothing on where a position is.
        if step < 1 or last[axis][0] == 0 or first[axis][1] == length - 1 or extent < 1:
            return None
        begin = origin + step * (n // 2)
        if middle[axis] != (max(0, begin), min(length, begin + extent) - 1):
            return None
        start.append(float(origin))
        stride.append(float(step))
        size.append(float(extent))
    return Places(tuple(grid), tuple(start), tuple(stride), tuple(size), tuple(shape), is_region=True)


def _axes_of(leaf: Tensor, shape: Sequence[int]) -> list[int] | None:
    """Axes of height and width, or of time, in the input."""
    wanted, k = tuple(shape), len(shape)
    # Channels come first or last.
    places = [tuple(leaf.shape[i : i + k]) == wanted for i in range(1, leaf.ndim - k + 1)]
    if leaf.ndim not in (k + 1, k + 2) or places.count(True) != 1:
        return None
    begin = 1 + places.index(True)
    return list(range(begin, begin + k))
