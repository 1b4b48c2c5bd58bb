"""Validating node layers: whether they cut the computation, tested on a few samples before anything is computed.

In two ways. Each section is a separate autograd graph, so a gradient with respect to anything but the node layer before
reveals a path around that node layer; that also finds paths that have no effect yet, because a weight is zero. And the
model is run with the input of some samples and the activations of others: a section whose output does not follow from
the activations before it alone depends on something else, with or without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from lib_lightning.errors import LIBError, NodeLayerError, NotFiniteError, is_out_of_memory
from lib_lightning.model.agreement import other_order, same_numbers
from lib_lightning.model.batch import first_tensor, is_empty, tensors_in
from lib_lightning.model.capture import CapturedLayer
from lib_lightning.model.exchange import Exchange, exchanges, first_samples
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.module_paths import explain_own_names
from lib_lightning.model.skip_positions import plain_skip, skipped_of
from lib_lightning.model.sources import SampleSources
from lib_lightning.model.vjp import apply_mask, vjp

T = TypeVar("T")

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
NOT_LOOKED = (
    "The check for skip connections around the first node layer could not look: all samples that it was given are the "
    "same, or lead to the same activations there. Check the node layers with other batches (check_node_layers)."
)
_NOT_REPEATABLE = (
    "The check for paths without gradient around node layers could not look: two passes over the same batch give "
    "different activations."
)
# What the error messages of torch mean for a node layer.
_TORCH_ERRORS = {
    "detached in-place": _USED,
    "leaf Variable that requires grad": _USED,
    "have been used in the graph": _DIFFERENTIATED,
    "inside of a function being transformed": _DIFFERENTIATED,
}


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


class InputBypassError(NodeLayerError):
    """A node layer does not cut the computation, because a later one depends on the model's input past it."""


def validate_node_layers(instrumented: InstrumentedModel, batches: Sequence[Any]) -> list[str]:
    """Raise an error if the node layers do not cut the computation.

    Inputs that the first node layer does not depend on (a time step) are constants. So are masks and lengths, if the
    node layers cut the computation only then; a note says so.

    Args:
        instrumented: The model and its node layers.
        batches: Batches, of which a few samples are used.

    Returns:
        Notes, one sentence each: what could not be tested, and what was treated as a constant.

    Raises:
        NodeLayerError: If a node layer does not cut the computation, with its name and the reason.
        ActivationError: If activations are integers, NaN or infinite.
    """
    batches = instrumented.parts([batch for batch in batches if not is_empty(batch)] or batches[:1])
    try:
        return on_few_samples(instrumented, partial(_validate, instrumented, batches), batches, final=LIBError)
    except NodeLayerError as error:
        meant = explain_own_names(instrumented.model, instrumented.layers)
        if not meant:
            raise
        raise NodeLayerError(f"{error} {meant}") from error


def on_few_samples(
    instrumented: InstrumentedModel,
    run: Callable[[int], T],
    batches: Sequence[Any],
    final: type[Exception] | tuple[type[Exception], ...] = (),
) -> T:
    """Run a function on a few samples of batches, or on whole batches if that fails.

    Args:
        instrumented: The model that the function runs.
        run: The function, called with the number of samples to use at most; 0 for whole batches.
        batches: The batches.
        final: Errors after which whole batches are not tried; always those of memory.

    Returns:
        The result of the function.
    """
    if all(instrumented.num_samples(batch) <= _SAMPLES for batch in batches):
        return run(0)  # once: a model that fails may leave other state behind
    try:
        return run(_SAMPLES)
    except Exception as error:
        if isinstance(error, final) or is_out_of_memory(error):
            raise
        return run(0)


def _validate(instrumented: InstrumentedModel, batches: Sequence[Any], limit: int) -> list[str]:
    try:
        for exchange in exchanges(batches, instrumented.layout(batches[0]), limit):
            data = _exchange_of_data(instrumented, exchange)
            if data is not None:
                return _check_with_context(instrumented, data)
        captured = instrumented.capture(first_samples(batches[0], instrumented.layout(batches[0]), limit))
        _check_gradients(captured, [])
        return [NOT_LOOKED]
    except RuntimeError as error:
        for message, meaning in _TORCH_ERRORS.items():
            if message in str(error):
                raise NodeLayerError(f"{meaning} ({error})") from error
        raise


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


