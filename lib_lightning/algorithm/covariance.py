"""Running mean and covariance of activations, independent of how they are divided into batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lib_lightning.algorithm.linalg import add_gram
from lib_lightning.algorithm.low_rank_gram import DENSE_WIDTH
from lib_lightning.distributed.process_group import ProcessGroup, Reducible, all_reduce
from lib_lightning.model.agreement import any_differs
from lib_lightning.model.precision import for_sums

_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Numbers ahead of the mean in `RunningCovariance.totals`.
_N_NUMBERS = 5


class RunningCovariance(Reducible):
    """Running mean, and sum of outer products of deviations from it, in float64.

    Batches are centred separately and merged, so that activations far from zero lose no digits. If ``m`` rows of mean
    ``mu`` are followed by ``k`` rows of mean ``mu + delta``, the sum grows by the outer products of the new rows,
    centred, and by ``m k / (m + k) delta delta^T``.

    Args:
        always: Whether the covariance is computed at any width; False for only the mean of node layers wider than
            `DENSE_WIDTH`.

    Attributes:
        n: Number of samples.
        count: Number of rows.
        mean: ``mu``, shape ``(d,)``, float64; empty before the first row.
        dtype: Type of the activations.

    Note:
        Source: Chan, Golub and LeVeque (1979), "Updating formulae and a pairwise algorithm for computing sample
        variances".

    Example:
        >>> moments = RunningCovariance()
        >>> moments.update(torch.tensor([[0.0], [2.0]]), n=2)
        >>> moments.update(torch.tensor([[4.0]]), n=1)
        >>> moments.mean, moments.covariance, moments.n
        (tensor([2.], dtype=torch.float64), tensor([[2.6667]], dtype=torch.float64), 3)
    """

    sums = ("_scatter",)

    def __init__(self, always: bool = True) -> None:
        self._always = always
        self.dtype: torch.dtype | None = None
        self.n = 0
        self.count = 0
        self._varies: bool | Tensor = False
        self._first: Tensor | None = None
        self.mean = torch.zeros(0, dtype=torch.float64, device="cpu")
        self._scatter = torch.zeros(0, 0, dtype=torch.float64, device="cpu")

    def update(self, rows: Tensor, n: int) -> None:
        """Add a batch of activations.

        Args:
            rows: Activations, one vector a row: ``(m, d)``.
            n: Number of samples that they come from.
        """
        self.n += n
        count = rows.shape[0]
        if count == 0 and self.mean.numel():
            return
        rows, self.dtype = for_sums(rows.detach()), rows.dtype
        if self._varies is not True and rows.numel():
            self._first = rows[:1].clone() if self._first is None else self._first
            self._varies = any_differs(rows, self._first) | self._varies
            if rows.device.type == "cpu":  # reading a value on another device would wait for it
                self._varies = bool(self._varies)  # for ordinary activations, True from the first batch on
        mean = rows.sum(0, dtype=torch.float64) / max(1, count)
        total = self.count + count
        before = self.mean if self.count else torch.zeros_like(mean)
        delta = mean - before
        self.mean = before + delta * (count / max(1, total))
        if self.has_covariance:
            # The step of the mean is one more row, so that the matrix is updated once.
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
        """Counts, type and mean of this process, for `align`; on the CPU."""
        dtype = -1 if self.dtype is None else _DTYPES.index(self.dtype)
        own = [self.n, self.count, dtype, len(self.mean), self.varies]
        numbers = torch.tensor(own, dtype=torch.float64, device="cpu")
        return torch.cat([numbers, self.mean.cpu()])

    def align(self, all_totals: Sequence[Tensor]) -> None:
        """Change to the mean over all processes, so that the sums of outer products can be added up.

        Args:
            all_totals: The `totals` of every process, including this one; a process may have no rows.
        """
        n, counts, dtypes, widths, varies = torch.stack([totals[:_N_NUMBERS] for totals in all_totals]).T
        d = int(widths.max())
        means = torch.stack(
            [totals[_N_NUMBERS:] if len(totals) > _N_NUMBERS else totals.new_zeros(d) for totals in all_totals]
        )
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
        # Each process may have a constant of its own.
        own = means[counts > 0].to(self.dtype or means.dtype)
        self._varies = bool(varies.any()) or (len(own) > 1 and own.numel() > 0 and bool(any_differs(own, own[:1])))

    @property
    def varies(self) -> bool:
        """Whether rows differ by more than rounding."""
        self._varies = bool(self._varies)
        return self._varies

    @property
    def covariance(self) -> Tensor:
        """``E[(a - mu)(a - mu)^T]`` over samples and positions, ``(d, d)``, float64."""
        return self._scatter / self.count

    @property
    def has_covariance(self) -> bool:
        """Whether the covariance is computed."""
        return self._always or len(self.mean) <= DENSE_WIDTH


def all_reduce_covariances(moments: Sequence[RunningCovariance], process_group: ProcessGroup) -> None:
    """Combine the moments of all processes, in two exchanges. A process may have no rows.

    Args:
        moments: One for each node layer; afterwards those of all processes.
        process_group: The processes.
    """
    if process_group.size == 1:
        return
    all_totals = process_group.gather(torch.cat([layer.totals for layer in moments]))
    for layer in moments:
        ends = [_N_NUMBERS + int(totals[3]) for totals in all_totals]
        layer.align([totals[:end] for totals, end in zip(all_totals, ends, strict=True)])
        all_totals = [totals[end:] for totals, end in zip(all_totals, ends, strict=True)]
    all_reduce([layer for layer in moments if layer.has_covariance], process_group)
