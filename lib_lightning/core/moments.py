"""Mean and covariance of a stream of activations, exact for any way the stream is cut into batches."""

from __future__ import annotations

import torch
from torch import Tensor

from lib_lightning.core.together import Together


class Moments:
    """Running mean and sum of squared deviations in float64.

    Each batch is centred by itself and merged by the pairwise update of Chan, Golub and LeVeque (1979), so activations
    far from zero lose no digits.

    Example:
        >>> moments = Moments()
        >>> moments.update(torch.tensor([[0.0], [2.0]]), n=2)
        >>> moments.update(torch.tensor([[4.0]]), n=1)
        >>> moments.mean, moments.covariance, moments.n
        (tensor([2.], dtype=torch.float64), tensor([[2.6667]], dtype=torch.float64), 3)
    """

    def __init__(self) -> None:
        self.n = 0
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, rows: Tensor, n: int) -> None:
        """Add a batch of activations.

        Args:
            rows: Activations, one a row: ``(m, d)``.
            n: Number of samples they come from.
        """
        self.n += n
        count = rows.shape[0]
        if count == 0 and self.mean.numel():
            return
        rows = rows.detach().double()
        mean = rows.sum(0) / max(1, count)
        centred = rows - mean
        scatter = centred.T @ centred
        if self.count == 0:
            self.count, self.mean, self._scatter = count, mean, scatter
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self._scatter += scatter + torch.outer(delta, delta) * (self.count * count / total)
        self.count = total

    def reduce(self, together: Together) -> None:
        """Join what several processes have seen, the same way; some may have seen nothing."""
        if together.size == 1:
            return
        totals = torch.cat([torch.tensor([self.n, self.count]).to(self.mean), self.mean])
        everyone = together.gather(totals)
        d = max(len(t) for t in everyone) - 2
        counts = torch.stack([t[1] for t in everyone])
        means = torch.stack([t[2:] if len(t) > 2 else t.new_zeros(d) for t in everyone])
        total = counts.sum()
        mean = (counts[:, None] * means).sum(0) / total.clamp(min=1)
        if len(self.mean) < d:
            self.mean, self._scatter = mean.new_zeros(d), mean.new_zeros(d, d)
        delta = self.mean - mean
        (self._scatter,) = together.sum([self._scatter + self.count * torch.outer(delta, delta)])
        self.n, self.count, self.mean = int(sum(t[0] for t in everyone)), int(total), mean

    @property
    def covariance(self) -> Tensor:
        """``E[(a - mu)(a - mu)^T]`` over samples and positions, ``(d, d)``, float64."""
        return self._scatter / self.count
