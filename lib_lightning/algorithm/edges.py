"""Interaction edges: how strongly each feature acts on each feature of the next node layer."""

from __future__ import annotations

import torch
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.jackknife import leave_one_out
from lib_lightning.distributed.process_group import Reducible
from lib_lightning.jacobian.closed_form import ClosedEdges
from lib_lightning.jacobian.section import Section
from lib_lightning.model.precision import product_dtype

# A Jacobian-vector product is a backward pass through a backward pass: measured at 1 to 2 times a plain one.
_FORWARD_COST = 2


class Edges(Reducible):
    """Streaming ``E_ij = 1/(n S) sum_x sum_t (sum_s [d fhat'_{t,i} / d fhat_{s,j}] fhat_{s,j})^2``.

    Args:
        before: Basis of the node layer with features ``j``.
        after: Basis of the next node layer, with features ``i``.
        groups: Number of groups of samples to sum apart.

    Attributes:
        fell_back: Whether forward mode would have been cheaper, but has no derivative to go by.

    Note:
        Source: arXiv 2405.10928, edges of the interaction graph (squared). The inner sum over ``s`` is one
        Jacobian-vector product with the tangent ``v_s = fhat_{s,j} C^+_j``, whatever the number of output positions,
        or one entry of a vector-Jacobian product for each ``(t, i)``; the cheaper of the two ways is taken, the second
        wherever the first has no derivative to go by.
    """

    sums = ("rows", "_total")

    def __init__(self, before: Basis, after: Basis, groups: int = 1) -> None:
        self.before, self.after = before, after
        self.rows = torch.zeros(groups, dtype=torch.float64)
        self.fell_back = False
        self._forward: bool | None = None
        self._closed: ClosedEdges | None = None
        shape = (groups, after.n_features, before.n_features)
        self._total = torch.zeros(shape, dtype=torch.float64, device=before.mean.device)

    def update(self, section: Section, fhat: Tensor) -> None:
        """Add one batch.

        Args:
            section: The section between the two node layers, at that batch.
            fhat: Features of the first one, zero at positions that do not count, shape ``(n, S_in, r_in)``.
        """
        fhat = fhat.to(section.a)
        for group, span in section.spans:
            self.rows[group] += section.rows_of(span)
        if section.closed is not None:
            weights = section.closed.weights
            if self._closed is None or self._closed.weights is not weights:
                self._closed = ClosedEdges(weights, self.before.from_features, self.after.to_features)
            for group, span in section.spans:
                self._total[group] += self._closed.sum(section.closed, fhat, span)
            return
        if section.jacobian:
            for i, g in section.jacobian:
                self._add_rows(section, i, g, fhat)
            return
        if self._forward is None:
            cheaper = _FORWARD_COST * self.before.n_features < section.S_out * self.after.n_features
            self._forward = section.has_jvp() if cheaper else False
            self.fell_back = cheaper and self._forward is False
        if self._forward:
            self.update_forward(section, fhat)
        else:
            self.update_reverse(section, fhat)

    def update_forward(self, section: Section, fhat: Tensor) -> None:
        """Add one batch with one Jacobian-vector product for each input feature."""
        C_pinv, C_next = self.before.from_features.to(fhat), self.after.to_features.to(fhat)
        stack = section.stack
        for start in range(0, self.before.n_features, stack):
            j = slice(start, start + stack)
            tangents = fhat[..., j].movedim(-1, 0)[..., None] * C_pinv[j][:, None, None, :]
            moved = section.jvp(tangents) @ C_next
            squares = moved.to(product_dtype(moved.dtype)).square()
            for group, span in section.spans:
                self._total[group, :, j] += squares[:, span].sum(dim=(1, 2)).T.double()

    def update_reverse(self, section: Section, fhat: Tensor) -> None:
        """Add one batch with one vector-Jacobian product for each output position and feature."""
        for i, cotangents in section.output_stacks(self.after.to_features.to(fhat)):
            self._add_rows(section, i, section.vjp(cotangents), fhat)

    def _add_rows(self, section: Section, i: Tensor, g: Tensor, fhat: Tensor) -> None:
        """Add gradients ``(k, n, S_in, d_in)`` of output features ``i``."""
        moved = (g @ self.before.from_features.to(fhat).T).mul_(fhat).sum(dim=2)
        squares = moved.to(product_dtype(moved.dtype)).square()
        for group, span in section.spans:
            self._total[group].index_add_(0, i, squares[:, span].sum(dim=1).double())

    @property
    def E(self) -> Tensor:
        """The edges, shape ``(r_out, r_in)``, float64, non-negative."""
        return self._total.sum(0) / self.rows.sum()

    @property
    def replicates(self) -> Tensor:
        """The edges with one group of samples left out at a time, ``(G, r_out, r_in)``; G is 0 with one group only."""
        return leave_one_out(self._total, self.rows)
