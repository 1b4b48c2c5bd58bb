"""Finding a section's closed form in the graph that autograd made of it, and holding it to account.

What the graph says is a guess: which operations mix features, and which only bend single numbers, goes by their names.
On a few samples the weights are read off, by backward passes that ask for one row of them at every position, and the
form has to give the same product with the Jacobian as autograd does, for a random vector. Factors, too, may differ from
batch to batch: at every one the graph has to consist of the same operations with the same weights in them, or else the
form has to give the same product again, all the way to the node layer. Where it does not, the section is computed like
any other.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lib_lightning.errors import is_out_of_memory
from lib_lightning.jacobian.closed_form import ClosedForm, Factors
from lib_lightning.jacobian.section import Section
from lib_lightning.model.autograd_graph import Edge, PathNode, edge_of, path_nodes, saved_names, shape_of
from lib_lightning.model.vjp import apply_mask

# Operations that bend nothing, by what autograd calls them: they leave numbers as they are, or add.
_LAYOUT = re.compile(
    r"AccumulateGrad|Copy|Clone|Alias|View|Reshape|Squeeze|Unsqueeze|Permute|Transpose|Slice|Select|Index"
)
_ADD = re.compile(r"^(Add|Sub)Backward")
# Operations that are what autograd shows of them, with no more than weights inside.
_KNOWN = re.compile(
    r"::(AccumulateGrad|CopyBackwards)$"
    r"|^(Mm|Addmm|T|Transpose|Permute|View|UnsafeView|ReshapeAlias|Clone|Alias|Add|Sub)Backward\d$"
)
# Operations whose derivative is torch's own: of others nothing is shown.
_BUILT_IN = re.compile(r"Backward\d$")
_Constants = list[tuple[Any, ...]]
# Samples to read weights off.
SAMPLES = 64
# A closed form is a handful of operations; a longer graph is none.
_OPERATIONS = 40
# One pass reads off one row for each position that counts; so many passes at most.
_PASSES = 256
# Random directions that a product is looked at along, for each sample: that of one could be small by chance.
_DIRECTIONS = 4
# How closely products agree, as a power of the precision: rounding over thousands of terms, and no more.
_SAME = 0.75


class ClosedFormDetector:
    """Knows the closed form of one section, once it has been read off a few samples."""

    def __init__(self) -> None:
        # A ReLU that is on for all of the few samples looks affine; then there are two.
        self._forms: list[tuple[Factors, _Constants | None]] = []

    def learn(self, section: Section) -> None:
        """Read off all forms that fit a section.

        Args:
            section: The section at a few samples.
        """
        if _may_be_simple(section):
            with _tolerate():
                search = _Search(section)
                for weights in search.read_off():
                    fitting = (constants for form, constants in search.forms(weights) if search.agrees(form))
                    self._forms += [(weights, constants) for constants in itertools.islice(fitting, 1)]

    def __call__(self, section: Section) -> ClosedForm | None:
        """Find the closed form of a section.

        Args:
            section: The section at one batch.

        Returns:
            The form; None if there is none that fits.
        """
        if self._forms and _may_be_simple(section):
            with _tolerate():
                search = _Search(section)
                for weights, known in self._forms:
                    for form, constants in search.forms(weights):
                        if _equal(known, constants) or search.agrees(form):
                            return form
        return None


class ElementwiseSpan(NamedTuple):
    """Where an activation function begins and ends, the operations between, and whether a residual passes it by."""

    start: Edge
    stop: Edge
    operations: frozenset[Node]
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
        self.parts = path_nodes([self.begin], self.end)
        self.bends = list(_bends(self.begin, self.end, self.parts))
        counts = torch.ones(section.n, section.S_in, dtype=torch.bool, device=section.a.device)
        masks = [mask for mask in (section.mask_in, section.mask_out) if mask is not None]
        for mask in masks:
            counts = counts & mask
        self.counts, self.masked = counts, bool(masks)
        # All positions, and where among them those lie that are looked at.
        self.S_all = replace(self.layer, positions=None).read([self.leaf]).shape[1]
        index = torch.arange(self.S_all, device=section.a.device)
        self.positions = self.layer.positions_of(index[None, :, None])[0, :, 0]

    @cached_property
    def u(self) -> Tensor:
        """A random vector on the side of the output, zero at positions that do not count."""
        return self._counted(_random(self.a_out, self.a_out.shape))

    def forms(self, weights: Factors) -> Iterator[tuple[ClosedForm, _Constants | None]]:
        """Forms with these weights that the section may have at this batch, each with what does not bend.

        Args:
            weights: What is the same at all positions.

        Yields:
            A form, and what the operations beside its activation function hold.
        """
        if weights.affine:
            yield ClosedForm(weights, None, self.counts), self._constants(frozenset())
            return
        for bend in self.bends:
            start, stop = self._place(bend.start), self._place(bend.stop)
            slopes = self._counted(start.read(_pull(stop, start, self.a_out.new_ones(stop.shape))))
            if bend.residual == weights.residual and slopes.shape[-1] == weights.hidden:
                yield ClosedForm(weights, slopes, self.counts), self._constants(bend.operations)

    def agrees(self, form: ClosedForm) -> bool:
        """Whether a form gives the products that autograd gives."""
        v = _random(self.a_out, (self.section.d_in, _DIRECTIONS))
        return _same(form.seen_along(self.u, v), self._product @ v)

    def _constants(self, bent: frozenset[Node]) -> _Constants | None:
        nodes = dict.fromkeys(part.edge.node for part in self.parts)
        held = [_signature(node, node in bent) for node in nodes]
        known = [one for one in held if one is not None]
        return known if len(known) == len(held) else None

    @cached_property
    def _product(self) -> Tensor:
        """What autograd makes of the random vector, all the way: shape ``(n, S, d_in)``."""
        return self._pull(self._place(self.end), self._place(self.begin))

    def read_off(self) -> Iterator[Factors]:
        """Weights of all forms that this section could have."""
        d_in, d_out = self.section.d_in, self.section.d_out
        if self._enough(d_out):
            yield Factors(None, self._rows(self.end, self.begin, d_out), d_in, affine=True)
        for bend in self.bends:
            h = self._pull(self._place(self.end), self._place(bend.start)).shape[-1]
            if self._enough(max(h, d_out)):
                W_1 = None if bend.start == self.begin else self._rows(bend.start, self.begin, h)
                W_2 = None if bend.stop == self.end else self._rows(self.end, bend.stop, d_out)
                yield Factors(W_1, W_2, h, bend.residual)

    @cached_property
    def _counting(self) -> tuple[Tensor, Tensor]:
        """Samples and positions that count."""
        x, s = self.counts.nonzero(as_tuple=True)
        return x, s

    def _enough(self, units: int) -> bool:
        return units <= _PASSES * len(self._counting[0])

    def _rows(self, stop: Edge, start: Edge, units: int) -> Tensor:
        """The linear map from one place to another, ``(units, width)``: each row at a position of its own."""
        of, by, (x, s) = self._place(stop), self._place(start), self._counting
        s_all = s if stop == self.end else self.positions[s]
        rows = []
        for k in torch.arange(units, device=x.device).split(len(x)):
            m = len(k)
            u = self.a_out.new_zeros(of.shape)
            u.view(self.section.n, -1, units)[x[:m], s_all[:m], k] = 1
            rows.append(by.read(_pull(of, by, u))[x[:m], s[:m]])
        return torch.cat(rows)

    def _place(self, edge: Edge) -> _Place:
        if edge == self.end:
            return _Place(self.a_out, self.a_out.shape, lambda t: t)
        if edge == self.begin:
            return _Place(self.leaf, self.leaf.shape, lambda t: self.layer.read([t]))
        # Tensors between node layers are known to autograd only. Their numbers are taken to lie in the order of
        # samples, positions and features: where they do not, the form will not fit.
        rows = self.section.n, self.S_all, -1
        return _Place(GradientEdge(*edge), shape_of(edge), lambda t: self.layer.positions_of(t.reshape(rows)))

    def _pull(self, of: _Place, by: _Place) -> Tensor:
        """What autograd makes of the random vector, ``(n, S, width)``."""
        return self._counted(by.read(_pull(of, by, self.u)))

    def _counted(self, rows: Tensor) -> Tensor:
        return apply_mask(rows, self.counts) if self.masked else rows


@contextmanager
def _tolerate() -> Iterator[None]:
    """A search that an error ends: a shape that is another at this batch, or an operation without such a derivative."""
    try:
        yield
    except (RuntimeError, NotImplementedError, IndexError) as error:
        if is_out_of_memory(error):
            raise


def _random(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)


def _signature(node: Node, bends: bool) -> tuple[Any, ...] | None:
    """What an operation is made of, as far as autograd shows it; None if that may not be all.

    Of weights a product with a random vector, which tells them apart. What bends numbers has saved them, too, and these
    are not compared: unless they say which ones go where.
    """
    if (_BUILT_IN if bends else _KNOWN).search(node.name()) is None:
        return None
    found: list[Any] = [node.name()]
    for name in saved_names(type(node)):
        if "strides" in name:
            continue
        value = getattr(node, name)
        if isinstance(value, Tensor):
            if bends and (value.is_floating_point() or value.dtype == torch.bool):
                continue
            if bends or value.ndim != 2:
                return None
            found.append(value @ _random(value, value.shape[-1:]))
        elif isinstance(value, list):
            return None
        else:
            found.append(value[1:] if "sizes" in name else value)  # of whatever number of samples
    return tuple(found)


def _equal(a: _Constants | None, b: _Constants | None) -> bool:
    """Whether these are the same operations with the same weights, and known to be no more than that."""

    def same(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y

    if a is None or b is None or [len(x) for x in a] != [len(x) for x in b]:
        return False
    return all(same(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two products are equal up to rounding, and tell something."""
    size = b.norm()
    return bool(size > 0) and bool((a - b).norm() <= torch.finfo(b.dtype).eps ** _SAME * size)


