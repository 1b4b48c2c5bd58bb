"""The interface of a metric on the activations of a node layer: Jacobian and Fisher metrics implement it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lib_lightning.distributed.process_group import ProcessGroup


class Metric(Protocol):
    """A quadratic form ``v M v^T`` on the activations of a node layer, summed over samples."""

    def reduce(self, process_group: ProcessGroup) -> None:
        """Add up the sums of all processes."""
        ...

    def is_finite(self) -> bool:
        """Whether the sums are free of NaN and infinity."""
        ...

    def factor(self, cutoff: float) -> Tensor:
        """Square-root factor ``B`` with ``B^T B = M``.

        Args:
            cutoff: Directions with an eigenvalue up to this share of the largest are dropped.

        Returns:
            ``B`` of shape ``(k, d)``, float64.
        """
        ...

    def replicates(self, directions: Tensor) -> Tensor:
        """Squared lengths of directions in the jackknife replicates of the metric.

        Args:
            directions: One a row, shape ``(r, d)``, float64.

        Returns:
            ``v M v^T`` of each direction in each replicate, shape ``(G, r)``; G is 0 if there is only one group.
        """
        ...

    @property
    def M(self) -> Tensor:
        """The metric, shape ``(d, d)``, float64."""
        ...

    @property
    def relative_error(self) -> float | None:
        """Estimated sampling error of ``M``, relative in the Frobenius norm: 0 if exact, None if unknown."""
        ...
