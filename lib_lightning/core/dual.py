"""The LIB of a wide node layer that little is read of, without its covariance.

LIB features are the principal components of the activations measured in the metric ``M``. With ``B^T B = M``, ``B`` of
as many rows as there are directions that anything reads, they are those of ``y = (a - mu) B^T``: a small eigenproblem.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lib_lightning.core.basis import Basis, lib_of_components
from lib_lightning.core.spectral import Cutoff, eigh_psd
from lib_lightning.core.together import Together

# Activations to centre at a time, so that they stay in the cache until they are multiplied.
_NUMBERS = 2**19


class DualMoments:
    """Streaming ``K = E[y y^T]`` and ``E[y^T (a - mu)]`` with ``y = (a - mu) B^T``.

    Args:
        mean: ``mu``, shape ``(d,)``, float64.
        B: Square-root factor of the Jacobian metric, ``B^T B = M``, shape ``(k, d)``, float64.

    Note:
        Source: duality between the principal components of ``a`` in the metric ``M`` and those of ``y``: ``Sigma M``
        and ``B Sigma B^T`` have the same eigenvalues.
    """

    def __init__(self, mean: Tensor, B: Tensor) -> None:
        self.mean, self.B = mean, B
        self._count = mean.new_zeros(1)
        self._K, self._cross = mean.new_zeros(len(B), len(B)), mean.new_zeros(B.shape)
        self._squares = torch.zeros_like(mean)

    def update(self, rows: Tensor) -> None:
        """Add activations, one vector a row: ``(m, d)``."""
        for block in rows.split(max(1, _NUMBERS // max(1, rows.shape[1]))):
            centred = block.double() - self.mean
            y = centred @ self.B.T
            self._K += y.T @ y
            self._cross += y.T @ centred
            self._squares += centred.square_().sum(0)
        self._count += len(rows)

    def reduce(self, together: Together) -> None:
        """Join the sums of several processes."""
        sums = [self._count, self._K, self._cross, self._squares]
        self._count, self._K, self._cross, self._squares = together.sum(sums)

    def basis(self, name: str, cutoff: Cutoff) -> Basis:
        """Local Interaction Basis: ``C = B^T Q``, ``C^+ = Lambda^-1 Q^T E[y^T (a - mu)]`` with ``K = Q Lambda Q^T``.

        Args:
            name: Node layer.
            cutoff: Directions with an importance up to its share of the largest are dropped.

        Returns:
            The basis with kind ``"lib"``.
        """
        # Equal numbers differ from their mean by its rounding: a variance no larger than that is none.
        rounding = torch.finfo(self.mean.dtype).eps * self.mean.abs()
        K = self._K / self._count
        floor = float((rounding @ self.B.abs().T).square().sum())
        Lambda, Q = eigh_psd(K, cutoff.metric, floor) if len(K) else (K.diagonal(), K)
        C_pinv = (Q.T @ self._cross) / (self._count * Lambda[:, None])
        # What never varies (the border of all images) is no part of a feature, however strongly it would be read.
        varies = self._squares / self._count > rounding.square()
        return Basis(name, "lib", self.mean, (self.B * varies).T @ Q, C_pinv, Lambda)


class FewRows:
    """All activations of a wide node layer, where they are fewer than its features.

    They span only some directions, and features must not reach beyond: what `DualMoments` makes of ``B`` does. The
    principal components are found by the products of activations with each other, a matrix as large as they are many.

    Args:
        mean: ``mu``, shape ``(d,)``, float64.
        B: Square-root factor of the Jacobian metric, ``B^T B = M``, shape ``(k, d)``, float64.

    Note:
        Source: Sirovich (1987), the method of snapshots.
    """

    def __init__(self, mean: Tensor, B: Tensor) -> None:
        self.mean, self.B = mean, B
        self._rows = [mean.new_zeros(0, len(mean))]

    def update(self, rows: Tensor) -> None:
        """Add activations, one vector a row: ``(m, d)``."""
        self._rows.append((rows.double() - self.mean) if len(rows) else self._rows[0])

    def reduce(self, together: Together) -> None:
        """Join the activations of several processes."""
        self._rows = together.gather(torch.cat(self._rows))

    def basis(self, name: str, cutoff: Cutoff) -> Basis:
        """Local Interaction Basis, as `lib_lightning.core.basis.lib_basis` makes it of the covariance.

        Args:
            name: Node layer.
            cutoff: Directions with an importance up to its share of the largest are dropped.

        Returns:
            The basis with kind ``"lib"``.
        """
        X = torch.cat(self._rows)
        rounding = float((torch.finfo(X.dtype).eps * self.mean).square().sum())
        D, V = eigh_psd(X @ X.T / len(X), cutoff.rounding, rounding)
        U = X.T @ (V / (len(X) * D).sqrt())
        return lib_of_components(name, self.mean, D, U, self.B, cutoff)
