"""Sections that have a closed form: affine, or linear - activation - linear, at every position by itself.

Their Jacobian at one position is ``J = W_2 diag(s) W_1``, or ``1 + W_2 diag(s) W_1`` where a residual passes by, with
``s`` the slopes of the activation function there; in an affine section it is one matrix everywhere. The sums over
samples then need no backward pass:

    sum_{x,i} g g^T = W_1^T [ (A^T A) * sum_x s s^T ] W_1       with A = C'^T W_2,
    sum_x (d fhat'_i / d fhat_j  fhat_j)^2 = sum_x (A_i diag(s) B_j)^2 fhat_j^2       with B = W_1 C^+T.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_lightning.model.precision import product_dtype

# Positions, and numbers, of one block of products; small enough to stay in a core's cache between two operations.
_ROWS, _BLOCK = 256, 2**18


@dataclass(frozen=True)
class Factors:
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

    weights: Factors
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


def _are_counts(s: Tensor) -> bool:
    """Whether all slopes are 0 or 1: single precision counts up to 2^24 without rounding, and twice as fast."""
    # An accelerator would have to wait for the answer.
    return s.device.type == "cpu" and len(s) < 2**24 and torch.equal(s, s.square())


class ClosedMetric:
    """Streaming ``sum g g^T`` over output features and samples of a section in closed form.

    Args:
        weights: What is the same at all positions.
        C_next: The next node layer's map to features, shape ``(d_out, r_out)``, float64.
        groups: Number of groups of samples to sum apart.

    Note:
        Source: arXiv 2405.10928, Jacobian step of the transformation; see above.
    """

    def __init__(self, weights: Factors, C_next: Tensor, groups: int) -> None:
        self.weights, self.C_next = weights, C_next
        h = 0 if weights.affine else weights.hidden
        self._count = C_next.new_zeros(groups)
        self._slopes, self._products = C_next.new_zeros(groups, h), C_next.new_zeros(groups, h, h)

    def add(self, form: ClosedForm, group: int, span: slice) -> None:
        """Add some of the samples of one batch to a group."""
        self._count[group] += form.counts[span].sum()
        if form.slopes is not None:
            s = form.slopes[span].flatten(0, 1)
            s = s.to(torch.float32 if _are_counts(s) else torch.float64)
            self._slopes[group] += s.sum(0)
            self._products[group] += s.T @ s

    def sums(self) -> tuple[Tensor, Iterator[Tensor]]:
        """What has been summed up, of each group, as ``V^T X V``.

        Returns:
            ``V``, shape ``(m, d_in)``, and one ``X`` after the other, shape ``(m, m)``; float64.
        """
        w, C = self.weights, self.C_next
        A = C.T if w.W_2 is None else C.T @ w.W_2.double()
        one = torch.eye(len(A)).to(A)
        if w.affine:
            return A, (count * one for count in self._count)
        V = torch.eye(w.hidden).to(A) if w.W_1 is None else w.W_1.double()
        A_A = A.T @ A
        bent = (A_A * products for products in self._products)
        if not w.residual:
            return V, bent
        mixed = (A * slopes for slopes in self._slopes)
        return torch.cat([C.T, V]), (
            torch.cat([torch.cat([count * one, x], 1), torch.cat([x.T, X], 1)])
            for count, x, X in zip(self._count, mixed, bent, strict=True)
        )


class ClosedEdges:
    """Sums of squared interactions over samples of a section in closed form.

    Args:
        weights: What is the same at all positions.
        C_pinv: The first node layer's map back ``C^+``, shape ``(r_in, d_in)``, float64.
        C_next: The next node layer's map to features, shape ``(d_out, r_out)``, float64.

    Note:
        Source: arXiv 2405.10928, edges of the interaction graph (squared); see above.
    """

    def __init__(self, weights: Factors, C_pinv: Tensor, C_next: Tensor) -> None:
        self.weights = weights
        self.A = C_next.T if weights.W_2 is None else C_next.T @ weights.W_2.double()
        self.B = C_pinv.T if weights.W_1 is None else weights.W_1.double() @ C_pinv.T
        self.straight = C_next.T @ C_pinv.T if weights.residual else None
        # Of an affine section that is all.
        self.J = self.A @ self.B if weights.affine else None

    def sum(self, form: ClosedForm, fhat: Tensor, span: slice) -> Tensor:
        """Sum over some of the samples of one batch.

        Args:
            form: The section at that batch.
            fhat: Features of all of its samples, zero where a position does not count, shape ``(n, S, r_in)``.
            span: The samples.

        Returns:
            Shape ``(r_out, r_in)``, float64.
        """
        counts = form.counts[span].flatten()
        squares = fhat[span].flatten(0, 1)[counts].square()
        if self.J is not None:
            return self.J.square() * squares.double().sum(0)
        assert form.slopes is not None
        s = form.slopes[span].flatten(0, 1)[counts].to(product_dtype(form.slopes.dtype))
        A, B, squares = self.A.to(s).contiguous(), self.B.to(s).contiguous(), squares.to(s)
        total = torch.zeros(len(A), B.shape[1], dtype=torch.float64, device=s.device)
        rows, r_in = max(1, min(len(s), _ROWS)), B.shape[1]
        # The three factors of one term are A, s and B: the two that make the smaller product are multiplied first.
        weights_first = len(s) > r_in > 0
        features = max(1, _BLOCK // ((max(rows, len(B)) * r_in) if weights_first else (rows * max(1, *B.shape))))
        for i in range(0, len(A), features):
            A_i = A[i : i + features]
            A_i_B = (A_i.T[:, :, None] * B[:, None]).flatten(1) if weights_first else None
            for s_x, squares_x in zip(s.split(rows), squares.split(rows), strict=True):
                moved = (s_x[:, None] * A_i) @ B if A_i_B is None else (s_x @ A_i_B).unflatten(1, (-1, r_in))
                if self.straight is not None:
                    moved += self.straight[i : i + features].to(s)
                total[i : i + features] += moved.square_().mul_(squares_x[:, None]).sum(0).double()
        return total
