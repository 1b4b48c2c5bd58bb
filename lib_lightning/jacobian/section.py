"""The map between two neighbouring node layers at one batch, through its Jacobian.

The Jacobian ``J = d a^{l+1} / d a^l`` is never formed. `Section.vjp` multiplies with it from the output side (reverse
mode), `Section.jvp` from the input side (forward mode). Forward mode needs no forward-mode formulas of the model's
operations: ``u -> J^T u`` is linear in ``u``, so the derivative of that product with respect to ``u`` along ``v`` is
``J v`` (the double-backward trick).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from lib_lightning.errors import is_out_of_memory
from lib_lightning.jacobian.closed_form import ClosedForm
from lib_lightning.model.agreement import agree, half_of_the_digits
from lib_lightning.model.autograd_graph import has_custom_function, save_contiguous
from lib_lightning.model.capture import CapturedLayer
from lib_lightning.model.loops import parts_of
from lib_lightning.model.vjp import _grad, apply_mask, num_valid, vjp

# Several vectors go through a section in one call. Small tensors gain from it (2 to 6 times less overhead per call),
# large ones lose: up to 3 times in attention. Measured on a CPU, break-even is near this many numbers per call.
STACK_ELEMENTS = 2**18


class Gradients(NamedTuple):
    """Gradients of some features of the next node layer, each at one output position.

    Attributes:
        t: Output positions, shape ``(k,)``.
        i: Indices of the features, shape ``(k,)``.
        g: ``d fhat_{t,i} / d a``, shape ``(k, n, S_in, d_in)``.
    """

    t: Tensor
    i: Tensor
    g: Tensor


@dataclass(frozen=True)
class QuadraturePoint:
    """One point of an integration path.

    Attributes:
        weight: Quadrature weight of the point.
        before: The node layer before the section, at that point.
        after: The node layer after the section, on the autograd graph of ``before``.
    """

    weight: float
    before: CapturedLayer
    after: CapturedLayer

    @cached_property
    def has_custom_function(self) -> bool:
        """Whether a custom `torch.autograd.Function` runs in the backward pass."""
        return has_custom_function(self.after.outputs)


@dataclass(eq=False)
class Section:
    """Products with the Jacobian of one section at one batch, averaged over an integration path.

    Rows and columns of masked positions are zero.

    Attributes:
        a: Activations of the node layer before, shape ``(n, S_in, d_in)``.
        a_out: Activations of the node layer after, shape ``(n, S_out, d_out)``.
        points: One point of weight 1 for the gradient at the activations, several for integrated gradients, none if
            a closed form replaces the autograd graph.
        mask_in: True at valid positions of ``a``, shape ``(n, S_in)``; None if all are valid.
        mask_out: True at valid positions of ``a_out``, shape ``(n, S_out)``; None if all are valid.
        stack_elements: About how many numbers a batch of vectors may have.
        group_slices: Jackknife groups of the batch: number of the group, and slice of its samples.
        closed_form: Closed form of the Jacobian, if it has one.
        sequential_only: Whether an operation can only be differentiated for one vector at a time. Becomes True when
            a product with several vectors fails.
        cached_products: List in which `output_gradients` keeps its results; None to keep nothing.
    """

    a: Tensor
    a_out: Tensor
    points: Sequence[QuadraturePoint]
    mask_in: Tensor | None = None
    mask_out: Tensor | None = None
    stack_elements: int = STACK_ELEMENTS
    group_slices: Sequence[tuple[int, slice]] = ((0, slice(None)),)
    closed_form: ClosedForm | None = None
    sequential_only: bool = False
    cached_products: list[Gradients] | None = None
    # The graph of ``u -> J^T u`` at each point, with its placeholder ``u``; made by the first `jvp`.
    _transposed: list[tuple[Tensor, Sequence[Tensor]]] | None = field(default=None, init=False)

    @classmethod
    def between(
        cls, a: Tensor, a_out: Tensor, points: Sequence[QuadraturePoint], stack_elements: int = STACK_ELEMENTS
    ) -> Section:
        """The section between two captured node layers.

        Args:
            a: Activations of the node layer before, shape ``(n, S_in, d_in)``.
            a_out: Activations of the node layer after, shape ``(n, S_out, d_out)``.
            points: At least one point of the integration path.
            stack_elements: About how many numbers a batch of vectors may have.

        Returns:
            The section.
        """
        return cls(a.detach(), a_out.detach(), points, points[0].before.mask, points[0].after.mask, stack_elements)

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.a.shape[0]

    @property
    def S_in(self) -> int:
        """Number of positions of the node layer before."""
        return self.a.shape[1]

    @property
    def d_in(self) -> int:
        """Width of the node layer before."""
        return self.a.shape[2]

    @property
    def S_out(self) -> int:
        """Number of positions of the node layer after."""
        return self.a_out.shape[1]

    @property
    def d_out(self) -> int:
        """Width of the node layer after."""
        return self.a_out.shape[2]

    @property
    def vectors_per_call(self) -> int:
        """How many vectors are multiplied in one call."""
        if self.sequential_only:
            return 1
        return max(1, self.stack_elements // max(1, self.a.numel(), self.a_out.numel()))

    def num_valid(self, samples: slice) -> int:
        """Number of samples times valid input positions among some samples of the batch."""
        return num_valid(self.a[samples], None if self.mask_in is None else self.mask_in[samples])

    def num_valid_out(self, samples: slice) -> int:
        """Number of samples times valid output positions among some samples of the batch."""
        return num_valid(self.a_out[samples], None if self.mask_out is None else self.mask_out[samples])

    def vjp(self, cotangents: Tensor) -> Tensor:
        """Multiply from the output side: ``J^T u`` for a batch of vectors ``u``.

        Args:
            cotangents: ``u``, shape ``(k, n, S_out, d_out)``.

        Returns:
            ``J^T u``, shape ``(k, n, S_in, d_in)``.
        """
        if not len(cotangents):  # no latent of a dictionary is active
            return self.a.new_zeros(0, *self.a.shape)
        cotangents = apply_mask(cotangents, self.mask_out)
        products = []
        for point in self.points:

            def product(vectors: Sequence[Tensor], k: int | None, point: QuadraturePoint = point) -> list[Tensor]:
                return vjp(point.before, point.after, vectors[0], k)

            grads = self._batched([cotangents], product, point.after.outputs)
            rows = point.before.layer.read([grad.flatten(0, 1) for grad in grads])
            products.append(rows.unflatten(0, cotangents.shape[:2]))
        return apply_mask(self._average(products), self.mask_in)

    def jvp(self, tangents: Tensor) -> Tensor:
        """Multiply from the input side: ``J v`` for a batch of vectors ``v``.

        Args:
            tangents: ``v``, shape ``(k, n, S_in, d_in)``.

        Returns:
            ``J v``, shape ``(k, n, S_out, d_out)``.
        """
        if not len(tangents):  # there are no features
            return self.a_out.new_zeros(0, *self.a_out.shape)
        if self._transposed is None:
            self._transposed = [self._transpose(point) for point in self.points]
        k = tangents.shape[0]
        tangents = apply_mask(tangents, self.mask_in)
        products = []
        for point, (placeholder, grads) in zip(self.points, self._transposed, strict=True):
            zeros = [leaf.new_zeros(k * leaf.shape[0], *leaf.shape[1:]) for leaf in point.before.leaves]
            written = point.before.layer.write(tangents.flatten(0, 1), zeros)
            vectors = [v.unflatten(0, (k, -1)) for v in written]
            (product,) = self._batched(vectors, partial(_grad, grads, [placeholder]), grads)
            products.append(product)
        return apply_mask(self._average(products), self.mask_out)

    def has_jvp(self) -> bool | None:
        """Check whether `jvp` works here: some operations have no second derivative, or a silently wrong one.

        Returns:
            True or False; None if this batch cannot decide it, because all of its derivatives are zero.
        """
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(1, *self.a.shape, generator=generator, device="cpu").to(self.a)
        u = torch.randn(1, self.n, self.S_out, self.d_out, generator=generator, device="cpu").to(self.a)
        try:
            forward, reverse = (u * self.jvp(v)).sum((0, 2, 3)), (self.vjp(u) * v).sum((0, 2, 3))
        except (RuntimeError, NotImplementedError):
            return False
        if not reverse.any():
            return None
        # <u, J v> = <J^T u, v> for every sample, up to rounding; parts of a model may compute in single precision.
        tolerance = max(1e-4, half_of_the_digits(self.a.dtype))
        return agree(forward, reverse, tolerance)

    def cotangent_batches(self, C: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Iterate over the cotangents of all next-layer features, ``d fhat_{t,i} / d a^{l+1} = e_t C_i``.

        Args:
            C: The next node layer's map to features, shape ``(d_out, r_out)``.

        Yields:
            Output positions ``t`` and feature indices ``i``, shape ``(k,)``, and the cotangents that select
            ``fhat_{t,i}`` of every sample, shape ``(k, n, S_out, d_out)``. Every ``t`` and ``i`` comes once.
        """
        C_T, r_out = C.T.contiguous(), max(1, C.shape[1])
        k = torch.arange(self.S_out * C.shape[1], device=C.device)
        size = self.vectors_per_call
        parts = list(zip((k // r_out).split(size), (k % r_out).split(size), strict=True)) if len(k) else []
        for t, i in parts_of(parts, fewest=self._fewest_parts):
            cotangents = C.new_zeros(len(t), self.S_out, self.d_out)
            cotangents[k[: len(t)], t] = C_T[i]
            yield t, i, cotangents[:, None].expand(-1, self.n, -1, -1).contiguous()

    def output_gradients(self, C: Tensor) -> Iterable[Gradients]:
        """Gradients of all next-layer features with respect to ``a``: the whole Jacobian, in batches.

        Args:
            C: The next node layer's map to features, shape ``(d_out, r_out)``; the same in each call if there are
                `cached_products`.

        Returns:
            The gradients. Every output position ``t`` and feature ``i`` comes once.
        """
        products = (Gradients(t, i, self.vjp(cotangents)) for t, i, cotangents in self.cotangent_batches(C))
        if self.cached_products is None:
            return products
        count = -(-self.S_out * C.shape[1] // self.vectors_per_call)
        if not self.cached_products:
            # All of them before the first is used: alternating between backward passes and sums would evict either
            # one's data from the processor's cache.
            self.cached_products.extend(products)
        return parts_of(self.cached_products, count, self._fewest_parts)

    @property
    def _fewest_parts(self) -> int:
        """Calls of which even a trial needs the gradients: as many directions as the node layer before may have."""
        return -(-2 * self.d_in // (self.n * self.vectors_per_call))

    def _average(self, products: Sequence[Tensor]) -> Tensor:
        if len(products) == 1:  # its weight is 1
            return products[0]
        return torch.stack([point.weight * p for point, p in zip(self.points, products, strict=True)]).sum(0)

    def _transpose(self, point: QuadraturePoint) -> tuple[Tensor, Sequence[Tensor]]:
        shape = (self.n, self.S_out, self.d_out)
        placeholder = torch.zeros(shape, dtype=self.a_out.dtype, device=self.a.device, requires_grad=True)
        return placeholder, vjp(point.before, point.after, placeholder, create_graph=True)

    def _batched(
        self,
        vectors: Sequence[Tensor],
        product: Callable[[Sequence[Tensor], int | None], Sequence[Tensor]],
        outputs: Sequence[Tensor],
    ) -> list[Tensor]:
        """Multiply a batch of vectors with the derivative of outputs: in one call where that works, else one by one."""
        k = vectors[0].shape[0]
        # In a batched call, `grad.data` in the backward of a custom function crashes the process.
        if k > 1 and self.vectors_per_call > 1 and any(point.has_custom_function for point in self.points):
            self.sequential_only = True
        while k > 1 and self.vectors_per_call > 1:
            try:
                return list(product(vectors, k))
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                # Some operation has no batching rule, or none for tensors with channels last in memory.
                self.sequential_only = not save_contiguous(outputs)
        singles = [product([v[index] for v in vectors], None) for index in range(k)]
        # A batch of one needs no copy, which would cost as much as an operation of the model.
        return [parts[0][None] if k == 1 else torch.stack(parts) for parts in zip(*singles, strict=True)]
