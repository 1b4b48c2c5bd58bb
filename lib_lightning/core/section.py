"""The map between two neighbouring node layers at one batch, seen through its derivative.

``J = d a^{l+1} / d a^l`` is never formed. `Section.vjp` multiplies it from the output side (reverse mode),
`Section.jvp` from the input side. The second needs no forward-mode support of the model: ``u -> J^T u`` is linear in a
placeholder ``u``, so the derivative of that product with respect to ``u``, along ``v``, is ``J v``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from lib_lightning.core.closed import ClosedForm
from lib_lightning.core.cut import Cut
from lib_lightning.core.live import LiveModel
from lib_lightning.core.memory import STACK_ELEMENTS, is_out_of_memory


@dataclass(frozen=True)
class Point:
    """The section's graph at one point of the integration path, and the weight of that point."""

    weight: float
    before: Cut
    after: Cut


class Section:
    """Products with the Jacobian of one section at one batch, averaged over the integration path.

    Rows and columns of positions that a mask leaves out are zero. `stack` vectors are multiplied at once; `unstackable`
    tells of an operation that takes them one by one only.

    Args:
        a: Activations ``(n, S_in, d_in)`` of the node layer before.
        a_out: Activations ``(n, S_out, d_out)`` of the node layer after.
        points: One point of weight 1 for the gradient at the activations; several for integrated gradients.
        stack_elements: About how many numbers one stack of vectors may hold.

    Attributes:
        spans: The groups of samples that are summed apart, and which samples of the batch belong to each.
        closed: Its closed form, where one has been recognised: sums over samples then need no products with vectors.
        keeps_jacobian: Whether products that make up the whole Jacobian are to be kept.
        jacobian: Those products: output features ``i``, shape ``(k,)``, and ``d fhat_{t,i} / d a``, shape
            ``(k, n, S_in, d_in)``; every output position and feature is in one of the stacks.
    """

    def __init__(self, a: Tensor, a_out: Tensor, points: Sequence[Point], stack_elements: int = STACK_ELEMENTS) -> None:
        self.a, self.a_out = a.detach(), a_out.detach()
        self.spans: list[tuple[int, slice]] = [(0, slice(None))]
        self.closed: ClosedForm | None = None
        self.keeps_jacobian = False
        self.jacobian: list[tuple[Tensor, Tensor]] = []
        self.points = list(points)
        self.n, self.S_in, self.d_in = self.a.shape
        _, self.S_out, self.d_out = self.a_out.shape
        self.mask_in, self.mask_out = self.points[0].before.mask, self.points[0].after.mask
        largest = self.n * max(self.S_in * self.d_in, self.S_out * self.d_out)
        self.stack = max(1, stack_elements // max(1, largest))
        self.unstackable = False
        self._transposed: list[tuple[Tensor, Sequence[Tensor]]] | None = None

    def forget_graph(self) -> None:
        """Give back the memory of autograd's graph, where the closed form does without."""
        self.points = []

    def forget_products(self) -> None:
        """Give back the memory of the graph that `jvp` makes of the graph."""
        self._transposed = None

    def rows_of(self, span: slice) -> int:
        """Number of samples times input positions of some samples, counting only positions that count."""
        return count_rows(self.a[span], None if self.mask_in is None else self.mask_in[span])

    def vjp(self, cotangents: Tensor) -> Tensor:
        """Multiply from the output side: ``J^T u`` for a stack of ``u``.

        Args:
            cotangents: ``u``, shape ``(k, n, S_out, d_out)``.

        Returns:
            ``J^T u``, shape ``(k, n, S_in, d_in)``.
        """
        cotangents = keep(cotangents, self.mask_out)
        products = []
        for point in self.points:

            def pull(vectors: Sequence[Tensor], k: int | None, point: Point = point) -> list[Tensor]:
                return pull_back(point.before, point.after, vectors[0], k)

            grads = self._in_stacks([cotangents], pull)
            rows = point.before.layer.read([grad.flatten(0, 1) for grad in grads])
            products.append(rows.unflatten(0, cotangents.shape[:2]))
        return keep(self._average(products), self.mask_in)

    def has_jvp(self) -> bool | None:
        """Tell whether `jvp` works here: some operations have no second derivative, or a silently wrong one.

        Returns:
            True or False; None if this batch cannot tell, because all of its derivatives are zero.
        """
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(1, *self.a.shape, generator=generator).to(self.a)
        u = torch.randn(1, self.n, self.S_out, self.d_out, generator=generator).to(self.a)
        try:
            along, back = (u * self.jvp(v)).sum((0, 2, 3)), (self.vjp(u) * v).sum((0, 2, 3))
        except (RuntimeError, NotImplementedError):
            return False
        if not back.any():
            return None
        # <u, J v> = <J^T u, v> for every sample, up to rounding; parts of a model may compute in single precision.
        return bool((along - back).norm() <= max(1e-4, torch.finfo(self.a.dtype).eps ** 0.5) * back.norm())

    def output_stacks(self, C: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through every output position and feature ``(t, i)``, a stack at a time.

        Args:
            C: The next node layer's map to features, shape ``(d_out, r_out)``.

        Yields:
            The feature indices ``i``, shape ``(k,)``, and the cotangents that pick ``fhat_{t,i}`` of every sample,
            shape ``(k, n, S_out, d_out)``.
        """
        rows, r_out = C.T.contiguous(), max(1, C.shape[1])
        k = torch.arange(self.S_out * C.shape[1], device=C.device)
        parts = zip((k // r_out).split(self.stack), (k % r_out).split(self.stack), strict=True)
        for t, i in parts if len(k) else ():
            picked = C.new_zeros(len(t), self.S_out, self.d_out)
            picked[k[: len(t)], t] = rows[i]
            yield i, picked[:, None].expand(-1, self.n, -1, -1).contiguous()

    def jvp(self, tangents: Tensor) -> Tensor:
        """Multiply from the input side: ``J v`` for a stack of ``v``.

        Args:
            tangents: ``v``, shape ``(k, n, S_in, d_in)``.

        Returns:
            ``J v``, shape ``(k, n, S_out, d_out)``.
        """
        if self._transposed is None:
            self._transposed = [self._transpose(point) for point in self.points]
        k = tangents.shape[0]
        tangents = keep(tangents, self.mask_in)
        products = []
        for point, (placeholder, grads) in zip(self.points, self._transposed, strict=True):
            zeros = [leaf.new_zeros(k * leaf.shape[0], *leaf.shape[1:]) for leaf in point.before.leaves]
            written = point.before.layer.write(tangents.flatten(0, 1), zeros)
            stacks = [v.unflatten(0, (k, -1)) for v in written]
            (product,) = self._in_stacks(stacks, partial(_grad, grads, [placeholder]))
            products.append(product)
        return keep(self._average(products), self.mask_out)

    def _average(self, products: Sequence[Tensor]) -> Tensor:
        if len(products) == 1:  # of weight 1
            return products[0]
        return torch.stack([point.weight * p for point, p in zip(self.points, products, strict=True)]).sum(0)

    @cached_property
    def _has_own_backward(self) -> bool:
        """Whether code in Python differentiates here: in a stack, `grad.data` in it would crash the process."""
        return any(_has_own_backward(point.after.ends) for point in self.points)

    def _transpose(self, point: Point) -> tuple[Tensor, Sequence[Tensor]]:
        shape = (self.n, self.S_out, self.d_out)
        placeholder = torch.zeros(shape, dtype=self.a_out.dtype, device=self.a.device, requires_grad=True)
        return placeholder, pull_back(point.before, point.after, placeholder, create_graph=True)

    def _in_stacks(
        self, stacks: Sequence[Tensor], product: Callable[[Sequence[Tensor], int | None], Sequence[Tensor]]
    ) -> list[Tensor]:
        """Products of a stack of vectors with a derivative: all at once where that works."""
        k = stacks[0].shape[0]
        if k > 1 and self.stack > 1 and self._has_own_backward:
            self.stack, self.unstackable = 1, True
        if k > 1 and self.stack > 1:
            try:
                return list(product(stacks, k))
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                # Some operation in here cannot be stacked: one vector at a time from now on.
                self.stack, self.unstackable = 1, True
        singles = [product([stack[index] for stack in stacks], None) for index in range(k)]
        # One vector is its own stack: a copy of what it gives would cost as much as an operation of the model.
        return [parts[0][None] if k == 1 else torch.stack(parts) for parts in zip(*singles, strict=True)]


def pull_back(
    before: Cut, after: Cut, cotangent: Tensor, k: int | None = None, create_graph: bool = False
) -> list[Tensor]:
    """Gradients of a node layer's activations, weighted by a cotangent, with respect to the node layer before.

    Args:
        before: The node layer before.
        after: The node layer whose activations are differentiated.
        cotangent: Shape ``(n, S, d)``, or ``(k, n, S, d)`` for a stack of them.
        k: Size of the stack; None for a single cotangent.
        create_graph: Whether the result is to be differentiable in turn.

    Returns:
        One gradient for each leaf of ``before``, in its shape, after the axis of the stack if there is one.
    """
    if len(after.ends) == 1:
        return _grad([after.a], before.leaves, [cotangent], k, create_graph)
    # One tap may be computed from another: from the last to the first, each hands on what it owes to those before it.
    stacked = () if k is None else (k,)
    zeros = [end.new_zeros(*stacked, *end.shape).flatten(0, len(stacked)) for end in after.ends]
    shares = after.layer.write(cotangent.flatten(0, len(stacked)), zeros)
    owed = [share.reshape(*stacked, *end.shape) for share, end in zip(shares, after.ends, strict=True)]
    total = [leaf.new_zeros(*stacked, *leaf.shape) for leaf in before.leaves]
    for position in reversed(range(len(after.order))):
        tap, earlier = after.order[position], after.order[:position]
        leaves = [*(after.leaves[t] for t in earlier), *before.leaves]
        grads = _grad([after.ends[tap]], leaves, [owed[tap]], k, create_graph)
        for t, grad in zip(earlier, grads, strict=False):
            owed[t] = owed[t] + grad
        total = [x + y for x, y in zip(total, grads[len(earlier) :], strict=True)]
    return total


def _grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    vectors: Sequence[Tensor],
    k: int | None,
    create_graph: bool = False,
) -> list[Tensor]:
    live = [i for i, output in enumerate(outputs) if output.requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(inputs)
    if live:
        grads = torch.autograd.grad(
            [outputs[i] for i in live],
            inputs,
            [vectors[i] for i in live],
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            is_grads_batched=k is not None,
        )
    # An output that depends on some of the inputs only, or on none, has zero gradients: that is no error here.
    stacked = () if k is None else (k,)
    return [
        x.new_zeros(*stacked, *x.shape) if grad is None else grad.reshape(*stacked, *x.shape)
        for x, grad in zip(inputs, grads, strict=True)
    ]


def sections(
    live: LiveModel, batch: object, means: Sequence[Tensor], integration_steps: int, stack_elements: int
) -> list[Section]:
    """Run one batch through the live model and return the section after each node layer but the last.

    Args:
        live: The model and its node layers.
        batch: One batch.
        means: ``mu`` of each node layer, shape ``(d,)``; where the integration path starts.
        integration_steps: 0 for the gradient at the activations, else the number of Gauss-Legendre points on the
            straight path ``mu + alpha (a - mu)``.
        stack_elements: About how many numbers one stack of vectors may hold.

    Returns:
        One section for each pair of neighbouring node layers.

    Note:
        Source: arXiv 2405.10928, integrated gradients as the measure of interaction. The path of each section starts
        from its own node layer, so one forward pass with every node layer replaced serves all of them.
    """
    if integration_steps == 0:
        return sections_between(live.cut(batch), stack_elements)
    activations = live.activations(batch)
    # The last node layer starts no section: it stays as it is. A tap that is computed from another one of its layer
    # must not see that one replaced: then neighbours take turns, in two passes.
    starts = range(len(activations) - 1)
    turns = [starts] if all(len(layer.taps) == 1 for layer in live.layers[1:]) else [starts[0::2], starts[1::2]]
    points: list[list[Point]] = [[] for _ in starts]
    for alpha, weight in gauss_legendre(integration_steps):
        path = [m.to(a) + alpha * (a - m.to(a)) for m, a in zip(means, activations, strict=True)]
        for turn in turns:
            cuts = live.cut(batch, [a if i in turn else None for i, a in enumerate(path)])
            for i in turn:
                points[i].append(Point(weight, cuts[i], cuts[i + 1]))
    pairs = itertools.pairwise(activations)
    return [Section(a, a_out, p, stack_elements) for (a, a_out), p in zip(pairs, points, strict=True)]


def sections_between(cuts: Sequence[Cut], stack_elements: int) -> list[Section]:
    """The section after each cut but the last, with the gradient at the activations.

    Args:
        cuts: Node layers of one forward pass.
        stack_elements: As for `sections`.

    Returns:
        One section for each pair of neighbours.
    """
    return [Section(b.a, c.a, [Point(1.0, b, c)], stack_elements) for b, c in itertools.pairwise(cuts)]


def gauss_legendre(k: int) -> Iterator[tuple[float, float]]:
    """Points and weights of Gauss-Legendre quadrature on the interval from 0 to 1.

    Args:
        k: Number of points; polynomials up to degree ``2k - 1`` are integrated exactly.

    Yields:
        A point and its weight; the weights sum to 1.

    Note:
        Source: Golub and Welsch (1969), eigenvalues of the tridiagonal recurrence matrix.

    Example:
        >>> [(round(x, 4), round(w, 4)) for x, w in gauss_legendre(2)]
        [(0.2113, 0.5), (0.7887, 0.5)]
    """
    i = torch.arange(1, k, dtype=torch.float64)
    off = i / (4 * i * i - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    yield from zip(((nodes + 1) / 2).tolist(), vectors[0].square().tolist(), strict=True)


def _has_own_backward(ends: Sequence[Tensor]) -> bool:
    """Whether there is a custom `torch.autograd.Function` on the way to the leaves."""
    seen: set[object] = set()
    todo: list[Any] = [end.grad_fn for end in ends if end.grad_fn is not None]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return True
        todo += [before for before, _ in node.next_functions if before is not None]
    return False


def keep(stack: Tensor, mask: Tensor | None) -> Tensor:
    """Zero where a mask ``(n, S)`` says that a position does not count, in a stack ``(..., n, S, d)``."""
    return stack if mask is None else torch.where(mask[..., None], stack, stack.new_zeros(()))


def count_rows(a: Tensor, mask: Tensor | None) -> int:
    """Number of samples times positions of activations ``(n, S, d)``, counting only those of a mask ``(n, S)``."""
    return a.shape[0] * a.shape[1] if mask is None else int(mask.sum())
