"""Vector-Jacobian products between two captured node layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lib_lightning.model.capture import CapturedLayer


def vjp(
    before: CapturedLayer, after: CapturedLayer, cotangent: Tensor, k: int | None = None, create_graph: bool = False
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
    if len(after.outputs) == 1:
        return _grad([after.a], before.leaves, [cotangent], k, create_graph)
    # One tap may be computed from another: from the last to the first, each hands on what it owes to those before it.
    stacked = () if k is None else (k,)
    zeros = [end.new_zeros(*stacked, *end.shape).flatten(0, len(stacked)) for end in after.outputs]
    shares = after.layer.write(cotangent.flatten(0, len(stacked)), zeros)
    owed = [share.reshape(*stacked, *end.shape) for share, end in zip(shares, after.outputs, strict=True)]
    total = [leaf.new_zeros(*stacked, *leaf.shape) for leaf in before.leaves]
    for position in reversed(range(len(after.order))):
        tap, earlier = after.order[position], after.order[:position]
        leaves = [*(after.leaves[t] for t in earlier), *before.leaves]
        grads = _grad([after.outputs[tap]], leaves, [owed[tap]], k, create_graph)
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


def apply_mask(stack: Tensor, mask: Tensor | None) -> Tensor:
    """Zero where a mask ``(n, S)`` says that a position does not count, in a stack ``(..., n, S, d)``."""
    return stack if mask is None else torch.where(mask[..., None], stack, stack.new_zeros(()))


def num_valid(a: Tensor, mask: Tensor | None) -> int:
    """Number of samples times positions of activations ``(n, S, d)``, counting only those of a mask ``(n, S)``."""
    return a.shape[0] * a.shape[1] if mask is None else int(mask.sum())