def _pull(of: _Place, by: _Place, u: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(of.target, by.target, u, retain_graph=True)
    return gradient


def _may_be_simple(section: Section) -> bool:
    """Whether a section could act on each position by itself, seen from outside."""
    if len(section.points) != 1 or section.S_in != section.S_out or torch.finfo(section.a.dtype).bits < 32:
        return False
    (point,) = section.points
    return len(point.before.leaves) == len(point.after.outputs) == 1 and point.after.outputs[0].requires_grad


def _bends(begin: Edge, end: Edge, parts: list[PathNode]) -> Iterator[ElementwiseSpan]:
    """Runs of operations that mix nothing, and that everything passes, in a section with at most two that do."""
    residual = False
    add = _before_layout(end).node
    if _ADD.search(add.name()):
        branches = [Edge(node, k) for node, k in add.next_functions if node is not None]
        straight = [_before_layout(branch) == begin for branch in branches]
        if len(branches) == 2 and sum(straight) == 1:
            parts, residual = path_nodes([begin], branches[straight.index(False)]), True
    if not parts or len(parts) > _OPERATIONS or parts[-1].mixing_depth > 2:
        return
    for _, group in itertools.groupby(parts, key=lambda part: part.mixing_depth):
        run = list(group)
        names = [part.edge.node.name() for part in run[1:]]
        passed = [part.edge for part in run if part.is_dominator]
        if passed and not all(_LAYOUT.search(name) or _ADD.search(name) for name in names):
            edges = [part.edge for part in run]
            between = edges[edges.index(passed[0]) + 1 : edges.index(passed[-1]) + 1]
            yield ElementwiseSpan(passed[0], passed[-1], frozenset(edge.node for edge in between), residual)


def _before_layout(edge: Edge) -> Edge:
    """The result that another one shows in another layout."""
    while _LAYOUT.search(edge.node.name()):
        inputs = [Edge(before, k) for before, k in edge.node.next_functions if before is not None]
        if len(inputs) != 1:
            break
        (edge,) = inputs
    return edge
