"""What the features of one node layer contribute to features of the next one, or to outputs, on a single sample.

A target ``z = u . (a'_t - mu')`` is a feature, or an output, at position ``t`` of the next node layer. With its
gradient ``g_s = d z / d a_s``, one vector-Jacobian product, and the features ``fhat`` of this sample:

``z = sum_{s,j} (g_s . C^+_j) fhat_{s,j}  +  sum_s g_s . e_s  +  rest``,   ``e_s = a_s - mu - fhat_s C^+``

- The first sum are the contributions of features: the products that edges are mean squares of.
- The second is what the basis leaves out of the activations.
- ``rest`` is what the linear approximation leaves out. It is zero for an affine section (up to the mean of its output
  over the samples of the graph, which is the output at the mean), and with integrated gradients.

Targets are followed backwards from the outputs: only features that matter to the targets of the section behind become
targets of the section before them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_lightning.algorithm.active_latents import ActiveLatents
from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.dictionary_basis import DictionaryBasis
from lib_lightning.jacobian.section import Section
from lib_lightning.model.precision import to_float64
from lib_lightning.model.vjp import apply_mask


@dataclass(frozen=True)
class Targets:
    """Features or outputs of one node layer at some of its positions, ``m`` of them.

    Attributes:
        positions: The position ``t`` of each, shape ``(m,)``, int64.
        indices: Index of the feature or output, shape ``(m,)``, int64.
        directions: ``u``, what is read of the activations, shape ``(m, d)``, float64.
        values: ``z``, shape ``(m,)``, float64.
        influence: How much each matters to the outputs, at least 0, shape ``(m,)``, float64.
    """

    positions: Tensor
    indices: Tensor
    directions: Tensor
    values: Tensor
    influence: Tensor


@dataclass(frozen=True)
class Contributions:
    """What makes up the values of ``m`` targets.

    Attributes:
        targets: The targets.
        sources: The features of the node layer before whose contributions are given, ``k`` of them.
        features: Their contributions, shape ``(m, k)``, float64.
        errors: What the basis leaves out at each position of the node layer before, shape ``(m, S)``, float64.
        linearisation: What the linear approximation leaves out, shape ``(m,)``, float64.
        others: Contributions of all other features together, shape ``(m,)``, float64. ``features.sum(1) +
            errors.sum(1) + linearisation + others`` are the values of the targets.
    """

    targets: Targets
    sources: Targets
    features: Tensor
    errors: Tensor
    linearisation: Tensor
    others: Tensor


class SampleSection:
    """One section at one sample, and the features before it.

    Args:
        section: The section, with a single sample.
        basis: Basis of the node layer before it.

    Attributes:
        fhat: Features, zero at masked positions, shape ``(S, r)``, float64.
        remainder: ``e``, what the basis leaves out of the activations, shape ``(S, d)``, float64.
        valid: True at positions with features, shape ``(S,)``.
    """

    def __init__(self, section: Section, basis: Basis) -> None:
        self.section, self.basis = section, basis
        a = to_float64(section.a)
        self.valid = torch.ones(section.S_in, dtype=torch.bool, device=a.device)
        if section.mask_in is not None:
            self.valid = section.mask_in[0].to(a.device)
        self._read(a, self.valid[None])

    def _read(self, a: Tensor, mask: Tensor) -> None:
        """Compute features and what is left out, from activations ``(1, S, d)`` and a mask ``(1, S)``."""
        basis = self.basis
        mean, self._C, self._C_pinv = (
            to_float64(t).to(a.device) for t in (basis.mean, basis.to_features, basis.from_features)
        )
        self.fhat = apply_mask(basis.encode(a, torch.float64), mask)[0]
        self.remainder = apply_mask(a - mean - self.fhat @ self._C_pinv, mask)[0]

    def contributions(self, targets: Targets, some: slice) -> tuple[Tensor, Tensor]:
        """Contributions to some of the targets.

        Args:
            targets: The targets, in the node layer after the section.
            some: Which of them.

        Returns:
            Those of features, shape ``(k, S, r)``, and what the basis leaves out, shape ``(k, S)``.
        """
        u = targets.directions[some]
        cotangents = self.section.a_out.new_zeros(len(u), 1, self.section.S_out, self.section.d_out)
        t = targets.positions[some].to(cotangents.device)
        cotangents[torch.arange(len(u), device=t.device), 0, t] = u.to(cotangents)
        g = to_float64(self.section.vjp(cotangents))[:, 0]
        return self._of_features(g), (g * self.remainder).sum(2)

    def features(self, flat: Tensor, influence: Tensor) -> Targets:
        """The features with some numbers ``s r + j``, as targets of the section before."""
        s, j = flat // self.basis.n_features, flat % self.basis.n_features
        return Targets(s, j, self._directions(s, j), self.fhat[s, j], influence)

    def _of_features(self, g: Tensor) -> Tensor:
        """Contributions ``(k, S, r)`` of features to targets with gradients ``(k, S, d)``."""
        return (g @ self._C_pinv.T) * self.fhat

    def _directions(self, s: Tensor, j: Tensor) -> Tensor:
        """Gradients ``(m, d)`` of features at positions."""
        return self._C.T[j]


class DictionarySampleSection(SampleSection):
    """One section at one sample, and the active latents before it. What the basis leaves out is the error."""

    def _read(self, a: Tensor, mask: Tensor) -> None:
        assert isinstance(self.basis, DictionaryBasis)
        self._active = ActiveLatents.of(self.basis, a, mask)
        # The error is not one of the features here: it is what they leave out.
        self.fhat = torch.cat([self._active.f, torch.zeros_like(self._active.f[..., :1])], -1)[0]
        self.remainder = self._active.e[0]

    def _of_features(self, g: Tensor) -> Tensor:
        active = self._active
        terms = torch.einsum("ksd,spd->ksp", g, active.directions[0]) * active.values[0]
        return terms.new_zeros(len(g), *self.fhat.shape).scatter_add_(-1, active.index.expand(terms.shape), terms)

    def _directions(self, s: Tensor, j: Tensor) -> Tensor:
        active = self._active
        at = (active.index[0, s] == j[:, None]) & (active.values[0, s] != 0)
        return torch.einsum("mp,mpd->md", at.to(active.a), active.gradients[0, s])


def sample_section(section: Section, basis: Basis) -> SampleSection:
    """A section at one sample, with the features of any basis before it.

    Args:
        section: The section, with a single sample.
        basis: Basis of the node layer before it.

    Returns:
        Them.
    """
    kind = DictionarySampleSection if isinstance(basis, DictionaryBasis) else SampleSection
    return kind(section, basis)


def trace_back(
    sections: Sequence[SampleSection], outputs: Targets, max_features: int, memory: int
) -> list[Contributions]:
    """Follow outputs backwards through all sections.

    In each node layer, those features become targets that matter most: a target's influence is divided among the
    features and errors that contribute to it, in proportion to the absolute values of their contributions, as in
    circuit-tracer (https://transformer-circuits.pub/2025/attribution-graphs/methods.html).

    Args:
        sections: The sections from the first node layer to the output, at one sample.
        outputs: Targets in the output.
        max_features: Number of features at positions to keep in each node layer.
        memory: Bytes for contributions that are kept until it is known which features are. Those of more targets are
            computed twice.

    Returns:
        The contributions in each section, in the order of the sections.
    """
    found: list[Contributions] = []
    targets = outputs
    for section in reversed(sections):
        contributions = _contributions(section, targets, max_features, memory)
        found.append(contributions)
        targets = contributions.sources
    return found[::-1]


def _contributions(section: SampleSection, targets: Targets, max_features: int, memory: int) -> Contributions:
    m, fhat = len(targets.values), section.fhat
    kept: list[Tensor] = []
    score, total = torch.zeros_like(fhat), fhat.new_zeros(m)
    errors = fhat.new_zeros(m, fhat.shape[0])
    keep = m * fhat.numel() * fhat.element_size() <= memory
    for some, features, left_out in _parts(section, targets):
        errors[some], total[some] = left_out, features.sum((1, 2))
        rest = targets.values[some] - total[some] - left_out.sum(1)
        size = features.abs().sum((1, 2)) + left_out.abs().sum(1) + rest.abs()
        share = targets.influence[some] / size.clamp(min=torch.finfo(size.dtype).tiny)
        score += torch.einsum("k,ksj->sj", share, features.abs())
        if keep:
            kept.append(features.flatten(1))
    flat = score.flatten()
    chosen = flat.topk(min(max_features, len(flat))).indices
    chosen = chosen[flat[chosen] > 0].sort().values
    every = iter(kept) if keep else (features.flatten(1) for _, features, _ in _parts(section, targets))
    matrix = torch.cat([features[:, chosen] for features in every] or [fhat.new_zeros(0, len(chosen))])
    linearisation = targets.values - total - errors.sum(1)
    sources = section.features(chosen, flat[chosen])
    return Contributions(targets, sources, matrix, errors, linearisation, total - matrix.sum(1))


def _parts(section: SampleSection, targets: Targets) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Targets in parts, with the contributions of all features to them and what the basis leaves out."""
    size = section.section.vectors_per_call
    for start in range(0, len(targets.values), size):
        some = slice(start, start + size)
        yield some, *section.contributions(targets, some)
