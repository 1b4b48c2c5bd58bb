"""How sure a number is that was computed from samples."""

from __future__ import annotations

import math

from torch import Tensor


def standard_error(replicates: Tensor) -> Tensor:
    """Standard error by the jackknife: ``sqrt((G - 1)/G sum_g (x_g - mean)^2)``.

    Args:
        replicates: ``x_g``, shape ``(G, ...)``: the number as it comes out if group ``g`` of ``G`` equally large groups
            of samples is left out. Floating point.

    Returns:
        The standard error of the number from all samples, shape ``(...)``; NaN if there are fewer than two groups.

    Note:
        Source: Efron and Stein (1981), "The jackknife estimate of variance", https://doi.org/10.1214/aos/1176345462,
        after Tukey (1958); with groups in the place of single samples.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, 2.0, 3.0, 6.0])
        >>> standard_error((x.sum() - x) / 3), x.std() / 2
        (tensor(1.0801), tensor(1.0801))
    """
    G = replicates.shape[0]
    if G < 2:
        return replicates.new_full(replicates.shape[1:], math.nan)
    deviations = replicates - replicates.mean(0)
    return (deviations.square().sum(0) * ((G - 1) / G)).sqrt()