def _exchange_of_data(instrumented: InstrumentedModel, exchange: Exchange) -> Exchange | None:
    """The part of an exchange that changes the first node layer; None if nothing does."""
    try:
        before = _first_activations(instrumented, exchange.batch)
    except KeyError:  # it did not run, which `capture` explains
        instrumented.capture(exchange.batch)
        raise

    def changes(part: Exchange) -> bool:
        try:
            after = _first_activations(instrumented, part.other)
        except Exception as error:  # not samples that the model accepts
            if is_out_of_memory(error):
                raise
            return False
        return after.shape == before.shape and not _close(after, before)

    entries = exchange.entries or ()
    data = [i for i in entries if changes(exchange.only([i]))] if len(entries) > 1 else []
    part = exchange.only(data) if data else exchange
    return part if len(data) == 1 or changes(part) else None


def _first_activations(instrumented: InstrumentedModel, batch: Any) -> Tensor:
    with torch.no_grad():
        return instrumented.next_activations(batch, -1, None).detach()


def _check_with_context(instrumented: InstrumentedModel, exchange: Exchange) -> list[str]:
    try:
        return _Check(instrumented, exchange, hold_masks=False).run()
    except InputBypassError as error:
        # Masks and lengths are used by many layers. What the model does with the rest is a function of the node layer.
        data = exchange.without_context()
        try:
            check = _Check(instrumented, data or exchange, hold_masks=True)
            notes = check.run()
        except NodeLayerError:
            raise error from None
        if not check.changes_first_layer:
            raise
        first = instrumented.layers[0].name
        what = f"{', '.join(data.held)} of the batch" if data else "a mask that the model computes from its input"
        return [*notes, f"Node layers after '{first}' also depend on {what}, which is treated as a constant."]


class _Check:
    """The check of a model's node layers with two sets of samples.

    Args:
        instrumented: The model and its node layers.
        exchange: The samples.
        hold_masks: Whether masks that the model computes from integers are the same for both.
    """

    def __init__(self, instrumented: InstrumentedModel, exchange: Exchange, hold_masks: bool) -> None:
        self.instrumented, self.exchange, self.hold_masks = instrumented, exchange, hold_masks
        self.search = SampleSources(instrumented.model)
        # Activations of all node layers, for either set of samples.
        self.a: list[list[Tensor]] = []

    @property
    def changes_first_layer(self) -> bool:
        """Whether the first node layer differs between the two sets of samples."""
        return not _close(self.a[0][0], self.a[1][0])

    def run(self) -> list[str]:
        """Raise an error if the node layers do not cut the computation; returns notes."""
        batch, other = self.exchange.batch, self.exchange.other
        self.a = [self._activations(batch, check=True), self._activations(other)]
        captured, sources = self._capture()
        is_repeatable = all(_close(x.a, a) for x, a in zip(captured, self.a[0], strict=True))
        try:
            _check_gradients(captured, sources)
        finally:
            self.search.release()
        if not is_repeatable:
            return [_NOT_REPEATABLE]
        _check_same_output(self.instrumented, batch, captured)
        self._check_exchanged()
        return []

    def _activations(self, batch: Any, check: bool = False) -> list[Tensor]:
        with self.search.compare(self.hold_masks):
            captured = self.instrumented.capture(batch)
        if check:
            for layer in captured:
                check_finite(layer.layer.name, layer.rows)
        return [layer.a.detach() for layer in captured]

    def _capture(self) -> tuple[list[CapturedLayer], list[Tensor]]:
        with self.search.mark(hold_masks=self.hold_masks) as sources:
            captured = self.instrumented.capture(self.exchange.batch)
        return captured, sources

    def _check_exchanged(self) -> None:
        """With activations of one set of samples, the section after must not see that all else is of the other set."""
        layers = self.instrumented.layers
        # For input and node layers, the digits of a Gray code say of which samples they are: any two differ in some
        # pass, and neighbours in one pass only.
        codes = [i ^ i >> 1 for i in range(len(layers))]
        for digit in range(max(codes).bit_length()):
            choice = [code >> digit & 1 for code in codes]
            found = self._activations_with(choice)
            for i in range(1, len(layers)):
                # A tap may be computed from another one of its node layer.
                is_comparable = i == len(layers) - 1 or len(layers[i].taps) == 1 or choice[i] == choice[i + 1]
                if is_comparable and not _close(found[i], self.a[choice[i]][i]):
                    raise self._bypass(i)

    def _activations_with(self, choice: Sequence[int]) -> list[Tensor]:
        """Activations of all node layers, with the input and those of earlier ones from either set of samples."""
        batch = self.exchange.other if choice[0] else self.exchange.batch
        replace = [*(self.a[side][i] for i, side in enumerate(choice[1:])), None]
        with torch.no_grad(), self.search.holding_masks() if self.hold_masks else nullcontext():
            return [layer.a for layer in self.instrumented.capture(batch, replace)]

    def _bypass(self, after: int) -> NodeLayerError:
        """The error for a section whose output does not follow from the node layer before alone."""
        layers = self.instrumented.layers
        source = 0
        for j in range(1, after):
            only_j = [int(k == j) for k in range(len(layers))]
            if not _close(self._activations_with(only_j)[after], self.a[0][after]):
                source = j
                break
        error = NodeLayerError if source else InputBypassError
        return error(
            f"Node layer '{layers[after - 1].name}' does not cut the computation: '{layers[after].name}' also depends "
            f"on {_INPUT if source == 0 else repr(layers[source - 1].name)} past it, on a path without gradient "
            "(detach, argmax, ...)."
        )


