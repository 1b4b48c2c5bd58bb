"""Which of many mean differences are not chance: a test of each, and the false discovery rate over all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The smallest c with P(sum e_i a_i >= x) <= c P(N >= x) for random signs e_i, sum a_i^2 = 1, and N standard normal:
# 1 / (4 P(N >= sqrt 2)).
_RADEMACHER = 1 / (2 * math.erfc(1))


def sign_flip_p_values(total: Tensor, squares: Tensor) -> Tensor:
    """Upper bounds of the p-values of sign-flip tests, of the hypotheses that differences are symmetric about zero.

    The sign-flip test compares ``|sum_i d_i|`` with its distribution when each difference has a random sign instead of
    its own (Fisher 1935). It is exact for any number of samples and any symmetric distribution, with ties, with zeros
    and with heavy tails, where a t-test is not; and since its statistic is equivalent to that of the t-test (flips
    leave ``sum d_i^2`` as it is), it becomes that test with many samples, also for differences that are not symmetric
    but have mean zero. A random choice of flips cannot give p-values below its inverse number, which many features
    need; all flips are too many. But the tail of a sum of random signs is at most 3.18 times that of the normal
    distribution, however few they are: so ``p = 2 * 3.18 * P(N >= |sum d_i| / sqrt(sum d_i^2))`` needs two sums, draws
    no random numbers, and is never smaller than the p-value of the test with all flips.

    Args:
        total: Sums of the differences, shape ``(m,)``, float64.
        squares: Sums of their squares, shape ``(m,)``, float64.

    Returns:
        The p-values, shape ``(m,)``, float64; 1 where all differences are zero.

    Note:
        Source: Bentkus and Dzindzalieta, "A tight Gaussian bound for weighted sums of Rademacher random variables",
        Bernoulli 21(2), 2015, theorem 1.

    Example:
        >>> d = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, -2.0, 1.5, 0.5], [2.0, 1.0, 2.0, 1.0]]).double()
        >>> sign_flip_p_values(d.sum(1), d.square().sum(1))
        tensor([1.0000, 1.0000, 0.1837], dtype=torch.float64)
    """
    t = torch.where(squares > 0, total.abs() / squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt(), 0.0)
    return (_RADEMACHER * torch.erfc(t / math.sqrt(2))).clamp(max=1)


def benjamini_hochberg(p_values: Tensor, level: float) -> Tensor:
    """Choose hypotheses to reject, so that the expected share of wrong ones among them is at most a level.

    With ``p_(1) <= ... <= p_(m)``, the first ``k`` are rejected, for the largest ``k`` with ``p_(k) <= level k / m``.
    The level holds for independent p-values and for positively dependent ones.

    Args:
        p_values: Shape ``(m,)``.
        level: The false discovery rate.

    Returns:
        True for those rejected, shape ``(m,)``.

    Note:
        Source: Benjamini and Hochberg, "Controlling the False Discovery Rate", J. R. Stat. Soc. B 57(1), 1995.

    Example:
        >>> benjamini_hochberg(torch.tensor([0.02, 0.9, 0.03, 0.2]), 0.06).tolist()
        [True, False, True, False]
    """
    m = len(p_values)
    ordered, order = p_values.sort()
    passed = (
        ordered <= level * torch.arange(1, m + 1, device=p_values.device, dtype=p_values.dtype) / max(m, 1)
    ).nonzero()
    rejected = torch.zeros(m, dtype=torch.bool, device=p_values.device)
    rejected[order[: int(passed[-1]) + 1 if len(passed) else 0]] = True
    return rejected


def samples_needed(num_features: int, level: float) -> int:
    """Number of samples below which no single feature among so many can be told from chance."""
    n = 1
    while _RADEMACHER * math.erfc(math.sqrt(n / 2)) > level / max(num_features, 1):
        n += 1
    return n
