"""Validating node layers: whether they cut the computation, tested on a few samples before anything is computed.

Most of it is tested with gradients. Each section is a separate autograd graph, so a gradient with respect to anything
but the node layer before reveals a path around that node layer. Paths without gradients are found by permuting the
samples of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lib_lightning.errors import LIBError, NodeLayerError, NotFiniteError
from lib_lightning.model.batch import batch_size, first_tensor, map_tensors, run_on_few, tensors_in
from lib_lightning.model.capture import CapturedLayer
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.module_paths import explain_own_names
from lib_lightning.model.vjp import apply_mask, vjp

# Enough samples to detect interactions between samples.
_SAMPLES = 3
_INPUT = "the model's input"
_USED = (
    "A tapped tensor is also used before it reaches its tap, or written to afterwards, in a way that cannot be cut. "
    "Tap the module before or after it instead."
)
_DIFFERENTIATED = (
    "A node layer is inside code that the model itself differentiates or maps (autograd.grad, torch.func). Tap modules "
    "before or after that."
)
# What the error messages of torch mean for a node layer.
_TORCH_ERRORS = {
    "detached in-place": _USED,
    "leaf Variable that requires grad": _USED,
    "have been used in the graph": _DIFFERENTIATED,
    "inside of a function being transformed": _DIFFERENTIATED,
}


@contextmanager
def wrap_forward_errors(model: nn.Module, spec: ModelSpec) -> Iterator[None]:
    """Run a block that calls a model for the first time, and explain its errors.

    Args:
        model: The model.
        spec: How it is called.

    Raises:
        LIBError: If the model cannot be called, with the reason.
    """
    try:
        yield
    except LIBError:
        raise
    except Exception as error:
        advice = (
            " By default it is called with the first entry of a tuple or list, and with a dict's entries by name; "
            "input_fn= changes that."
            if spec.input_fn is None
            else " input_fn returns its arguments: a tuple becomes positional arguments, a dict keyword arguments, and "
            "anything else, a list too, is the only argument."
        )
        raise LIBError(
            f"{type(model).__name__} cannot be run on a validation batch: {type(error).__name__}: {error}.{advice}"
        ) from error


def is_model_error(error: Exception, batch: Any) -> bool:
    """Whether an error would also occur with any other batch: an invalid node layer, or NaN from a finite batch.

    Args:
        error: An error that occurred with a batch.
        batch: The batch.

    Returns:
        True if so.
    """
    if isinstance(error, NodeLayerError):
        return True
    return isinstance(error, NotFiniteError) and all(bool(torch.isfinite(t).all()) for t in tensors_in(batch))


def validate_node_layers(instrumented: InstrumentedModel, batch: Any) -> None:
    """Raise an error if the node layers do not cut the computation.

    Args:
        instrumented: The model and its node layers.
        batch: One batch, of which a few samples are used.

    Raises:
        NodeLayerError: If a node layer does not cut the computation, with its name and the reason.
        ActivationError: If activations are integers, NaN or infinite.
    """
    try:
        run_on_few(partial(_validate, instrumented), batch, _SAMPLES, final=LIBError)
    except NodeLayerError as error:
        meant = explain_own_names(instrumented.model, instrumented.layers)
        if not meant:
            raise
        raise NodeLayerError(f"{error} {meant}") from error


def _validate(instrumented: InstrumentedModel, batch: Any) -> None:
    try:
        with varying_inputs(instrumented, batch_size(batch), lambda _, t: t.requires_grad_(True)) as inputs:
            captured = instrumented.capture(batch)
        for layer in captured:
            check_finite(layer.layer.name, layer.rows)
        # Inputs that the first node layer does not depend on are context (a mask, a time step): treated as constants.
        inputs = {index: leaf for index, leaf in inputs.items() if _depends(captured[0].outputs, [leaf])}
        _check_bypass(captured, list(inputs.values()))
        for before, after in pairwise(captured):
            _check_section(before, after)
    except RuntimeError as error:
        for message, meaning in _TORCH_ERRORS.items():
            if message in str(error):
                raise NodeLayerError(f"{meaning} ({error})") from error
        raise
    if _is_repeatable(instrumented, batch, captured):
        _check_same_output(instrumented, batch, captured)
        _check_permuted_inputs(instrumented, batch, captured, set(inputs))


def check_finite(name: str, a: Tensor) -> None:
    """Raise an error for activations that are NaN or infinite.

    Args:
        name: Node layer.
        a: Its activations.

    Raises:
        NotFiniteError: With the node layer and the number of such activations.
    """
    finite = torch.isfinite(a)
    if not finite.all():
        what = "NaN" if a.isnan().any() else "infinite"
        raise NotFiniteError(
            f"Node layer '{name}' has {what} activations ({int((~finite).sum())} of {a.numel()} numbers). "
            "No basis can be computed from them; check the model and the batch."
        )


@contextmanager
def varying_inputs(
    instrumented: InstrumentedModel, n: int, replace: Callable[[int, Tensor], Tensor]
) -> Iterator[dict[int, Tensor]]:
    """Replace the tensors that bring the samples into the model: its float inputs, and outputs of embeddings.

    Args:
        instrumented: The model.
        n: Number of samples of the batch that the model is going to be called on.
        replace: From the index of such a tensor and the tensor, detached, to the one to continue with.

    Yields:
        The replacements by index; filled during the forward pass. Tensors that are the same for all samples are not
        replaced.
    """
    inputs: dict[int, Tensor] = {}

    def visit(tensor: Tensor) -> Tensor:
        varies = tensor.ndim > 0 and tensor.shape[0] == n > 1 and bool((tensor != tensor[:1]).any())
        if not (tensor.is_floating_point() and varies):
            return tensor
        index = len(inputs)
        inputs[index] = replace(index, tensor.detach())
        return inputs[index].clone()

    handles = [
        instrumented.model.register_forward_pre_hook(
            lambda _, args, kwargs: map_tensors((args, kwargs), visit), with_kwargs=True, prepend=True
        )
    ]
    for module in instrumented.model.modules():
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(lambda _, args, output: visit(output), prepend=True))
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _check_bypass(captured: Sequence[CapturedLayer], inputs: Sequence[Tensor]) -> None:
    """Each node layer may depend on the one before only, not on earlier ones or on the model's input."""
    earlier = [(_INPUT, inputs), *((f"'{layer.layer.name}'", layer.leaves) for layer in captured)]
    for position in range(1, len(captured)):
        for source, leaves in earlier[:position]:
            if _depends(captured[position].outputs, leaves):
                raise NodeLayerError(
                    f"Node layer '{captured[position - 1].layer.name}' does not cut the computation: "
                    f"'{captured[position].layer.name}' also depends on {source} past it (a skip connection?). Tap the "
                    "residual stream itself, such as a block's output or the input of the norm that follows; parallel "
                    "paths can be joined in one NodeLayer(taps=[...])."
                )


