"""How well one number predicts whether a feature is active: the area under the ROC curve, and whether it is chance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Differences of means that are no larger than this are those of a predictor that is the same everywhere.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Areas:
    """Areas under ROC curves.

    Attributes:
        area: Probability that the predictor is larger where the feature is active than where it is not, ties counting
            half, shape ``(k,)``, float64; NaN where it is active everywhere or nowhere.
        error: Its standard error over samples, shape ``(k,)``, float64.
        p_value: Of the hypothesis that the predictor says nothing, one-sided, shape ``(k,)``, float64.
    """

    area: Tensor
    error: Tensor
    p_value: Tensor


def midranks(values: Tensor, valid: Tensor) -> Tensor:
    """Ranks of numbers, scaled such that differences of means of them are twice differences of areas.

    Args:
        values: Shape ``(m, k)``, one predictor in each column.
        valid: Which rows count, shape ``(m,)``, bool.

    Returns:
        From 0 to 2, ties at the middle of their ranks, 0 in other rows, shape ``(m, k)``, float32.

    Example:
        >>> midranks(torch.tensor([[5.0], [1.0], [5.0], [9.0]]), torch.tensor([True, True, True, True])).flatten()
        tensor([1.2500, 0.5000, 1.2500, 2.0000])
    """
    found = torch.zeros(values.shape, dtype=torch.float32, device=values.device)
    ordered, order = values[valid].sort(dim=0)
    ordered, order = ordered.T.contiguous(), order.T
    n = ordered.shape[1]
    if not n:
        return found
    first, last = (torch.searchsorted(ordered, ordered, right=right) for right in (False, True))
    ranks = (first + 1 + last) / 2 * (2 / n)
    found[valid] = torch.empty_like(ranks).scatter_(1, order, ranks).T.float()
    return found


def areas(predictor: Tensor, active: Tensor, valid: Tensor | None) -> Areas:
    """Areas under the ROC curves of predictors of activity, of positions within samples that depend on each other.

    With ``c`` the `midranks` of a predictor, or 1 and 0 for one of two values, the area is
    ``1/2 + (mean of c where active - mean of c elsewhere) / 2``. This difference of means is a sum over samples of
    ``u_k = sum_s w (c - mean c)``, with the weights ``w = 1 / #active`` and ``-1 / #inactive``. Positions of a sample
    are not independent, samples are: so the standard error of the area is that of a sum over samples (Obuchowski 1997),
    with the means of each group in place of the common one. The test uses ``sum u_k^2``, or, if it is larger, the
    variance under random permutations of the samples and of the positions in each of them, which does not miss what has
    not happened in few samples; both are known without drawing any.

    Args:
        predictor: ``c``, shape ``(n, P, k)``: samples, positions, predictors.
        active: Where the feature that each of them predicts is active, same shape, bool.
        valid: Positions that count, shape ``(n, P)``, bool; None for all.

    Returns:
        The areas.

    Note:
        Source: Obuchowski, "Nonparametric Analysis of Clustered ROC Curve Data", Biometrics 53(2), 1997.

    Example:
        >>> active = torch.arange(400).reshape(400, 1, 1) % 4 == 0
        >>> found = areas(torch.cat([active, active.roll(1, 0)], 2).double(), active.expand(-1, -1, 2), None)
        >>> found.area, found.p_value < 0.05
        (tensor([1.0000, 0.3333], dtype=torch.float64), tensor([ True, False]))
    """
    n, P, _ = predictor.shape
    c, a = predictor.float(), active.float()
    if valid is not None:
        c, a = c * valid[..., None], a * valid[..., None]
    # Sums over the positions of each sample, shape (n, k).
    c_sum, c_squares, a_sum, both = (x.sum(1).double() for x in (c, c.square(), a, c * a))
    rows = torch.full_like(a_sum[:, :1], P) if valid is None else valid.sum(1, keepdim=True).double()
    num_active, num_others = a_sum.sum(0), (rows - a_sum).sum(0)
    w_active, w_others = 1 / num_active.clamp(min=1), 1 / num_others.clamp(min=1)
    mean, mean_active = c_sum.sum(0) / rows.sum().clamp(min=1), both.sum(0) * w_active
    mean_others = (c_sum - both).sum(0) * w_others

    def by_sample(of_active: Tensor, of_others: Tensor) -> Tensor:
        return (both - a_sum * of_active) * w_active - (c_sum - both - (rows - a_sum) * of_others) * w_others

    correction = n / max(n - 1, 1)
    error = (by_sample(mean_active, mean_others).square().sum(0) * correction).sqrt()
    observed = by_sample(mean, mean).square().sum(0) * correction
    # The sum is that of samples' means plus that of deviations from them, whose permutations are independent.
    S = rows.clamp(min=1)
    w_sum = a_sum * w_active - (rows - a_sum) * w_others
    w_squares = a_sum * w_active.square() + (rows - a_sum) * w_others.square()
    between = ((c_sum - rows * mean).square() / S).sum(0) * (w_sum.square() / S).sum(0) / max(n - 1, 1)
    within = (c_squares - c_sum.square() / S) * (w_squares - w_sum.square() / S) / (S - 1).clamp(min=1)
    variance = torch.maximum(observed, between + within.sum(0))
    t = (mean_active - mean_others) / variance.clamp(min=_ROUNDING**2).sqrt()
    known = (num_active > 0) & (num_others > 0)
    return Areas(
        (0.5 + (mean_active - mean_others) / 2).where(known, math.nan),
        (error / 2).where(known, math.nan),
        (0.5 * torch.erfc(t / math.sqrt(2))).where(known, 1.0),
    )
