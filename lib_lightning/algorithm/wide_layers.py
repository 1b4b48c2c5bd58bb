"""The LIB of a wide node layer that little is read of, without its covariance.

LIB features are the principal components of the activations measured in the metric ``M``. With ``B^T B = M``, ``B`` of
as many rows as there are directions that anything reads, they are those of ``y = (a - mu) B^T``: a small eigenproblem.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.linalg import Cutoff, eigh_psd
from lib_lightning.distributed.process_group import ProcessGroup, Reducible, all_reduce

# Activations to centre at a time, so that they stay in the cache until they are multiplied.
_NUMBERS = 2**19
# How many times as wide as `y` activations have to be for it to be kept beside them.
_FEW = 8
# Rows of a symmetric product to compute at a time, up to its diagonal.
_ROWS = 256
# A pivot that is not this much larger than rounding may hide a direction that is nothing but rounding.
_CLEARLY = 1e3


class DualEigenproblem(Reducible):
    """Streaming ``E[y^T (a - mu)]`` with ``y = (a - mu) B^T``, of which ``K = E[y^T y]`` is the product with ``B^T``.

    Args:
        mean: ``mu``, shape ``(d,)``, float64.
        B: Square-root factor of the Jacobian metric, ``B^T B = M``, shape ``(k, d)``, float64.
        keep: Whether to keep ``y``, of which features come for nothing, if it is much smaller than the activations.

    Note:
        Source: duality between the principal components of ``a`` in the metric ``M`` and those of ``y``: ``Sigma M``
        and ``B Sigma B^T`` have the same eigenvalues.
    """

    sums = ("_count", "_cross", "_squares")

    def __init__(self, mean: Tensor, B: Tensor, keep: bool = False) -> None:
        self.mean, self.B = mean, B
        self._count = mean.new_zeros(1)
        self._cross, self._squares = mean.new_zeros(B.shape), torch.zeros_like(mean)
        self._centred = mean.new_zeros(0, len(mean))  # the same memory for each block: new memory costs more than sums
        self._y: list[Tensor] | None = [] if keep and _FEW * len(B) <= len(mean) else None

    def update(self, rows: Tensor) -> None:
        """Add activations, one vector a row: ``(m, d)``."""
        for block in rows.split(max(1, _NUMBERS // max(1, rows.shape[1]))):
            if len(block) > len(self._centred):
                self._centred = self.mean.new_empty(block.shape)
            self._add(torch.sub(block, self.mean, out=self._centred[: len(block)]))

    def _add(self, centred: Tensor) -> None:
        """Add centred activations; what they hold is lost."""
        self._count += len(centred)
        # With the few rows of B first: products of that shape are up to twice as fast as their transposes.
        y = self.B @ centred.T
        self._cross.addmm_(y, centred)
        if self._y is not None:
            self._y.append(y)
        self._squares += centred.square_().sum(0)

    def reduce(self, process_group: ProcessGroup) -> None:
        """Join the sums of several processes."""
        all_reduce([self], process_group)

    def solve(self, name: str, cutoff: Cutoff) -> tuple[Basis, Tensor | None]:
        """Local Interaction Basis: ``C = B^T Q``, ``C^+ = Lambda^-1 Q^T E[y^T (a - mu)]`` with ``K = Q Lambda Q^T``.

        Args:
            name: Node layer.
            cutoff: Directions with an importance up to its share of the largest are dropped.

        Returns:
            The basis with kind ``"lib"``, and the features of all activations in it, ``(m, r)``, in the order in which
            they came, if ``y`` has been kept.
        """
        # Equal numbers differ from their mean by its rounding: a variance no larger than that is none.
        rounding = torch.finfo(self.mean.dtype).eps * self.mean.abs()
        cross = self._cross / self._count
        K = cross @ self.B.T
        floor = float((rounding @ self.B.abs().T).square().sum())
        Lambda, Q = eigh_psd(K, cutoff.metric, floor) if len(K) else (K.diagonal(), K)
        C_pinv = (Q.T @ cross) / Lambda[:, None]
        # What never varies (the border of all images) is no part of a feature, however strongly it would be read.
        varies = self._squares / self._count > rounding.square()
        basis = Basis(name, "lib", self.mean, (self.B * varies).T @ Q, C_pinv, Lambda)
        return basis, None if self._y is None else torch.cat([(Q.T @ y).T for y in self._y])


class DualFewSamples(DualEigenproblem):
    """The same of activations that are fewer than their node layer is wide, and span only some of its directions.

    Features must not reach beyond these, where what they read has never been seen.
    """

    def __init__(self, mean: Tensor, B: Tensor, keep: bool = False) -> None:
        super().__init__(mean, B, keep)
        self._rows = [mean.new_zeros(0, len(mean))]

    def _add(self, centred: Tensor) -> None:
        self._rows.append(centred.clone())
        super()._add(centred)

    def reduce(self, process_group: ProcessGroup) -> None:
        """Join the sums and the activations of several processes."""
        super().reduce(process_group)
        self._rows = process_group.gather(torch.cat(self._rows))

    def solve(self, name: str, cutoff: Cutoff) -> tuple[Basis, Tensor | None]:
        """Local Interaction Basis, ``C`` being the part of ``B^T Q`` in the span of all activations.

        Args:
            name: Node layer.
            cutoff: Directions with an importance up to its share of the largest are dropped; of the variances only
                those that are rounding.

        Returns:
            The basis with kind ``"lib"``, and the features, which are the same: what is left out reads nothing here.
        """
        beyond, features = super().solve(name, cutoff)
        X = torch.cat(self._rows)
        rounding = float((torch.finfo(X.dtype).eps * self.mean).square().sum())
        to_features = _in_span(X, beyond.to_features, cutoff.rounding, rounding)
        return replace(beyond, to_features=to_features), features


def _in_span(X: Tensor, C: Tensor, cutoff: float, floor: float) -> Tensor:
    """The part of vectors ``C (d, r)`` in the span of rows ``X (n, d)`` that have a mean of zero.

    Directions with a variance up to ``floor``, or this share of the largest, are none. Without such, the normal
    equations of all rows but one, which the others determine, are solved; else the principal components are needed: by
    the products of rows with each other (Sirovich, 1987, the method of snapshots).
    """
    n = len(X)
    gram = X.new_zeros(n, n)
    for rows in range(0, n, _ROWS):
        end = min(n, rows + _ROWS)
        gram[rows:end, :end] = X[rows:end] @ X[:end].T
    L, failed = torch.linalg.cholesky_ex(gram[:-1, :-1])
    pivots = L.diagonal().square() / n
    # No eigenvalue is larger than the trace.
    if n > 1 and not failed and pivots.amin() > _CLEARLY * max(floor, cutoff * float(gram.trace()) / n):
        rest = X[:-1]
        found = torch.cholesky_solve(rest @ C, L)
        # Once more with what is left, as the equations square the condition of the rows.
        found += torch.cholesky_solve(rest @ (C - rest.T @ found), L)
        return rest.T @ found
    D, V = eigh_psd((gram.tril() + gram.tril(-1).T) / n, cutoff, floor)
    U = X.T @ (V / (n * D).sqrt())
    return U @ (U.T @ C)
