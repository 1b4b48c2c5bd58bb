"""Closed forms of sections that act on each position separately: affine, or linear - elementwise - linear.

The Jacobian of such a section at one position is ``J = W_2 diag(s) W_1``, or ``1 + W_2 diag(s) W_1`` with a residual
connection, where ``s`` are the derivatives of the elementwise nonlinearity at that position. The Jacobian of an affine
section is the same matrix everywhere. Sums over samples then need no backward pass. With ``A = C'^T W_2`` and
``B = W_1 C^+T``,

    sum_{x,i} g g^T                               = sum_x J^T C' C'^T J = W_1^T [(A^T A) * sum_x s s^T] W_1,
    sum_x (d fhat'_i / d fhat_j  fhat_j)^2        = sum_x (A_i diag(s) B_j)^2 fhat_j^2,
    sum_x (d fhat'_i / d fhat_j  fhat_j) fhat'_i  = sum_x (A_i diag(s) B_j) fhat_j fhat'_i,

with ``*`` the elementwise product: ``(A diag(s))^T (A diag(s)) = (A^T A) * (s s^T)``. A residual connection adds
``C' C'^T``, and ``C' A * sum_x s`` twice, to the first sum, and ``C'_i C^+_j`` to the interactions in the others.

The third sum is linear in the Jacobian, so that moments could be summed before it is formed:
``sum_h A_ih B_hj sum_x fhat'_i s_h fhat_j + C'_i C^+_j sum_x fhat'_i fhat_j``. That takes ``h`` multiplications for
each ``x, i, j``, as many as all interactions ``y_ij(x)``, which the second sum forms in any case, and from which the
third takes one. In an affine section both are sums of the moments alone, ``J_ij^2 sum_x fhat_j^2`` and
``J_ij sum_x fhat_j fhat'_i``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_lightning.model.loops import parts_of
from lib_lightning.model.precision import for_sums, product_dtype, to_float64

# Positions, and numbers, in one block of products: small enough for a core's cache.
ROWS, BLOCK = 256, 2**18


@dataclass(frozen=True)
class Factors:
    """The factors of the Jacobian that are the same at all positions.

    Attributes:
        W_1: The linear map before the nonlinearity, shape ``(h, d_in)``; None for the identity.
        W_2: The linear map after it, shape ``(d_out, h)``; None for the identity. The whole Jacobian of an affine
            section, shape ``(d_out, d_in)``.
        hidden: Number of hidden units ``h``, to which the nonlinearity is applied.
        residual: Whether the input is added to the result.
        affine: Whether there is no nonlinearity.
    """

    W_1: Tensor | None
    W_2: Tensor | None
    hidden: int
    residual: bool = False
    affine: bool = False


@dataclass(frozen=True)
class ClosedForm:
    """Closed form of a section's Jacobian at one batch.

    Attributes:
        factors: The factors that are the same at all positions.
        derivatives: ``s``, shape ``(n, S, h)``, zero at masked positions; None for an affine section.
        mask: True at positions that are valid before and after the section, shape ``(n, S)``.
    """

    factors: Factors
    derivatives: Tensor | None
    mask: Tensor

    def bilinear(self, cotangent: Tensor, directions: Tensor) -> Tensor:
        """Multiply the Jacobian from both sides, ``u^T J v``, without forming a product as wide as the node layer.

        Args:
            cotangent: ``u``, zero at masked positions, shape ``(n, S, d_out)``.
            directions: ``v``, one a column, shape ``(d_in, k)``.

        Returns:
            Shape ``(n, S, k)``.
        """
        f = self.factors
        hidden = directions if f.W_1 is None else f.W_1 @ directions
        if self.derivatives is None:
            return cotangent @ (hidden if f.W_2 is None else f.W_2 @ hidden)
        product = ((cotangent if f.W_2 is None else cotangent @ f.W_2) * self.derivatives) @ hidden
        return product + cotangent @ directions if f.residual else product


def _are_zeros_and_ones(s: Tensor) -> bool:
    """Whether all derivatives are 0 or 1: float32 sums these exactly up to 2^24, at twice the speed of float64."""
    # An accelerator would have to wait for the answer.
    return s.device.type == "cpu" and len(s) < 2**24 and torch.equal(s, s.square())


def _size(t: Tensor) -> Tensor:
    """The largest absolute value in a tensor, positive."""
    return t.abs().amax().clamp(min=torch.finfo(t.dtype).tiny) if t.numel() else t.new_ones(())


class ClosedMetric:
    """Streaming ``sum g g^T`` over output features and samples of a section in closed form.

    Args:
        factors: The factors that are the same at all positions.
        C_next: The next node layer's map to features, shape ``(d_out, r_out)``, float64.
        groups: Number of jackknife groups.

    Note:
        Source: arXiv 2405.10928, Jacobian step of the transformation; derivation in the module docstring.
    """

    def __init__(self, factors: Factors, C_next: Tensor, groups: int) -> None:
        self.factors, self.C_next = factors, C_next
        h = 0 if factors.affine else factors.hidden
        self._count = C_next.new_zeros(groups)
        self._s, self._ss = C_next.new_zeros(groups, h), C_next.new_zeros(groups, h, h)

    def add(self, form: ClosedForm, group: int, samples: slice) -> None:
        """Add some samples of one batch to a group."""
        self._count[group] += for_sums(form.mask[samples]).sum()
        if form.derivatives is not None:
            s = for_sums(form.derivatives[samples].flatten(0, 1))
            s = s.to(torch.float32 if _are_zeros_and_ones(s) else torch.float64)
            self._s[group] += s.sum(0)
            self._ss[group] += s.T @ s

    def sums(self) -> tuple[Tensor, Iterator[Tensor]]:
        """The sum of each group, as ``V^T X V``.

        Returns:
            ``V``, shape ``(m, d_in)``, and one ``X`` for each group, shape ``(m, m)``; float64.
        """
        f, C = self.factors, self.C_next
        A = C.T if f.W_2 is None else C.T @ to_float64(f.W_2)
        one = torch.eye(len(A), dtype=A.dtype, device=A.device)
        if f.affine:  # g = A^T e_i, the same for every sample
            return A, (count * one for count in self._count)
        V = torch.eye(f.hidden, dtype=A.dtype, device=A.device) if f.W_1 is None else to_float64(f.W_1)
        A_A = A.T @ A
        hidden = (A_A * ss for ss in self._ss)
        if not f.residual:
            return V, hidden
        # g = [C'^T; W_1]^T [e_i; diag(s) A_i]: the identity adds one row of V for each output feature.
        mixed = (A * s for s in self._s)
        return torch.cat([C.T, V]), (
            torch.cat([torch.cat([count * one, x], 1), torch.cat([x.T, X], 1)])
            for count, x, X in zip(self._count, mixed, hidden, strict=True)
        )


class ClosedEdges:
    """Sums of interactions, squared and signed, over samples of a section in closed form.

    Args:
        factors: The factors that are the same at all positions.
        C_pinv: The first node layer's map back ``C^+``, shape ``(r_in, d_in)``, float64.
        C_next: The next node layer's map to features, shape ``(d_out, r_out)``, float64.

    Note:
        Source: arXiv 2405.10928, edges of the interaction graph (squared); derivation in the module docstring.
    """

    def __init__(self, factors: Factors, C_pinv: Tensor, C_next: Tensor) -> None:
        self.factors = factors
        self.A = C_next.T if factors.W_2 is None else C_next.T @ to_float64(factors.W_2)
        self.B = C_pinv.T if factors.W_1 is None else to_float64(factors.W_1) @ C_pinv.T
        self.identity = C_next.T @ C_pinv.T if factors.residual else None
        # The Jacobian between features, if it is the same everywhere.
        self.J = self.A @ self.B if factors.affine else None

    def sums(self, form: ClosedForm, fhat: Tensor, fhat_next: Tensor, samples: slice) -> tuple[Tensor, Tensor]:
        """Sum over some samples of one batch.

        Args:
            form: The section at that batch.
            fhat: Features of all samples of the batch, zero at masked positions, shape ``(n, S, r_in)``.
            fhat_next: Features of the next node layer, likewise, shape ``(n, S, r_out)``.
            samples: The samples.

        Returns:
            Sums of ``y_ij^2`` and of ``y_ij fhat'_i``, each of shape ``(r_out, r_in)``, float64.
        """
        mask = form.mask[samples].flatten()
        values = fhat[samples].flatten(0, 1)[mask]
        size = _size(values)
        next_values = fhat_next[samples].flatten(0, 1)[mask.to(fhat_next.device)]
        # Factors of size 1, so that their squares stay in the range of the type.
        values = values / size
        if self.J is not None:
            J = self.J * to_float64(size)
            values = to_float64(values)
            return J.square() * values.square().sum(0), J * (to_float64(next_values).T @ values)
        assert form.derivatives is not None
        s = form.derivatives[samples].flatten(0, 1)[mask].to(product_dtype(form.derivatives.dtype))
        sizes = [_size(self.A), _size(self.B)]
        A, B = ((factor / k).to(s).contiguous() for factor, k in zip((self.A, self.B), sizes, strict=True))
        identity = None if self.identity is None else (self.identity / (sizes[0] * sizes[1])).to(s)
        values, next_size = values.to(s), _size(next_values)
        next_T = (next_values / next_size).to(s).T.contiguous()
        total = self.A.new_zeros(len(A), B.shape[1])
        signed = torch.zeros_like(total)
        rows, r_in = max(1, min(len(s), ROWS)), B.shape[1]
        # Of the three factors A_i, s and B_j the two with the smaller product are multiplied first.
        factors_first = len(s) > r_in > 0
        features = max(1, BLOCK // ((max(rows, len(B)) * r_in) if factors_first else (rows * max(1, *B.shape))))
        for i in parts_of(range(0, len(A), features)):
            A_i = A[i : i + features]
            A_i_B = (A_i.T[:, :, None] * B[:, None]).flatten(1) if factors_first else None
            next_i = next_T[i : i + features, None]
            for s_x, values_x, next_x in zip(s.split(rows), values.split(rows), next_i.split(rows, 2), strict=True):
                J = (s_x[:, None] * A_i) @ B if A_i_B is None else (s_x @ A_i_B).unflatten(1, (-1, r_in))
                if identity is not None:
                    J += identity[i : i + features]
                J.mul_(values_x[:, None])  # the interactions y_ij(x)
                signed[i : i + features] += to_float64((next_x @ J.transpose(0, 1))[:, 0])
                total[i : i + features] += to_float64(J.square_().sum(0))
        scale = sizes[0] * sizes[1] * to_float64(size)
        return total * scale.square(), signed * (scale * to_float64(next_size))
