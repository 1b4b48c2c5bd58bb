"""The latents that are active in one batch, and the derivatives of encoder and decoder at them, and only at them.

At most ``K`` latents are active at any position of a batch, out of ``r`` that are features: 32 of 16,384, for example.
Everything here has ``K`` entries for each position; what is left over where fewer are active has the value 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lib_lightning.algorithm.dictionary_basis import DictionaryBasis
from lib_lightning.model.vjp import apply_mask

# Products with all directions are faster than with the active ones alone if at least this share of them is active.
_DENSE = 1 / 8


@dataclass
class ActiveLatents:
    """The active latents of one node layer in one batch.

    Attributes:
        basis: Basis of the node layer.
        a: Activations, shape ``(n, S, d)``, without a graph.
        mask: True at valid positions, shape ``(n, S)``; None if all are valid.
        f: Latents that are features, zero at masked positions, shape ``(n, S, r - 1)``, in the type of ``a``.
        e: Error, zero at masked positions, shape ``(n, S, d)``.
        index: Which of the features are active, shape ``(n, S, K)``, int64.
        values: Their values, shape ``(n, S, K)``.
    """

    basis: DictionaryBasis
    a: Tensor
    mask: Tensor | None
    f: Tensor
    e: Tensor
    index: Tensor
    values: Tensor

    @classmethod
    def of(cls, basis: DictionaryBasis, a: Tensor, mask: Tensor | None, fhat: Tensor | None = None) -> ActiveLatents:
        """The active latents of activations.

        Args:
            basis: Basis of the node layer.
            a: Activations, shape ``(n, S, d)``.
            mask: True at valid positions, shape ``(n, S)``; None if all are valid.
            fhat: Features, zero at masked positions, shape ``(n, S, r)``, if they are known.

        Returns:
            Them.
        """
        a = a.detach()
        with torch.no_grad():
            f = apply_mask(basis.latents_of(a), mask) if fhat is None else fhat[..., :-1].to(a)
            e = apply_mask(basis.error_of(f, a), mask)
        is_active = f != 0
        K = int(is_active.sum(-1).max()) if f.numel() else 0
        if f.shape[-1] == K:
            index = torch.arange(K, device=a.device).expand(*f.shape[:-1], K)
        else:
            index = is_active.to(torch.float32).topk(K, dim=-1).indices
        return cls(basis, a, mask, f, e, index, f.gather(-1, index))

    @property
    def K(self) -> int:
        """Largest number of active latents at any position."""
        return self.index.shape[-1]

    @cached_property
    def of_samples(self) -> Tensor:
        """Features that are active anywhere in a sample, padded with others: shape ``(n, J)``, int64."""
        is_active = (self.f != 0).any(1)
        J = int(is_active.sum(-1).max()) if is_active.numel() else 0
        return is_active.to(torch.float32).topk(J, dim=-1).indices

    @cached_property
    def _flat(self) -> tuple[Tensor, Tensor, Tensor]:
        """Activations ``(m, d)``, numbers of active latents in the dictionary ``(m, K)``, and which are active."""
        latents = self.basis.latents.to(self.index.device)[self.index]
        return self.a.flatten(0, 1), latents.flatten(0, 1), self.values.flatten(0, 1) != 0

    @cached_property
    def scale(self) -> Tensor | None:
        """Scale of an affine decoder, shape ``(n, S)``; None for 1."""
        return self.basis.known.scale(self.a)

    @cached_property
    def directions(self) -> Tensor:
        """``d decode / d f_j`` of the active latents, shape ``(n, S, K, d)``."""
        rows, latents, _ = self._flat
        known = self.basis.known
        every = known.encode(rows) if not known.is_affine else rows
        if not known.is_affine:
            kept = torch.zeros(known.n_latents, dtype=torch.bool, device=rows.device)
            kept[self.basis.latents.to(rows.device)] = True
            every = every.detach() * kept
        return known.decoder_gradients(rows, every, latents).reshape(*self.index.shape, self.a.shape[2])

    @cached_property
    def _encoder_weights(self) -> Tensor | None:
        """Rows of the weights for all features, ``(r - 1, d)``, if their gradients are these."""
        weights = self.basis.known.encoder_weights(*self._flat)
        return None if weights is None else weights[self.basis.latents.to(weights.device)].to(self.a)

    @cached_property
    def gradients(self) -> Tensor:
        """``d f_i / d a`` of the active latents, shape ``(n, S, K, d)``; zero for those that are not."""
        if self._encoder_weights is not None:
            return self._encoder_weights[self.index] * (self.values != 0)[..., None]
        return self.basis.known.encoder_gradients(*self._flat).reshape(*self.a.shape[:2], self.K, self.a.shape[2])

    def tangents(self, j: Tensor) -> Tensor:
        """What features contribute to activations: ``f_j d decode / d f_j``.

        Args:
            j: A feature for each sample, shape ``(q, n)``.

        Returns:
            Shape ``(q, n, S, d)``.
        """
        known = self.basis.known
        if known.is_affine:
            samples = torch.arange(len(self.a), device=j.device)
            values = self.f[samples, :, j]  # (q, n, S)
            values = values if self.scale is None else values * self.scale
            directions = known.decoder_weights(self.basis.latents.to(j.device)[j]).to(self.a)
            return values[..., None] * directions[:, :, None]
        is_own = (self.index == j[:, :, None, None]) * self.values
        return torch.einsum("qnsp,nspd->qnsd", is_own, self.directions)

    def changes(self, w: Tensor) -> Tensor:
        """How the active latents change along tangents of the activations.

        Args:
            w: Tangents, shape ``(q, n, S, d)``.

        Returns:
            Shape ``(q, n, S, K)``; zero where a latent is not active.
        """
        if self._encoder_weights is not None and _DENSE * self.f.shape[-1] < self.K:
            every = w @ self._encoder_weights.T
            index = self.index.expand(len(w), *self.index.shape)
            return every.gather(-1, index) * (self.values != 0)
        return torch.einsum("qnsd,nspd->qnsp", w, self.gradients)

    def error_changes(self, w: Tensor, y: Tensor) -> Tensor:
        """How the error changes along tangents: what of these is not in the changes of the latents.

        Args:
            w: Tangents, shape ``(q, n, S, d)``.
            y: `changes` of the latents, shape ``(q, n, S, K)``.

        Returns:
            Shape ``(q, n, S, d)``, zero at masked positions.
        """
        known = self.basis.known
        if known.is_affine and _DENSE * self.f.shape[-1] < self.K:
            every = y.new_zeros(*y.shape[:-1], self.f.shape[-1]).scatter_add(-1, self.index.expand(y.shape), y)
            weights = known.decoder_weights(self.basis.latents).to(self.a)
            decoded = every @ weights
            decoded = decoded if self.scale is None else decoded * self.scale[..., None]
        else:
            decoded = torch.einsum("qnsp,nspd->qnsd", y, self.directions)
        return apply_mask(w - decoded, self.mask)

    def pulled_back(self, g: Tensor) -> Tensor:
        """What features contribute to something with a gradient: ``sum_s g_s . f_{s,j} d decode / d f_j``.

        Args:
            g: Gradients, shape ``(q, n, S, d)``.

        Returns:
            Those of all features, shape ``(q, n, r)``; the last one is the error.
        """
        y = torch.einsum("qnsd,nspd->qnsp", g, self.directions) * self.values
        total = y.new_zeros(*y.shape[:2], self.f.shape[-1] + 1)
        total.scatter_add_(-1, self.index.flatten(1).expand(len(y), -1, -1), y.flatten(2))
        total[..., -1] = (g * self.e).sum((2, 3))
        return total

    def pairs(self) -> Tensor:
        """Positions and places in `index` of what is active in each sample: ``s K + p``, padded; ``(n, k)``, int64."""
        is_active = (self.values != 0).flatten(1)
        count = int(is_active.sum(1).max()) if is_active.numel() else 0
        return is_active.to(torch.float32).topk(count, dim=1).indices
