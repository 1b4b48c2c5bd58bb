"""Detection of closed forms in the autograd graph of a section, verified against autograd.

The graph only suggests a form: which operations mix features and which are elementwise is guessed from their names. On
a few samples the factors are then extracted by backward passes, each of which reads one row of a factor at every
position, and the form is accepted if it gives the same product with the Jacobian as autograd for a random vector.
Factors may also change from batch to batch. A form is used for another batch only if the graph of that batch consists
of the same operations with the same weights, or if the form gives autograd's product there, too. A section without a
form is computed by automatic differentiation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from lib_lightning.errors import is_out_of_memory
from lib_lightning.jacobian.closed_form import ClosedForm, Factors
from lib_lightning.jacobian.integrated_gradients import sections_between
from lib_lightning.jacobian.section import Section
from lib_lightning.model.agreement import agree
from lib_lightning.model.autograd_graph import (
    Edge,
    PathNode,
    edge_of,
    gradient_edge,
    input_edges,
    is_addition,
    is_built_in,
    is_fully_described,
    is_layout,
    path_nodes,
    saved_names,
    shape_of,
)
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.vjp import apply_mask

# What operations other than the nonlinearity consist of: names and saved values, one tuple for each operation.
_Signatures = list[tuple[Any, ...]]
# Samples from which factors are extracted.
SAMPLES = 64
# A closed form is a handful of operations; longer graphs are not searched.
_MAX_OPERATIONS = 40
# One backward pass extracts one row for each valid position; at most this many passes.
_MAX_PASSES = 256
# Random directions along which products are compared, for each sample: a single one may be small by chance.
_DIRECTIONS = 4
# Products agree up to this power of the precision: rounding, over thousands of terms.
_TOLERANCE_EXPONENT = 0.75


class ClosedForms(Protocol):
    """Where the algorithm looks up the closed form of a section."""

    @classmethod
    def fit(cls, instrumented: InstrumentedModel, batches: Sequence[Any]) -> ClosedForms:
        """Prepare to recognise the closed forms of all sections of a model.

        Args:
            instrumented: The model and its node layers.
            batches: All batches.

        Returns:
            The closed forms.
        """
        ...

    def closed_form_of(self, index: int, section: Section) -> ClosedForm | None:
        """Find the closed form of a section.

        Args:
            index: Index of the section.
            section: The section at one batch.

        Returns:
            Its closed form; None if it has none.
        """
        ...


class NoClosedForms:
    """The plain twin of `DetectedClosedForms`: every section is computed by automatic differentiation."""

    @classmethod
    def fit(cls, instrumented: InstrumentedModel, batches: Sequence[Any]) -> NoClosedForms:
        """See `ClosedForms`."""
        return cls()

    def closed_form_of(self, index: int, section: Section) -> ClosedForm | None:
        """See `ClosedForms`."""
        return None


class DetectedClosedForms:
    """Closed forms that are found in the graphs of the first samples.

    Args:
        detectors: One for each section.
    """

    def __init__(self, detectors: Sequence[ClosedFormDetector]) -> None:
        self._detectors = detectors

    @classmethod
    def fit(cls, instrumented: InstrumentedModel, batches: Sequence[Any]) -> DetectedClosedForms:
        """See `ClosedForms`: runs the first samples of the first batch."""
        detectors = [ClosedFormDetector() for _ in instrumented.layers[1:]]
        if batches:
            instrumented.manual_seed(0)
            captured = instrumented.run_on_few(instrumented.capture, batches[0], SAMPLES)
            for detector, section in zip(detectors, sections_between(captured, 1), strict=True):
                detector.fit(section)
        return cls(detectors)

    def closed_form_of(self, index: int, section: Section) -> ClosedForm | None:
        """See `ClosedForms`."""
        return self._detectors[index].match(section)


class ClosedFormDetector:
    """Recognises the closed form of one section, after its factors have been extracted from a few samples."""

    def __init__(self) -> None:
        # A ReLU that is active for all of the few samples looks affine; then there are two candidates.
        self._forms: list[tuple[Factors, _Signatures | None]] = []

    def fit(self, section: Section) -> None:
        """Extract the factors of all forms that agree with autograd.

        Args:
            section: The section at a few samples.
        """
        if _may_be_positionwise(section):
            with _tolerate():
                search = _Search(section)
                for factors in search.extract_factors():
                    agreeing = (
                        signatures for form, signatures in search.forms(factors) if search.matches_autograd(form)
                    )
                    self._forms += [(factors, signatures) for signatures in itertools.islice(agreeing, 1)]

    def match(self, section: Section) -> ClosedForm | None:
        """Find the closed form of the section at another batch.

        Args:
            section: The section at that batch.

        Returns:
            The first form that agrees; None if none does.
        """
        if self._forms and _may_be_positionwise(section):
            with _tolerate():
                search = _Search(section)
                for factors, fitted in self._forms:
                    for form, signatures in search.forms(factors):
                        if _same_operations(fitted, signatures) or search.matches_autograd(form):
                            return form
        return None


class ElementwiseSpan(NamedTuple):
    """The operations of an elementwise nonlinearity.

    Attributes:
        start: Its input.
        stop: Its output.
        operations: The operations between.
        residual: Whether a residual connection goes around it.
    """

    start: Edge
    stop: Edge
    operations: frozenset[Node]
    residual: bool


class _Result(NamedTuple):
    """An intermediate result of the section.

    Attributes:
        target: The result as `torch.autograd.grad` accepts it.
        shape: Its shape.
        read: Maps a tensor of that shape to one of shape ``(n, S, width)``.
    """

    target: Tensor | GradientEdge
    shape: torch.Size
    read: Callable[[Tensor], Tensor]


class _Search:
    """The candidate forms of a section at one batch."""

    def __init__(self, section: Section) -> None:
        (point,) = section.points
        self.section, self.layer = section, point.before.layer
        (self.leaf,), self.a_out = point.before.leaves, point.after.a
        self.begin, self.end = edge_of(self.leaf), edge_of(self.a_out)
        self.path = path_nodes([self.begin], self.end)
        self.spans = list(_elementwise_spans(self.begin, self.end, self.path))
        mask = torch.ones(section.n, section.S_in, dtype=torch.bool, device=section.a.device)
        masks = [m for m in (section.mask_in, section.mask_out) if m is not None]
        for m in masks:
            mask = mask & m
        self.mask, self.masked = mask, bool(masks)
        # All positions of the tapped tensor, and where among them the node layer's own positions are.
        self.S_all = replace(self.layer, positions=None).read([self.leaf]).shape[1]
        index = torch.arange(self.S_all, device=section.a.device)
        self.positions = self.layer.positions_of(index[None, :, None])[0, :, 0]

    @cached_property
    def u(self) -> Tensor:
        """A random cotangent of the output, zero at masked positions."""
        return self._apply_mask(_random(self.a_out, self.a_out.shape))

    def forms(self, factors: Factors) -> Iterator[tuple[ClosedForm, _Signatures | None]]:
        """Forms with these factors that the section may have at this batch.

        Args:
            factors: The factors that are the same at all positions.

        Yields:
            A form, and the signatures of all operations of the section.
        """
        if factors.affine:
            yield ClosedForm(factors, None, self.mask), self._signatures(frozenset())
            return
        for span in self.spans:
            start, stop = self._result(span.start), self._result(span.stop)
            # The derivative of an elementwise function: the gradient of the sum of its outputs.
            s = self._apply_mask(start.read(_grad(stop, start, self.a_out.new_ones(stop.shape))))
            if span.residual == factors.residual and s.shape[-1] == factors.hidden:
                yield ClosedForm(factors, s, self.mask), self._signatures(span.operations)

    def matches_autograd(self, form: ClosedForm) -> bool:
        """Whether a form gives the products that autograd gives."""
        v = _random(self.a_out, (self.section.d_in, _DIRECTIONS))
        return _close(form.bilinear(self.u, v), self._vjp @ v)

    def extract_factors(self) -> Iterator[Factors]:
        """Factors of all forms that the section could have."""
        if len(self.path) > _MAX_OPERATIONS:
            return
        d_in, d_out = self.section.d_in, self.section.d_out
        if self._affordable(d_out):
            yield Factors(None, self._linear_map(self.end, self.begin, d_out), d_in, affine=True)
        for span in self.spans:
            h = self._pull_back(self._result(self.end), self._result(span.start)).shape[-1]
            if self._affordable(max(h, d_out)):
                W_1 = None if span.start == self.begin else self._linear_map(span.start, self.begin, h)
                W_2 = None if span.stop == self.end else self._linear_map(self.end, span.stop, d_out)
                yield Factors(W_1, W_2, h, span.residual)

    def _signatures(self, elementwise: frozenset[Node]) -> _Signatures | None:
        """Signatures of all operations; None if one of them is not fully described."""
        nodes = dict.fromkeys(part.edge.node for part in self.path)
        found = [_signature(node, node in elementwise) for node in nodes]
        known = [one for one in found if one is not None]
        return known if len(known) == len(found) else None

    @cached_property
    def _vjp(self) -> Tensor:
        """Autograd's product of ``u`` with the whole Jacobian, shape ``(n, S, d_in)``."""
        return self._pull_back(self._result(self.end), self._result(self.begin))

    @cached_property
    def _valid(self) -> tuple[Tensor, Tensor]:
        """Samples and positions of all valid positions."""
        x, s = self.mask.nonzero(as_tuple=True)
        return x, s

    def _affordable(self, rows: int) -> bool:
        return rows <= _MAX_PASSES * len(self._valid[0])

    def _linear_map(self, stop: Edge, start: Edge, rows: int) -> Tensor:
        """The linear map from one result to another, ``(rows, width)``.

        The map is the same at every valid position, so that one backward pass reads a different row at each of them.
        """
        of, by, (x, s) = self._result(stop), self._result(start), self._valid
        s_all = s if stop == self.end else self.positions[s]
        found = []
        for k in torch.arange(rows, device=x.device).split(len(x)):
            m = len(k)
            u = self.a_out.new_zeros(of.shape)
            u.view(self.section.n, -1, rows)[x[:m], s_all[:m], k] = 1
            found.append(by.read(_grad(of, by, u))[x[:m], s[:m]])
        return torch.cat(found)

    def _result(self, edge: Edge) -> _Result:
        if edge == self.end:
            return _Result(self.a_out, self.a_out.shape, lambda t: t)
        if edge == self.begin:
            return _Result(self.leaf, self.leaf.shape, lambda t: self.layer.read([t]))
        # Only autograd knows the tensors between node layers. Their axes are assumed to be samples, positions and
        # features in this order; if they are not, no form agrees with autograd.
        shape = self.section.n, self.S_all, -1
        return _Result(gradient_edge(edge), shape_of(edge), lambda t: self.layer.positions_of(t.reshape(shape)))

    def _pull_back(self, of: _Result, by: _Result) -> Tensor:
        """Autograd's product of ``u`` with the Jacobian between two results, ``(n, S, width)``."""
        return self._apply_mask(by.read(_grad(of, by, self.u)))

    def _apply_mask(self, t: Tensor) -> Tensor:
        return apply_mask(t, self.mask) if self.masked else t