def _check_section(before: CapturedLayer, after: CapturedLayer) -> None:
    names = f"'{after.layer.name}'", f"'{before.layer.name}'"
    a, a_next = before.a, after.a
    if not _depends(after.outputs, before.leaves):
        raise NodeLayerError(
            f"Node layer {names[0]} has no gradient with respect to {names[1]}: it does not depend on it, or something "
            "between them (detach, argmax, no_grad) stops gradients."
        )
    if a.shape[0] != a_next.shape[0]:
        raise NodeLayerError(
            f"Node layers {names[1]} and {names[0]} differ in samples ({a.shape[0]} and {a_next.shape[0]}): axis 0 of "
            "each must be the batch."
        )
    u = torch.rand(a_next.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(a_next)
    u = apply_mask(u, after.mask)
    grads = vjp(before, after, u)
    selected = before.layer.write(
        apply_mask(before.layer.read(grads), before.mask), [torch.zeros_like(grad) for grad in grads]
    )
    # A comparison that is false for NaN: a derivative may be NaN, which is no evidence of a path.
    if any(bool(((grad - part).abs() > 0).any()) for grad, part in zip(grads, selected, strict=True)):
        raise NodeLayerError(
            f"Node layer {names[1]} does not cut the computation: {names[0]} also depends on it at positions that are "
            "excluded. Include all positions there, or fewer afterwards."
        )
    for sample, others in ((0, slice(1, None)), (-1, slice(None, -1))):
        u_sample = torch.zeros_like(u)
        u_sample[sample] = u[sample]
        if any(bool((grad[others].abs() > 0).any()) for grad in vjp(before, after, u_sample)):
            raise NodeLayerError(
                f"Samples influence each other between {names[1]} and {names[0]}: is axis 0 the batch? Models that "
                "take the sequence first need batch_first=True; a norm over the batch is not a function of one sample."
            )


def _is_repeatable(instrumented: InstrumentedModel, batch: Any, captured: Sequence[CapturedLayer]) -> bool:
    """Whether a second forward pass gives the same activations; not so if the model counts its calls, for example."""
    with torch.no_grad():
        again = instrumented.capture(batch)
    return all(_close(x.a, y.a) for x, y in zip(again, captured, strict=True))


def _check_same_output(instrumented: InstrumentedModel, batch: Any, captured: Sequence[CapturedLayer]) -> None:
    if captured[-1].layer.taps != ("output",):
        return
    with torch.no_grad():
        output = first_tensor(instrumented.run(batch))
    if output is None or not _close(output, captured[-1].outputs[0]):
        raise NodeLayerError(
            "The model's output changes when it is cut: a tapped tensor is written to in place while something else "
            "still uses it. Tap the output of the module that writes to it, instead of its input."
        )


def _check_permuted_inputs(
    instrumented: InstrumentedModel, batch: Any, captured: Sequence[CapturedLayer], inputs: set[int]
) -> None:
    """With the samples of the input permuted but a node layer's activations unchanged, later ones must not change.

    This finds paths without gradients: through detach, comparisons and argmax.
    """

    def permute(index: int, tensor: Tensor) -> Tensor:
        return tensor.roll(1, 0) if index in inputs else tensor

    for position in range(len(captured) - 1 if inputs else 0):
        unchanged = [layer.a.detach() if k == position else None for k, layer in enumerate(captured)]
        with torch.no_grad(), varying_inputs(instrumented, batch_size(batch), permute):
            permuted = instrumented.capture(batch, unchanged)
        for x, y in zip(captured[position + 1 :], permuted[position + 1 :], strict=True):
            if not _close(x.a, y.a):
                raise NodeLayerError(
                    f"Node layer '{captured[position].layer.name}' does not cut the computation: '{x.layer.name}' "
                    "also depends on the model's input past it, on a path without gradient (detach, argmax, ...)."
                )


def _close(a: Tensor, b: Tensor) -> bool:
    # The same operations on the same numbers, but an accelerator may sum them in another order. In half precision a
    # tolerance of 1000 eps would exceed the numbers themselves.
    eps = torch.finfo(a.dtype).eps
    return a.shape == b.shape and bool((a - b).abs().max() <= min(1000 * eps, eps**0.5) * b.abs().max())


def _depends(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> bool:
    """Whether there is a path with gradients from any of the leaves to any of the outputs."""
    outputs = [output for output in outputs if output.requires_grad]
    if not outputs or not leaves:
        return False
    ones = [torch.ones_like(output) for output in outputs]
    grads = torch.autograd.grad(outputs, list(leaves), ones, retain_graph=True, allow_unused=True)
    return any(grad is not None for grad in grads)
