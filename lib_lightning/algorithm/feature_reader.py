"""Features of one node layer, batch by batch: encoded, or read from values computed earlier."""

from __future__ import annotations

import torch
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.model.vjp import apply_mask, num_valid


class FeatureReader:
    """Gives ``fhat`` of one batch after the other.

    Args:
        basis: Basis of the node layer.
        known: Features of all batches at the positions that count, in order, shape ``(m, r)``, float64, if there are.

    Example:
        >>> from lib_lightning.algorithm.basis import neuron_basis
        >>> basis = neuron_basis("fc", torch.ones(1), torch.eye(1))
        >>> FeatureReader(basis).of(torch.tensor([[[3.0]]]), None)
        tensor([[[2.]]], dtype=torch.float64)
    """

    def __init__(self, basis: Basis, known: Tensor | None = None) -> None:
        self.basis, self._known = basis, known

    def of(self, a: Tensor, mask: Tensor | None) -> Tensor:
        """Features of the next batch.

        Args:
            a: Its activations, shape ``(n, S, d)``.
            mask: True at positions that count, shape ``(n, S)``; None where all of them do.

        Returns:
            ``fhat``, zero at positions that do not count, shape ``(n, S, r)``, float64.
        """
        if self._known is None:
            return apply_mask(self.basis.encode(a, torch.float64), mask)
        n = num_valid(a, mask)
        rows, self._known = self._known[:n], self._known[n:]
        if mask is None:
            return rows.view(*a.shape[:2], rows.shape[1])
        features = rows.new_zeros(*a.shape[:2], rows.shape[1])
        features[mask] = rows
        return features
