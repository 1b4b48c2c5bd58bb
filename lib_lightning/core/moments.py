"""Mean and covariance of a stream of activations, exact for any way the stream is cut into batches."""

from __future__ import annotations

import torch
from torch import Tensor

from lib_lightning.core.gram import DENSE_WIDTH
from lib_lightning.core.together import Together


class Moments:
    """Running mean and sum of squared deviations in float64.

    Each batch is centred by itself and merged by the pairwise update of Chan, Golub and LeVeque (1979), so activations
    far from zero lose no digits.

    Args:
        wide: Whether the covariance is wanted also where it is wide; else only the mean is summed there.

    Example:
        >>> moments = Moments()
        >>> moments.update(torch.tensor([[0.0], [2.0]]), n=2)
        >>> moments.update(torch.tensor([[4.0]]), n=1)
        >>> moments.mean, moments.covariance, moments.n
        (tensor([2.], dtype=torch.float64), tensor([[2.6667]], dtype=torch.float64), 3)
    """

    def __init__(self, wide: bool = True) -> None:
        self._wide = wide
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
        rows = rows.detach()
        mean = rows.sum(0, dtype=torch.float64) / max(1, count)
        total = self.count + count
        before = self.mean if self.count else torch.zeros_like(mean)
        delta = mean - before
        self.mean = before + delta * (count / max(1, total))
        if self.has_covariance:
            # The step of the mean counts as one more row, so that the sum is gone through once.
            step = delta * (self.count * count / max(1, total)) ** 0.5
            centred = torch.cat([rows.double() - mean, step[None]])
            if self.count == 0:
                self._scatter = centred.new_zeros(len(mean), len(mean))
            self._scatter.addmm_(centred.T, centred)
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
            self.mean = mean.new_zeros(d)
        if self.has_covariance:
            delta = self.mean - mean
            self._scatter = self._scatter if len(self._scatter) else mean.new_zeros(d, d)
            (self._scatter,) = together.sum([self._scatter + self.count * torch.outer(delta, delta)])
        self.n, self.count, self.mean = int(sum(t[0] for t in everyone)), int(total), mean

    @property
    def covariance(self) -> Tensor:
        """``E[(a - mu)(a - mu)^T]`` over samples and positions, ``(d, d)``, float64."""
        return self._scatter / self.count

    @property
    def has_covariance(self) -> bool:
        """Whether the covariance is summed."""
        return self._wide or len(self.mean) <= DENSE_WIDTH
