"""Examples of features: the samples and positions at which each is largest and smallest, and some in between.

They are collected batch by batch, with a state of constant size for each feature, and merged over processes: the result
depends on the order of the samples alone, not on how they are divided into batches and processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.distributed.process_group import ProcessGroup, first_number
from lib_lightning.model.capture import CapturedLayer

# Bins of a histogram, half of them on either side of zero, and how many of these make a standard deviation if no value
# is beyond four standard deviations.
NUM_BINS = 64
_BINS_PER_DEVIATION = 8
# Number of examples of each kind: as many as fit on a screen without scrolling.
_LARGEST = _SMALLEST = 6
_SPREAD = 4
# Number of positions before and after an example in a sequence that are shown with it: a line of text.
_BEFORE, _AFTER = 12, 7
# Examples between the extremes are chosen among this many positions of about this many samples, evenly spaced.
_SPREAD_POSITIONS, _SPREAD_SAMPLES = 8, 512
# Small batches are gathered until they have this many numbers: each step takes the same time for few as for many.
_GATHERED = 2**18
# Numbers that are put into bins at once.
_BINNED_AT_ONCE = 2**20
# Any odd number without a pattern of bits, which makes products look random (Knuth, The Art of Computer Programming 3,
# section 6.4: the golden ratio); and how many bits of a product are kept, so that float64 holds them.
_MULTIPLIER, _KEY_BITS = 0x1E3779B97F4A7C15, 48
_NO_KEY = 2**_KEY_BITS
# Shapes of positions with more axes than this are flattened, so that all processes exchange as many.
_MAX_AXES = 4


@dataclass(frozen=True)
class FeatureExamples:
    """Where each feature of a node layer is largest, smallest and in between, in the samples of the graph.

    Samples are numbered from 0 in the order of the batches, those of one process after those of the one before. A
    sample appears at most once among the largest and once among the smallest values of a feature: at the position of
    its own largest or smallest value. Missing examples, as in a graph of few samples, have sample and position -1 and
    value NaN.

    Attributes:
        samples: Number of the sample of each example, shape ``(r, K)``, int32.
        positions: Index of its position among the positions of the sample, as flattened, shape ``(r, K)``, int32. Where
            a `NodeLayer` selects positions, it is the index among all of them.
        values: Value of the feature there, shape ``(r, K)``, float32.
        counts: How the ``K`` examples of a feature are divided: the largest ones, in descending order; the smallest
            ones, in ascending order; and some that are spread over its range, in descending order: the values nearest
            to the middles of equal parts of it, among those at a few positions of some samples.
        shape: Shape of the positions of a sample: ``()`` for a single one, ``(T,)`` for the longest sequence,
            ``(H, W)`` for images, or ``(H * W,)`` of the largest image if they differ in size.
        context: Values of the feature at the positions around each example in a sequence, shape ``(r, K, W)``,
            float16; NaN where there is no position, or one that is left out. ``W`` is 0 if positions are no sequence.
        before: How many of these ``W`` positions are before the example's own.
        histogram: Number of values in each of 64 intervals of equal width, symmetric about 0, the feature's mean, shape
            ``(r, 64)``, int64.
        bin_width: Width of the intervals, shape ``(r,)``, float32: a power of two times an eighth of the feature's
            standard deviation, the smallest with which all values are in the histogram.
    """

    samples: Tensor
    positions: Tensor
    values: Tensor
    counts: tuple[int, int, int]
    shape: tuple[int, ...]
    context: Tensor
    before: int
    histogram: Tensor
    bin_width: Tensor

    @property
    def kinds(self) -> list[str]:
        """What each of the ``K`` examples of a feature is: ``"largest"``, ``"smallest"`` or ``"spread"``."""
        names = ("largest", "smallest", "spread")
        return [name for name, count in zip(names, self.counts, strict=True) for _ in range(count)]


@dataclass(frozen=True)
class Positions:
    """The positions of one node layer in one batch.

    Attributes:
        shape: Shape of all positions of a sample.
        selected: Indices of those that the node layer selects, shape ``(S,)``; None for all.
    """

    shape: tuple[int, ...]
    selected: Tensor | None

    @classmethod
    def of(cls, captured: CapturedLayer) -> Positions:
        """Those of a node layer as captured.

        Args:
            captured: The node layer.

        Returns:
            Its positions.
        """
        shape, selected = captured.layer.position_shape(captured.outputs), None
        if captured.layer.positions is not None:
            selected = captured.layer.positions_of(torch.arange(math.prod(shape), device="cpu")[None])[0]
        return cls(shape, selected)


@dataclass(frozen=True)
class _Places:
    """Values of features, each with the place where it was found.

    Attributes:
        value: Shape ``(r, k)``, float64; NaN for none.
        sample: Number of the sample, -1 for none, shape ``(r, k)``, int64.
        position: Index of the position among all of its sample, shape ``(r, k)``, int64.
        context: Values around it, shape ``(r, k, W)``, float64.
    """

    value: Tensor
    sample: Tensor
    position: Tensor
    context: Tensor

    @classmethod
    def none(cls, r: int, k: int, W: int, device: torch.device) -> _Places:
        """No values yet."""
        missing = torch.full((r, k), -1, dtype=torch.int64, device=device)
        context = torch.full((r, k, W), math.nan, dtype=torch.float64, device=device)
        return cls(torch.full((r, k), math.nan, dtype=torch.float64, device=device), missing, missing, context)

    @classmethod
    def join(cls, parts: Sequence[_Places]) -> _Places:
        """All of several."""
        return cls(
            *(torch.cat(tensors, dim=1) for tensors in zip(*(vars(part).values() for part in parts), strict=True))
        )

    def at(self, order: Tensor, keep: Tensor) -> _Places:
        """Those with the indices ``order``; none where ``keep`` is False. Both have shape ``(r, m)``."""
        wide = order[..., None].expand(-1, -1, self.context.shape[2])
        return _Places(
            self.value.gather(1, order).where(keep, math.nan),
            self.sample.gather(1, order).where(keep, -1),
            self.position.gather(1, order).where(keep, -1),
            self.context.gather(1, wide).where(keep[..., None], math.nan),
        )


class _Found(NamedTuple):
    """Values of features in one batch.

    Attributes:
        value: Shape ``(r, m)``, float64; NaN for none.
        sample: Index of the sample in the batch, shape ``(r, m)``, int64.
        at: Index of the position in the batch, shape ``(r, m)``, int64.
    """

    value: Tensor
    sample: Tensor
    at: Tensor


@dataclass(frozen=True)
class _Batch:
    """The features of one batch, and where they are.

    Attributes:
        fhat: Features, shape ``(n, S, r)``, float64.
        mask: True at positions that count, shape ``(n, S)``; None for all.
        sample: Numbers of the samples, shape ``(n,)``.
        position: Indices of the positions among all of a sample, shape ``(S,)``.
        offsets: Positions of the context relative to its own, shape ``(W,)``.
    """

    fhat: Tensor
    mask: Tensor | None
    sample: Tensor
    position: Tensor
    offsets: Tensor

    def extremes(self, k: int, largest: bool) -> _Found:
        """The ``k`` largest, or smallest, of the extreme values of the samples, in order."""
        fhat = self.fhat
        if self.mask is not None:
            fhat = fhat.where(self.mask[..., None], -math.inf if largest else math.inf)
        value, at = fhat.max(dim=1) if largest else fhat.min(dim=1)
        value, sample = value.T.topk(min(k, len(value)), dim=1, largest=largest)
        # No position of a sample may count.
        value = value.where(value.isfinite(), math.nan)
        return _Found(value, sample, at.T.gather(1, sample))

    def drawn(self, samples: range) -> tuple[_Found, Tensor]:
        """Values at a few positions of some samples, and the keys by which they are chosen, shape ``(r, m)``."""
        some = slice(samples.start, samples.stop, samples.step)
        keys = _keys(self.sample[some, None], self.position)
        if self.mask is not None:
            keys = keys.where(self.mask[some], _NO_KEY)
        keys, at = keys.topk(min(_SPREAD_POSITIONS, keys.shape[1]), dim=1, largest=False)
        sample = torch.arange(len(self.sample), device=at.device)[some, None].expand_as(at).flatten()
        value = self.fhat[sample, at.flatten()].T
        return _Found(value, sample.expand_as(value), at.flatten().expand_as(value)), keys.flatten().expand_as(value)

    def select(self, before: _Places, found: _Found, order: Tensor, keep: Tensor) -> _Places:
        """The places with the indices ``order`` among those of earlier batches, followed by those of this one.

        Args:
            before: Places in the batches before, shape ``(r, k)``.
            found: Places in this one, shape ``(r, m)``.
            order: Indices from 0 to ``k + m - 1``, shape ``(r, j)``.
            keep: Where False, there is none; shape ``(r, j)``.

        Returns:
            Shape ``(r, j)``.
        """
        k = before.value.shape[1]
        is_new, old, new = order >= k, order.clamp(max=k - 1), (order - k).clamp(min=0)
        known = before.at(old, keep)
        sample, at = found.sample.gather(1, new), found.at.gather(1, new)
        taken = is_new & keep
        return _Places(
            found.value.gather(1, new).where(taken, known.value),
            self.sample[sample].where(taken, known.sample),
            self.position[at].where(taken, known.position),
            self._context(sample, at).where(taken[..., None], known.context),
        )

    def _context(self, sample: Tensor, at: Tensor) -> Tensor:
        """Values around places, shape ``(r, j, W)``."""
        if not len(self.offsets):
            return self.fhat.new_empty((*at.shape, 0))
        around = at[..., None] + self.offsets
        inside = around.clamp(0, self.fhat.shape[1] - 1)
        sample, feature = sample[..., None], torch.arange(len(at), device=at.device)[:, None, None]
        known = inside == around
        if self.mask is not None:
            known &= self.mask[sample, inside]
        return torch.where(known, self.fhat[sample, inside, feature], math.nan)


class _State(NamedTuple):
    """What a collector has found; the attributes of the same names say what."""

    largest: _Places
    smallest: _Places
    of_bin: _Places
    keys: Tensor
    histogram: Tensor
    doublings: Tensor


def _keys(sample: Tensor, position: Tensor) -> Tensor:
    """Numbers that put places into an order that looks random and depends on the places alone."""
    mixed = (sample * _MULTIPLIER + position + 1) * _MULTIPLIER  # int64, modulo 2^64
    mixed = (mixed ^ (mixed >> 29)) * _MULTIPLIER
    keys: Tensor = (mixed >> (64 - _KEY_BITS)) & (_NO_KEY - 1)
    return keys


class ExampleCollector:
    """Collects the examples and the histogram of each feature of one node layer, batch by batch.

    Args:
        basis: Basis of the node layer; a feature's importance is its variance.
        shape: Shape of all positions of a sample, over all batches and processes.
        is_sequence: Whether the positions of a batch are those of a sequence, one after the other.
        samples: Numbers of the samples of this process.
        every: Examples between the extremes are taken from one in so many samples, counted over all processes.
    """

    def __init__(self, basis: Basis, shape: tuple[int, ...], is_sequence: bool, samples: range, every: int = 1) -> None:
        device = basis.importance.device
        self._shape, self._next_sample, self._every = shape, samples.start, every
        W = min(_BEFORE + 1 + _AFTER, shape[0]) if is_sequence else 0
        self._before = min(_BEFORE, max(0, W - 1))
        self._offsets = torch.arange(W, device=device) - self._before
        r = basis.n_features
        self._largest, self._smallest = (_Places.none(r, k, W, device) for k in (_LARGEST, _SMALLEST))
        self._of_bin = _Places.none(r, NUM_BINS, W, device)
        self._keys = torch.full((r, NUM_BINS), _NO_KEY, device=device)
        self._histogram = torch.zeros((r, NUM_BINS), dtype=torch.int64, device=device)
        deviation = basis.importance.clamp(min=0).sqrt()
        self._narrowest = torch.where(deviation > 0, deviation, 1.0).float() / _BINS_PER_DEVIATION
        # How many times the width of the bins has been doubled.
        self._doublings = torch.zeros(r, dtype=torch.int64, device=device)
        self._pending: list[tuple[Tensor, Tensor | None]] = []
        self._positions, self._is_masked = Positions((), None), False

    def update(self, fhat: Tensor, mask: Tensor | None, positions: Positions) -> None:
        """Add one batch.

        Args:
            fhat: Features, shape ``(n, S, r)``, float64.
            mask: True at positions that count, shape ``(n, S)``; None for all.
            positions: The positions.
        """
        if self._pending and (
            self._positions.shape != positions.shape or (self._pending[0][1] is None) != (mask is None)
        ):
            self._add_pending()
        self._positions = positions
        self._pending.append((fhat, mask))
        if sum(values.numel() for values, _ in self._pending) >= _GATHERED:
            self._add_pending()

    def _add_pending(self) -> None:
        if not self._pending:
            return
        fhat = torch.cat([values for values, _ in self._pending])
        masks = [of_batch for _, of_batch in self._pending if of_batch is not None]
        mask = torch.cat(masks) if masks else None
        self._pending = []
        n, S, _ = fhat.shape
        sample = torch.arange(self._next_sample, self._next_sample + n, device=fhat.device)
        selected = self._positions.selected
        position = torch.arange(S, device="cpu") if selected is None else selected
        batch = _Batch(fhat, mask, sample, position.to(fhat.device), self._offsets)
        largest, smallest = batch.extremes(_LARGEST, True), batch.extremes(_SMALLEST, False)
        order = _top(torch.cat([self._largest.value, largest.value], 1), _LARGEST)
        self._largest = batch.select(self._largest, largest, *order)
        order = _top(-torch.cat([self._smallest.value, smallest.value], 1), _SMALLEST)
        self._smallest = batch.select(self._smallest, smallest, *order)
        self._widen(
            torch.maximum(self._largest.value[:, 0].abs(), self._smallest.value[:, 0].abs()).nan_to_num(nan=0.0)
        )
        self._count(fhat, mask)
        drawn, keys = batch.drawn(range(-self._next_sample % self._every, n, self._every))
        own = torch.arange(NUM_BINS, device=keys.device).expand(len(keys), -1)
        bins = torch.cat([own, self._bins(drawn.value.T).T.long()], 1)
        order_in_bins, self._keys = _first_in_bins(bins, torch.cat([self._keys, keys], 1))
        self._of_bin = batch.select(self._of_bin, drawn, order_in_bins, self._keys < _NO_KEY)
        self._next_sample += n

    def _widen(self, furthest: Tensor) -> None:
        """Double the widths of bins until a value at this distance from 0, shape ``(r,)``, is within them."""
        # x = m 2^e with 1/2 <= m < 1, so that x < 2^e; rounded as for the bins.
        needed = torch.frexp(furthest.float() / self._narrowest / (NUM_BINS // 2)).exponent.long().clamp(min=0)
        doublings = torch.maximum(self._doublings, needed)
        bins = _wider_bins(doublings - self._doublings)
        self._histogram = torch.zeros_like(self._histogram).scatter_add_(1, bins, self._histogram)
        order, keys = _first_in_bins(bins, self._keys)
        self._of_bin, self._keys, self._doublings = self._of_bin.at(order, keys < _NO_KEY), keys, doublings

    def _bins(self, values: Tensor) -> Tensor:
        """The bin of each value, shape ``(..., r)``, int32."""
        # Powers of two are exact, so a value falls into the bin that its old bin has been merged into.
        bins = (values.float() / self._narrowest) * 0.5**self._doublings
        return bins.floor_().clamp_(-NUM_BINS // 2, NUM_BINS // 2 - 1).int() + NUM_BINS // 2

    def _count(self, fhat: Tensor, mask: Tensor | None) -> None:
        r = fhat.shape[2]
        rows = fhat.flatten(0, 1) if mask is None else fhat[mask]
        first = NUM_BINS * torch.arange(r, dtype=torch.int32, device=fhat.device)
        for some in rows.split(max(1, _BINNED_AT_ONCE // max(1, r))):
            counts = torch.bincount((self._bins(some) + first).flatten(), minlength=NUM_BINS * r)
            self._histogram += counts.view(r, NUM_BINS)

    def state(self) -> Tensor:
        """All numbers, as one vector of float64, to be exchanged between processes."""
        self._add_pending()
        return torch.cat([t.double().flatten() for t in self._tensors()])

    def merge(self, states: Sequence[Tensor]) -> None:
        """Combine the states of all processes.

        Args:
            states: `state` of each process, in the order of their samples.
        """
        if len(states) < 2:
            return
        parts = [self._read(state) for state in states]
        largest = _Places.join([part.largest for part in parts])
        self._largest = largest.at(*_top(largest.value, _LARGEST))
        smallest = _Places.join([part.smallest for part in parts])
        self._smallest = smallest.at(*_top(-smallest.value, _SMALLEST))
        self._doublings = torch.stack([part.doublings for part in parts]).amax(0)
        bins = [_wider_bins(self._doublings - part.doublings) for part in parts]
        self._histogram = torch.zeros_like(self._histogram)
        for of_part, part in zip(bins, parts, strict=True):
            self._histogram.scatter_add_(1, of_part, part.histogram)
        order, self._keys = _first_in_bins(torch.cat(bins, 1), torch.cat([part.keys for part in parts], 1))
        self._of_bin = _Places.join([part.of_bin for part in parts]).at(order, self._keys < _NO_KEY)

    def _read(self, state: Tensor) -> _State:
        """The numbers of a state of the same shapes."""
        like = [*self._tensors()]
        flat = state.to(self._keys.device).split([t.numel() for t in like])
        tensors = [numbers.view(t.shape).to(t.dtype) for numbers, t in zip(flat, like, strict=True)]
        return _State(_Places(*tensors[:4]), _Places(*tensors[4:8]), _Places(*tensors[8:12]), *tensors[12:])

    def _tensors(self) -> Iterator[Tensor]:
        for places in (self._largest, self._smallest, self._of_bin):
            yield from vars(places).values()
        yield from (self._keys, self._histogram, self._doublings)

    def result(self) -> FeatureExamples:
        """The examples of all batches so far."""
        self._add_pending()
        low, high = self._smallest.value[:, :1], self._largest.value[:, :1]
        middles = (torch.arange(_SPREAD, device=low.device).flip(0) + 0.5) / _SPREAD
        distance = (self._of_bin.value[:, None] - (low + middles * (high - low))[..., None]).abs()
        order = distance.nan_to_num(nan=math.inf).argmin(2)
        is_repeated = (order[:, None] == order[..., None]).tril(-1).any(2)
        spread = self._of_bin.at(order, ~is_repeated)
        spread = spread.at(*_top(spread.value, _SPREAD))
        found = _Places.join([self._largest, self._smallest, spread])
        half = torch.finfo(torch.float16).max
        return FeatureExamples(
            found.sample.int().cpu(),
            found.position.int().cpu(),
            found.value.float().cpu(),
            (_LARGEST, _SMALLEST, _SPREAD),
            self._shape,
            found.context.clamp(-half, half).half().cpu(),
            self._before,
            self._histogram.cpu(),
            (self._narrowest * 2.0**self._doublings).float().cpu(),
        )


def bytes_per_feature(num_positions: int) -> int:
    """Bytes of the examples and the histogram of a feature in a file, of a layer with so many positions in sequence."""
    context = min(_BEFORE + 1 + _AFTER, num_positions) if num_positions > 1 else 0
    return (_LARGEST + _SMALLEST + _SPREAD) * (4 + 4 + 4 + 2 * context) + 8 * NUM_BINS + 4


def _top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices of the ``k`` largest values, of equal ones the first, ``(r, k)``; and False where there are none."""
    ranked, order = values.nan_to_num(nan=-math.inf).sort(dim=1, descending=True, stable=True)
    return order[:, :k], ranked[:, :k] > -math.inf


