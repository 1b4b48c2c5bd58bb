"""The paper's interventions on a model: only some features of a node layer, or some edges of a section, are kept.

*Node ablation* keeps the ``m`` most important features of a node layer, and sets all others to their means. *Edge
ablation* keeps the ``k`` strongest edges of a section: each feature of its output is computed from an input in which
all features without a kept edge to it are set to their means.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.basis_kinds import LATENTS
from lib_lightning.errors import NodeLayerError
from lib_lightning.model.agreement import agree
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.vjp import apply_mask

# Relative deviation of an affine section by rounding, as a power of eps: 4e-11 in float64, 2e-5 in float32.
_AFFINE = 2 / 3
# A section is only affine if it is so at these multiples of the features as well.
_FAR = (100.0, -100.0)


def keep_features(basis: Basis, a: Tensor, m: int) -> Tensor:
    """Keep only the ``m`` most important features of activations: ``mu + (a - mu) C_m C_m^+``.

    Of a dictionary all other latents are 0, and so is the error, if it is not among the ``m``.

    Args:
        basis: Basis of the node layer.
        a: Activations, shape ``(..., d)``.
        m: Number of features to keep.

    Returns:
        Activations, shape ``(..., d)``.

    Note:
        Source: arXiv 2405.10928, node ablations.

    Example:
        >>> from lib_lightning.algorithm.basis import neuron_basis
        >>> basis = neuron_basis("fc", torch.zeros(2), torch.diag(torch.tensor([1.0, 4.0])))
        >>> keep_features(basis, torch.tensor([5.0, 6.0]), 1)
        tensor([0., 6.])
    """
    kept = basis.importance.argsort(descending=True, stable=True)[:m]
    if basis.kind == LATENTS:
        is_kept = torch.zeros_like(basis.importance).index_fill(0, kept, 1.0)
        return basis.from_coordinates(basis.coordinates(a) * basis.per_coordinate(is_kept).to(a), a)
    fhat = (a - basis.mean.to(a)) @ basis.to_features[:, kept].to(a)
    return basis.mean.to(a) + fhat @ basis.from_features[kept].to(a)


def top_k_mask(E: Tensor, k: int) -> Tensor:
    """Mask of the ``k`` strongest edges. Among equal ones, the first in row-major order are kept.

    Args:
        E: Edges, shape ``(r_out, r_in)``.
        k: Number of edges to keep.

    Returns:
        True where an edge is kept, shape ``(r_out, r_in)``.

    Example:
        >>> top_k_mask(torch.tensor([[1.0, 3.0], [2.0, 0.0]]), 2)
        tensor([[False,  True],
                [ True, False]])
    """
    mask = torch.zeros(E.numel(), dtype=torch.bool, device="cpu")
    mask[E.detach().cpu().flatten().argsort(descending=True, stable=True)[:k]] = True
    return mask.reshape(E.shape)


class AblatedLayer:
    """A model at one batch with only some features of a node layer.

    Args:
        instrumented: The model.
        batch: One batch.
        index: Index ``l`` of the node layer.
        basis: Its basis.

    Raises:
        NodeLayerError: If the basis has a different width.
    """

    def __init__(self, instrumented: InstrumentedModel, batch: Any, index: int, basis: Basis) -> None:
        self.instrumented, self.batch, self.index, self.basis = instrumented, batch, index, basis
        captured = instrumented.capture(batch)[index]
        self.a, self.mask = captured.a, captured.mask
        check_width(basis, self.a)
        self.nbytes = _nbytes(self.a)

    def output(self, m: int) -> Any:
        """Output of the model with only the ``m`` most important features."""
        a = merge_masked(keep_features(self.basis, self.a, m), self.a, self.mask)
        return self.instrumented.output(self.batch, {self.index: a})


class AblatedSection:
    """A model at one batch with only some edges of a section.

    Output features with the same kept edges need one forward pass, and those whose kept edges did not change since the
    previous call need none. In an affine section, which is detected numerically, one matrix product replaces all of
    them.

    Args:
        instrumented: The model.
        batch: One batch.
        index: Index ``l`` of the section's first node layer.
        before: Basis of that node layer.
        after: Basis of the next node layer.

    Raises:
        NodeLayerError: If a basis has a different width.

    Note:
        Source: arXiv 2405.10928, edge ablations.
    """

    def __init__(self, instrumented: InstrumentedModel, batch: Any, index: int, before: Basis, after: Basis) -> None:
        self.instrumented, self.batch, self.index, self.before, self.after = instrumented, batch, index, before, after
        captured = instrumented.capture(batch)
        self.a, self.mask_in = captured[index].a, captured[index].mask
        self.a_out, self.mask_out = captured[index + 1].a, captured[index + 1].mask
        check_width(before, self.a)
        check_width(after, self.a_out)
        # Of bases, these are the features. The error of a dictionary has one for each of its entries.
        self.fhat = apply_mask(before.coordinates(self.a), self.mask_in)
        self._mask = torch.zeros(after.n_features, before.n_features, dtype=torch.bool, device="cpu")
        # Without any edges, every output feature is computed from the mean.
        self._at_mean = self._section(torch.zeros_like(self.fhat))
        self._features = self._at_mean.clone()
        self.J = self._affine_map()
        self.nbytes = _nbytes(self.a, self.a_out, self.fhat, self._at_mean, self._features)

    def features(self, mask: Tensor) -> Tensor:
        """Features of the next node layer, computed from the kept edges.

        Args:
            mask: True where an edge is kept, shape ``(r_out, r_in)``.

        Returns:
            Coordinates of the next node layer (`Basis.coordinates`), shape ``(n, S_out, c_out)``: of bases, its
            features ``fhat^{l+1}``.
        """
        if self.J is not None:
            kept = torch.where(mask.to(self.J.device), self.J, self.J.new_zeros(()))
            return self._at_mean + self.fhat @ kept.T
        changed = (mask != self._mask).any(1).nonzero().flatten()
        # A mask without rows or columns, of a layer without features, has no patterns.
        patterns, group = mask[changed].unique(dim=0, return_inverse=True) if len(changed) else (mask[:0], changed)
        for g, pattern in enumerate(patterns):
            columns = self.after.columns(changed[group == g].to(self.fhat.device))
            kept = self.before.per_coordinate(pattern.to(self.fhat))
            self._features[..., columns] = self._section(self.fhat * kept)[..., columns]
        self._mask = mask.clone()
        return self._features.clone()

    def output(self, mask: Tensor) -> Any:
        """Output of the model with only the edges in a mask ``(r_out, r_in)``."""
        new = self.after.from_coordinates(self.features(mask), self.a_out)
        a = merge_masked(new, self.a_out, self.mask_out)
        return self.instrumented.output(self.batch, {self.index + 1: a})

    def _section(self, fhat: Tensor) -> Tensor:
        a = merge_masked(self.before.from_coordinates(fhat, self.a), self.a, self.mask_in)
        return self.after.coordinates(self.instrumented.next_activations(self.batch, self.index, a))

    def _affine_map(self) -> Tensor | None:
        """``J`` with ``fhat^{l+1} = fhat^{l+1}(mu) + fhat^l J^T`` at each position; None if it is not affine."""
        n, S, r = self.fhat.shape
        if self._at_mean.shape[1] != S or min(n, r) == 0 or LATENTS in (self.before.kind, self.after.kind):
            return None
        # Two halves of the features, so that nonlinear terms cannot cancel, and large multiples of both signs: there, a
        # ReLU that is active on all samples because of a large bias is not, and a weak nonlinearity is visible.
        halves = [self.fhat.clone(), self.fhat.clone()]
        for parity in (0, 1):
            halves[parity][..., parity::2] = 0
        changes = [self._section(half) - self._at_mean for half in halves]
        for factor in _FAR:
            for half, change in zip(halves, changes, strict=True):
                if not self._is_same((self._section(factor * half) - self._at_mean) / factor, change):
                    return None
        # Each sample gives one column: the effect of a step of one standard deviation at its first valid position.
        spread = self.before.importance.clamp(min=0).sqrt().to(self.fhat)
        size = torch.where(spread > 0, spread, 1.0)
        first = self.fhat.new_zeros(n).long() if self.mask_in is None else self.mask_in.long().argmax(1)
        columns = []
        for start in range(0, r, n):
            j = torch.arange(start, min(start + n, r), device=self.fhat.device)
            x = torch.arange(len(j), device=self.fhat.device)
            step = torch.zeros_like(self.fhat)
            step[x, :, j] = size[j, None]
            columns.append((self._section(step) - self._at_mean)[x, first[x]] / size[j, None])
        J = torch.cat(columns).T
        # Each column was measured on one sample, and must hold for all of them.
        same = all(self._is_same(half @ J.T, change) for half, change in zip(halves, changes, strict=True))
        return J if same else None

    def _is_same(self, a: Tensor, b: Tensor) -> bool:
        """Whether changes of the features are equal up to rounding, at valid positions. False for NaN."""
        a, b = apply_mask(a, self.mask_out), apply_mask(b, self.mask_out)
        return agree(a, b, torch.finfo(b.dtype).eps ** _AFFINE)


def _nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def merge_masked(new: Tensor, old: Tensor, mask: Tensor | None) -> Tensor:
    """New activations at the valid positions of a mask ``(n, S)``, old ones elsewhere."""
    return new if mask is None else torch.where(mask[..., None], new, old)


def check_width(basis: Basis, a: Tensor) -> None:
    """Check that a basis fits activations.

    Args:
        basis: The basis.
        a: Activations, shape ``(n, S, d)``.

    Raises:
        NodeLayerError: If the widths differ.
    """
    if a.shape[-1] != basis.mean.shape[0]:
        raise NodeLayerError(
            f"The basis of '{basis.name}' has width {basis.mean.shape[0]}, but the model has {a.shape[-1]} activations "
            "per position there: the graph was computed on another model, or at another place in it."
        )
