"""The number of edges that a model needs, from an ablation curve."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lib_lightning.model.precision import to_float64


def min_edges_from_curve(counts: Tensor, scores: Tensor, unablated: float | Tensor, tolerance: float = 1e-3) -> Tensor:
    """Smallest number of edges from which on the score is within a tolerance of the unablated score.

    Args:
        counts: Numbers of strongest edges kept, shape ``(k,)``, in any order.
        scores: Mean score with each number of edges, shape ``(k,)``; higher is better.
        unablated: Mean score without ablation.
        tolerance: Accepted loss of score, in units of the score.

    Returns:
        The smallest count such that it and all larger ones have a score of at least ``unablated - tolerance``; a
        float64 scalar, NaN if the largest count has not. A score of NaN is insufficient.

    Note:
        Source: arXiv 2405.10928, the number of edges required to keep a loss or accuracy. Curves need not be monotone:
        a count with an insufficient larger one does not qualify.

    Example:
        >>> counts, scores = torch.tensor([1, 10, 100, 1000]), torch.tensor([0.9, 0.5, 0.8995, 0.91])
        >>> min_edges_from_curve(counts, scores, unablated=0.9)
        tensor(100., dtype=torch.float64)
    """
    counts, scores = to_float64(counts), to_float64(scores)
    sufficient = scores >= torch.as_tensor(unablated, dtype=torch.float64, device=scores.device) - tolerance
    if not bool(sufficient.all()):
        counts = counts[counts > counts[~sufficient].amax()]
    return counts.amin() if counts.numel() else counts.new_full((), math.nan)
