"""The eigenproblem of the LIB: from the covariance, or in its dual form for wide node layers.

LIB features are the principal components of the activations in the metric ``M``. With ``B^T B = M``, where ``B`` has as
many rows as there are directions that anything reads, they are those of ``y = (a - mu) B^T``. If these are few, their
eigenproblem is small, and the covariance of a wide node layer is never formed.

Derivation. With ``cross = E[y^T (a - mu)]`` (so ``cross = B Sigma``) and ``K = E[y^T y] = B Sigma B^T = Q Lambda Q^T``,
the maps ``C = B^T Q`` and ``C^+ = Lambda^-1 Q^T cross`` give ``C^+ C = Lambda^-1 Q^T B Sigma B^T Q = 1``, uncorrelated
features ``C^T Sigma C = Lambda``, and ``C C^T = B^T Q Q^T B = M`` on everything that varies.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from lib_lightning.algorithm.basis import Basis, lib_basis
from lib_lightning.algorithm.covariance import RunningCovariance
from lib_lightning.algorithm.linalg import Cutoff, eigh_psd
from lib_lightning.distributed.process_group import ProcessGroup, Reducible, all_reduce
from lib_lightning.model.precision import for_sums

# Numbers to centre at a time, so that they stay in the processor's cache until they are multiplied.
_NUMBERS = 2**19
# `y` is kept if activations are this many times wider.
_FEW = 8
# Rows of a symmetric product to compute at a time, up to its diagonal.
_ROWS = 256
# A pivot that is not this many times larger than rounding may hide a direction that is only rounding error.
_SAFETY = 1e3


class Eigenproblem(Protocol):
    """Finds the LIB of a node layer from its moments and a factor of its metric.

    Attributes:
        needs_rows: Whether the activations are needed once more, through `update`.
    """

    needs_rows: bool

    def update(self, rows: Tensor) -> None:
        """Add activations, one vector a row: ``(m, d)``."""
        ...

    def reduce(self, process_group: ProcessGroup) -> None:
        """Add up the sums of all processes."""
        ...

    def solve(self, name: str, cutoff: Cutoff) -> tuple[Basis, Tensor | None]:
        """Solve the eigenproblem.

        Args:
            name: Node layer.
            cutoff: Directions with an importance up to its share of the largest are dropped.

        Returns:
            The basis with kind ``"lib"``, and the features of all activations, in the order of `update`, shape
            ``(m, r)``, if they are available at no extra cost.
        """
        ...


def eigenproblem(moments: RunningCovariance, B: Tensor, process_group: ProcessGroup, keep: bool) -> Eigenproblem:
    """Choose how to solve the eigenproblem of the LIB.

    Args:
        moments: Moments of the node layer, of all processes.
        B: Square-root factor of its metric, ``B^T B = M``, shape ``(k, d)``, float64.
        process_group: The processes.
        keep: Whether features may be kept from the eigenproblem for the edges.

    Returns:
        The eigenproblem, in its dual form if the covariance was not computed.
    """
    if moments.has_covariance:
        return CovarianceEigenproblem(moments.mean, moments.covariance, B)
    # A square-root factor is not unique, and sums over processes need the same one everywhere.
    (B,) = process_group.broadcast([B])
    if moments.count <= len(moments.mean):
        return DualFewSamples(moments.mean, B, keep)
    return DualEigenproblem(moments.mean, B, keep)


class CovarianceEigenproblem:
    """The eigenproblem from the covariance matrix: the plain twin of `DualEigenproblem` and `DualFewSamples`.

    Args:
        mean: ``mu``, shape ``(d,)``, float64.
        covariance: ``Sigma``, shape ``(d, d)``, float64.
        B: Square-root factor of the metric, ``B^T B = M``, shape ``(k, d)``, float64.
    """

    needs_rows = False

    def __init__(self, mean: Tensor, covariance: Tensor, B: Tensor) -> None:
        self.mean, self.covariance, self.B = mean, covariance, B

    def update(self, rows: Tensor) -> None:
        """See `Eigenproblem`."""

    def reduce(self, process_group: ProcessGroup) -> None:
        """See `Eigenproblem`: the covariance is that of all processes."""

    def solve(self, name: str, cutoff: Cutoff) -> tuple[Basis, Tensor | None]:
        """See `Eigenproblem`."""
        return lib_basis(name, self.mean, self.covariance, self.B, cutoff), None


class DualEigenproblem(Reducible):
    """Streaming ``cross = E[y^T (a - mu)]`` with ``y = (a - mu) B^T``; see `Eigenproblem` for the methods.

    Args:
        mean: ``mu``, shape ``(d,)``, float64.
        B: Square-root factor of the metric, ``B^T B = M``, shape ``(k, d)``, float64.
        keep: Whether to keep ``y``, from which features follow at no extra cost, if it is much smaller than the
            activations.

    Note:
        Source: duality between the principal components of ``a`` in the metric ``M`` and those of ``y``; derivation in
        the module docstring.
    """

    sums = ("_count", "_cross", "_squares")
    needs_rows = True

    def __init__(self, mean: Tensor, B: Tensor, keep: bool = False) -> None:
        self.mean, self.B = mean, B
        self._count = mean.new_zeros(1)
        self._cross, self._squares = mean.new_zeros(B.shape), torch.zeros_like(mean)
        # One buffer for all blocks: allocating new memory would take longer than the sums.
        self._centred = mean.new_zeros(0, len(mean))
        self._y: list[Tensor] | None = [] if keep and _FEW * len(B) <= len(mean) else None

    def update(self, rows: Tensor) -> None:
        """See `Eigenproblem`."""
        for block in for_sums(rows).split(max(1, _NUMBERS // max(1, rows.shape[1]))):
            if len(block) > len(self._centred):
                self._centred = self.mean.new_empty(block.shape)
            self._add(torch.sub(block, self.mean, out=self._centred[: len(block)]))

    def _add(self, centred: Tensor) -> None:
        """Add centred activations; overwrites them."""
        self._count += len(centred)
        # With the few rows of B first: such products are up to twice as fast as their transposes.
        y = self.B @ centred.T
        self._cross.addmm_(y, centred)
        if self._y is not None:
            self._y.append(y)
        self._squares += centred.square_().sum(0)

    def reduce(self, process_group: ProcessGroup) -> None:
        """See `Eigenproblem`."""
        all_reduce([self], process_group)

    def solve(self, name: str, cutoff: Cutoff) -> tuple[Basis, Tensor | None]:
        """See `Eigenproblem`: ``C = B^T Q``, ``C^+ = Lambda^-1 Q^T cross`` with ``K = cross B^T = Q Lambda Q^T``."""
        # Constant activations differ from their rounded mean: a variance of that size is rounding error.
        rounding = torch.finfo(self.mean.dtype).eps * self.mean.abs()
        cross = self._cross / self._count
        K = cross @ self.B.T
        floor = float((rounding @ self.B.abs().T).square().sum())
        Lambda, Q = eigh_psd(K, cutoff.metric, floor) if len(K) else (K.diagonal(), K)
        C_pinv = (Q.T @ cross) / Lambda[:, None]
        # Activations that never vary (the border of all images) belong to no feature, however strongly they are read.
        varies = self._squares / self._count > rounding.square()
        basis = Basis(name, "lib", self.mean, (self.B * varies).T @ Q, C_pinv, Lambda)
        return basis, None if self._y is None else torch.cat([(Q.T @ y).T for y in self._y])


class DualFewSamples(DualEigenproblem):
    """The dual eigenproblem for fewer activations than dimensions, which span only a subspace.

    ``C`` is projected to the span of the activations: features must not read directions that no sample has, which the
    metric of the layer before would otherwise include.
    """

    def __init__(self, mean: Tensor, B: Tensor, keep: bool = False) -> None:
        super().__init__(mean, B, keep)
        self._rows = [mean.new_zeros(0, len(mean))]

    def _add(self, centred: Tensor) -> None:
        self._rows.append(centred.clone())
        super()._add(centred)

    def reduce(self, process_group: ProcessGroup) -> None:
        """See `Eigenproblem`: also gathers the activations of all processes."""
        super().reduce(process_group)
        self._rows = process_group.gather(torch.cat(self._rows))

    def solve(self, name: str, cutoff: Cutoff) -> tuple[Basis, Tensor | None]:
        """See `Eigenproblem`: the projection does not change features of the activations themselves."""
        unprojected, features = super().solve(name, cutoff)
        X = torch.cat(self._rows)
        rounding = float((torch.finfo(X.dtype).eps * self.mean).square().sum())
        to_features = _project_to_rows(X, unprojected.to_features, cutoff.rounding, rounding)
        return replace(unprojected, to_features=to_features), features


def _project_to_rows(X: Tensor, C: Tensor, cutoff: float, floor: float) -> Tensor:
    """Project vectors ``C (d, r)`` to the span of centred rows ``X (n, d)``.

    Directions with a variance up to ``floor``, or up to this share of the largest, are not part of the span. If there
    are no such directions, the normal equations of all rows but one, which is minus the sum of the others, are solved.
    Otherwise the principal components are computed from the products of rows (the method of snapshots, Sirovich, 1987).
    """
    n = len(X)
    gram = X.new_zeros(n, n)
    for rows in range(0, n, _ROWS):
        end = min(n, rows + _ROWS)
        gram[rows:end, :end] = X[rows:end] @ X[:end].T
    L, failed = torch.linalg.cholesky_ex(gram[:-1, :-1])
    pivots = L.diagonal().square() / n
    # The largest eigenvalue is at most the trace.
    if n > 1 and not failed and pivots.amin() > _SAFETY * max(floor, cutoff * float(gram.trace()) / n):
        rows_but_one = X[:-1]
        solution = torch.cholesky_solve(rows_but_one @ C, L)
        # One step of iterative refinement, as the normal equations square the condition number of the rows.
        solution += torch.cholesky_solve(rows_but_one @ (C - rows_but_one.T @ solution), L)
        return rows_but_one.T @ solution
    D, V = eigh_psd((gram.tril() + gram.tril(-1).T) / n, cutoff, floor)
    U = X.T @ (V / (n * D).sqrt())
    return U @ (U.T @ C)
