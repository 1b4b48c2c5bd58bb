"""Features of a section's output, each computed from another input, with all that they have in common computed once.

In an edge ablation every output feature ``i`` is computed from an input of its own, ``mu + sum_j m_ij fhat_j C^+_j``,
with the mask ``m``. Run as it is, the model goes through everything before the section, decodes all features, and
computes all outputs, of which one is used. Here the section is a list of operations (`lib_lightning.model.recorded`):

1. What is affine in the input's features is computed for each feature in advance. A tensor between the input and the
   first nonlinear operations is ``t_0 + Phi (m_i * B)``, with ``t_0`` at the mean, the features ``Phi`` of the samples,
   and the change ``B`` of the tensor for one unit of each feature, shape ``(r_in, d_t)``. The product has as many terms
   as there are kept edges, not as many as the node layer is wide.
2. What is affine up to the output's features is multiplied out in advance as well: ``fhat'_i = c_i + sum_t t w_ti``
   over the last nonlinear tensors ``t``, with ``w_t`` of shape ``(d_t, r_out)``. Of a product with a weight only one
   column remains.
3. The operations in between are repeated for each row of the mask; if their tensors are small, for many rows at once.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lib_lightning.errors import is_out_of_memory
from lib_lightning.jacobian.section import STACK_ELEMENTS
from lib_lightning.model.precision import to_float64
from lib_lightning.model.recorded import Operation, RecordedFunction, Slot, last_uses
from lib_lightning.model.safe_points import safe_point

aten = torch.ops.aten

# Fewer rows are computed one after another, each from its own features alone.
_FEWEST_AT_ONCE = 8
# Products of weights with more numbers are not made in advance.
_MOST = 2**24
# What an operation does to all axes of a tensor but the last.
_Change = Callable[[Tensor], Tensor]


def _same(t: Tensor) -> Tensor:
    return t


class _Linear(NamedTuple):
    """A linear operation on a tensor ``(..., d)``: ``change(x @ W)``.

    Attributes:
        change: What it does to all axes but the last, for a last axis of any length.
        W: Shape ``(d, d')``; ``(d,)`` or ``()`` for a product entry by entry; None for the identity.
    """

    change: _Change = _same
    W: Tensor | None = None

    def columns(self, B: Tensor) -> Tensor:
        """``B W`` for ``B`` of shape ``(r, d)``."""
        return B if self.W is None else B @ self.W.to(B) if self.W.ndim == 2 else B * self.W.to(B)

    def rows(self, w: Tensor | None) -> Tensor | None:
        """``W w`` for ``w`` of shape ``(d', r)``; None for the identity."""
        if self.W is None or w is None:
            return w if self.W is None else self.W
        return self.W.to(w) @ w if self.W.ndim == 2 else self.W.to(w).reshape(-1, 1) * w


class _Term(NamedTuple):
    """A part ``Phi B`` of a tensor that is affine in the features.

    Attributes:
        Phi: The features for each row of the tensor, shape ``(..., r)``.
        B: Change of the tensor for one unit of each feature, shape ``(r, d)``, float64.
    """

    Phi: Tensor
    B: Tensor


# Indices of output features, shape ``(k,)``, or a single one.
_Rows = Tensor | int


def _columns(rows_first: Tensor, rows: _Rows) -> Tensor:
    """Some rows of a tensor ``(r, ...)``, as its last axis."""
    if isinstance(rows, int):
        return rows_first[rows].unsqueeze(-1)
    return rows_first.index_select(0, rows).movedim(0, -1)


class _Read(NamedTuple):
    """A part ``change(t @ w)`` of the output's features.

    Attributes:
        source: Number of the tensor ``t`` of shape ``(..., d)``.
        changes: What is done to the axes of ``t @ w``, in order.
        W_T: ``w`` transposed, shape ``(r_out, d)``; None for the identity.
    """

    source: int
    changes: tuple[_Change, ...]
    W_T: Tensor | None

    def of(self, t: Tensor, rows: _Rows) -> Tensor:
        """``change(t @ w)`` for some output features."""
        return self.changed(self.columns(t, rows))

    def columns(self, t: Tensor, rows: _Rows) -> Tensor:
        """``t @ w`` for some output features."""
        if self.W_T is not None:
            return t @ _columns(self.W_T, rows)
        return t[..., rows, None] if isinstance(rows, int) else t.index_select(-1, rows)

    def changed(self, t: Tensor) -> Tensor:
        """The features of each position of the output, from those of each row of the tensor."""
        for change in self.changes:
            t = change(t)
        return t


class _Output(NamedTuple):
    """A part of the output's features, while it is looked for; see `_Read`.

    Attributes:
        source: As for `_Read`.
        changes: As for `_Read`.
        w: Shape ``(d, r_out)``, float64; None for the identity.
    """

    source: int
    changes: tuple[_Change, ...]
    w: Tensor | None


def _with(t: Tensor, last: float) -> Tensor:
    """A tensor with one more entry in its last axis."""
    return torch.cat([t, t.new_full((*t.shape[:-1], 1), last)], -1)


class _Pattern(NamedTuple):
    """By how much each feature is multiplied.

    Attributes:
        columns: Indices of the features that are not zero, and after them the number of features; None for all.
        factors: Of these features, and 1 after them, shape ``(k + 1,)``; None if all of them are 1.
    """

    columns: Tensor | None
    factors: Tensor | None

    def rows(self, t: Tensor, has_constant: bool) -> Tensor:
        """The rows of a tensor that belong to these features, and that of the constant if it has one."""
        if self.columns is None:
            return t
        return t.index_select(0, self.columns if has_constant else self.columns[:-1])


class _ColumnTerm(NamedTuple):
    """A `_Term` of which some features are read.

    Attributes:
        shape: Shape of the tensor without its last axis.
        Phi_T: The features, shape ``(r, m)``: those of one feature are contiguous. With a constant, ones after them.
        B: Shape ``(r, d)``; with a constant, its values after them.
        row_of: For each row of the tensor, its column in ``Phi_T``; None if these are the rows in order.
        has_constant: Whether it contains a part that does not depend on features, which all rows have.
    """

    shape: tuple[int, ...]
    Phi_T: Tensor
    B: Tensor
    row_of: Tensor | None
    has_constant: bool = False

    def factors(self, pattern: _Pattern, selected: dict[int, Tensor]) -> tuple[Tensor, Tensor]:
        """``Phi`` of shape ``(m, k)`` and ``m * B`` of shape ``(k, d)``.

        Args:
            pattern: The pattern ``m``.
            selected: ``Phi_T`` of this pattern for terms that have the same features.
        """
        if id(self.Phi_T) not in selected:
            selected[id(self.Phi_T)] = pattern.rows(self.Phi_T, self.has_constant)
        Phi_T, B = selected[id(self.Phi_T)], pattern.rows(self.B, self.has_constant)
        return Phi_T.T, B if pattern.factors is None else B * pattern.factors[: len(B), None]

    def all_rows(self, t: Tensor) -> Tensor:
        """All rows of a tensor, from those ``(m, ...)`` that are computed."""
        return t if self.row_of is None else t.index_select(0, self.row_of)


class _Entry(NamedTuple):
    """A tensor of the section that is affine in the input's features.

    Attributes:
        shape: Its shape.
        at_zero: Its values at the mean, shape ``(rows, d)``; None if the first term contains them.
        terms: How it depends on the features.
    """

    shape: tuple[int, ...]
    at_zero: Tensor | None
    terms: Sequence[_ColumnTerm]

    def at(self, pattern: _Pattern, selected: dict[int, Tensor]) -> Tensor:
        """The tensor with features multiplied by a pattern; ``selected`` as for `_ColumnTerm.factors`."""
        t = self.at_zero
        for term in self.terms:
            Phi, B = term.factors(pattern, selected)
            if t is None or term.row_of is not None:
                rows = term.all_rows(Phi @ B)
                t = rows if t is None else t + rows
            else:
                t = torch.addmm(t, Phi, B)
        assert t is not None
        return t.reshape(self.shape)


class SharedSection:
    """Rows of output features of a section, each from features of its own.

    Args:
        recorded: The section, a function from activations ``(n, S, d)`` to ``(n, S', d')``, recorded at the mean.
        fhat: Features of the node layer before, shape ``(n, S, r_in)``; zero where they are not replaced.
        from_features: Their map to activations ``C^+``, shape ``(r_in, d)``.
        to_features: The next node layer's map to features ``C``, shape ``(d', r_out)``; None for the identity.
        at_mean: Output features at the mean, shape ``(n, S', r_out)``.
    """

    def __init__(
        self,
        recorded: RecordedFunction,
        fhat: Tensor,
        from_features: Tensor,
        to_features: Tensor | None,
        at_mean: Tensor,
    ) -> None:
        self._recorded, self._dtype, self._device, self._r = recorded, fhat.dtype, fhat.device, fhat.shape[-1]
        affine = _affine_tensors(recorded, fhat, from_features)
        reads = [
            _Read(read.source, read.changes, None if read.w is None else read.w.T.to(fhat).contiguous())
            for read in _outputs(recorded, to_features, affine)
        ]
        transposed = _Transposed()

        def entry(index: int) -> _Entry:
            value = recorded.values[index]
            at_zero = value.reshape(-1, value.shape[-1])
            terms = [transposed.columns(term, fhat) for term in affine[index]]
            # Adding the mean takes longer than the product with a few features, unless it is one of them.
            if len(at_zero) and bool((at_zero == at_zero[0]).all()):
                return _Entry(tuple(value.shape), None, [transposed.with_constant(terms[0], at_zero[0]), *terms[1:]])
            return _Entry(tuple(value.shape), at_zero, terms)

        # Parts of the output that are affine in the input's features need no tensor of the section.
        self._affine_reads = [
            (read, [transposed.columns(term, fhat) for term in affine[read.source]])
            for read in reads
            if read.source in affine
        ]
        self._reads = [read for read in reads if read.source not in affine]
        self._operations = recorded.needed([read.source for read in self._reads], affine)
        used = {index for operation in self._operations for index in operation.inputs} & set(affine)
        self._entries = {index: entry(index) for index in sorted(used)}
        rows = torch.arange(at_mean.shape[-1], device=self._device)
        constant = at_mean - sum(read.of(recorded.values[read.source], rows) for read in self._reads)
        self._constant = constant.movedim(-1, 0).contiguous()  # the output features first
        self._frees = last_uses(self._operations, {read.source for read in self._reads})
        made = [recorded.values[index] for operation in self._operations for index in operation.outputs]
        sizes = [*(t.numel() for t in made), *(math.prod(entry.shape) for entry in self._entries.values())]
        # Several rows at once gain time as long as their tensors are small.
        rows_at_once = STACK_ELEMENTS // max(1, self._constant[:1].numel(), *sizes)
        self.rows_at_once = rows_at_once if rows_at_once >= _FEWEST_AT_ONCE else 1
        recorded.values.clear()
        recorded.result = None

    @property
    def is_intact(self) -> bool:
        """Whether the rest of the model has not changed what the section uses."""
        return self._recorded.is_intact

    @property
    def kept(self) -> list[Tensor]:
        """All tensors that are kept."""
        terms = [term for entry in self._entries.values() for term in entry.terms]
        terms += [term for _, own in self._affine_reads for term in own]
        kept = [self._constant, *(constant.alias for constant in self._recorded.constants.values())]
        kept += [entry.at_zero for entry in self._entries.values() if entry.at_zero is not None]
        kept += [t for term in terms for t in (term.Phi_T, term.B, term.row_of) if t is not None]
        return kept + [read.W_T for read in self._reads if read.W_T is not None]

    def features(self, mask: Tensor, rows: Tensor) -> Tensor:
        """Compute some output features, each from the input features in its row of a mask.

        Args:
            mask: By how much each input feature is multiplied, shape ``(k, r_in)``.
            rows: Indices of the output features, shape ``(k,)``.

        Returns:
            Features, shape ``(n, S', k)``.
        """
        mask, rows = mask.to(self._device, self._dtype), rows.to(self._device)
        patterns, group = mask.unique(dim=0, return_inverse=True)
        found = self._constant.new_empty(len(rows), *self._constant.shape[1:])  # the output features first
        if self.rows_at_once > 1 and 2 * len(patterns) > len(rows):
            for some, part in self._parts(
                group.argsort(stable=True), lambda some: self._at_once(mask[some], rows[some])
            ):
                found[some] = part.movedim(-1, 0)
            return found.movedim(0, -1)
        some_of = group.argsort(stable=True).split(group.bincount(minlength=len(patterns)).tolist())
        for pattern, some in zip(self._patterns(patterns), some_of, strict=True):
            safe_point()
            if len(some) == 1:
                found[int(some)] = self._evaluate(pattern, int(rows[some])).squeeze(-1)
            else:
                found[some] = self._evaluate(pattern, rows[some]).movedim(-1, 0)
        return found.movedim(0, -1)

    def gradient(self, mask: Tensor, rows: Tensor, cotangent: Tensor) -> Tensor:
        """Derivatives of a function of some output features with respect to their rows of a mask.

        Args:
            mask: As for `features`.
            rows: As for `features`.
            cotangent: Derivatives with respect to the features, shape ``(n, S', k)``.

        Returns:
            Shape ``(k, r_in)``.
        """
        mask, rows = mask.to(self._device, self._dtype), rows.to(self._device)

        def of_some(some: Tensor) -> Tensor:
            with torch.enable_grad():
                own = mask[some].requires_grad_()
                many = self._at_once(own, rows[some], dense=True)
                return torch.autograd.grad(many, own, cotangent[..., some])[0] if many.requires_grad else own * 0

        found = torch.zeros_like(mask)
        for some, part in self._parts(torch.arange(len(rows), device=self._device), of_some):
            found[some] = part
        return found

    def _parts(self, order: Tensor, compute: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """A function of rows, for some rows after another; for fewer at once where more are not possible."""
        start = 0
        while start < len(order):
            safe_point()
            some = order[start : start + self.rows_at_once]
            try:
                yield some, compute(some)
            except Exception as error:
                if self.rows_at_once == 1:
                    raise
                # Some operation cannot be repeated for several values at once, or their tensors are too large.
                self.rows_at_once = self.rows_at_once // 2 if is_out_of_memory(error) else 1
                continue
            start += len(some)

    def _at_once(self, mask: Tensor, rows: Tensor, dense: bool = False) -> Tensor:
        """Features ``(n, S', k)`` of several rows, in one call of every operation."""
        columns = None if dense else _with(mask.any(0).nonzero().flatten(), self._r)
        factors = _with(mask if columns is None else mask[:, columns[:-1]], 1)
        if len(rows) == 1:
            return self._evaluate(_Pattern(columns, factors[0]), rows)

        def one(own: Tensor, row: Tensor) -> Tensor:
            return self._evaluate(_Pattern(columns, own), row).squeeze(-1)

        # A warning says that an operation is repeated for one value after another, which is faster without `vmap`.
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            many: Tensor = torch.vmap(one, out_dims=-1)(factors, rows[:, None])
        return many

    def _patterns(self, patterns: Tensor) -> Iterator[_Pattern]:
        """The rows of a mask ``(k, r_in)``, each with its own features only."""
        full = _with(patterns, 1)
        places = full.nonzero()
        counts = full.count_nonzero(1).tolist()
        factors = (
            None if bool(((patterns == 0) | (patterns == 1)).all()) else full[places[:, 0], places[:, 1]].split(counts)
        )
        for g, columns in enumerate(places[:, 1].split(counts)):
            is_full = counts[g] == full.shape[1]
            yield _Pattern(None if is_full else columns, None if factors is None else factors[g])

    def _evaluate(self, pattern: _Pattern, rows: _Rows) -> Tensor:
        """Features ``(n, S', k)`` that are computed from the same input."""
        selected: dict[int, Tensor] = {}
        values = {index: entry.at(pattern, selected) for index, entry in self._entries.items()}
        for operation, unused in zip(self._operations, self._frees, strict=True):
            operation.repeat(values)
            for index in unused:
                values.pop(index, None)
        total = _columns(self._constant, rows)
        for read in self._reads:
            total = total + read.of(values[read.source], rows)
        for read, terms in self._affine_reads:
            for term in terms:
                Phi, B = term.factors(pattern, selected)
                own = term.all_rows(Phi @ read.columns(B, rows))
                total = total + read.changed(own.reshape(*term.shape, -1))
        return total


class SharedParts:
    """A `SharedSection` for each of some parts of the samples, one after another.

    Args:
        parts: The parts, with the number of samples of each.
    """

    def __init__(self, parts: Sequence[tuple[int, SharedSection]]) -> None:
        self.sizes, self.parts = [size for size, _ in parts], [part for _, part in parts]

    @property
    def is_intact(self) -> bool:
        """As for `SharedSection`."""
        return all(part.is_intact for part in self.parts)

    @property
    def kept(self) -> list[Tensor]:
        """As for `SharedSection`."""
        return [t for part in self.parts for t in part.kept]

    def features(self, mask: Tensor, rows: Tensor) -> Tensor:
        """As for `SharedSection`."""
        return torch.cat([part.features(mask, rows) for part in self.parts])

    def gradient(self, mask: Tensor, rows: Tensor, cotangent: Tensor) -> Tensor:
        """As for `SharedSection`."""
        found = zip(self.parts, cotangent.split(self.sizes), strict=True)
        return torch.stack([part.gradient(mask, rows, own) for part, own in found]).sum(0)


class _Transposed:
    """Features as `_ColumnTerm` has them, each once however many terms have them."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], tuple[Tensor, Tensor | None]] = {}
        self._with_ones: dict[int, Tensor] = {}

    def columns(self, term: _Term, like: Tensor) -> _ColumnTerm:
        """A term, with ``B`` in the type of another tensor."""
        Phi = term.Phi.reshape(-1, term.Phi.shape[-1])
        key = (Phi.data_ptr(), Phi.shape, Phi.stride())
        if key not in self._found:
            rows, row_of = _distinct(Phi)
            self._found[key] = rows.T.contiguous(), row_of
        Phi_T, row_of = self._found[key]
        return _ColumnTerm(tuple(term.Phi.shape[:-1]), Phi_T, term.B.to(like), row_of)

    def with_constant(self, term: _ColumnTerm, constant: Tensor) -> _ColumnTerm:
        """A term to which a constant ``(d,)`` is added in all rows."""
        key = id(term.Phi_T)
        if key not in self._with_ones:
            self._with_ones[key] = torch.cat([term.Phi_T, torch.ones_like(term.Phi_T[:1])])
        return term._replace(Phi_T=self._with_ones[key], B=torch.cat([term.B, constant[None]]), has_constant=True)


def _distinct(Phi: Tensor) -> tuple[Tensor, Tensor | None]:
    """The distinct rows of a matrix, and which of them each row is; the matrix and None if few rows are equal.

    A token at a position has the same embedding wherever it occurs.
    """
    if 2 * len(Phi[:, :1].unique()) <= len(Phi):  # in less time than whole rows are compared
        distinct, row_of = Phi.unique(dim=0, return_inverse=True)
        if 2 * len(distinct) <= len(Phi):
            return distinct, row_of
    return Phi, None


def _affine_tensors(recorded: RecordedFunction, fhat: Tensor, from_features: Tensor) -> dict[int, list[_Term]]:
    """The tensors of a section that are affine in the features of its input, by number, with their terms."""
    found = {0: [_Term(fhat, to_float64(from_features))]} if 0 not in recorded.written else {}
    for operation in recorded.operations:
        parts = _linear_parts(operation, recorded)
        if parts is None or any(index not in found for index, _ in parts):
            continue
        terms: list[_Term] = []
        for index, linear in parts:
            for Phi, B in found[index]:
                terms = _with_term(terms, _Term(linear.change(Phi), linear.columns(B)))
        if all(term.B.numel() <= _MOST and term.Phi.numel() <= max(_MOST, fhat.numel()) for term in terms):
            found[operation.outputs[0]] = terms
    return found


def _with_term(terms: Sequence[_Term], new: _Term) -> list[_Term]:
    """Terms with another one, added to that with the same features if there is one."""
    if any(term.Phi is new.Phi for term in terms):
        return [_Term(term.Phi, term.B + new.B) if term.Phi is new.Phi else term for term in terms]
    return [*terms, new]


def _outputs(recorded: RecordedFunction, to_features: Tensor | None, affine: Collection[int]) -> list[_Output]:
    """The tensors of which the output's features are an affine function, as early in the section as possible."""
    w = None if to_features is None else to_float64(to_features)
    waiting: dict[int, list[_Output]] = {recorded.output: [_Output(recorded.output, (), w)]}
    for operation in reversed(recorded.operations):
        index = operation.outputs[0] if len(operation.outputs) == 1 else -1
        if index not in waiting or index in affine:
            continue
        parts = _linear_parts(operation, recorded)
        if parts is None:
            continue
        earlier = [
            _Output(part, (*(() if linear.change is _same else (linear.change,)), *read.changes), linear.rows(read.w))
            for part, linear in parts
            for read in waiting[index]
        ]
        if any(read.w is not None and (read.w.ndim < 2 or read.w.numel() > _MOST) for read in earlier):
            continue
        del waiting[index]
        for read in earlier:
            waiting[read.source] = _with_output(waiting.get(read.source, []), read)
    return [read for reads in waiting.values() for read in reads]


def _with_output(reads: Sequence[_Output], new: _Output) -> list[_Output]:
    """Parts of the output with another one, added to that with the same changes if there is one."""
    for k, read in enumerate(reads):
        if read.changes == new.changes and read.w is not None and new.w is not None:
            return [*reads[:k], read._replace(w=read.w + new.w), *reads[k + 1 :]]
    return [*reads, new]


def _linear_parts(operation: Operation, recorded: RecordedFunction) -> list[tuple[int, _Linear]] | None:
    """How the result of an operation depends on its inputs, if it is a constant plus a sum of linear functions.

    Args:
        operation: The operation.
        recorded: The function that it belongs to.

    Returns:
        The numbers of the inputs, each with its linear function; None for any other operation.
    """
    if operation.writes or len(operation.outputs) != 1 or {*operation.inputs, *operation.outputs} & recorded.written:
        return None
    result = recorded.values[operation.outputs[0]]
    inputs = [recorded.values[index] for index in operation.inputs]
    if not inputs or any(t.dtype != result.dtype or t.ndim == 0 for t in (*inputs, result)):
        return None
    if operation.name in ("aten::add.Tensor", "aten::sub.Tensor"):
        return _of_sum(operation, result, recorded)
    if len(inputs) != 1:
        return None
    rule = _RULES.get(operation.name)
    linear = None if rule is None else rule(operation.args, operation.kwargs, inputs[0], result)
    return None if linear is None else [(operation.inputs[0], linear)]


def _of_sum(operation: Operation, result: Tensor, recorded: RecordedFunction) -> list[tuple[int, _Linear]] | None:
    factors = [1.0, operation.kwargs.get("alpha", 1) * (-1.0 if "sub" in operation.name else 1.0)]
    parts = []
    for value, factor in zip(operation.args, factors, strict=True):
        if isinstance(value, Slot):
            if recorded.values[value.index].shape != result.shape:
                return None
            parts.append((value.index, _Linear() if factor == 1 else _Linear(W=_number(factor, result))))
    return parts


def _number(value: float, like: Tensor) -> Tensor:
    return torch.tensor(float(value), dtype=like.dtype, device=like.device)


# The rules below are for operations with one input ``x`` that depends on the features: from arguments, keyword
# arguments, input and result to the linear function.
_Rule = Callable[[Sequence[Any], Mapping[str, Any], Tensor, Tensor], _Linear | None]


def _same_last_axis(x: Tensor, result: Tensor) -> bool:
    return x.shape[-1] == result.shape[-1] and x.ndim > 0


def _view(args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, result: Tensor) -> _Linear | None:
    shape = result.shape[:-1]
    return _Linear(lambda t: t.reshape(*shape, t.shape[-1])) if _same_last_axis(x, result) else None


def _expand(args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, result: Tensor) -> _Linear | None:
    shape = result.shape[:-1]
    return _Linear(lambda t: t.expand(*shape, t.shape[-1])) if _same_last_axis(x, result) else None


def _identity(args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, result: Tensor) -> _Linear | None:
    """An operation whose result has all entries of ``x`` in their order if it has the same shape."""
    return _Linear() if x.shape == result.shape else None


def _along_axis(function: Callable[..., Tensor]) -> _Rule:
    """An operation along one axis, its second argument, which is not the last one, or changes nothing."""

    def rule(args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, result: Tensor) -> _Linear | None:
        axis = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % x.ndim
        rest = args[2:]
        named = {key: value for key, value in kwargs.items() if key != "dim"}
        if axis < x.ndim - 1:
            return _Linear(lambda t: function(t, axis, *rest, **named))
        return _Linear() if function is aten.slice.Tensor and x.shape == result.shape else None

    return rule


def _indexed(args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, result: Tensor) -> _Linear | None:
    """``x[:, index]``."""
    is_first = isinstance(args[0], Slot) and len(args[1]) < x.ndim
    return _Linear(lambda t: aten.index.Tensor(t, args[1])) if is_first else None


def _inserted(args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, result: Tensor) -> _Linear | None:
    """``x`` at some positions of a constant."""
    axis, index = args[1] % result.ndim, args[2]
    if not isinstance(args[3], Slot) or axis == result.ndim - 1:
        return None
    shape = result.shape[:-1]
    return _Linear(lambda t: t.new_zeros(*shape, t.shape[-1]).index_copy(axis, index, t))


def _unsqueeze(args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, result: Tensor) -> _Linear | None:
    axis = args[1] % (x.ndim + 1)
    return _Linear(lambda t: t.unsqueeze(axis)) if axis < x.ndim else None


def _transpose(args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, result: Tensor) -> _Linear | None:
    axes = [axis % x.ndim for axis in args[1:3]]
    return _Linear(lambda t: t.transpose(*axes)) if max(axes) < x.ndim - 1 else None


def _permute(args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, result: Tensor) -> _Linear | None:
    axes = [axis % x.ndim for axis in args[1]]
    return _Linear(lambda t: t.permute(axes)) if axes[-1] == x.ndim - 1 else None


def _over_axes(function: Callable[..., Tensor]) -> _Rule:
    """A sum or mean over axes, the second argument, without the last one."""

    def rule(args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, result: Tensor) -> _Linear | None:
        axes = [axis % x.ndim for axis in args[1] or range(x.ndim)]
        keep = bool(args[2]) if len(args) > 2 else bool(kwargs.get("keepdim", False))
        return _Linear(lambda t: function(t, axes, keep)) if max(axes, default=x.ndim) < x.ndim - 1 else None

    return rule


def _matrix(args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, result: Tensor) -> _Linear | None:
    """``x @ W``."""
    is_first = isinstance(args[0], Slot) and isinstance(args[1], Tensor)
    return _Linear(W=args[1]) if is_first and args[1].ndim == 2 else None


def _matrix_and_bias(args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, result: Tensor) -> _Linear | None:
    """``b + x @ W``."""
    is_last = isinstance(args[1], Slot) and isinstance(args[2], Tensor)
    return _Linear(W=args[2]) if is_last and args[2].ndim == 2 and not kwargs else None


def _weight(args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, result: Tensor) -> _Linear | None:
    """``x @ W^T + b``."""
    is_first = isinstance(args[0], Slot) and isinstance(args[1], Tensor)
    return _Linear(W=args[1].T) if is_first and args[1].ndim == 2 else None


def _product(args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, result: Tensor) -> _Linear | None:
    """``x * c`` with a number, or with a tensor that varies along the last axis or along the others."""
    c = args[1] if isinstance(args[0], Slot) else args[0]
    return _times(c, x, result)


def _quotient(args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, result: Tensor) -> _Linear | None:
    """``x / c``."""
    if not isinstance(args[0], Slot) or kwargs:
        return None
    c = args[1]
    return _times(
        1 / c if isinstance(c, (int, float)) and c else c.reciprocal() if isinstance(c, Tensor) else None, x, result
    )


def _times(c: Any, x: Tensor, result: Tensor) -> _Linear | None:
    if isinstance(c, (int, float)):
        return _Linear(W=_number(c, x))
    if not isinstance(c, Tensor) or x.shape != result.shape or c.dtype != x.dtype:
        return None
    if math.prod(c.shape[:-1]) == 1:
        return _Linear(W=c.reshape(-1) if c.numel() > 1 else c.reshape(()))
    return _Linear(lambda t: t * c) if c.shape[-1] == 1 else None


def _negative(args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, result: Tensor) -> _Linear | None:
    return _Linear(W=_number(-1, x))


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("aten::view", "aten::_unsafe_view", "aten::_reshape_alias"), _view),
    **dict.fromkeys(("aten::clone", "aten::detach", "aten::alias", "aten::lift_fresh", "aten::_to_copy"), _identity),
    "copied": _identity,
    "aten::expand": _expand,
    "aten::slice.Tensor": _along_axis(aten.slice.Tensor),
    "aten::select.int": _along_axis(aten.select.int),
    "aten::index_select": _along_axis(torch.index_select),
    "aten::squeeze.dim": _along_axis(torch.squeeze),
    "aten::index.Tensor": _indexed,
    "aten::index_copy": _inserted,
    "aten::split_with_sizes": _identity,
    "aten::unsqueeze": _unsqueeze,
    "aten::transpose.int": _transpose,
    "aten::permute": _permute,
    "aten::mean.dim": _over_axes(torch.mean),
    "aten::sum.dim_IntList": _over_axes(torch.sum),
    "aten::mm": _matrix,
    "aten::addmm": _matrix_and_bias,
    "aten::linear": _weight,
    **dict.fromkeys(("aten::mul.Tensor", "aten::mul.Scalar"), _product),
    **dict.fromkeys(("aten::div.Tensor", "aten::div.Scalar"), _quotient),
    "aten::neg": _negative,
}