def _check_gradients(captured: Sequence[CapturedLayer], sources: Sequence[Tensor]) -> None:
    _check_skipped(captured)
    for layer in captured:
        check_finite(layer.layer.name, layer.rows)
    _check_bypass(captured, sources)
    for before, after in pairwise(captured):
        _check_section(before, after)


def _check_skipped(captured: Sequence[CapturedLayer]) -> None:
    """Positions to leave out have to be there in some node layer."""
    asked = [layer for layer in captured if layer.layer.skip_positions]
    sizes = [replace(layer.layer, positions=None).read(layer.outputs).shape[1] for layer in asked]
    skips = [plain_skip(layer.layer.skip_positions) for layer in asked]
    if asked and not any(S > 1 and skipped_of(skip or 0, S) for S, skip in zip(sizes, skips, strict=True)):
        shown = ", ".join(f"{S} at '{layer.layer.name}'" for S, layer in list(zip(sizes, asked, strict=True))[:3])
        raise NodeLayerError(
            f"skip_positions={skips[0]!r} leaves nothing out; numbers of positions: {shown}. Positions are counted "
            "from 0, and a single one (after pooling, or without a sequence) is never left out."
        )


def _check_bypass(captured: Sequence[CapturedLayer], sources: Sequence[Tensor]) -> None:
    """Each node layer may depend on the one before only, not on earlier ones or on the model's input."""
    earlier = [(_INPUT, sources), *((f"'{layer.layer.name}'", layer.leaves) for layer in captured)]
    for position in range(1, len(captured)):
        for source, leaves in earlier[:position]:
            if _depends(captured[position].outputs, leaves):
                error = InputBypassError if source == _INPUT else NodeLayerError
                raise error(
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
    # Positions that are left out are part of the cut: what follows may depend on them, which it may not on padding.
    u = apply_mask(u, after.valid)
    grads = vjp(before, after, u)
    selected = before.layer.write(
        apply_mask(before.layer.read(grads), before.valid), [torch.zeros_like(grad) for grad in grads]
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
        if bool((before.layer.read(vjp(before, after, u_sample))[others].abs() > 0).any()):
            raise NodeLayerError(
                f"Samples influence each other between {names[1]} and {names[0]}: is axis 0 the batch? Models that "
                "take the sequence first need batch_first=True; a norm over the batch is not a function of one sample."
            )


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


def _close(a: Tensor, b: Tensor) -> bool:
    return same_numbers(a, b, other_order(b.dtype) if b.is_floating_point() else 0.0)


def _depends(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> bool:
    """Whether there is a path with gradients from any of the leaves to any of the outputs."""
    outputs = [output for output in outputs if output.requires_grad]
    if not outputs or not leaves:
        return False
    ones = [torch.ones_like(output) for output in outputs]
    grads = torch.autograd.grad(outputs, list(leaves), ones, retain_graph=True, allow_unused=True)
    return any(grad is not None for grad in grads)
