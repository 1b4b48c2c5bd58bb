"""Mean and covariance of a stream of activations, exact for any way the stream is cut into batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lib_lightning.algorithm.linalg import add_gram
from lib_lightning.algorithm.low_rank_gram import DENSE_WIDTH
from lib_lightning.distributed.process_group import ProcessGroup, Reducible, all_reduce

_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


class RunningCovariance(Reducible):
    """Running mean and sum of squared deviations in float64.

    Each batch is centred by itself and merged by the pairwise update of Chan, Golub and LeVeque (1979), so activations
    far from zero lose no digits.

    Args:
        wide: Whether the covariance is wanted also where it is wide; else only the mean is summed there.

    Attributes:
        n: Number of samples.
        count: Number of activations.
        mean: ``mu``, shape ``(d,)``, float64; empty as long as there are none.
        dtype: Type that they came in.

    Example:
        >>> moments = RunningCovariance()
        >>> moments.update(torch.tensor([[0.0], [2.0]]), n=2)
        >>> moments.update(torch.tensor([[4.0]]), n=1)
        >>> moments.mean, moments.covariance, moments.n
        (tensor([2.], dtype=torch.float64), tensor([[2.6667]], dtype=torch.float64), 3)
    """

    sums = ("_scatter",)

    def __init__(self, wide: bool = True) -> None:
        self._wide = wide
        self.dtype: torch.dtype | None = None
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
        rows, self.dtype = rows.detach(), rows.dtype
        mean = rows.sum(0, dtype=torch.float64) / max(1, count)
        total = self.count + count
        before = self.mean if self.count else torch.zeros_like(mean)
        delta = mean - before
        self.mean = before + delta * (count / max(1, total))
        if self.has_covariance:
            # The step of the mean counts as one more row, so that the sum is gone through once.
            step = delta * (self.count * count / max(1, total)) ** 0.5
            centred = mean.new_empty(count + 1, len(mean))
            torch.sub(rows, mean, out=centred[:-1])
            centred[-1] = step
            if self.count == 0:
                self._scatter = centred.new_zeros(len(mean), len(mean))
            add_gram(self._scatter, centred)
        self.count = total

    @property
    def totals(self) -> Tensor:
        """Numbers that tell another process what has been seen, but for second moments; on the CPU."""
        dtype = -1 if self.dtype is None else _DTYPES.index(self.dtype)
        numbers = torch.tensor([self.n, self.count, dtype, len(self.mean)], dtype=torch.float64)
        return torch.cat([numbers, self.mean.cpu()])

    def meet(self, everyone: Sequence[Tensor]) -> None:
        """Go over to the mean of several processes, so that what is left to do is to sum.

        Args:
            everyone: The `totals` of each, this one among them; some may have seen nothing.
        """
        n, counts, dtypes, widths = torch.stack([totals[:4] for totals in everyone]).T
        d = int(widths.max())
        means = torch.stack([totals[4:] if len(totals) > 4 else totals.new_zeros(d) for totals in everyone])
        total = counts.sum()
        mean = ((counts[:, None] * means).sum(0) / total.clamp(min=1)).to(self.mean)
        if len(self.mean) < d:
            self.mean = mean.new_zeros(d)
        if self.has_covariance:
            delta = self.mean - mean
            scatter = self._scatter if len(self._scatter) else mean.new_zeros(d, d)
            self._scatter = scatter + self.count * torch.outer(delta, delta)
        self.n, self.count, self.mean = int(n.sum()), int(total), mean
        self.dtype = _DTYPES[int(dtypes.max())] if dtypes.max() >= 0 else None

    @property
    def covariance(self) -> Tensor:
        """``E[(a - mu)(a - mu)^T]`` over samples and positions, ``(d, d)``, float64."""
        return self._scatter / self.count

    @property
    def has_covariance(self) -> bool:
        """Whether the covariance is summed."""
        return self._wide or len(self.mean) <= DENSE_WIDTH


def all_reduce_covariances(moments: Sequence[RunningCovariance], process_group: ProcessGroup) -> None:
    """Join what several processes have seen of all node layers, in two exchanges; some may have seen nothing.

    Args:
        moments: One for each node layer.
        process_group: The processes.
    """
    if process_group.size == 1:
        return
    everyone = process_group.gather(torch.cat([layer.totals for layer in moments]))
    for layer in moments:
        ends = [4 + int(totals[3]) for totals in everyone]
        layer.meet([totals[:end] for totals, end in zip(everyone, ends, strict=True)])
        everyone = [totals[end:] for totals, end in zip(everyone, ends, strict=True)]
    all_reduce([layer for layer in moments if layer.has_covariance], process_group)
