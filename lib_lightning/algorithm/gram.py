"""Sums of outer products ``sum g g^T``: the interface, and the dense implementation that specifies it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from lib_lightning.algorithm.linalg import eigh_psd
from lib_lightning.distributed.process_group import ProcessGroup, Reducible
from lib_lightning.model.precision import to_float64


class Gram(Reducible, ABC):
    """Several sums ``sum g g^T`` over vectors ``g`` of length ``d``, in float64.

    Attributes:
        N: The sums in an orthonormal basis that all of them share, shape ``(parts, k, k)``.
    """

    sums = ("N",)
    N: Tensor

    @abstractmethod
    def add(self, g: Tensor, part: int = 0) -> None:
        """Add vectors to one sum.

        Args:
            g: One vector a row, shape ``(m, d)``.
            part: Which sum.
        """

    @abstractmethod
    def add_product(self, V: Tensor, sums: Iterable[Tensor]) -> None:
        """Add a product ``V^T X V`` to each sum.

        Args:
            V: Shape ``(m, d)``, float64.
            sums: ``X`` for each sum, symmetric, shape ``(m, m)``, float64.
        """

    @abstractmethod
    def align(self, process_group: ProcessGroup) -> None:
        """Express the sums of all processes in the same orthonormal basis, so that they can be added up."""

    @abstractmethod
    def matrix(self, part: int | None = None) -> Tensor:
        """One sum, or the total of all of them, as a matrix ``(d, d)``."""

    @abstractmethod
    def squared_lengths(self, directions: Tensor) -> Tensor:
        """Squared lengths ``v (sum g g^T) v^T`` of directions.

        Args:
            directions: ``v``, one a row, shape ``(r, d)``, float64.

        Returns:
            Shape ``(parts, r)``.
        """

    @abstractmethod
    def factor(self, cutoff: float) -> Tensor:
        """Square-root factor of the total: ``B`` with ``B^T B = sum g g^T``.

        Args:
            cutoff: Directions with an eigenvalue up to this share of the largest are dropped.

        Returns:
            ``B`` of shape ``(k, d)``, float64.
        """


class DenseGram(Gram):
    """The sums as dense matrices: the plain twin of `lib_lightning.algorithm.low_rank_gram.LowRankGram`.

    Args:
        d: Length of the vectors.
        parts: Number of sums.

    Example:
        >>> gram = DenseGram(2)
        >>> gram.add(torch.tensor([[1.0, 2.0]]))
        >>> gram.matrix()
        tensor([[1., 2.],
                [2., 4.]], dtype=torch.float64)
    """

    def __init__(self, d: int, parts: int = 1) -> None:
        self.N = torch.zeros(parts, d, d, dtype=torch.float64, device="cpu")

    def add(self, g: Tensor, part: int = 0) -> None:
        """See `Gram`."""
        g = to_float64(g)
        self.N = self.N.to(g.device)
        self.N[part] += g.T @ g

    def add_product(self, V: Tensor, sums: Iterable[Tensor]) -> None:
        """See `Gram`."""
        self.N = self.N.to(V.device)
        for N, X in zip(self.N, sums, strict=True):
            N += V.T @ X @ V

    def align(self, process_group: ProcessGroup) -> None:
        """See `Gram`: dense matrices already share the standard basis."""

    def matrix(self, part: int | None = None) -> Tensor:
        """See `Gram`."""
        return self.N.sum(0) if part is None else self.N[part]

    def squared_lengths(self, directions: Tensor) -> Tensor:
        """See `Gram`."""
        return torch.einsum("ri,pij,rj->pr", directions, self.N.to(directions), directions)

    def factor(self, cutoff: float) -> Tensor:
        """See `Gram`."""
        values, vectors = eigh_psd(self.matrix(), cutoff)
        return values.sqrt()[:, None] * vectors.T
