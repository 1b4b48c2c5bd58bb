"""Edges of a section where the features of one node layer, or of both, are latents of a dictionary."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lib_lightning.algorithm.active_latents import ActiveLatents
from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.dictionary_basis import DictionaryBasis
from lib_lightning.algorithm.edges import FORWARD_COST, POWER, Edges
from lib_lightning.algorithm.unequal_sampling import inclusion_probabilities, systematic_sample
from lib_lightning.jacobian.section import Section
from lib_lightning.model.loops import parts_of
from lib_lightning.model.precision import to_float64
from lib_lightning.model.vjp import apply_mask

# In reverse mode, entries of an error at all positions up to which each is read; and random signs for more of them.
_MOST_ENTRIES, _SIGNS = 256, 64


class DictionaryEdges(Edges):
    """Streaming edges ``E`` and attributions ``A`` through ``encode . section . decode``, at the activations.

    ``E_ij = 1/(n S) sum_x sum_t y_ij^2`` with ``y_ij(x, t) = sum_s [d f'_{t,i} / d f_{s,j}] f_{s,j}``, as for any
    basis: with the derivatives of decoder and encoder in place of ``C^+`` and ``C``, and of a latent's distance from 0,
    where it is inactive, in place of that from the mean. Latents that are not active have no derivative, and contribute
    nothing, so that only active ones are pushed through the section.

    The last feature is the error ``e = a - decode(f)``. Its edges to features ``i`` are those of the tangent ``e``. Its
    edges from features ``j`` are squared lengths of what of the change ``w`` of the next activations is not in the
    changes ``y`` of the latents, ``w - sum_i y_i d decode / d f'_i``. The sum of all contributions, errors included, is
    the derivative of the whole section along ``a - decode(0)``.

    Args:
        before: Basis of the node layer with features ``j``.
        after: Basis of the next node layer, with features ``i``. At least one of the two is a `DictionaryBasis`.
        groups: Number of jackknife groups.
        forward_mode: As for `Edges`.
        n_pushed: None for all active latents; a number for about that many of each sample, chosen at random.
        generator: Source of this choice, on the CPU.

    Attributes:
        samples_errors: Whether edges to the error were estimated with random signs: without forward mode, each of its
            entries at each position needs a product of its own.

    Note:
        Source: arXiv 2405.10928, edges of the interaction graph (squared), with a nonlinear map to features.
    """

    samples_errors = False

    def update(self, section: Section, fhat: Tensor, fhat_next: Tensor) -> None:
        """See `Edges`."""
        self.count(section)
        before = _side(self.before, section.a, section.mask_in, fhat)
        after = _side(self.after, section.a_out, section.mask_out, fhat_next)
        n_forward = before.n_pushed if self.n_pushed is None else min(before.n_pushed, self.n_pushed + before.n_always)
        if self._forward is None:
            cheaper = FORWARD_COST * n_forward < after.n_pulled
            self._forward = section.has_jvp() if cheaper else False
            self.fell_back = cheaper and self._forward is False
        if self._forward:
            self._push(section, before, after, n_forward < before.n_pushed)
        else:
            self._pull(section, before, after)

    def count(self, section: Section) -> None:
        """See `Edges`."""
        for group, samples in self._groups(section):
            self.rows[group] += section.num_valid(samples)
            self.rows_out[group] += section.num_valid_out(samples)

    def _groups(self, section: Section) -> list[tuple[int, slice]]:
        # Matrices of very many features are not kept for each group.
        return [(0, slice(None))] if len(self.rows) == 1 else list(section.group_slices)

    def _push(self, section: Section, before: _Side, after: _Side, is_sampled: bool) -> None:
        """Add a batch with one Jacobian-vector product for each active feature of a sample."""
        j, weights = before.pushed(self.n_pushed if is_sampled else None, self._generator)
        size = max(1, min(section.vectors_per_call, section.stack_elements // max(1, after.numbers_per_vector)))
        for part in parts_of(list(zip(j.split(size), weights.split(size), strict=True))):
            of, weight = part
            w = section.jvp(before.tangents(of))
            for index, squares, signed in after.interactions(w):
                self._add(section, index, of, squares * weight[..., None], signed * weight[..., None])

    def _add(self, section: Section, index: Tensor, j: Tensor, squares: Tensor, signed: Tensor) -> None:
        """Add terms ``(q, n, k)`` at rows ``index``, shape ``(n, k)``, and columns ``j``, shape ``(q, n)``."""
        flat = index * self.before.n_features + j[..., None].to(index.device)  # (q, n, k)
        for group, samples in self._groups(section):
            own = flat[:, samples].flatten()
            self._total[group].view(-1).index_add_(0, own, squares[:, samples].flatten())
            self._signed[group].view(-1).index_add_(0, own, signed[:, samples].flatten())

    def _pull(self, section: Section, before: _Side, after: _Side) -> None:
        """Add a batch with one vector-Jacobian product for each active output feature at a position of a sample."""
        for read in after.cotangents(section.vectors_per_call, self._generator):
            y = to_float64(before.contributions(section.vjp(read.cotangents)))
            i, values = read.i.to(y.device), read.values.to(y)
            for group, samples in self._groups(section):
                rows, terms = i[:, samples].flatten(), y[:, samples]
                if read.weight:
                    self._total[group].index_add_(0, rows, read.weight * terms.square().flatten(0, 1))
                self._signed[group].index_add_(0, rows, (terms * values[:, samples, None]).flatten(0, 1))
        self.samples_errors |= after.samples_errors


class _Read(NamedTuple):
    """Cotangents that read features behind a section.

    Attributes:
        i: Indices of the features, shape ``(q, n)``.
        cotangents: Shape ``(q, n, S, d)``.
        values: What signed terms are multiplied with, shape ``(q, n)``.
        weight: What squares are multiplied with.
    """

    i: Tensor
    cotangents: Tensor
    values: Tensor
    weight: float = 1.0


class _Side:
    """The features of one node layer in one batch: pushed into a section, or read behind it.

    Attributes:
        n_pushed: Tangents with which all of them are pushed.
        n_always: How many of these are never left out.
        n_pulled: Cotangents with which all of them are read.
        numbers_per_vector: Numbers that reading them behind one tangent takes.
        samples_errors: Whether cotangents of the error are random.
    """

    n_pushed: int
    n_always: int
    n_pulled: int
    numbers_per_vector: int
    samples_errors = False

    def pushed(self, count: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Features to push in each sample, ``(q, n)``, and the weights of their terms; some of them, or all."""
        raise NotImplementedError

    def tangents(self, j: Tensor) -> Tensor:
        """Tangents ``(q, n, S, d)`` of features ``(q, n)``."""
        raise NotImplementedError

    def contributions(self, g: Tensor) -> Tensor:
        """Contributions ``(q, n, r)`` of all features to what has gradients ``(q, n, S, d)``."""
        raise NotImplementedError

    def interactions(self, w: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What tangents ``(q, n, S, d)`` do: indices ``(n, k)``, squares and products with values ``(q, n, k)``."""
        raise NotImplementedError

    def cotangents(self, size: int, generator: torch.Generator) -> Iterator[_Read]:
        """The cotangents that read all features, so many at a time."""
        raise NotImplementedError


class _LinearSide(_Side):
    """Features of a linear basis."""

    def __init__(self, basis: Basis, fhat: Tensor, like: Tensor) -> None:
        self.fhat64, self.fhat = fhat, fhat.to(like)
        self.C, self.C_pinv = basis.to_features.to(like), basis.from_features.to(like)
        self._importance = basis.importance
        self.n_pushed, self.n_always = basis.n_features, 0
        self.n_pulled = like.shape[1] * basis.n_features
        self.numbers_per_vector = like.shape[0] * like.shape[1] * basis.n_features

    def pushed(self, count: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        n, r = len(self.fhat), self.n_pushed
        if count is None:
            j = torch.arange(r, device=self.fhat.device)[:, None].expand(-1, n)
            return j, torch.ones(j.shape, dtype=torch.float64, device=self.fhat64.device)
        probabilities = inclusion_probabilities(self._importance.cpu().clamp(min=0) ** POWER, count)
        chosen = systematic_sample(probabilities, n, generator).T
        return chosen.to(self.fhat.device), (1 / probabilities[chosen]).to(self.fhat64.device)

    def tangents(self, j: Tensor) -> Tensor:
        samples = torch.arange(len(self.fhat), device=j.device)
        return self.fhat[samples, :, j][..., None] * self.C_pinv[j][:, :, None, :]

    def contributions(self, g: Tensor) -> Tensor:
        return ((g @ self.C_pinv.T) * self.fhat).sum(2)

    def interactions(self, w: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        y = to_float64(w @ self.C)
        index = torch.arange(y.shape[-1], device=y.device).expand(y.shape[1], -1)
        yield index, y.square().sum(2), (y * self.fhat64).sum(2)

    def cotangents(self, size: int, generator: torch.Generator) -> Iterator[_Read]:
        n, S, r = self.fhat.shape
        flat = torch.arange(S * r, device=self.fhat.device)
        for part in parts_of(list(flat.split(size))):
            t, i = part // r, part % r
            u = self.fhat.new_zeros(len(part), S, self.C.shape[0])
            u[torch.arange(len(part), device=t.device), t] = self.C.T[i]
            values = self.fhat64[:, t.to(self.fhat64.device), i.to(self.fhat64.device)].T
            yield _Read(i[:, None].expand(-1, n), u[:, None].expand(-1, n, -1, -1).contiguous(), values)


class _DictionarySide(_Side):
    """Active latents of a dictionary, and its error."""

    def __init__(self, active: ActiveLatents) -> None:
        self.active = active
        n, S, d = active.a.shape
        self.n_pushed, self.n_always = active.of_samples.shape[1] + 1, 1
        self.n_pulled = active.pairs().shape[1] + S * d
        self.numbers_per_vector = n * S * max(active.K, d)
        self._error = active.basis.error
        self.samples_errors = S * d > _MOST_ENTRIES

    def pushed(self, count: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        chosen = self.active.of_samples
        weights = torch.ones(chosen.shape, dtype=torch.float64, device="cpu")
        if count is not None:
            sizes = self.active.f.double().cpu().square().sum(1).gather(1, chosen.cpu()) ** POWER
            places = torch.zeros(len(chosen), count, dtype=torch.int64, device="cpu")
            weights = torch.zeros(len(chosen), count, dtype=torch.float64, device="cpu")
            for x, size in enumerate(sizes):  # each sample has active latents of its own
                probabilities = inclusion_probabilities(size, count)
                own = systematic_sample(probabilities, 1, generator)[0]
                places[x, : len(own)], weights[x, : len(own)] = own, 1 / probabilities[own]
            chosen = chosen.gather(1, places.to(chosen.device))
        error = chosen.new_full((len(chosen), 1), self._error)
        j, weights = torch.cat([chosen, error], 1).T, torch.cat([weights, weights.new_ones(len(weights), 1)], 1).T
        return j, weights.to(to_float64(self.active.e[:1, :1]).device)

    def tangents(self, j: Tensor) -> Tensor:
        is_error = j == self._error
        v = self.active.tangents(j.clamp(max=self._error - 1)) if self._error else 0
        return torch.where(is_error[..., None, None], self.active.e, v)

    def contributions(self, g: Tensor) -> Tensor:
        return self.active.pulled_back(g)

    def interactions(self, w: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        changes = self.active.changes(w)
        y = to_float64(changes).flatten(2)
        yield self.active.index.flatten(1).to(y.device), y.square(), y * to_float64(self.active.values).flatten(1)
        error = to_float64(self.active.error_changes(w, changes))
        signed = (error * to_float64(self.active.e)).sum((2, 3))[..., None]
        index = torch.full((len(self.active.a), 1), self._error, device=y.device)
        yield index, error.square().sum((2, 3))[..., None], signed

    def cotangents(self, size: int, generator: torch.Generator) -> Iterator[_Read]:
        active = self.active
        n, S, d = active.a.shape
        samples = torch.arange(n, device=active.a.device)
        for part in parts_of(list(active.pairs().T.split(size))):  # (q, n)
            t, p = part // max(1, active.K), part % max(1, active.K)
            u = active.a.new_zeros(len(part), n, S, d)
            u[torch.arange(len(part), device=t.device)[:, None], samples, t] = active.gradients[samples, t, p]
            yield _Read(active.index[samples, t, p], u, active.values[samples, t, p])
        if self.samples_errors:
            # Products with the error itself are one cotangent; squares are those of random signs, in the mean.
            yield self._of_error(active.e[None], torch.ones(1, n, device=active.a.device), 0.0)
            for start in parts_of(range(0, _SIGNS, size)):
                shape = (min(size, _SIGNS - start), n, S, d)
                signs = 2 * torch.randint(2, shape, generator=generator, device="cpu") - 1
                yield self._of_error(signs.to(active.a), torch.zeros(shape[:2], device=active.a.device), 1 / _SIGNS)
            return
        for flat in parts_of(list(torch.arange(S * d, device=active.a.device).split(size))):
            t, k = flat // d, flat % d
            z = active.a.new_zeros(len(flat), n, S, d)
            z[torch.arange(len(flat), device=t.device), :, t, k] = 1
            yield self._of_error(z, active.e[:, t, k].T)

    def _of_error(self, z: Tensor, values: Tensor, weight: float = 1.0) -> _Read:
        """What reads combinations ``z`` of the entries of the error, shape ``(q, n, S, d)``."""
        active = self.active
        # The transpose of ``w - sum_i y_i d decode / d f_i``.
        of_latents = torch.einsum("qnsd,nspd->qnsp", z, active.directions)
        u = z - torch.einsum("qnsp,nspd->qnsd", of_latents, active.gradients)
        index = torch.full(z.shape[:2], self._error, device=z.device)
        return _Read(index, apply_mask(u, active.mask), values, weight)


def _side(basis: Basis, a: Tensor, mask: Tensor | None, fhat: Tensor) -> _Side:
    if isinstance(basis, DictionaryBasis):
        return _DictionarySide(ActiveLatents.of(basis, a, mask, fhat))
    return _LinearSide(basis, fhat, a)
