"""The paper's interventions on a model: only some features of a node layer, or some edges of a section, are kept.

*Node ablation* keeps the ``m`` most important features of a node layer, and sets all others to their means. *Edge
ablation* keeps the ``k`` strongest edges of a section: each feature of its output is computed from an input in which
all features without a kept edge to it are set to their means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lib_lightning.ablation.model_part import ROUNDING, ModelPart, is_recordable, nbytes_of, nbytes_without
from lib_lightning.ablation.shared_section import SharedParts, SharedSection
from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.basis_kinds import LATENTS
from lib_lightning.errors import NodeLayerError, is_out_of_memory
from lib_lightning.model.agreement import agree
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.precision import to_float64
from lib_lightning.model.recorded import RecordedFunction, record
from lib_lightning.model.vjp import apply_mask, vjp

# Numbers of a tensor that stays in a processor's cache: the section is recorded for parts of a batch that are as large.
_CACHED = 2**20
# Largest number of such parts.
_MOST_PARTS = 16
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
        self.nbytes = nbytes_of(self.a)

    def output(self, m: int) -> Any:
        """Output of the model with only the ``m`` most important features."""
        a = merge_masked(keep_features(self.basis, self.a, m), self.a, self.mask)
        return self.instrumented.output(self.batch, {self.index: a})


class AblatedSection:
    """A model at one batch with only some edges of a section.

    Output features whose kept edges did not change since the previous call are not computed again. In an affine
    section, which is detected numerically, one matrix product gives all others. In any other section whose operations
    can be recorded, these are repeated for each distinct set of kept edges (`lib_lightning.ablation.shared_section`),
    after a comparison with the model itself at two inputs. Latents of dictionaries are no linear coordinates: for them
    the operations are repeated as they are (`lib_lightning.ablation.model_part`). Where operations cannot be recorded,
    each set needs a forward pass.

    Args:
        instrumented: The model.
        batch: One batch.
        index: Index ``l`` of the section's first node layer.
        before: Basis of that node layer.
        after: Basis of the next node layer.
        max_bytes: Memory for all intermediate results of a section or of the rest of the model, while their operations
            are recorded.
        score: From an output to scores, for which the rest of the model is repeated; None for any that reads nothing
            but the tensors of the output.

    Raises:
        NodeLayerError: If a basis has a different width.

    Note:
        Source: arXiv 2405.10928, edge ablations.
    """

    def __init__(
        self,
        instrumented: InstrumentedModel,
        batch: Any,
        index: int,
        before: Basis,
        after: Basis,
        max_bytes: int = 2**31,
        score: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.instrumented, self.batch, self.index, self.before, self.after = instrumented, batch, index, before, after
        self._max_bytes = max_bytes
        captured, output = instrumented.capture_with_output(batch)
        unablated = None if score is None else score(output)
        self.a, self.mask_in = captured[index].a, captured[index].mask
        self.a_out, self.mask_out = captured[index + 1].a, captured[index + 1].mask
        check_width(before, self.a)
        check_width(after, self.a_out)
        # Of bases, these are the features. The error of a dictionary has one for each of its entries.
        self.fhat = apply_mask(before.coordinates(self.a), self.mask_in)
        self._mask = torch.zeros(after.n_features, before.n_features, dtype=torch.bool, device="cpu")
        # Without any edges, every output feature is computed from the mean.
        has_latents = LATENTS in (before.kind, after.kind)
        a_at_mean = self._activations(torch.zeros_like(self.fhat))
        next_at_mean, recorded = (self._next(a_at_mean), None) if has_latents else self._recorded(a_at_mean)
        self._at_mean = after.coordinates(next_at_mean)
        # The features of the last mask, shape ``(r_out, n, S_out)``: those of one output feature are contiguous.
        self._features = self._at_mean.movedim(-1, 0).clone(memory_format=torch.contiguous_format)
        # Two halves of the features, so that nonlinear terms cannot cancel.
        even = torch.arange(before.n_features, device=self.fhat.device) % 2 == 0
        self._halves = torch.stack([~even, even]).to(self.fhat)
        self.J, self.shared, self._has_gradient = None, None, True
        if not has_latents and self.fhat.numel():
            changes = [self._section(self.fhat * half) - self._at_mean for half in self._halves]
            self.shared = None if recorded is None else self._shared_section(recorded, changes)
            self.J = self._affine_map(changes)
            self.shared = None if self.J is not None else self.shared

        def rest(a: Tensor) -> Any:
            return instrumented.output(batch, {index + 1: a})

        at_mean = self._from_features(self._at_mean)
        self.rest = ModelPart(instrumented, rest, at_mean, [(self.a_out, output)], max_bytes)
        if score is not None and unablated is not None:
            self.rest.check_score(score, [(self.a_out, unablated)])
        self.section: ModelPart | None = None
        if self.J is None and self.shared is None and self.a.numel():
            half = self._activations(self.fhat * before.per_coordinate(self._halves[0]))
            known = [(self.a, self.a_out), (half, self._next(half))]
            self.section = ModelPart(instrumented, self._next, a_at_mean, known, max_bytes)
        self._own_bytes = nbytes_of(self.a, self.a_out, self.fhat, self._at_mean, self._features)
        if self.shared is not None:
            self._own_bytes += nbytes_without(instrumented, self.shared.kept)

    def features(self, mask: Tensor) -> Tensor:
        """Features of the next node layer, computed from the kept edges.

        Args:
            mask: True where an edge is kept, or by how much the input feature is multiplied, shape ``(r_out, r_in)``.

        Returns:
            Coordinates of the next node layer (`Basis.coordinates`), shape ``(n, S_out, c_out)``: of bases, its
            features ``fhat^{l+1}``.
        """
        if self.J is not None:
            mask = mask.to(self.J.device)
            kept = torch.where(mask, self.J, self.J.new_zeros(())) if mask.dtype == torch.bool else self.J * mask
            return self._at_mean + self.fhat @ kept.to(self.J).T
        changed = (mask != self._mask).any(1).nonzero().flatten()
        has_edges = mask[changed].any(1)
        without = changed[~has_edges].to(self.fhat.device)
        self._set(without, self._at_mean[..., self.after.columns(without)])
        changed = changed[has_edges]
        if len(changed) and not self._set_shared(changed, mask[changed]):
            self._set_by_passes(changed, mask[changed])
        self._mask = mask.clone()
        return self._features.clone().movedim(0, -1)

    def _set(self, rows: Tensor, features: Tensor) -> None:
        """Take some output features from their coordinates, shape ``(n, S_out, k)``."""
        self._features[self.after.columns(rows.to(self.fhat.device))] = features.movedim(-1, 0)

    def _set_shared(self, rows: Tensor, mask: Tensor) -> bool:
        """Compute some output features without running the model; False if that is not possible."""
        if self.shared is None or not self.shared.is_intact:
            return False
        self._features[rows.to(self.fhat.device)] = self.shared.features(mask, rows).movedim(-1, 0)
        return True

    def _set_by_passes(self, rows: Tensor, mask: Tensor) -> None:
        """Compute some output features, ascending, by passes through the section: one for each set of kept edges."""
        patterns, group = (t.to(self.fhat.device) for t in mask.unique(dim=0, return_inverse=True))
        rows = rows.to(self.fhat.device)
        for some in torch.arange(len(patterns), device=self.fhat.device).split(self._rows_at_once):
            # Of each set only its own features are wanted; all that are wanted of any are computed together.
            wanted = rows[torch.isin(group, some)]
            found = self.after.coordinates_of(self._outputs(patterns[some]), wanted)
            feature = self._feature_of_column[self.after.columns(wanted)]
            for g, of_pattern in zip(some, found, strict=True):
                own = rows[group == g]
                self._set(own, of_pattern[..., torch.isin(feature, own)])

    @cached_property
    def _feature_of_column(self) -> Tensor:
        """The output feature that each coordinate belongs to."""
        return self.after.per_coordinate(torch.arange(self.after.n_features, device=self.fhat.device))

    @property
    def _rows_at_once(self) -> int:
        """Number of rows of a mask for which the section runs at once: several, as long as their tensors are small."""
        if self.section is None:
            return 1
        (n, S, _), S_out = self.fhat.shape, self._at_mean.shape[1]
        return self.section.at_once(n * max(S * self.before.n_encoded, S_out * self.after.n_encoded))

    def _outputs(self, factors: Tensor) -> Tensor:
        """Activations after the section for each row of a mask, shape ``(k, n, S_out, d_out)``."""
        kept = self.before.per_coordinate(factors.to(self.fhat))[:, None, None]
        a = self._activations(self.fhat * kept)
        return torch.stack([self._next(x) for x in a]) if self.section is None else self.section.each(a)

    @property
    def nbytes(self) -> int:
        """Memory of what is kept."""
        return self._own_bytes + self.rest.nbytes + (0 if self.section is None else self.section.nbytes)

    def output(self, mask: Tensor) -> Any:
        """Output of the model with only the edges in a mask, or with edges that are scaled, ``(r_out, r_in)``."""
        return self.rest(self._next_activations(mask))

    def gradient(self, mask: Tensor, loss: Callable[[Any], Tensor]) -> tuple[Any, Tensor]:
        """Output of the model with edges that are scaled, and the derivatives of a loss with respect to the factors.

        Args:
            mask: The factors, shape ``(r_out, r_in)``.
            loss: From the output to a scalar.

        Returns:
            The output, and the gradient ``(r_out, r_in)``, float64, on the CPU.
        """
        with torch.enable_grad():
            features = self.features(mask).detach().requires_grad_()
            a = self._from_features(features)
        output, grad = self.instrumented.output_and_gradient(self.batch, self.index + 1, a.detach(), loss)
        (cotangent,) = torch.autograd.grad(a, features, grad)
        return output, to_float64(self._mask_gradient(mask, cotangent)).cpu()

    def _mask_gradient(self, mask: Tensor, cotangent: Tensor) -> Tensor:
        """Derivatives with respect to a mask, from those with respect to the output's coordinates ``(n, S, c_out)``."""
        if self.J is not None:
            return torch.einsum("nsi,nsj->ij", cotangent, self.fhat) * self.J
        rows = torch.arange(len(mask), device=self.fhat.device)
        if self.shared is not None and self.shared.is_intact:
            try:
                return self.shared.gradient(mask, rows, cotangent)
            except RuntimeError:  # an operation without derivative: the model may have another one
                self.shared = None
        if self.section is not None and self.section.is_recorded and self._has_gradient:
            try:
                parts = [self._rows_gradient(mask, cotangent, some) for some in rows.split(self._rows_at_once)]
                return torch.cat(parts)
            except (RuntimeError, NodeLayerError) as error:  # without derivative: the model may have another one
                self._has_gradient = is_out_of_memory(error)
        return torch.stack([self._row_gradient(mask[i], cotangent, row) for i, row in enumerate(rows.split(1))])

    def _rows_gradient(self, mask: Tensor, cotangent: Tensor, rows: Tensor) -> Tensor:
        """Derivatives with respect to some rows of a mask, through the recorded operations of the section."""
        columns = self.after.columns(rows)
        is_own = self._feature_of_column[columns] == rows[:, None, None, None]
        with torch.enable_grad():
            own = mask[rows.to(mask.device)].to(self.fhat).requires_grad_()
            found = self.after.coordinates_of(self._outputs(own), rows)
            if self.section is None or not self.section.is_recorded:
                raise NodeLayerError("An operation of the section cannot be repeated.")
            (gradient,) = torch.autograd.grad((found * cotangent[..., columns] * is_own).sum(), own)
        return gradient

    def _row_gradient(self, factors: Tensor, cotangent: Tensor, row: Tensor) -> Tensor:
        """Derivatives with respect to one row of a mask, by a forward and a backward pass of the model."""
        columns = self.after.columns(row)
        with torch.enable_grad():
            own = factors.to(self.fhat).requires_grad_()
            a = self._activations(self.fhat * self.before.per_coordinate(own))
            replace = [a.detach() if l == self.index else None for l in range(len(self.instrumented.layers))]
            captured = self.instrumented.capture(self.batch, replace)
            before, after = captured[self.index : self.index + 2]
            end = after.a.detach().requires_grad_()
            (direction,) = torch.autograd.grad(self.after.coordinates(end)[..., columns], end, cotangent[..., columns])
            grads = vjp(before, after, direction)
        return torch.autograd.grad(a, own, before.layer.read(grads))[0]

    def _next_activations(self, mask: Tensor) -> Tensor:
        return self._from_features(self.features(mask))

    def _from_features(self, features: Tensor) -> Tensor:
        return merge_masked(self.after.from_coordinates(features, self.a_out), self.a_out, self.mask_out)

    def _section(self, fhat: Tensor) -> Tensor:
        return self.after.coordinates(self._next(self._activations(fhat)))

    def _activations(self, fhat: Tensor) -> Tensor:
        return merge_masked(self.before.from_coordinates(fhat, self.a), self.a, self.mask_in)

    def _next(self, a: Tensor) -> Tensor:
        return self.instrumented.next_activations(self.batch, self.index, a)

    def _recorded(self, a: Tensor) -> tuple[Tensor, RecordedFunction | None]:
        """The activations after others, and the operations of the section if they can be repeated."""
        if a.numel() and is_recordable(self.instrumented, a):
            with suppress(Exception):  # of the recording; one of the model's is raised again
                return record(self._next, a, self._max_bytes)
        return self._next(a), None

    def _shared_section(self, whole: RecordedFunction, changes: Sequence[Tensor]) -> SharedParts | None:
        """The section without the rest of the model; None if it does not give the features that the model gives.

        Args:
            whole: Its operations, recorded at the mean.
            changes: What each half of the features changes.
        """
        n = len(self.fhat)
        fitting = max(1, _CACHED * n // whole.largest)
        size = -(-n // min(_MOST_PARTS, -(-n // fitting)))  # parts of equal size
        # What depends on the other samples of a batch, such as random numbers, needs all of them.
        for part in (size, n) if size < n else (n,):
            with suppress(Exception):
                recorded = [whole] if part == n else [self._recorded_part(k, part) for k in range(0, n, part)]
                shared = self._shared_parts(recorded, part)
                if self._gives(shared, changes):
                    return shared
        return None

    def _recorded_part(self, start: int, size: int) -> RecordedFunction:
        """The operations of the section on some samples, recorded at the mean.

        Raises:
            NodeLayerError: If they cannot be repeated.
        """
        a = self._activations(torch.zeros_like(self.fhat))[start : start + size]
        batch = self.instrumented.select(self.batch, slice(start, start + size))
        recorded = None
        if self.instrumented.num_samples(batch) == len(a):
            recorded = record(lambda x: self.instrumented.next_activations(batch, self.index, x), a, self._max_bytes)[1]
        if recorded is None:
            raise NodeLayerError("The section cannot be recorded on a part of the batch.")
        return recorded

    def _shared_parts(self, recorded: Sequence[RecordedFunction], size: int) -> SharedParts:
        C = None if self.after.kind == "neuron" else self.after.to_features
        maps = self.before.from_features, C
        return SharedParts(
            [
                (len(fhat), SharedSection(part, fhat, *maps, at_mean))
                for part, fhat, at_mean in zip(recorded, self.fhat.split(size), self._at_mean.split(size), strict=True)
            ]
        )

    def _gives(self, shared: SharedParts, changes: Sequence[Tensor]) -> bool:
        """Whether recorded operations give what the model gives, for each row alone and for several at once."""
        for half, change in zip(self._halves, changes, strict=True):
            if not self._is_same(self._with_factors(half, shared) - self._at_mean, change):
                return False
        some = torch.arange(self.after.n_features, device=self.fhat.device)[:3]  # both halves in turn
        found = shared.features(self._halves[some % 2], some)
        expected = torch.stack([changes[i % 2][..., i] for i in range(len(some))], -1)
        return self._is_same(found - self._at_mean[..., some], expected)

    def _with_factors(self, factors: Tensor, shared: SharedParts | None) -> Tensor:
        """Output features with each input feature multiplied by a factor ``(r_in,)``."""
        if shared is None:
            return self._section(self.fhat * factors)
        rows = torch.arange(self.after.n_features, device=self.fhat.device)
        return shared.features(factors.expand(len(rows), -1), rows)

    def _affine_map(self, changes: Sequence[Tensor]) -> Tensor | None:
        """``J`` with ``fhat^{l+1} = fhat^{l+1}(mu) + fhat^l J^T`` at each position; None if it is not affine.

        Args:
            changes: What each half of the features changes.
        """
        n, S, r = self.fhat.shape
        if self._at_mean.shape[1] != S:
            return None
        # Large multiples of both signs: there, a ReLU that is active on all samples because of a large bias is not, and
        # a weak nonlinearity is visible.
        for factor in _FAR:
            for half, change in zip(self._halves, changes, strict=True):
                far = self._with_factors(factor * half, self.shared)
                if not self._is_same((far - self._at_mean) / factor, change):
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
        halves = [self.fhat * half for half in self._halves]
        same = all(self._is_same(half @ J.T, change) for half, change in zip(halves, changes, strict=True))
        return J if same else None

    def _is_same(self, a: Tensor, b: Tensor) -> bool:
        """Whether changes of the features are equal up to rounding, at valid positions. False for NaN."""
        a, b = apply_mask(a, self.mask_out), apply_mask(b, self.mask_out)
        return agree(a, b, torch.finfo(b.dtype).eps ** ROUNDING)


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
