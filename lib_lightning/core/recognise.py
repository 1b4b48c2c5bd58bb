"""Finding a section's closed form in the graph that autograd made of it, and holding it to account.

What the graph says is a guess: which operations mix features, and which only bend single numbers, goes by their names.
The weights are read off by backward passes that ask for one row of them at every position. Then the form has to give
the same product with the Jacobian as autograd does, for a random vector, at every batch anew; where it does not, the
section is computed like any other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from lib_lightning.core.closed import ClosedForm, Weights
from lib_lightning.core.flow import Edge, before_layout, edge_of, flow
from lib_lightning.core.section import Section

# A closed form is a handful of operations; a longer graph is none.
_OPERATIONS = 40
# One pass reads off one row for each position that counts. A batch that takes more passes than this is left to others.
_PASSES = 8
# How closely products agree, as a power of the precision: rounding over thousands of terms, and no more.
_SAME = 0.75


class Recognition:
    """Looks for the closed form of one section, batch after batch.

    Weights read off one batch serve the next ones as long as they fit.
    """

    def __init__(self) -> None:
        self._weights: Weights | None = None
        self._hopeless = False

    def __call__(self, section: Section) -> ClosedForm | None:
        """Find the closed form of a section.

        Args:
            section: The section at one batch.

        Returns:
            The form; None if there is none, or the batch is too small to read it off.
        """
        if self._hopeless or not _may_be_simple(section):
            return None
        try:
            search = _Search(section)
            known = search.known(self._weights) if self._weights else iter(())
            form = next(filter(search.fits, itertools.chain(known, search.new())), None)
        except (RuntimeError, NotImplementedError):
            self._hopeless = True  # an operation that cannot be differentiated in parts
            return None
        if form is not None:
            self._weights = form.weights
        elif self._weights is None and search.conclusive:
            self._hopeless = True
        return form


class _Bend(NamedTuple):
    """Where an activation function begins and ends; whether a residual passes it by."""

    start: Edge
    stop: Edge
    residual: bool


class _Place(NamedTuple):
    """A result on the way through the section.

    Attributes:
        target: What autograd knows it by.
        shape: Its shape.
        read: From a tensor of that shape to one of shape ``(n, S, width)``.
    """

    target: Tensor | GradientEdge
    shape: torch.Size
    read: Callable[[Tensor], Tensor]


class _Search:
    """The search at one batch."""

    def __init__(self, section: Section) -> None:
        (point,) = section.points
        self.section, self.layer = section, point.before.layer
        (self.leaf,), self.a_out = point.before.leaves, point.after.a
        self.begin, self.end = edge_of(self.leaf), edge_of(self.a_out)
        counts = torch.ones(section.n, section.S_in, dtype=torch.bool, device=section.a.device)
        for mask in (section.mask_in, section.mask_out):
            counts = counts if mask is None else counts & mask
        self.counts, (self.x, self.s) = counts, counts.nonzero(as_tuple=True)
        # All positions, and where among them those lie that are looked at.
        self.S_all = replace(self.layer, positions=None).read([self.leaf]).shape[1]
        index = torch.arange(self.S_all, device=section.a.device)
        self.positions = self.layer.positions_of(index[None, :, None])[0, :, 0]
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(1, *self.a_out.shape, generator=generator).to(self.a_out)
        self.u, self.product = u[0], section.vjp(u)[0]
        # Nothing is learnt from a batch without derivatives, or too small to read weights off.
        self.conclusive = bool(self.product.any())

    def fits(self, form: ClosedForm) -> bool:
        """Whether a form gives the product that autograd gives."""
        difference, size = (form.vjp(self.u) - self.product).norm(), self.product.norm()
        return bool(size > 0) and bool(difference <= torch.finfo(size.dtype).eps ** _SAME * size)

    def known(self, weights: Weights) -> Iterator[ClosedForm]:
        """Forms with given weights."""
        if weights.affine:
            yield ClosedForm(weights, None, self.counts)
            return
        for bend in _bends(self.begin, self.end):
            slopes = self._slopes(bend)
            if bend.residual == weights.residual and slopes.shape[-1] == weights.hidden:
                yield ClosedForm(weights, slopes, self.counts)

    def new(self) -> Iterator[ClosedForm]:
        """Forms with weights read off here."""
        d_in, d_out = self.section.d_in, self.section.d_out
        if self._enough(d_out):
            J = self._read_off(self.end, self.begin, d_out)
            yield ClosedForm(Weights(None, J, d_in, affine=True), None, self.counts)
        for bend in _bends(self.begin, self.end):
            slopes = self._slopes(bend)
            h = slopes.shape[-1]
            if self._enough(max(h, d_out)):
                W_1 = None if bend.start == self.begin else self._read_off(bend.start, self.begin, h)
                W_2 = None if bend.stop == self.end else self._read_off(self.end, bend.stop, d_out)
                yield ClosedForm(Weights(W_1, W_2, h, bend.residual), slopes, self.counts)

    def _enough(self, units: int) -> bool:
        enough = units <= _PASSES * len(self.x)
        self.conclusive = self.conclusive and enough
        return enough

    def _slopes(self, bend: _Bend) -> Tensor:
        """Derivative of each number after a bend by the same one before it, ``(n, S, h)``."""
        start, stop = self._place(bend.start), self._place(bend.stop)
        slopes = start.read(_pull(stop, start, self.a_out.new_ones(stop.shape)))
        return torch.where(self.counts[..., None], slopes, slopes.new_zeros(()))

    def _read_off(self, stop: Edge, start: Edge, units: int) -> Tensor:
        """The linear map from one place to another, ``(units, width)``: each row at a position of its own."""
        of, by = self._place(stop), self._place(start)
        s_all = self.s if stop == self.end else self.positions[self.s]
        rows = []
        for k in torch.arange(units, device=self.x.device).split(len(self.x)):
            m = len(k)
            u = self.a_out.new_zeros(of.shape)
            u.view(self.section.n, -1, units)[self.x[:m], s_all[:m], k] = 1
            rows.append(by.read(_pull(of, by, u))[self.x[:m], self.s[:m]])
        return torch.cat(rows)

    def _place(self, edge: Edge) -> _Place:
        if edge == self.end:
            return _Place(self.a_out, self.a_out.shape, lambda t: t)
        if edge == self.begin:
            return _Place(self.leaf, self.leaf.shape, lambda t: self.layer.read([t]))
        # Tensors between node layers are known to autograd only; what arrives there shows their shape. Their numbers
        # are taken to lie in the order of samples, positions and features: where they do not, the form will not fit.
        target = GradientEdge(*edge)
        (gradient,) = torch.autograd.grad([self.a_out], [target], [self.u], retain_graph=True)
        rows = self.section.n, self.S_all, -1
        return _Place(target, gradient.shape, lambda t: self.layer.positions_of(t.reshape(rows)))


def _pull(of: _Place, by: _Place, u: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(of.target, by.target, u, retain_graph=True)
    return gradient


def _may_be_simple(section: Section) -> bool:
    """Whether a section could act on each position by itself, seen from outside."""
    if len(section.points) != 1 or section.S_in != section.S_out or torch.finfo(section.a.dtype).bits < 32:
        return False
    (point,) = section.points
    return len(point.before.leaves) == len(point.after.ends) == 1 and point.after.ends[0].requires_grad


def _bends(begin: Edge, end: Edge) -> Iterator[_Bend]:
    """Runs of operations that mix nothing, and that everything passes, in a section with at most two that do."""
    parts, residual = flow([begin], end), False
    add = before_layout(end).node
    if add.name().startswith("AddBackward"):
        branches = [Edge(node, k) for node, k in add.next_functions if node is not None]
        straight = [before_layout(branch) == begin for branch in branches]
        if len(branches) == 2 and sum(straight) == 1:
            parts, residual = flow([begin], branches[straight.index(False)]), True
    if not parts or len(parts) > _OPERATIONS or parts[-1].stage > 2:
        return
    for _, group in itertools.groupby((part for part in parts if part.unavoidable), key=lambda part: part.stage):
        run = list(group)
        if run[-1].step > run[0].step:
            yield _Bend(run[0].edge, run[-1].edge, residual)
