"""Features of one node layer, batch by batch: encoded, or read from values computed earlier."""

from __future__ import annotations

import torch
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.model.precision import for_sums
from lib_lightning.model.vjp import apply_mask, num_valid


class FeatureReader:
    """Returns the features ``fhat`` of one batch after the other.

    Args:
        basis: Basis of the node layer.
        cached_features: Features of all batches at valid positions, in order, shape ``(m, r)``, float64, if they are
            known; None to encode each batch.

    Example:
        >>> from lib_lightning.algorithm.basis import neuron_basis
        >>> basis = neuron_basis("fc", torch.ones(1), torch.eye(1))
        >>> FeatureReader(basis).next(torch.tensor([[[3.0]]]), None)
        tensor([[[2.]]], dtype=torch.float64)
    """

    def __init__(self, basis: Basis, cached_features: Tensor | None = None) -> None:
        self.basis, self._cached_features = basis, cached_features
        self._start = 0

    def next(self, a: Tensor, mask: Tensor | None) -> Tensor:
        """Features of the next batch.

        Args:
            a: Activations of the batch, shape ``(n, S, d)``.
            mask: True at valid positions, shape ``(n, S)``; None if all are valid.

        Returns:
            ``fhat``, zero at masked positions, shape ``(n, S, r)``, float64; on the CPU if the device of the
            activations has no float64.
        """
        a, mask = for_sums(a), None if mask is None else for_sums(mask)
        if self._cached_features is None:
            return apply_mask(self.basis.encode(a, torch.float64).detach(), mask)  # of the weights of a dictionary
        stop = self._start + num_valid(a, mask)
        rows, self._start = self._cached_features[self._start : stop], stop
        if mask is None:
            return rows.view(*a.shape[:2], rows.shape[1])
        features = rows.new_zeros(*a.shape[:2], rows.shape[1])
        features[mask] = rows
        return features
