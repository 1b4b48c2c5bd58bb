"""Sums of outer products of wide vectors that span few directions, without forming a ``d x d`` matrix.

Gradients with respect to a wide node layer (3,072 pixels) lie in the few directions (100 hidden units) that the next
module reads. Their span is found incrementally, and only the small Gram matrix of their coordinates is summed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lib_lightning.algorithm.gram import Gram
from lib_lightning.algorithm.linalg import add_gram, eigh_psd
from lib_lightning.distributed.process_group import ProcessGroup
from lib_lightning.model.agreement import length
from lib_lightning.model.precision import for_sums, product_dtype

# Up to this width the full matrix is cheaper than finding the span.
DENSE_WIDTH = 512
# The same on an accelerator, where finding the span would make the host wait for the device at every product.
_DENSE_ON_DEVICE = 4096
# New directions found in one step.
_SKETCH = 64
# Numbers to convert to float64 at a time.
_NUMBERS = 2**20


class LowRankGram(Gram):
    """Several sums ``sum g g^T`` as ``Q^T N Q``, with orthonormal rows of ``Q`` that all of them share.

    See `lib_lightning.algorithm.gram.Gram` for the methods, and `lib_lightning.algorithm.gram.DenseGram` for the same
    sums without the span.

    Args:
        d: Length of the vectors.
        parts: Number of sums.
        dense_width: Up to this length ``Q`` is the identity from the start.

    Note:
        New directions are found by a random sketch of the components outside the span (Halko, Martinsson and Tropp,
        2011, https://doi.org/10.1137/090771806), until only rounding is outside.

    Example:
        >>> gram = LowRankGram(3)
        >>> gram.add(torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0]]))
        >>> gram.rank, gram.matrix().round()
        (3, tensor([[ 5., 10.,  0.],
                [10., 20.,  0.],
                [ 0.,  0.,  0.]], dtype=torch.float64))
    """

    def __init__(self, d: int, parts: int = 1, dense_width: int = DENSE_WIDTH) -> None:
        self.d, self._dense_width = d, dense_width
        self.dense = d <= dense_width  # Q is the identity and is not stored
        self.Q = torch.zeros(0, d, device="cpu")
        k = d if self.dense else 0
        self.N = torch.zeros(parts, k, k, dtype=torch.float64, device="cpu")
        self._generator = torch.Generator().manual_seed(0)

    @property
    def rank(self) -> int:
        """Number of directions of the span."""
        return self.N.shape[1]

    def add(self, g: Tensor, part: int = 0) -> None:
        """See `Gram`."""
        g = for_sums(g.to(product_dtype(g.dtype)))
        self.N = self.N.to(g.device)
        if g.device.type != "cpu" and self.d <= _DENSE_ON_DEVICE and not self.dense:
            self._make_dense()
        coordinates = g if self.dense else self._coordinates(g)
        # Summed in float64: in float32 the rounding error of the sum, some 1e-6 of the largest eigenvalue, would make
        # directions look important that vary strongly but that nothing reads. This costs a quarter of the time on a
        # small MLP and little on a transformer; sums of split float32 products were no faster.
        for rows in coordinates.split(max(1, _NUMBERS // max(1, coordinates.shape[1]))):
            add_gram(self.N[part], rows.double())

    def add_product(self, V: Tensor, sums: Iterable[Tensor]) -> None:
        """See `Gram`."""
        if self.rank == 0 and 2 * len(V) <= self.d:  # so few rows that their span need not be searched
            self.N = self.N.new_zeros(len(self.N), len(V), len(V))
            self.Q, coordinates = (factor.T for factor in torch.linalg.qr(V.T))
        else:
            coordinates = V if self.dense else self._coordinates(V)
        self.N = self.N.to(V.device)
        for N, X in zip(self.N, sums, strict=True):
            N.addmm_(coordinates.T @ X, coordinates)

    def align(self, process_group: ProcessGroup) -> None:
        """See `Gram`: widens the span to that of all processes."""
        if process_group.size == 1 or self.d <= self._dense_width:
            return
        # Spans that come from the same weights are identical, which a product with a random vector shows.
        v = torch.randn(self.d, 1, generator=torch.Generator().manual_seed(0), device="cpu").to(self.N)
        checks = process_group.gather(torch.cat([self.N.new_ones(1) * self.dense, (self.Q.to(v) @ v)[:, 0]]))
        if any(bool(check[0]) for check in checks):
            if not self.dense:
                self._make_dense()
        elif not all(torch.equal(check, checks[0]) for check in checks):
            spans = [Q.double().reshape(-1, self.d) for Q in process_group.gather(self.Q.to(self.N))]
            # A direction found by two processes is in the union twice, up to rounding: drop zero singular values.
            _, sizes, directions = torch.linalg.svd(torch.cat(spans), full_matrices=False)
            # Coordinates add up in one basis only, and each process's SVD has its own signs and rounding.
            (Q,) = process_group.broadcast([directions[sizes > 1e-12]])
            own = self.Q.to(Q) @ Q.T
            self.N, self.Q = own.T @ self.N @ own, Q

    def matrix(self, part: int | None = None) -> Tensor:
        """See `Gram`."""
        N = self.N.sum(0) if part is None else self.N[part]
        return N if self.dense else self._widen(self._widen(N).T).T

    def squared_lengths(self, directions: Tensor) -> Tensor:
        """See `Gram`."""
        coordinates = directions if self.dense else directions @ self.Q.to(directions).T
        return ((coordinates @ self.N.to(directions)) * coordinates).sum(-1)

    def factor(self, cutoff: float) -> Tensor:
        """See `Gram`."""
        if self.rank == 0:
            return torch.zeros(0, self.d, dtype=torch.float64, device=self.N.device)
        values, vectors = eigh_psd(self.N.sum(0), cutoff)
        return values.sqrt()[:, None] * (vectors.T if self.dense else self._widen(vectors.T))

    def _widen(self, coordinates: Tensor) -> Tensor:
        """Vectors of length ``d`` from coordinates in the span, one a row."""
        return coordinates @ self.Q.to(coordinates)

    def _coordinates(self, g: Tensor) -> Tensor:
        """Widen the span to contain some vectors, and return their coordinates."""
        Q = self.Q.to(g)
        size = length(g)
        if not torch.isfinite(size):  # NaN has no span; in a dense sum it is found later
            self._make_dense()
            return g
        # The vectors are rounded, which moves them off the span in random directions.
        tolerance = 10 * self.d**0.5 * torch.finfo(g.dtype).eps * size
        coordinates = g @ Q.T
        rest = g - coordinates @ Q
        while (remainder := length(rest)) > tolerance:
            if 2 * (Q.shape[0] + _SKETCH) > self.d:
                self._make_dense()
                return g
            omega = torch.randn(_SKETCH, len(g), generator=self._generator, device="cpu").to(g)
            _, sizes, directions = torch.linalg.svd(omega @ (rest / remainder.to(rest)), full_matrices=False)
            # Directions that are together within the tolerance may be rounding of those found before. The sketch makes
            # vectors longer by the square root of its size; half the tolerance leaves room for its randomness.
            together = sizes.square().flip(0).cumsum(0).flip(0).sqrt() / _SKETCH**0.5
            found = (sizes > torch.finfo(g.dtype).eps * self.d * sizes[0]) & (together * remainder > tolerance / 2)
            found[0] = True
            new = directions[found]
            # Orthogonalise again: small remainders have lost their orthogonality to rounding.
            Q = torch.cat([Q, torch.linalg.qr((new - (new @ Q.T) @ Q).T).Q.T])
            coordinates = g @ Q.T
            rest = g - coordinates @ Q
        if Q.shape[0] > self.rank:
            wider = self.N.new_zeros(self.N.shape[0], Q.shape[0], Q.shape[0])
            wider[:, : self.rank, : self.rank] = self.N
            self.N = wider
        self.Q = Q
        return coordinates

    def _make_dense(self) -> None:
        self.N = torch.stack([self.matrix(part) for part in range(len(self.N))])
        self.dense = True
