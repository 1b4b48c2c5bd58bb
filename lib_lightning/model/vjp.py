"""Vector-Jacobian products between two captured node layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lib_lightning.model.capture import CapturedLayer
from lib_lightning.model.safe_points import safe_point, vectors_multiplied


def vjp(
    before: CapturedLayer, after: CapturedLayer, cotangent: Tensor, k: int | None = None, create_graph: bool = False
) -> list[Tensor]:
    """Vector-Jacobian product ``J^T u`` of the section between two node layers.

    Args:
        before: The node layer before the section.
        after: The node layer after it, whose activations are differentiated.
        cotangent: ``u``, shape ``(n, S, d)``, or ``(k, n, S, d)`` for a batch of vectors.
        k: Number of vectors; None for a single one without that axis.
        create_graph: Whether the result is to be differentiable.

    Returns:
        One gradient for each leaf of ``before``, in the leaf's shape, with the axis of the vectors in front.
    """
    if len(after.outputs) == 1:
        return _grad([after.a], before.leaves, [cotangent], k, create_graph)
    # One tap may be computed from another. From the last tap to the first, each adds its gradients with respect to
    # earlier taps to their cotangents.
    batch = () if k is None else (k,)
    zeros = [output.new_zeros(*batch, *output.shape).flatten(0, len(batch)) for output in after.outputs]
    written = after.layer.write(cotangent.flatten(0, len(batch)), zeros)
    cotangents = [u.reshape(*batch, *output.shape) for u, output in zip(written, after.outputs, strict=True)]
    total = [leaf.new_zeros(*batch, *leaf.shape) for leaf in before.leaves]
    for position in reversed(range(len(after.order))):
        tap, earlier = after.order[position], after.order[:position]
        leaves = [*(after.leaves[t] for t in earlier), *before.leaves]
        grads = _grad([after.outputs[tap]], leaves, [cotangents[tap]], k, create_graph)
        for t, grad in zip(earlier, grads, strict=False):
            cotangents[t] = cotangents[t] + grad
        total = [x + y for x, y in zip(total, grads[len(earlier) :], strict=True)]
    return total


def _grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    vectors: Sequence[Tensor],
    k: int | None,
    create_graph: bool = False,
) -> list[Tensor]:
    """`torch.autograd.grad` with zeros, in place of errors, for inputs that an output does not depend on."""
    safe_point()
    differentiable = [i for i, output in enumerate(outputs) if output.requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(inputs)
    if differentiable:
        grads = torch.autograd.grad(
            [outputs[i] for i in differentiable],
            inputs,
            [vectors[i] for i in differentiable],
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            is_grads_batched=k is not None,
        )
    vectors_multiplied(k or 1)
    batch = () if k is None else (k,)
    return [
        x.new_zeros(*batch, *x.shape) if grad is None else grad.reshape(*batch, *x.shape)
        for x, grad in zip(inputs, grads, strict=True)
    ]


def apply_mask(vectors: Tensor, mask: Tensor | None) -> Tensor:
    """Set a tensor ``(..., n, S, d)`` to zero where a mask ``(n, S)`` is false."""
    return vectors if mask is None else torch.where(mask[..., None], vectors, vectors.new_zeros(()))


def num_valid(a: Tensor, mask: Tensor | None) -> int:
    """Number of samples times valid positions of activations ``(n, S, d)`` with a mask ``(n, S)``."""
    return a.shape[0] * a.shape[1] if mask is None else int(mask.sum())
