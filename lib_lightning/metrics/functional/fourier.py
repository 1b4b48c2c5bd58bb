"""Frequencies of the features of a model for modular addition."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lib_lightning.errors import SettingError
from lib_lightning.model.precision import for_sums, to_float64

# Arguments of waves. "a,b" stands for the sum of a wave in a and one in b.
KINDS = ("a+b", "a,b", "a", "b")


def fourier_variance(features: Tensor, a: Tensor, b: Tensor, modulus: int) -> Tensor:
    """Fraction of each feature's variance explained by waves of each frequency in ``a + b``, ``a`` or ``b``.

    The wave of frequency ``k`` is ``c + u cos(2 pi k m / p) + v sin(2 pi k m / p)`` of ``m = a + b`` (or another of
    `KINDS`), fitted by least squares to the samples, separately at each position; variances are summed over positions.
    The samples need not include all pairs. By chance, a wave explains a fraction of about ``2 / (n - 1)``, and twice
    that for ``"a,b"``.

    Args:
        features: Shape ``(n, S, r)``.
        a: First summand of each sample, integers, shape ``(n,)``.
        b: Second summand of each sample, integers, shape ``(n,)``.
        modulus: ``p``, at least 2.

    Returns:
        Fractions between 0 and 1, shape ``(4, p // 2, r)``, float64: by kind in the order of `KINDS`, frequency from 1,
        and feature. Constant features have 0.

    Raises:
        SettingError: If the modulus or a shape is wrong.

    Note:
        Source: Nanda et al., arXiv 2301.05217, who found these waves in models trained on this task.

    Example:
        >>> a, b = torch.arange(25) // 5, torch.arange(25) % 5
        >>> feature = torch.cos(2 * torch.pi * 2 * (a + b) / 5)
        >>> fourier_variance(feature.reshape(25, 1, 1), a, b, 5)[0].squeeze().round(decimals=6)
        tensor([0., 1.], dtype=torch.float64)
    """
    if modulus < 2:
        raise SettingError(f"modulus must be at least 2; got {modulus}.")
    if features.ndim != 3 or a.shape != features.shape[:1] or b.shape != features.shape[:1]:
        raise SettingError(
            f"Features must have shape (n, S, r), a and b (n,); got {tuple(features.shape)}, {tuple(a.shape)} and "
            f"{tuple(b.shape)}."
        )
    n, S, r = features.shape
    if n == 0:
        return for_sums(features).new_zeros(len(KINDS), modulus // 2, r, dtype=torch.float64)
    values, a, b = to_float64(features), for_sums(a), for_sums(b)
    mean = values.mean(0)
    centred = values - mean
    variance = centred.square().mean(0)
    # A constant feature differs from its mean by rounding, in the input dtype.
    rounding = torch.finfo(features.dtype).eps if features.is_floating_point() else 0.0
    variance = torch.where(variance > (rounding * mean).square(), variance, 0.0)
    centred = (centred * (variance > 0)).flatten(1)
    total = variance.sum(0)

    # Waves are functions of remainders, of which there are fewer than samples: sums over samples are first accumulated
    # by remainder.
    table = _table(modulus, centred)
    a, b = a.long() % modulus, b.long() % modulus
    sum_of_both = _Waves(table, (a + b) % modulus, centred)
    of_a, of_b = _Waves(table, a, centred), _Waves(table, b, centred)
    pairs = torch.bincount(a * modulus + b, minlength=modulus**2).reshape(modulus, modulus).double()
    mixed = of_a.waves @ pairs @ of_b.waves.mT / n
    products = torch.cat([torch.cat([of_a.products, mixed], 2), torch.cat([mixed.mT, of_b.products], 2)], 1)
    explained = torch.stack(
        [
            _explained(sum_of_both.products, sum_of_both.cross),
            _explained(products, torch.cat([of_a.cross, of_b.cross], 1)),
            _explained(of_a.products, of_a.cross),
            _explained(of_b.products, of_b.cross),
        ]
    )
    explained = explained.unflatten(-1, (S, r)).sum(-2)
    return torch.where(total > 0, explained / total, 0.0).clamp(0, 1)


class _Waves:
    """Waves of one argument: ``waves`` by remainder ``(K, 2, p)``, and their mean ``products`` on the samples.

    ``cross`` are the mean products with the features.

    Args:
        table: All waves by remainder, shape ``(K, 2, p)``.
        m: Remainder of each sample, shape ``(n,)``.
        centred: Centred features, shape ``(n, m)``.
    """

    def __init__(self, table: Tensor, m: Tensor, centred: Tensor) -> None:
        n, modulus = len(m), table.shape[-1]
        counts = torch.bincount(m, minlength=modulus).double()
        self.waves = table - (table @ counts / n)[..., None]
        self.products = (self.waves * counts) @ self.waves.mT / n
        sums = centred.new_zeros(modulus, centred.shape[1]).index_add_(0, m, centred)
        self.cross = self.waves @ sums / n


def _table(modulus: int, like: Tensor) -> Tensor:
    """Cosines and sines of every frequency at every remainder, shape ``(p // 2, 2, p)``, float64."""
    k = torch.arange(1, modulus // 2 + 1, device=like.device)
    # The remainder is taken in integers, which makes multiples of the period exact.
    angle = (torch.outer(k, torch.arange(modulus, device=like.device)) % modulus).double() * (2 * math.pi / modulus)
    waves = torch.stack([angle.cos(), angle.sin()], 1)
    if modulus % 2 == 0:
        waves[-1, 1] = 0  # the sine of frequency p / 2 is zero at all integers
    return waves


def _explained(products: Tensor, cross: Tensor) -> Tensor:
    """Variance explained by each set of waves, ``(K, m)``, from their products ``(K, q, q)`` and ``(K, q, m)``."""
    # With few samples, or where a sine is zero, waves are linearly dependent.
    inverse = torch.linalg.pinv(products, atol=1e-12, rtol=1e-9, hermitian=True)
    explained: Tensor = (cross * (inverse @ cross)).sum(1)
    return explained
