"""What to say about node layers in which a single position, or a single feature, has nearly all of the variance.

In pretrained language models the first token often does: whatever is summed over positions is then about that token,
and the first feature is the direction in which it differs from all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.basis_kinds import LATENTS
from lib_lightning.distributed.process_group import ProcessGroup
from lib_lightning.model.capture import CapturedLayer
from lib_lightning.model.node_layer import NodeLayer
from lib_lightning.model.precision import product_dtype
from lib_lightning.model.skip_positions import plain_skip, skipped_of
from lib_lightning.model.vjp import apply_mask

# A position or feature with a larger share than this is reported.
_SHARE = 0.9
# Of fewer activations than these, one feature often has most of the importance, and nothing is wrong.
_MIN_WIDTH = 16


class PositionVariance:
    """Running variance of activations with any one of the positions left out.

    Positions are counted among the valid ones of each sample, as for ``skip_positions``. Nothing is computed for node
    layers with a single position per sample, selected positions, or streams that are joined.

    Example:
        >>> variance = PositionVariance()
        >>> a = torch.zeros(5, 3, 1)
        >>> a[:, 0], a[:, 1] = 100.0, torch.arange(5.0)[:, None]
        >>> variance.update(CapturedLayer(NodeLayer("x"), (a,), (a,), (0,)))
        >>> variance.dominant()
        0
    """

    def __init__(self) -> None:
        # Number, sum and sum of squares of the deviations of each position from an origin, the first batch's mean: with
        # that subtracted, the digits of the activations are enough for a share.
        self._counts = torch.zeros(0, device="cpu")
        self._squares = self._origin = self._counts
        self._sums = torch.zeros(0, 0, device="cpu")

    def update(self, captured: CapturedLayer) -> None:
        """Add a batch.

        Args:
            captured: The node layer at that batch.
        """
        a, layer = captured.a.detach(), captured.layer
        n, S, _ = a.shape
        if S == 1 or layer.positions is not None or layer.join == "positions":
            return
        a = a.to(product_dtype(a.dtype))
        if not self._origin.numel():
            self._origin = a.mean((0, 1)) if captured.mask is None else a[captured.mask].mean(0)
        deviations = apply_mask(a - self._origin, captured.mask)
        weights = a.new_ones(n, S) if captured.mask is None else captured.mask.to(a)
        squares = deviations.square().sum(2)
        if captured.valid is None:
            self._add(weights.sum(0), deviations.sum(0), squares.sum(0))
        else:
            place = (captured.valid.long().cumsum(1) - 1).clamp(min=0).flatten()
            parts = weights.flatten(), deviations.flatten(0, 1), squares.flatten()
            self._add(*(t.new_zeros(S, *t.shape[1:]).index_add(0, place, t) for t in parts))

    def _add(self, counts: Tensor, sums: Tensor, squares: Tensor) -> None:
        size = max(len(counts), len(self._counts))

        def padded(t: Tensor) -> Tensor:
            return torch.cat([t, t.new_zeros(size - len(t), *t.shape[1:])])

        if not len(self._counts):
            self._counts, self._sums, self._squares = counts, sums, squares
        elif len(counts):
            self._counts = padded(self._counts) + padded(counts)
            self._sums = padded(self._sums) + padded(sums)
            self._squares = padded(self._squares) + padded(squares)

    @property
    def totals(self) -> Tensor:
        """All sums of this process in one tensor, float64, on the CPU."""
        S, d = self._sums.shape
        shape = torch.tensor([S, d], device="cpu")
        parts = (shape, self._origin, self._counts, self._squares, self._sums)
        return torch.cat([t.cpu().double().flatten() for t in parts])

    @classmethod
    def merged(cls, all_totals: Sequence[Tensor]) -> PositionVariance:
        """The variance over the samples of several processes.

        Args:
            all_totals: The `totals` of each.

        Returns:
            The variance.
        """
        result = cls()
        for totals in all_totals:
            S, d = int(totals[0]), int(totals[1])
            if S:
                origin, counts, squares, sums = totals[2:].split([d, S, S, S * d])
                sums = sums.view(S, d)
                if not result._origin.numel():
                    result._origin = origin
                shift = origin - result._origin
                squares = squares + 2 * sums @ shift + counts * shift.square().sum()
                result._add(counts, sums + counts[:, None] * shift, squares)
        return result

    def dominant(self) -> int | None:
        """The one position without which the variance would be less than a tenth; None if there is none, or several."""
        if len(self._counts) < 2:
            return None
        counts, sums, squares = (t.cpu().double() for t in (self._counts, self._sums, self._squares))
        total = squares.sum() - sums.sum(0).square().sum() / counts.sum()
        others = (counts.sum() - counts).clamp(min=1)
        without = squares.sum() - squares - (sums.sum(0) - sums).square().sum(1) / others
        places = (without < (1 - _SHARE) * total).nonzero().flatten().tolist() if total > 0 else []
        # Of two positions that differ, each one removed would leave little.
        return int(places[0]) if len(places) == 1 else None

    @property
    def n_positions(self) -> int:
        """Number of positions of the longest sample."""
        return len(self._counts)


def reduce_position_variances(
    variances: Sequence[PositionVariance], process_group: ProcessGroup
) -> list[PositionVariance]:
    """Combine the variances of all processes.

    Args:
        variances: One for each node layer.
        process_group: The processes.

    Returns:
        One for each node layer.
    """
    if process_group.size == 1:
        return list(variances)
    lengths = torch.tensor([len(v.totals) for v in variances], device="cpu")
    all_lengths = process_group.gather(lengths)
    gathered = process_group.gather(torch.cat([v.totals for v in variances]))
    parts = [totals.split(sizes.tolist()) for totals, sizes in zip(gathered, all_lengths, strict=True)]
    return [PositionVariance.merged(layer) for layer in zip(*parts, strict=True)]


@dataclass(frozen=True)
class _Dominated:
    position: int | None
    feature: bool


def describe_dominance(
    bases: Sequence[Basis], layers: Sequence[NodeLayer], variances: Sequence[PositionVariance]
) -> list[str]:
    """Name node layers of which one position or one feature has more than nine tenths of the variance.

    Args:
        bases: The basis of each node layer.
        layers: The node layers.
        variances: Their variances with one position left out.

    Returns:
        One sentence for each such node layer, always the same one. A feature is reported of node layers with at least
        16 activations, and not if the last node layer has such a feature, too: then the result has one dimension.
    """
    found = [_Dominated(v.dominant(), _has_dominant(b)) for b, v in zip(bases, variances, strict=True)]
    sentences = []
    for i, (basis, layer, variance, dominated) in enumerate(zip(bases, layers, variances, found, strict=True)):
        p = dominated.position
        if p is not None:
            setting = _setting(layer, p, variance.n_positions)
            feature = ", and one feature as much of the importance" if dominated.feature else ""
            sentences.append(
                f"Position {p} of the samples has more than 90% of the variance of '{basis.name}'{feature}. "
                f"skip_positions={setting} leaves it out."
            )
        elif dominated.feature and i == len(bases) - 1:
            sentences.append(
                f"One feature has more than 90% of the variance of '{basis.name}', the last node layer, so that "
                "importance everywhere is about that one. Scale what the model predicts if the others matter as much."
            )
        elif dominated.feature and not found[-1].feature:
            sentences.append(
                f"One feature has more than 90% of the importance of '{basis.name}'. If that is a matter of scale (an "
                "input that is not normalised), normalise it, or choose the norm after it as the node layer."
            )
    return sentences


def _has_dominant(basis: Basis) -> bool:
    importance = basis.importance
    if basis.kind == LATENTS:  # of which one is what the dictionary leaves out
        return False
    is_wide = len(basis.mean) >= _MIN_WIDTH and len(importance) > 1
    return is_wide and bool(importance.max() > _SHARE * importance.sum())


def _setting(layer: NodeLayer, position: int, size: int) -> str:
    """The value of ``skip_positions`` that leaves out a position beside those that are left out already."""
    left_out = sorted({*skipped_of(plain_skip(layer.skip_positions) or 0, size), position})
    if left_out == list(range(len(left_out))):
        return str(len(left_out))
    return "-1" if left_out == [size - 1] else str(left_out)
