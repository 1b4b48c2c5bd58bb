"""Converts Lightning's axis of logged scalars to numbers of optimizer steps, by which snapshots are named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


class StepAxis:
    """Lightning logs at the number of batches that ended in an optimizer step, counted from 0.

    What it logs after 3,000 steps is therefore at 2,999, or at 1,499 if each batch has two optimizers take a step.
    Snapshots store both numbers. Between snapshots, steps are interpolated.

    Args:
        snapshots: For each snapshot, by its number of optimizer steps, where Lightning logs its scalars; None for a
            snapshot of version 0.1, which did not store it.

    Attributes:
        is_known: Whether any snapshot stores it.

    Example:
        >>> StepAxis({0: 0, 50: 49, 3000: 2999}).steps([0, 49, 2999])
        [1, 50, 3000]
        >>> StepAxis({1000: 499, 3000: 1499}).steps([9, 499, 1499])
        [20, 1000, 3000]
    """

    def __init__(self, snapshots: Mapping[int, int | None]) -> None:
        # Before the first step, Lightning also logs at 0.
        known = {at + 1: step for step, at in snapshots.items() if at is not None and step > 0}
        self._batches, self._steps = np.array([0, *sorted(known)]), np.array([0, *sorted(known.values())])
        self.is_known = bool(known)

    def steps(self, logged_at: Sequence[int]) -> list[int]:
        """Convert positions on Lightning's axis.

        Args:
            logged_at: The positions.

        Returns:
            Numbers of optimizer steps; the positions themselves if the relation is not known.
        """
        if not self.is_known:
            return list(logged_at)
        batches = np.asarray(logged_at, dtype=float) + 1
        # After the last snapshot, steps per batch are those of the run so far.
        beyond = np.maximum(batches - self._batches[-1], 0) * self._steps[-1] / self._batches[-1]
        found = np.interp(batches, self._batches, self._steps) + beyond
        return [int(step) for step in found.round()]
