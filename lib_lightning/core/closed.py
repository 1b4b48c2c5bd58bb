"""Sections that have a closed form: affine, or linear - activation - linear, at every position by itself.

Their Jacobian at one position is ``J = W_2 diag(s) W_1``, or ``1 + W_2 diag(s) W_1`` where a residual passes by, with
``s`` the slopes of the activation function there; in an affine section it is one matrix everywhere. The sums over
samples then need no backward pass:

    sum_{x,i} g g^T = W_1^T [ (A^T A) * sum_x s s^T ] W_1       with A = C'^T W_2,
    sum_x (d fhat'_i / d fhat_j  fhat_j)^2 = sum_x (A_i diag(s) B_j)^2 fhat_j^2       with B = W_1 C^+T.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lib_lightning.core.spectral import product_dtype

# Numbers of one block of products; small enough to stay in a core's cache between two operations.
_BLOCK = 2**18


@dataclass(frozen=True)
class Weights:
    """What is the same at all positions.

    Attributes:
        W_1: The linear map before the activation function, shape ``(h, d_in)``; None for the identity.
        W_2: The linear map after it, shape ``(d_out, h)``; None for the identity. Of an affine section the whole
            Jacobian, shape ``(d_out, d_in)``.
        hidden: Number of numbers ``h`` that the activation function bends.
        residual: Whether the input is added to the result.
        affine: Whether there is no activation function.
    """

    W_1: Tensor | None
    W_2: Tensor | None
    hidden: int
    residual: bool = False
    affine: bool = False


@dataclass(frozen=True)
class ClosedForm:
    """A section at one batch.

    Attributes:
        weights: What is the same at all positions.
        slopes: ``s``, shape ``(n, S, h)``, zero at positions that do not count; None in an affine section.
        counts: True at positions that count before and after, shape ``(n, S)``.
    """

    weights: Weights
    slopes: Tensor | None
    counts: Tensor

    def seen_along(self, cotangent: Tensor, directions: Tensor) -> Tensor:
        """Multiply with the Jacobian from both sides, ``u^T J v``, without a product as wide as the node layer.

        Args:
            cotangent: ``u``, zero at positions that do not count, shape ``(n, S, d_out)``.
            directions: ``v``, one a column, shape ``(d_in, k)``.

        Returns:
            Shape ``(n, S, k)``.
        """
        w = self.weights
        moved = directions if w.W_1 is None else w.W_1 @ directions
        if self.slopes is None:
            return cotangent @ (moved if w.W_2 is None else w.W_2 @ moved)
        bent = ((cotangent if w.W_2 is None else cotangent @ w.W_2) * self.slopes) @ moved
        return bent + cotangent @ directions if w.residual else bent

    def metric_sum(self, C_next: Tensor, span: slice) -> tuple[Tensor, Tensor]:
        """Sum of ``g g^T`` over output features and some samples, as ``V^T X V``.

        Args:
            C_next: The next node layer's map to features, shape ``(d_out, r_out)``, float64.
            span: The samples.

        Returns:
            ``V``, shape ``(m, d_in)``, and ``X``, symmetric, shape ``(m, m)``; float64.

        Note:
            Source: arXiv 2405.10928, Jacobian step of the transformation; ``*`` in the sum above is elementwise.
        """
        w = self.weights
        A = C_next.T if w.W_2 is None else C_next.T @ w.W_2.double()
        if self.slopes is None:
            A = A + C_next.T if w.residual else A
            return A, torch.eye(len(A)).to(A) * self.counts[span].sum()
        s = self.slopes[span].flatten(0, 1).double()
        X = (A.T @ A) * (s.T @ s)
        V = torch.eye(A.shape[1]).to(A) if w.W_1 is None else w.W_1.double()
        if not w.residual:
            return V, X
        mixed = (C_next @ A) * s.sum(0)
        straight = C_next @ C_next.T * self.counts[span].sum()
        V = torch.cat([torch.eye(len(C_next)).to(A), V])
        return V, torch.cat([torch.cat([straight, mixed], 1), torch.cat([mixed.T, X], 1)])

    def edge_sum(self, fhat: Tensor, C_pinv: Tensor, C_next: Tensor, span: slice) -> Tensor:
        """Sum of squared interactions over some samples.

        Args:
            fhat: Features of all samples, zero where a position does not count, shape ``(n, S, r_in)``.
            C_pinv: Their map back ``C^+``, shape ``(r_in, d_in)``, float64.
            C_next: The next node layer's map to features, shape ``(d_out, r_out)``, float64.
            span: The samples.

        Returns:
            Shape ``(r_out, r_in)``, float64.

        Note:
            Source: arXiv 2405.10928, edges of the interaction graph (squared).
        """
        w = self.weights
        counts = self.counts[span].flatten()
        squares = fhat[span].flatten(0, 1)[counts].square()
        A = C_next.T if w.W_2 is None else C_next.T @ w.W_2.double()
        straight = C_next.T @ C_pinv.T if w.residual else None
        if self.slopes is None:
            J = A @ C_pinv.T
            return (J if straight is None else J + straight).square() * squares.double().sum(0)
        s = self.slopes[span].flatten(0, 1)[counts].to(product_dtype(self.slopes.dtype))
        B = C_pinv.T if w.W_1 is None else w.W_1.double() @ C_pinv.T
        A, B = A.to(s).contiguous(), B.to(s).contiguous()
        total = torch.zeros(A.shape[0], B.shape[1], dtype=torch.float64, device=s.device)
        h, r_in = B.shape
        rows = min(len(s), 256)
        features = max(1, _BLOCK // max(1, rows * max(h, r_in)))
        for i in range(0, len(A), features):
            A_i = A[i : i + features]
            for s_x, squares_x in zip(s.split(rows), squares.to(s).split(rows), strict=True):
                moved = (A_i[:, None] * s_x).flatten(0, 1) @ B
                moved = moved.unflatten(0, (len(A_i), -1))
                if straight is not None:
                    moved += straight[i : i + features, None].to(s)
                total[i : i + features] += moved.square_().mul_(squares_x).sum(1).double()
        return total
