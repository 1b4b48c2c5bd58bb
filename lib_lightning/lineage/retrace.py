"""Looking back from the final features: when did each one first become recognisable?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_lightning.lineage.matching import SAME, standardised


@dataclass(frozen=True)
class Retraced:
    """How like each of ``r`` final features the most similar feature of each of ``T`` earlier snapshots was.

    Attributes:
        steps: Steps of the snapshots, rising, shape ``(T,)``, int64.
        similarity: Largest correlation with any feature of the snapshot, absolute value, shape ``(T, r)``, float64.

    Example:
        >>> seen = Retraced(torch.tensor([0, 10, 20]), torch.tensor([[0.1], [0.9], [1.0]]).double())
        >>> seen.first()
        tensor([10])
    """

    steps: Tensor
    similarity: Tensor

    def first(self, shared: float = SAME) -> Tensor:
        """The first snapshot in which some feature had that much of its variance in common with the final one.

        Args:
            shared: Share of the variance, between 0 and 1.

        Returns:
            Steps, shape ``(r,)``, int64; -1 for features that are in no snapshot.
        """
        return self._step_of(self.similarity.square() >= shared)

    def since(self, shared: float = SAME) -> Tensor:
        """The first snapshot from which on that was so in all of them.

        Args:
            shared: Share of the variance, between 0 and 1.

        Returns:
            Steps, shape ``(r,)``, int64; -1 for features that are not in the last snapshot.
        """
        seen = (self.similarity.square() >= shared).long()
        return self._step_of(seen.flip(0).cumprod(0).flip(0).bool())

    def _step_of(self, seen: Tensor) -> Tensor:
        if not len(self.steps):
            return torch.full((seen.shape[1],), -1)
        return torch.where(seen.any(0), self.steps[seen.long().argmax(0)], -1)


def retrace(final: Tensor, steps: Sequence[int], earlier: Sequence[Tensor], in_order: bool = False) -> Retraced:
    """Compare final features with those of earlier snapshots, on the same samples.

    Args:
        final: Values of the final features, shape ``(N, r)``.
        steps: Steps of the earlier snapshots, rising.
        earlier: Values of their features, each of shape ``(N, r_t)``.
        in_order: Whether features are what they are by their number, such as single neurons.

    Returns:
        The similarities.

    Raises:
        ValueError: If samples are not equally many everywhere.

    Example:
        >>> final = torch.eye(4)[:, :2]
        >>> retrace(final, [0, 10], [torch.ones(4, 1), final]).first()
        tensor([10, 10])
    """
    if wrong := {len(values) for values in earlier} - {len(final)}:
        raise ValueError(f"Features are compared on the same samples; got {len(final)} of them and {sorted(wrong)}.")
    last = standardised(final)
    found = [_likeness(standardised(values), last, in_order) for values in earlier]
    similarity = torch.stack(found) if found else last.new_zeros(0, last.shape[1])
    return Retraced(torch.tensor(steps, dtype=torch.int64), similarity)


def _likeness(values: Tensor, last: Tensor, in_order: bool) -> Tensor:
    if in_order:
        return (values * last).sum(0).abs()
    products = (values.T @ last).abs()
    return products.amax(0) if len(products) else last.new_zeros(last.shape[1])
