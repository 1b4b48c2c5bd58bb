"""The map between two neighbouring node layers at one batch, seen through its derivative.

``J = d a^{l+1} / d a^l`` is never formed. `Section.vjp` multiplies it from the output side (reverse mode),
`Section.jvp` from the input side. The second needs no forward-mode support of the model: ``u -> J^T u`` is linear in a
placeholder ``u``, so the derivative of that product with respect to ``u``, along ``v``, is ``J v``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from lib_lightning.errors import is_out_of_memory
from lib_lightning.jacobian.closed_form import ClosedForm
from lib_lightning.model.capture import CapturedLayer
from lib_lightning.model.vjp import _grad, apply_mask, num_valid, vjp

# One stack of vectors goes through a section at once. Small tensors gain from it (2 to 6 times fewer calls' overhead),
# large ones lose: up to 3 times in attention. Measured on CPU, the change of sign lies near this many numbers.
STACK_ELEMENTS = 2**18


@dataclass(frozen=True)
class QuadraturePoint:
    """The section's graph at one point of the integration path, and the weight of that point."""

    weight: float
    before: CapturedLayer
    after: CapturedLayer


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

    def __init__(
        self, a: Tensor, a_out: Tensor, points: Sequence[QuadraturePoint], stack_elements: int = STACK_ELEMENTS
    ) -> None:
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
        return num_valid(self.a[span], None if self.mask_in is None else self.mask_in[span])

    def vjp(self, cotangents: Tensor) -> Tensor:
        """Multiply from the output side: ``J^T u`` for a stack of ``u``.

        Args:
            cotangents: ``u``, shape ``(k, n, S_out, d_out)``.

        Returns:
            ``J^T u``, shape ``(k, n, S_in, d_in)``.
        """
        cotangents = apply_mask(cotangents, self.mask_out)
        products = []
        for point in self.points:

            def pull(vectors: Sequence[Tensor], k: int | None, point: QuadraturePoint = point) -> list[Tensor]:
                return vjp(point.before, point.after, vectors[0], k)

            grads = self._in_stacks([cotangents], pull)
            rows = point.before.layer.read([grad.flatten(0, 1) for grad in grads])
            products.append(rows.unflatten(0, cotangents.shape[:2]))
        return apply_mask(self._average(products), self.mask_in)

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
        tangents = apply_mask(tangents, self.mask_in)
        products = []
        for point, (placeholder, grads) in zip(self.points, self._transposed, strict=True):
            zeros = [leaf.new_zeros(k * leaf.shape[0], *leaf.shape[1:]) for leaf in point.before.leaves]
            written = point.before.layer.write(tangents.flatten(0, 1), zeros)
            stacks = [v.unflatten(0, (k, -1)) for v in written]
            (product,) = self._in_stacks(stacks, partial(_grad, grads, [placeholder]))
            products.append(product)
        return apply_mask(self._average(products), self.mask_out)

    def _average(self, products: Sequence[Tensor]) -> Tensor:
        if len(products) == 1:  # of weight 1
            return products[0]
        return torch.stack([point.weight * p for point, p in zip(self.points, products, strict=True)]).sum(0)

    @cached_property
    def _has_own_backward(self) -> bool:
        """Whether code in Python differentiates here: in a stack, `grad.data` in it would crash the process."""
        return any(_has_own_backward(point.after.outputs) for point in self.points)

    def _transpose(self, point: QuadraturePoint) -> tuple[Tensor, Sequence[Tensor]]:
        shape = (self.n, self.S_out, self.d_out)
        placeholder = torch.zeros(shape, dtype=self.a_out.dtype, device=self.a.device, requires_grad=True)
        return placeholder, vjp(point.before, point.after, placeholder, create_graph=True)

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
