"""Sums of outer products of wide vectors that span few directions: a ``d x d`` matrix that is never formed.

Gradients towards a wide node layer (3,072 pixels) all lie in the few directions (100 hidden units) that the next module
reads. Their span is found as they come and only its own small Gram matrix is summed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lib_lightning.algorithm.linalg import add_gram, eigh_psd
from lib_lightning.distributed.process_group import ProcessGroup, Reducible
from lib_lightning.model.precision import product_dtype

# Below this width the full matrix is cheaper than looking for a span.
DENSE_WIDTH = 512
_SKETCH = 64
# Numbers to hold in float64 at a time.
_NUMBERS = 2**20


class LowRankGram(Reducible):
    """Streaming ``sum g g^T`` over vectors ``g``, as ``Q^T N Q`` with orthonormal rows of ``Q``.

    Args:
        d: Length of the vectors.
        parts: Number of sums to keep apart, over one span.
        dense_width: Up to this length ``Q`` is the identity from the start.

    Note:
        New directions are found by a random sketch of what lies outside the span so far (Halko, Martinsson and Tropp,
        2011), until what is left is rounding.

    Example:
        >>> gram = LowRankGram(3)
        >>> gram.add(torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0]]))
        >>> gram.rank, gram.matrix().round()
        (3, tensor([[ 5., 10.,  0.],
                [10., 20.,  0.],
                [ 0.,  0.,  0.]], dtype=torch.float64))
    """

    sums = ("N",)

    def __init__(self, d: int, parts: int = 1, dense_width: int = DENSE_WIDTH) -> None:
        self.d, self._dense_width = d, dense_width
        self.dense = d <= dense_width  # Q is the identity, and not stored
        self.Q = torch.zeros(0, d)
        k = d if self.dense else 0
        self.N = torch.zeros(parts, k, k, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(0)

    @property
    def rank(self) -> int:
        """Number of directions summed over: all of them where the sum is dense."""
        return self.N.shape[1]

    def add(self, g: Tensor, part: int = 0) -> None:
        """Add vectors.

        Args:
            g: One vector a row, shape ``(m, d)``.
            part: The sum to add them to.
        """
        g = g.to(product_dtype(g.dtype))
        self.N = self.N.to(g.device)
        coordinates = g if self.dense else self._coordinates(g)
        # In single precision the rounding of the sum would be a metric of its own, some 1e-6 of the largest eigenvalue:
        # enough for directions that nothing reads, but that vary greatly, to look important. On a small MLP this costs
        # a quarter of the whole time, on a transformer little; splitting numbers into single ones was no faster.
        for rows in coordinates.split(max(1, _NUMBERS // max(1, coordinates.shape[1]))):
            add_gram(self.N[part], rows.double())

    def add_product(self, V: Tensor, sums: Iterable[Tensor]) -> None:
        """Add many vectors to each sum by what is known of theirs: ``V^T X V``.

        Args:
            V: Directions that they lie in, one a row, shape ``(m, d)``, float64.
            sums: For each part ``X``, their sum in these, symmetric, shape ``(m, m)``, float64.
        """
        if self.rank == 0 and 2 * len(V) <= self.d:  # so few that each may count as a direction of its own
            self.N = self.N.new_zeros(len(self.N), len(V), len(V))
            self.Q, coordinates = (factor.T for factor in torch.linalg.qr(V.T))
        else:
            coordinates = V if self.dense else self._coordinates(V)
        self.N = self.N.to(V.device)
        for N, X in zip(self.N, sums, strict=True):
            N.addmm_(coordinates.T @ X, coordinates)

    def meet(self, process_group: ProcessGroup) -> None:
        """Widen the span to that of all processes, so that their sums can be joined."""
        if process_group.size == 1 or self.d <= self._dense_width:
            return
        # Where all have read it off the same weights, it is the same: a product with a random vector shows that.
        seen = torch.randn(self.d, 1, generator=torch.Generator().manual_seed(0)).to(self.N)
        shown = process_group.gather(torch.cat([self.N.new_ones(1) * self.dense, (self.Q.to(seen) @ seen)[:, 0]]))
        if any(bool(one[0]) for one in shown):
            if not self.dense:
                self._make_dense()
        elif not all(torch.equal(one, shown[0]) for one in shown):
            # Directions that two processes both found are nearly the same twice.
            spans = [Q.double().reshape(-1, self.d) for Q in process_group.gather(self.Q.to(self.N))]
            _, sizes, directions = torch.linalg.svd(torch.cat(spans), full_matrices=False)
            # Coordinates add up only in one and the same span, which a factorisation gives up to rounding and signs.
            (Q,) = process_group.broadcast([directions[sizes > 1e-12]])
            own = self.Q.to(Q) @ Q.T
            self.N, self.Q = own.T @ self.N @ own, Q

    def matrix(self, part: int | None = None) -> Tensor:
        """One sum, or all together, as a matrix ``(d, d)``, float64."""
        N = self.N.sum(0) if part is None else self.N[part]
        return N if self.dense else self._widen(self._widen(N).T).T

    def squared_lengths(self, directions: Tensor) -> Tensor:
        """Squared length of directions in each sum: ``v (sum g g^T) v^T``.

        Args:
            directions: One a row, shape ``(r, d)``, float64.

        Returns:
            Shape ``(parts, r)``.
        """
        coordinates = directions if self.dense else directions @ self.Q.to(directions).T
        return ((coordinates @ self.N.to(directions)) * coordinates).sum(-1)

    def factor(self, cutoff: float) -> Tensor:
        """Square-root factor of all together: ``B`` with ``B^T B = sum g g^T``.

        Args:
            cutoff: Directions with an eigenvalue up to this share of the largest are dropped.

        Returns:
            ``B`` of shape ``(k, d)``, float64.
        """
        if self.rank == 0:
            return torch.zeros(0, self.d, dtype=torch.float64, device=self.N.device)
        values, vectors = eigh_psd(self.N.sum(0), cutoff)
        return values.sqrt()[:, None] * (vectors.T if self.dense else self._widen(vectors.T))

    def _widen(self, coordinates: Tensor) -> Tensor:
        """Vectors of length ``d`` from their coordinates in the span, one a row."""
        return coordinates @ self.Q.to(coordinates)

    def _coordinates(self, g: Tensor) -> Tensor:
        """Coordinates of vectors in the span, after it has been widened to hold them."""
        Q = self.Q.to(g)
        size = g.norm()
        if not torch.isfinite(size):  # no span to be found; let the sum show it
            self._make_dense()
            return g
        # The vectors themselves are rounded, off the span in all directions alike.
        tolerance = 10 * self.d**0.5 * torch.finfo(g.dtype).eps * size
        coordinates = g @ Q.T
        rest = g - coordinates @ Q
        while rest.norm() > tolerance:
            if 2 * (Q.shape[0] + _SKETCH) > self.d:
                self._make_dense()
                return g
            omega = torch.randn(_SKETCH, len(g), generator=self._generator).to(g)
            _, sizes, directions = torch.linalg.svd(omega @ rest, full_matrices=False)
            new = directions[sizes > torch.finfo(g.dtype).eps * self.d * sizes[0]]
            # Once more against the old ones: what is small has lost its orthogonality to rounding.
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
