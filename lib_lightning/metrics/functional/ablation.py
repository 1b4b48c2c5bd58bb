"""How many edges a model needs, read from an ablation curve."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def min_edges_from_curve(counts: Tensor, scores: Tensor, unablated: float | Tensor, tolerance: float = 1e-3) -> Tensor:
    """Smallest number of edges from which on the model scores as well as with all of them, up to a tolerance.

    Args:
        counts: Numbers of edges kept, the strongest ones, that were tried, shape ``(k,)``, in any order.
        scores: Mean score with so many edges, shape ``(k,)``; higher is better.
        unablated: Mean score of the model as it is.
        tolerance: How far a score may fall below it, in units of the score.

    Returns:
        The smallest of the counts that, like all larger ones, scores at least ``unablated - tolerance``; a float64
        scalar, NaN if the largest count does not. A score of NaN is not enough.

    Note:
        Source: arXiv 2405.10928, the number of edges required to keep a loss or accuracy. A curve need not rise
        steadily: a count that does well by chance, with a worse one above it, does not pass.

    Example:
        >>> counts, scores = torch.tensor([1, 10, 100, 1000]), torch.tensor([0.9, 0.5, 0.8995, 0.91])
        >>> min_edges_from_curve(counts, scores, unablated=0.9)
        tensor(100., dtype=torch.float64)
    """
    enough = scores.double() >= torch.as_tensor(unablated, dtype=torch.float64, device=scores.device) - tolerance
    counts = counts.double()
    if not bool(enough.all()):
        counts = counts[counts > counts[~enough].amax()]
    return counts.amin() if counts.numel() else counts.new_full((), math.nan)
