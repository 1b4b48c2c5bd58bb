"""Mean and covariance of a stream of activations, exact for any way the stream is cut into batches."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Running mean and sum of squared deviations in float64.

    Each batch is centred by itself and merged by the pairwise update of Chan, Golub and LeVeque (1979), so activations
    far from zero lose no digits.

    Example:
        >>> moments = Moments()
        >>> moments.update(torch.tensor([[[0.0]], [[2.0]]]))
        >>> moments.update(torch.tensor([[[4.0]]]))
        >>> moments.mean, moments.covariance, moments.n
        (tensor([2.], dtype=torch.float64), tensor([[2.6667]], dtype=torch.float64), 3)
    """

    def __init__(self) -> None:
        self.n = 0
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, a: Tensor) -> None:
        """Add a batch of activations.

        Args:
            a: Activations ``(n, S, d)``.
        """
        rows = a.detach().flatten(0, 1).double()
        count, mean = rows.shape[0], rows.mean(0)
        centred = rows - mean
        scatter = centred.T @ centred
        self.n += a.shape[0]
        if self.count == 0:
            self.count, self.mean, self._scatter = count, mean, scatter
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self._scatter += scatter + torch.outer(delta, delta) * (self.count * count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """``E[(a - mu)(a - mu)^T]`` over samples and positions, ``(d, d)``, float64."""
        return self._scatter / self.count