@contextmanager
def _tolerate() -> Iterator[None]:
    """Give up a search on an error: a different shape, an operation without a derivative, a missing torch internal."""
    try:
        yield
    except (RuntimeError, NotImplementedError, IndexError, AttributeError) as error:
        if is_out_of_memory(error):
            raise


def _random(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(like)


def _signature(node: Node, elementwise: bool) -> tuple[Any, ...] | None:
    """What an operation consists of, as far as autograd shows it; None if that may not be everything.

    Weights are represented by their product with a random vector. An elementwise nonlinearity has saved its inputs as
    well, which differ from batch to batch and are skipped; integer tensors, which may be indices, are not.
    """
    if not (is_built_in if elementwise else is_fully_described)(node):
        return None
    found: list[Any] = [node.name()]
    for name in saved_names(type(node)):
        if "strides" in name:
            continue
        value = getattr(node, name)
        if isinstance(value, Tensor):
            if elementwise and (value.is_floating_point() or value.dtype == torch.bool):
                continue
            if elementwise or value.ndim != 2:
                return None
            found.append(value @ _random(value, value.shape[-1:]))
        elif isinstance(value, list):
            return None
        else:
            found.append(value[1:] if "sizes" in name else value)  # the first size is the number of samples
    return tuple(found)


def _same_operations(a: _Signatures | None, b: _Signatures | None) -> bool:
    """Whether both are the same operations with the same weights, and fully described."""

    def same(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y

    if a is None or b is None or [len(x) for x in a] != [len(x) for x in b]:
        return False
    return all(same(x, y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two products are equal up to rounding; False for a product of zeros, which is no evidence."""
    return bool(b.any()) and agree(a, b, torch.finfo(b.dtype).eps ** _TOLERANCE_EXPONENT)


def _grad(of: _Result, by: _Result, u: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(of.target, by.target, u, retain_graph=True)
    return gradient


def _may_be_positionwise(section: Section) -> bool:
    """Whether a section could act on each position separately, judged by its shapes alone."""
    if len(section.points) != 1 or section.S_in != section.S_out or torch.finfo(section.a.dtype).bits < 32:
        return False
    (point,) = section.points
    return len(point.before.leaves) == len(point.after.outputs) == 1 and point.after.outputs[0].requires_grad


def _elementwise_spans(begin: Edge, end: Edge, path: list[PathNode]) -> Iterator[ElementwiseSpan]:
    """Runs of operations between at most two mixing operations, each entered and left through a dominator."""
    residual = False
    add = _before_layout(end).node
    if is_addition(add):
        branches = input_edges(add)
        skips = [_before_layout(branch) == begin for branch in branches]
        if len(branches) == 2 and sum(skips) == 1:
            path, residual = path_nodes([begin], branches[skips.index(False)]), True
    if not path or len(path) > _MAX_OPERATIONS or path[-1].mixing_depth > 2:
        return
    for _, group in itertools.groupby(path, key=lambda part: part.mixing_depth):
        run = list(group)
        nodes = [part.edge.node for part in run[1:]]
        dominators = [part.edge for part in run if part.is_dominator]
        if dominators and not all(is_layout(node) or is_addition(node) for node in nodes):
            edges = [part.edge for part in run]
            between = edges[edges.index(dominators[0]) + 1 : edges.index(dominators[-1]) + 1]
            yield ElementwiseSpan(dominators[0], dominators[-1], frozenset(edge.node for edge in between), residual)


def _before_layout(edge: Edge) -> Edge:
    """The result that another one is a view or a copy of."""
    while is_layout(edge.node):
        inputs = input_edges(edge.node)
        if len(inputs) != 1:
            break
        (edge,) = inputs
    return edge
