"""Is it a proper cut? Every node layer is held to account once, on a few samples, before anything is computed.

Gradients tell most: each section is its own graph, so a gradient that arrives anywhere else than at the node layer
before shows a path around it. Swapping inputs tells the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lib_lightning.errors import LIBError, NodeLayerError, NotFiniteError
from lib_lightning.model.batch import batch_size, first_tensor, map_tensors, slice_batch
from lib_lightning.model.capture import CapturedLayer
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.vjp import apply_mask, vjp

# Enough to see samples influence each other.
_SAMPLES = 3
_USED = (
    "A tapped tensor is also used before it reaches its tap, or written to afterwards, in a way that cannot be cut. "
    "Tap the module before or after it instead."
)
_DIFFERENTIATED = (
    "A node layer lies within what the model itself differentiates or maps (autograd.grad, torch.func). Tap modules "
    "before or after that."
)
# What torch says where a cut is not possible, and what that means.
_SIGNS = {
    "detached in-place": _USED,
    "leaf Variable that requires grad": _USED,
    "have been used in the graph": _DIFFERENTIATED,
    "inside of a function being transformed": _DIFFERENTIATED,
}


def validate_node_layers(instrumented: InstrumentedModel, batch: Any) -> None:
    """Refuse node layers that do not cut the computation.

    Args:
        instrumented: The model and its node layers.
        batch: One batch, of which a few samples are used.

    Raises:
        NodeLayerError: Naming the node layer and what is wrong with it.
        ActivationError: If activations are integers, NaN or infinite.
    """
    try:
        _check(instrumented, slice_batch(batch, 0, _SAMPLES))
    except LIBError:
        raise
    except Exception:
        # Perhaps something in the batch is not one entry a sample, though it has that length.
        _check(instrumented, batch)


def _check(instrumented: InstrumentedModel, batch: Any) -> None:
    try:
        with watched_inputs(instrumented, batch_size(batch), _as_leaf) as inputs:
            cuts = instrumented.capture(batch)
        for cut in cuts:
            check_finite(cut.layer.name, cut.rows)
        # What the first node layer does not depend on is context (a mask, a time step), not what it cuts off.
        inputs = {index: leaf for index, leaf in inputs.items() if _reaches(cuts[0].ends, [leaf])}
        _check_bypass(cuts, list(inputs.values()))
        for before, after in pairwise(cuts):
            _check_section(before, after)
    except RuntimeError as error:
        for sign, sentence in _SIGNS.items():
            if sign in str(error):
                raise NodeLayerError(f"{sentence} ({error})") from error
        raise
    if _draws_the_same_twice(instrumented, batch, cuts):
        _check_same_result(instrumented, batch, cuts)
        _check_swap(instrumented, batch, cuts, set(inputs))


def check_finite(name: str, a: Tensor) -> None:
    """Refuse activations that are NaN or infinite.

    Args:
        name: Node layer.
        a: Its activations.

    Raises:
        NotFiniteError: Naming the node layer and what was found.
    """
    finite = torch.isfinite(a)
    if not finite.all():
        what = "NaN" if a.isnan().any() else "infinite"
        raise NotFiniteError(
            f"Node layer '{name}' has {what} activations ({int((~finite).sum())} of {a.numel()} numbers). "
            "No basis can be computed from them; look at the model or at the batch."
        )


@contextmanager
def watched_inputs(
    instrumented: InstrumentedModel, n: int, change: Callable[[int, Tensor], Tensor]
) -> Iterator[dict[int, Tensor]]:
    """See, and change, what differs from sample to sample where it enters: float inputs and outputs of embeddings.

    Args:
        instrumented: The model.
        n: Number of samples in the batch that it is going to be run on.
        change: What to go on with, given which one of them it is, and its tensor.

    Yields:
        What the model goes on with, by which one it is; filled while the model runs.
    """
    seen: dict[int, Tensor] = {}
    count = 0

    def watch(tensor: Tensor) -> Tensor:
        nonlocal count
        varies = tensor.ndim > 0 and tensor.shape[0] == n > 1 and bool((tensor != tensor[:1]).any())
        if not (tensor.is_floating_point() and varies):
            return tensor
        seen[count] = change(count, tensor.detach())
        count += 1
        return seen[count - 1].clone()

    handles = [
        instrumented.model.register_forward_pre_hook(
            lambda _, args, kwargs: map_tensors((args, kwargs), watch), with_kwargs=True, prepend=True
        )
    ]
    for module in instrumented.model.modules():
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(lambda _, args, output: watch(output), prepend=True))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _as_leaf(index: int, tensor: Tensor) -> Tensor:
    return tensor.requires_grad_(True)


def _check_bypass(cuts: Sequence[CapturedLayer], inputs: Sequence[Tensor]) -> None:
    earlier = [("the model's input", inputs), *((cut.layer.name, cut.leaves) for cut in cuts)]
    for position in range(1, len(cuts)):
        for start, leaves in earlier[:position]:
            if _reaches(cuts[position].ends, leaves):
                source = start if start == "the model's input" else f"'{start}'"
                raise NodeLayerError(
                    f"Node layer '{cuts[position - 1].layer.name}' does not cut the computation: "
                    f"'{cuts[position].layer.name}' also depends on {source} past it (a skip connection?). Tap the "
                    "residual stream itself, such as a block's output or the input of the norm that follows; paths "
                    "that run side by side can be joined in one NodeLayer(taps=[...])."
                )


def _check_section(before: CapturedLayer, after: CapturedLayer) -> None:
    names = f"'{after.layer.name}'", f"'{before.layer.name}'"
    a, a_next = before.a, after.a
    if not _reaches(after.ends, before.leaves):
        raise NodeLayerError(
            f"Node layer {names[0]} has no gradient with respect to {names[1]}: it does not depend on it, or something "
            "between them (detach, argmax, no_grad) stops gradients."
        )
    if a.shape[0] != a_next.shape[0]:
        raise NodeLayerError(
            f"Node layers {names[1]} and {names[0]} differ in samples ({a.shape[0]} and {a_next.shape[0]}): axis 0 of "
            "each must be the batch."
        )
    direction = torch.rand(a_next.shape, generator=torch.Generator().manual_seed(0)).to(a_next)
    direction = apply_mask(direction, after.mask)
    grads = vjp(before, after, direction)
    seen = before.layer.write(
        apply_mask(before.layer.read(grads), before.mask), [torch.zeros_like(grad) for grad in grads]
    )
    # Compared so that NaN, which a derivative may well be, shows no path.
    if any(bool(((grad - part).abs() > 0).any()) for grad, part in zip(grads, seen, strict=True)):
        raise NodeLayerError(
            f"Node layer {names[1]} does not cut the computation: {names[0]} also depends on it at positions that are "
            "left out. Look at all positions there, or at fewer afterwards."
        )
    for sample, others in ((0, slice(1, None)), (-1, slice(None, -1))):
        alone = torch.zeros_like(direction)
        alone[sample] = direction[sample]
        if any(bool((grad[others].abs() > 0).any()) for grad in vjp(before, after, alone)):
            raise NodeLayerError(
                f"Samples influence each other between {names[1]} and {names[0]}: is axis 0 the batch? Models that "
                "take the sequence first need batch_first=True; a norm over the batch is no function of one sample."
            )


def _draws_the_same_twice(instrumented: InstrumentedModel, batch: Any, cuts: Sequence[CapturedLayer]) -> bool:
    """Whether a model that may draw random numbers, or count its calls, can be compared with itself at all."""
    with torch.no_grad():
        again = instrumented.capture(batch)
    return all(_close(a.a, b.a) for a, b in zip(again, cuts, strict=True))


def _check_same_result(instrumented: InstrumentedModel, batch: Any, cuts: Sequence[CapturedLayer]) -> None:
    if cuts[-1].layer.taps != ("output",):
        return
    with torch.no_grad():
        plain = first_tensor(instrumented.run(batch))
    if plain is None or not _close(plain, cuts[-1].ends[0]):
        raise NodeLayerError(
            "The model gives another result when it is cut: one of the node layers is written to in place while "
            "something else still uses it. Tap the output of the module that writes, instead of its input."
        )


def _check_swap(instrumented: InstrumentedModel, batch: Any, cuts: Sequence[CapturedLayer], inputs: set[int]) -> None:
    """Feed each sample the input of another, give a node layer its own activations: all after must be as before.

    It sees what gradients do not: paths through detach, comparisons and argmax.
    """

    def another(index: int, tensor: Tensor) -> Tensor:
        return tensor.roll(1, 0) if index in inputs else tensor

    for position in range(len(cuts) - 1 if inputs else 0):
        own = [cut.a.detach() if k == position else None for k, cut in enumerate(cuts)]
        with torch.no_grad(), watched_inputs(instrumented, batch_size(batch), another):
            swapped = instrumented.capture(batch, own)
        for before, after in zip(cuts[position + 1 :], swapped[position + 1 :], strict=True):
            if not _close(before.a, after.a):
                raise NodeLayerError(
                    f"Node layer '{cuts[position].layer.name}' does not cut the computation: '{before.layer.name}' "
                    "also depends on the model's input past it, on a path without gradient (detach, argmax, ...)."
                )


def _close(a: Tensor, b: Tensor) -> bool:
    # The same operations on the same numbers; an accelerator may add them in another order.
    # Half precision has too few digits for a margin of a thousand roundings.
    eps = torch.finfo(a.dtype).eps
    return a.shape == b.shape and bool((a - b).abs().max() <= min(1000 * eps, eps**0.5) * b.abs().max())


def _reaches(ends: Sequence[Tensor], leaves: Sequence[Tensor]) -> bool:
    ends = [end for end in ends if end.requires_grad]
    if not ends or not leaves:
        return False
    directions = [torch.ones_like(end) for end in ends]
    grads = torch.autograd.grad(ends, list(leaves), directions, retain_graph=True, allow_unused=True)
    return any(grad is not None for grad in grads)