def _wider_bins(doublings: Tensor) -> Tensor:
    """Where each bin is after its width has been doubled so many times, from shape ``(r,)`` to ``(r, 64)``."""
    half = NUM_BINS // 2
    return ((torch.arange(NUM_BINS, device=doublings.device) - half) >> doublings[:, None]) + half


def _first_in_bins(bins: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the place with the smallest key in each bin, shape ``(r, 64)``, and its key.

    Args:
        bins: Bins of the places, shape ``(r, m)``.
        keys: Their keys, shape ``(r, m)``.
    """
    smallest = keys.new_full((len(keys), NUM_BINS), _NO_KEY).scatter_reduce_(1, bins, keys, "amin")
    m = keys.shape[1]
    index = torch.arange(m, device=keys.device).expand_as(keys)
    index = index.where(keys == smallest.gather(1, bins), m - 1)
    order = keys.new_full(smallest.shape, m - 1).scatter_reduce_(1, bins, index, "amin")
    return order, smallest


def example_collectors(
    bases: Sequence[Basis], positions: Sequence[Sequence[Positions]], num_samples: int, process_group: ProcessGroup
) -> list[ExampleCollector]:
    """A collector for each node layer; called by all processes at the same time.

    Args:
        bases: Basis of each node layer.
        positions: For each batch of this process, the positions of each node layer.
        num_samples: Number of samples of this process.
        process_group: The processes.

    Returns:
        The collectors.
    """
    own = [of_layer for i in range(len(bases)) for of_layer in _described([of_batch[i] for of_batch in positions])]
    gathered = process_group.gather(torch.tensor([num_samples, *own], device="cpu"))
    counts = [int(t[0]) for t in gathered]
    first = first_number(counts, process_group)
    samples, every = range(first, first + num_samples), max(1, sum(counts) // _SPREAD_SAMPLES)
    described = torch.stack(gathered)[:, 1:].view(len(gathered), len(bases), _MAX_AXES + 2)
    found = []
    for i, basis in enumerate(bases):
        of_processes = [row for row in described[:, i].tolist() if row[0] >= 0]
        shapes = [tuple(row[2 : 2 + row[0]]) for row in of_processes]
        shape = _common_shape(shapes)
        is_sequence = len(shape) == 1 and all(row[0] == 1 and row[1] for row in of_processes)
        found.append(ExampleCollector(basis, shape, is_sequence, samples, every))
    return found


def _described(positions: Sequence[Positions]) -> list[int]:
    """Number of axes, whether all positions are there, and the shape, as numbers; -1 for the first without batches."""
    if not positions:
        return [-1] * (_MAX_AXES + 2)
    shape = _common_shape([of_batch.shape for of_batch in positions])
    shape = shape if len(shape) <= _MAX_AXES else (math.prod(shape),)
    has_one_axis = all(len(of_batch.shape) <= 1 for of_batch in positions)
    has_all = has_one_axis and all(of_batch.selected is None for of_batch in positions)
    return [len(shape), int(has_all), *shape, *[0] * (_MAX_AXES - len(shape))]


def _common_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of all; the longest sequence; the largest number of positions where images differ in size."""
    if len(set(shapes)) == 1:
        return shapes[0]
    largest = max((math.prod(shape) for shape in shapes), default=1)
    return (largest,) if largest > 1 else ()


def merge_examples(found: Sequence[ExampleCollector], process_group: ProcessGroup) -> None:
    """Combine what all processes have collected, in one exchange.

    Args:
        found: A collector for each node layer.
        process_group: The processes.
    """
    if process_group.size == 1:
        return
    states = [one.state().cpu() for one in found]
    gathered = process_group.gather(torch.cat(states))
    sizes = [len(state) for state in states]
    for one, of_processes in zip(found, zip(*(t.split(sizes) for t in gathered), strict=True), strict=True):
        one.merge(of_processes)
