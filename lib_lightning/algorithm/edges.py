"""Interaction edges: how strongly each feature acts on each feature of the next node layer."""

from __future__ import annotations

import torch
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.jackknife import leave_one_out
from lib_lightning.algorithm.unequal_sampling import inclusion_probabilities, systematic_sample
from lib_lightning.distributed.process_group import Reducible
from lib_lightning.jacobian.closed_form import ClosedEdges
from lib_lightning.jacobian.section import Gradients, Section
from lib_lightning.model.loops import parts_of
from lib_lightning.model.precision import to_float64

# A Jacobian-vector product is a backward pass through a backward pass: measured at 1 to 2 times a vector-Jacobian one.
FORWARD_COST = 2


# Features are chosen by this power of their importance. Edges from a feature are about proportional to its importance,
# so the power 1 has the smallest error of the whole matrix, and 1/2 that of single small edges. In SmolLM2, with 16 of
# 500 features and 8 samples, errors of the matrix are 8%, 14% and 37% for the powers 1, 3/4 and 1/2.
POWER = 0.75


def _size(basis: Basis) -> Tensor:
    return basis.importance.clamp(min=0) ** POWER


class Edges(Reducible):
    """Streaming edges ``E`` and attributions ``A`` of one section, from the same products.

    ``E_ij = 1/(n S) sum_x sum_t y_ij^2`` and ``A_ij = 1/(n S') sum_x sum_t y_ij fhat'_{t,i}`` with
    ``y_ij(x, t) = sum_s [d fhat'_{t,i} / d fhat_{s,j}] fhat_{s,j}``. Edges are an average over the positions ``S`` of
    the node layer before, as importances of its features are; attributions over the positions ``S'`` of the one after,
    as they are shares of the variance of its features.

    Args:
        before: Basis of the node layer with features ``j``.
        after: Basis of the next node layer, with features ``i``.
        groups: Number of jackknife groups.
        forward_mode: Whether forward mode is used where it is cheaper. Without it, the sum is taken literally.
        n_pushed: None for all terms of the sum; a number for about that many Jacobian-vector products per sample, for
            features ``j`` that are chosen at random. Sections in closed form, and those with fewer terms, are exact.
        generator: Source of this choice, on the CPU.

    Attributes:
        fell_back: Whether forward mode would have been cheaper, but an operation has no second derivative.

    Note:
        Source: arXiv 2405.10928, edges of the interaction graph (squared). The inner sum over ``s`` is entry ``(t, i)``
        of the Jacobian-vector product with the tangent ``v_s = fhat_{s,j} C^+_j``: one product for each ``j``,
        whatever the number of output positions. It is also the inner product of ``fhat_{s,j}`` with the gradient of
        ``fhat'_{t,i}``: one vector-Jacobian product for each ``(t, i)``.

        Random choice: each sample takes feature ``j`` with probability ``pi_j``, proportional to ``Lambda_j^(3/4)`` and
        at most 1, and its terms are divided by ``pi_j``, which leaves the expectation of the sum unchanged (Horvitz and
        Thompson 1952, https://doi.org/10.1080/01621459.1952.10483446). Groups of samples choose independently, so that
        the spread between them includes the error of the choice.

        An affine section that acts on each position alike, or has one output position, has ``sum_j y_ij = fhat'_i`` up
        to a constant, and therefore ``sum_j A_ij = E[fhat'_i^2] = Lambda'_i``. Elsewhere the difference is what the
        linear approximation leaves out. With integrated gradients and a single position there is none in any section,
        since the sum of ``y_ij`` is the whole difference to the features at the mean.
    """

    sums = ("rows", "rows_out", "_total", "_signed")

    def __init__(
        self,
        before: Basis,
        after: Basis,
        groups: int = 1,
        forward_mode: bool = True,
        n_pushed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.before, self.after, self.n_pushed = before, after, n_pushed
        self._generator = generator or torch.Generator().manual_seed(0)
        self.rows = torch.zeros(groups, dtype=torch.float64, device="cpu")
        self.rows_out = torch.zeros_like(self.rows)
        self.fell_back = False
        # None until a batch decides it.
        self._forward: bool | None = None if forward_mode else False
        self._closed: ClosedEdges | None = None
        shape = (groups, after.n_features, before.n_features)
        self._total = torch.zeros(shape, dtype=torch.float64, device=before.mean.device)
        self._signed = torch.zeros_like(self._total)

    def update(self, section: Section, fhat: Tensor, fhat_next: Tensor) -> None:
        """Add one batch.

        Args:
            section: The section between the two node layers, at that batch.
            fhat: Features of the node layer before, zero at masked positions, shape ``(n, S_in, r_in)``.
            fhat_next: Features of the node layer after, likewise, shape ``(n, S_out, r_out)``, float64.
        """
        fhat = fhat.to(section.a)
        self.count(section)
        if section.closed_form is not None:
            self._add_closed(section, fhat, fhat_next)
        elif section.cached_products:
            self.update_reverse(section, fhat, fhat_next)
        else:
            n_forward, n_reverse = self.before.n_features, section.S_out * self.after.n_features
            if self.n_pushed is not None:
                n_forward = min(n_forward, self.n_pushed)
            if self._forward is None:
                cheaper = FORWARD_COST * n_forward < n_reverse
                self._forward = section.has_jvp() if cheaper else False
                self.fell_back = cheaper and self._forward is False
            if self._forward:
                all_pushed = n_forward == self.before.n_features
                (self.update_forward if all_pushed else self.update_sampled)(section, fhat, fhat_next)
            elif self.fell_back and self.n_pushed is not None and FORWARD_COST * self.n_pushed < n_reverse:
                self.update_sampled_reverse(section, fhat, fhat_next)
            else:
                self.update_reverse(section, fhat, fhat_next)

    def count(self, section: Section) -> None:
        """Count the samples and positions of one batch, which the sums are divided by."""
        for group, samples in section.group_slices:
            self.rows[group] += section.num_valid(samples)
            self.rows_out[group] += section.num_valid_out(samples)

    def update_forward(self, section: Section, fhat: Tensor, fhat_next: Tensor) -> None:
        """Add one batch with one Jacobian-vector product for each input feature."""
        C_pinv, C_next = self.before.from_features.to(fhat), self.after.to_features.to(fhat)
        size = section.vectors_per_call
        for start in parts_of(range(0, self.before.n_features, size)):
            j = slice(start, start + size)
            tangents = fhat[..., j].movedim(-1, 0)[..., None] * C_pinv[j][:, None, None, :]
            interactions = to_float64(section.jvp(tangents) @ C_next)
            signed = (interactions * fhat_next).sum(dim=2)
            squares = interactions.square_().sum(dim=2)
            for group, samples in section.group_slices:
                self._total[group, :, j] += squares[:, samples].sum(dim=1).T
                self._signed[group, :, j] += signed[:, samples].sum(dim=1).T

    def update_sampled(self, section: Section, fhat: Tensor, fhat_next: Tensor) -> None:
        """Add one batch with `n_pushed` Jacobian-vector products, each for another feature of each sample."""
        C_pinv, C_next = self.before.from_features.to(fhat), self.after.to_features.to(fhat)
        probabilities, chosen = self._choose(_size(self.before), self.n_pushed, section)
        samples = torch.arange(section.n, device=fhat.device)
        for j in parts_of(chosen.T.split(section.vectors_per_call)):  # (k, n)
            here = j.to(fhat.device)  # importances are on the CPU if the device has no float64
            tangents = fhat[samples, :, here][..., None] * C_pinv[here][:, :, None, :]
            interactions = to_float64(section.jvp(tangents) @ C_next)
            signed, weights = (interactions * fhat_next).sum(dim=2), 1 / probabilities[j][..., None]
            self._add_sampled(self._total, section, 1, j, interactions.square_().sum(dim=2) * weights)
            self._add_sampled(self._signed, section, 1, j, signed * weights)

    def update_sampled_reverse(self, section: Section, fhat: Tensor, fhat_next: Tensor) -> None:
        """Add one batch with as many vector-Jacobian products, each for another output position and feature."""
        C_pinv, C_T = self.before.from_features.to(fhat), self.after.to_features.to(fhat).T
        size = _size(self.after).repeat(section.S_out)
        probabilities, chosen = self._choose(size, FORWARD_COST * (self.n_pushed or 1), section)
        samples = torch.arange(section.n, device=fhat.device)
        for ti in parts_of(chosen.T.split(section.vectors_per_call)):  # (k, n)
            t, i = ti // self.after.n_features, ti % self.after.n_features
            cotangents = fhat.new_zeros(len(ti), section.n, section.S_out, section.d_out)
            places = torch.arange(len(ti), device=fhat.device)[:, None], samples, t.to(fhat.device)
            cotangents[places] = C_T[i.to(fhat.device)]
            interactions = to_float64(((section.vjp(cotangents) @ C_pinv.T) * fhat).sum(dim=2))
            here = (place.to(fhat_next.device) for place in (samples, t, i))
            values, weights = fhat_next[tuple(here)][..., None], 1 / probabilities[ti][..., None]
            self._add_sampled(self._signed, section, 0, i, interactions * values * weights)
            self._add_sampled(self._total, section, 0, i, interactions.square_() * weights)

    def _choose(self, size: Tensor, count: int | None, section: Section) -> tuple[Tensor, Tensor]:
        """Probabilities ``(r,)``, and the items that each sample of a batch takes, ``(n, k)``."""
        probabilities = inclusion_probabilities(size, count or len(size))
        # Groups choose independently, so that the spread between them shows the error of the choice.
        lengths = [len(range(section.n)[samples]) for _, samples in section.group_slices]
        return probabilities, torch.cat([systematic_sample(probabilities, n, self._generator) for n in lengths])

    def _add_sampled(self, total: Tensor, section: Section, axis: int, index: Tensor, terms: Tensor) -> None:
        """Add terms ``(k, n, r)`` to the rows (axis 0) or columns (axis 1) ``index``, shape ``(k, n)``, of a sum."""
        for group, samples in section.group_slices:
            values = terms[:, samples].flatten(0, 1)
            total[group].index_add_(axis, index[:, samples].flatten(), values.T if axis else values)

    def update_reverse(self, section: Section, fhat: Tensor, fhat_next: Tensor) -> None:
        """Add one batch with one vector-Jacobian product for each output position and feature."""
        for gradients in section.output_gradients(self.after.to_features.to(fhat)):
            self._add_gradients(section, gradients, fhat, fhat_next)

    def _add_gradients(self, section: Section, gradients: Gradients, fhat: Tensor, fhat_next: Tensor) -> None:
        interactions = to_float64((gradients.g @ self.before.from_features.to(fhat).T).mul_(fhat).sum(dim=2))
        t, i = (index.to(interactions.device) for index in (gradients.t, gradients.i))
        terms = interactions * fhat_next[:, t, i].T.contiguous()[..., None]
        self._add_rows(self._signed, section, i, terms)
        # In the same memory: pages that are new to the process take as long as the product.
        self._add_rows(self._total, section, i, torch.mul(interactions, interactions, out=terms))

    def _add_rows(self, total: Tensor, section: Section, i: Tensor, terms: Tensor) -> None:
        """Add terms ``(k, n, r)`` to the rows ``i``, shape ``(k,)``, of a sum."""
        for group, samples in section.group_slices:
            total[group].index_add_(0, i, terms[:, samples].sum(dim=1))

    def _add_closed(self, section: Section, fhat: Tensor, fhat_next: Tensor) -> None:
        form = section.closed_form
        assert form is not None
        if self._closed is None or self._closed.factors is not form.factors:
            self._closed = ClosedEdges(form.factors, self.before.from_features, self.after.to_features)
        for group, samples in section.group_slices:
            squares, signed = self._closed.sums(form, fhat, fhat_next, samples)
            self._total[group] += squares
            self._signed[group] += signed

    @property
    def E(self) -> Tensor:
        """The edges, shape ``(r_out, r_in)``, float64, non-negative."""
        return self._total.sum(0) / self.rows.sum()

    @property
    def replicates(self) -> Tensor:
        """Jackknife replicates of the edges, shape ``(G, r_out, r_in)``; G is 0 if there is only one group."""
        return leave_one_out(self._total, self.rows)

    @property
    def A(self) -> Tensor:
        """The attributions, shape ``(r_out, r_in)``, float64, signed."""
        return self._signed.sum(0) / self.rows_out.sum()

    @property
    def attribution_replicates(self) -> Tensor:
        """Jackknife replicates of the attributions, shape ``(G, r_out, r_in)``; G is 0 if there is only one group."""
        return leave_one_out(self._signed, self.rows_out)
