"""What may name a feature: properties of positions and samples that predict where it is active."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lib_lightning.labels.auroc import midranks

# Values of one property in a name, such as tokens, at most; and how much of what the first one adds others must add.
MAX_VALUES = 3
_WORTH_NAMING = 1 / 3
# A property of fewer samples than this says nothing about other samples; and of more candidates than this of samples,
# only the most frequent ones are looked at.
_FEWEST, _MOST = 3, 4096


class Choice(NamedTuple):
    """The best candidate of one kind for each of ``k`` features.

    Attributes:
        numbers: Its number, and those of other values named with it, shape ``(k, 3)``; -1 for none.
        difference: Mean of the predictor where the feature is active minus that elsewhere, shape ``(k,)``.
        bound: What of this difference is left after subtracting what the best of as many candidates has by chance.
    """

    numbers: Tensor
    difference: Tensor
    bound: Tensor


class Weights(NamedTuple):
    """Weights whose sum with a predictor is the difference of its means where features are active and elsewhere.

    Attributes:
        rows: Shape ``(n, P, k)``, zero at positions that do not count.
        variance: Variance of the sum for a predictor of variance 1 that is independent from position to position.
        of_samples: Sums over positions, shape ``(n, k)``.
        between: The same variance for one that is the same at all positions of a sample.
    """

    rows: Tensor
    variance: Tensor
    of_samples: Tensor
    between: Tensor

    def variance_of(self, total: Tensor, of_means: Tensor) -> Tensor:
        """Variance of the difference by chance, shape ``(M, k)``.

        Args:
            total: Variances of predictors, shape ``(M,)``.
            of_means: Variances of their means over the positions of a sample, shape ``(M,)``.
        """
        return of_means[:, None] * self.between + (total - of_means).clamp(min=0)[:, None] * self.variance


def weights(active: Tensor, valid: Tensor) -> Weights:
    """Weights for the activity of some features.

    Args:
        active: Shape ``(n, P, k)``, bool.
        valid: Positions that count, shape ``(n, P)``, bool.

    Returns:
        The weights.
    """
    active = active & valid[..., None]
    num_active = active.sum((0, 1)).float()
    num_others = (valid.sum() - num_active).clamp(min=1)
    num_active = num_active.clamp(min=1)
    rows = torch.where(active, 1 / num_active, -1 / num_others) * valid[..., None]
    of_samples = rows.sum(1)
    between = of_samples.square().sum(0) * (len(rows) / max(len(rows) - 1, 1))
    return Weights(rows, 1 / num_active + 1 / num_others, of_samples, between)


class Kind(Protocol):
    """Candidates of one kind, such as the tokens at the position."""

    def choose(self, at: Tensor, w: Weights) -> Choice:
        """The best candidate for each feature, by its activity on some samples.

        Args:
            at: Numbers of these samples, shape ``(n,)``.
            w: The weights.

        Returns:
            The best.
        """
        ...

    def predictor(self, at: Tensor, valid: Tensor, index: Tensor) -> Tensor:
        """What chosen candidates predict on some samples, as for `lib_lightning.labels.auroc.areas`.

        Args:
            at: Numbers of the samples, shape ``(n,)``.
            valid: Positions that count, shape ``(n, P)``.
            index: The candidates, shape ``(k, 3)``.

        Returns:
            Shape ``(n, P, k)`` or ``(n, 1, k)``.
        """
        ...

    def text(self, index: Sequence[int]) -> str:
        """The name of candidates."""
        ...


@dataclass(frozen=True)
class Codes:
    """A property with one of several values at each position, or of each sample: such as the token, or the class.

    Attributes:
        codes: Shape ``(n, P)`` or ``(n, 1)``, int64, from 0; -1 for none.
        name: From the values to a text.
        of_samples: Whether it is a property of samples.
    """

    codes: Tensor
    name: Callable[[list[int]], str]
    of_samples: bool = False

    @property
    def _count(self) -> int:
        return int(self.codes.max()) + 1 if self.codes.numel() else 0

    def choose(self, at: Tensor, w: Weights) -> Choice:
        """See `Kind`."""
        M, codes = self._count, self.codes[at]
        rows = w.of_samples if self.of_samples else w.rows.flatten(0, 1)
        codes = torch.where(codes < 0, M, codes)
        found = rows.new_zeros((M + 1, rows.shape[1])).index_add_(0, codes.flatten(), rows)
        per_sample = rows.new_zeros((len(codes), M + 1))
        per_sample.scatter_add_(1, codes, torch.ones_like(codes, dtype=rows.dtype) / codes.shape[1])
        share = per_sample.mean(0)
        variance = w.variance_of(share * (1 - share), per_sample.var(0, correction=0))
        return _best(found[:M], variance[:M], MAX_VALUES)

    def predictor(self, at: Tensor, valid: Tensor, index: Tensor) -> Tensor:
        """See `Kind`."""
        M = self._count
        table = torch.zeros((M + 1, len(index)), dtype=torch.bool, device=index.device)
        table.scatter_(0, torch.where(index < 0, M, index).T, True)
        table[M] = False
        codes = self.codes[at]
        return table[torch.where(codes < 0, M, codes)]

    def text(self, index: Sequence[int]) -> str:
        """See `Kind`."""
        return self.name([i for i in index if i >= 0])


@dataclass(frozen=True)
class Contained:
    """Properties of samples of which each may have several, such as the tokens that they contain.

    Attributes:
        present: Shape ``(n, M)``, bool.
        name: From a property to a text.
    """

    present: Tensor
    name: Callable[[int], str]

    @classmethod
    def of(cls, codes: Tensor, name: Callable[[int], str]) -> Contained:
        """Those that at least three samples have, and three have not; the most frequent ones if there are many.

        Args:
            codes: Values that each sample contains, shape ``(n, m)``, int64, from 0; -1 for none.
            name: From a value to a text.
        """
        M = int(codes.max()) + 1 if codes.numel() else 0
        present = torch.zeros((len(codes), M + 1), dtype=torch.bool, device=codes.device)
        present.scatter_(1, torch.where(codes < 0, M, codes), True)
        count = present[:, :M].sum(0)
        kept = ((count >= _FEWEST) & (count <= len(codes) - _FEWEST)).nonzero().flatten()
        if len(kept) > _MOST:
            kept = kept[count[kept].topk(_MOST).indices]
        values = kept.tolist()
        return cls(present[:, kept], lambda i: name(values[i]))

    def choose(self, at: Tensor, w: Weights) -> Choice:
        """See `Kind`."""
        present = self.present[at].float()
        variance = present.var(0, correction=0)
        return _best(present.T @ w.of_samples, w.variance_of(variance, variance), 1)

    def predictor(self, at: Tensor, valid: Tensor, index: Tensor) -> Tensor:
        """See `Kind`."""
        return self.present[at][:, index[:, 0].clamp(min=0)][:, None]

    def text(self, index: Sequence[int]) -> str:
        """See `Kind`."""
        return self.name(index[0])


@dataclass(frozen=True)
class Numbers:
    """Numbers of which large or small values may predict activity, such as the columns of a table.

    Attributes:
        values: Shape ``(n, P, M)`` or ``(n, 1, M)``, float.
        names: What large and small values of each are called.
        of_samples: Whether they are properties of samples.
    """

    values: Tensor
    names: Sequence[tuple[str, str]]
    of_samples: bool = False

    def choose(self, at: Tensor, w: Weights) -> Choice:
        """See `Kind`."""
        valid = w.rows.ne(0).any(2)
        valid = valid.any(1, keepdim=True) if self.of_samples else valid
        c = midranks(self.values[at].flatten(0, 1), valid.flatten())
        found = c.T @ (w.of_samples if self.of_samples else w.rows.flatten(0, 1))
        means = c.unflatten(0, valid.shape).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
        variance = w.variance_of(c[valid.flatten()].var(0, correction=0), means.var(0, correction=0))
        return _best(torch.cat([found, -found]), torch.cat([variance, variance]), 1)

    def predictor(self, at: Tensor, valid: Tensor, index: Tensor) -> Tensor:
        """See `Kind`."""
        M, chosen = self.values.shape[2], index[:, 0].clamp(min=0)
        columns, place = (chosen % M).unique(return_inverse=True)
        values = self.values[at][..., columns].expand(*valid.shape, -1)
        ranks = midranks(values.flatten(0, 1), valid.flatten()).unflatten(0, valid.shape)[..., place]
        return torch.where(chosen < M, ranks, 2 - ranks)

    def text(self, index: Sequence[int]) -> str:
        """See `Kind`."""
        M = self.values.shape[2]
        return self.names[index[0] % M][index[0] // M]


def _best(difference: Tensor, variance: Tensor, most: int) -> Choice:
    """The best of ``M`` candidates for each of ``k`` features, by a lower bound; and others of the same kind with it.

    The largest of ``M`` differences that are chance is about ``sqrt(2 ln M)`` standard deviations.

    Args:
        difference: Shape ``(M, k)``.
        variance: Of each by chance, shape ``(M, k)``.
        most: Number of candidates to name together; their predictors are never 1 at the same place.
    """
    M, k = difference.shape
    index = torch.full((k, MAX_VALUES), -1, device=difference.device)
    if not M:
        return Choice(index, difference.new_zeros(k), difference.new_full((k,), -math.inf))
    bounds = difference - math.sqrt(2 * math.log(M + 1)) * variance.clamp(min=0).sqrt()
    top, order = bounds.topk(min(most, M), dim=0)
    gains = difference.gather(0, order)
    added = (top > 0) & (gains >= _WORTH_NAMING * gains[:1])
    added[0] = True
    index[:, : len(order)] = torch.where(added, order, -1).T
    return Choice(index, (gains * added).sum(0), (top * added).sum(0))
