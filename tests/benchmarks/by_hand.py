"""The CIFAR-10 perceptron by hand: the same shortcuts, written for this network only.

A general program (any model, standard errors) can hardly be faster, so this time is the reference for the machine.
Source: arXiv 2405.10928; for ReLU ``J = W diag(s)``, and the principal components of ``a`` in the metric ``B^T B`` are
those of ``(a - mu) B^T``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_RANK = 1e-13


def perceptron_edges(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """Edges between the bases of a perceptron with two hidden layers of ReLU; the outputs keep their neurons.

    Args:
        model: Linear, ReLU, Linear, ReLU, Linear.
        x: All samples, ``(n, d)``.

    Returns:
        Edges of the three sections, ``(r_out, r_in)``.
    """
    (W_1, b_1), (W_2, b_2), (W_3, _) = ((m.weight.detach(), m.bias.detach()) for m in model[::2])
    h_1 = (x @ W_1.T + b_1).relu()
    h_2 = (h_1 @ W_2.T + b_2).relu()
    s_1, s_2 = (h_1 > 0).to(x), (h_2 > 0).to(x)
    C, C_pinv, fhat = _basis(h_2, W_3)
    edges = [(W_3 @ C_pinv.T).square() * fhat.square().mean(0)]
    for a, W, s in ((h_1, W_2, s_2), (x, W_1, s_1)):
        D, V = torch.linalg.eigh((C @ C.T) * (s.T @ s / len(x)))
        keep = _RANK * D[-1] < D
        before, C_pinv, fhat = _basis(a, (V[:, keep] * D[keep].sqrt()).T @ W)
        edges.append(torch.stack([(((s * c) @ (W @ C_pinv.T)) * fhat).square().mean(0) for c in C.T]))
        C = before
    return edges[::-1]


def _basis(a: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``C``, ``C^+`` and features of the LIB with the metric ``B^T B``."""
    centred = a - a.mean(0)
    y = centred @ B.T
    Lambda, Q = torch.linalg.eigh(y.T @ y / len(a))
    keep = _RANK * Lambda[-1] < Lambda
    Lambda, Q = Lambda[keep].flip(0), Q[:, keep].flip(1)
    C = B.T @ Q
    return C, (Q.T @ (y.T @ centred)) / (len(a) * Lambda[:, None]), centred @ C
