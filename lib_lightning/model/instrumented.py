"""A model as it is, run on a batch: whole, cut at its node layers, or with activations of one's own."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lib_lightning.errors import LIBError
from lib_lightning.model.batch import map_tensors
from lib_lightning.model.capture import ActivationRecorder, CapturedLayer, StopForward
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.module_paths import check_taps
from lib_lightning.model.node_layer import NodeLayer
from lib_lightning.model.preserve import preserve_attributes

_DEFAULT = ModelSpec()


class InstrumentedModel:
    """A model, the node layers to cut it at, and how to feed it a batch.

    Args:
        model: Any module; never modified.
        layers: Node layers in forward order.
        spec: How to call the model on a batch. To compute in another dtype, each call converts copies of the
            parameters. Masked positions enter no sum.

    Attributes:
        seed: For random numbers that a forward pass may draw; to be set anew for each batch.

    Raises:
        NodeLayerError: If a tap names a module the model does not have, or the model has no ``forward``.
        LIBError: If the model is wrapped in FullyShardedDataParallel.
    """

    def __init__(self, model: nn.Module, layers: Sequence[NodeLayer], spec: ModelSpec = _DEFAULT) -> None:
        self.model = model
        self.layers = list(layers)
        self.spec = spec
        self.seed = 0
        self._changed: list[weakref.ref[Tensor]] = []
        self._put_back: Callable[[], None] | None = None  # what a forward pass that is left halfway has not
        self._widths: dict[tuple[int, int], int] = {}
        self._given: dict[int, tuple[Tensor, Tensor]] = {}
        if any(cls.__name__ == "FullyShardedDataParallel" for m in model.modules() for cls in type(m).__mro__):
            raise LIBError(
                "FullyShardedDataParallel frees a module's weights after one backward pass, and a basis needs many "
                "over the same forward pass. Use its successor, torch.distributed.fsdp.fully_shard."
            )
        check_taps(model, self.layers)

    def activations(self, batch: Any) -> list[Tensor]:
        """Activations ``(n, S, d)`` of every node layer on one batch, without gradients."""
        with torch.no_grad():
            return [cut.a for cut in self.capture(batch)]

    def capture(self, batch: Any, replace: Sequence[Tensor | None] | None = None) -> list[CapturedLayer]:
        """Run the model once, cut at every node layer.

        Args:
            batch: One batch, as the data loader gives it.
            replace: For each node layer activations ``(n, S, d)`` to continue with instead of the computed ones, or
                None to leave it as it is.

        Returns:
            One `CapturedLayer` for each node layer, in order.

        Raises:
            NodeLayerError: If a node layer is never run, run repeatedly, or out of order.
            ActivationError: If its activations are not floating-point numbers.
        """
        recorder = ActivationRecorder(
            self.model, self.layers, replace or [None] * len(self.layers), self._widths, self._given
        )
        with recorder.hooked():
            self.run(batch)
        self._changed += recorder.changed
        cuts = recorder.finish()
        mask = self.spec.mask_of(batch)
        return cuts if mask is None else [_masked(cut, mask) for cut in cuts]

    def output(self, batch: Any, replace: Mapping[int, Tensor]) -> Any:
        """Run the model with activations replaced, and nothing else in its way.

        Args:
            batch: One batch, as the data loader gives it.
            replace: Activations ``(n, S, d)`` to continue with, by index of the node layer. `capture` has run before.

        Returns:
            What the model returns.
        """
        values = [replace.get(i) for i in range(len(self.layers))]
        recorder = ActivationRecorder(self.model, self.layers, values, self._widths, self._given)
        with recorder.hooked(replace):
            return self.run(batch)

    def next_activations(self, batch: Any, index: int, a: Tensor) -> Tensor:
        """The section after a node layer, at activations of one's own: the model runs up to the next node layer.

        Args:
            batch: One batch, as the data loader gives it.
            index: Index ``l`` of the node layer.
            a: Its activations ``a^l``, shape ``(n, S, d)``. `capture` has run before.

        Returns:
            ``a^{l+1}``, shape ``(n, S', d')``.
        """
        values = [a if i == index else None for i in range(len(self.layers))]
        recorder = ActivationRecorder(self.model, self.layers, values, self._widths, self._given)
        recorder.last = index + 1
        self._put_back = self._put_back or preserve_attributes(self.model)
        try:
            with recorder.hooked((index, index + 1)):
                self.run(batch)
        except (StopForward, Exception):
            # A model that catches whatever comes may go on for a while, and fail; we have what we wanted.
            if not recorder.reached:
                raise
            self._put_back()
        layer = self.layers[index + 1]
        return layer.read([recorder.seen[index + 1, k][0] for k in range(len(layer.taps))])

    def run(self, batch: Any) -> Any:
        """Call the model on a batch, in the computation dtype, and return what it returns."""
        # A model that draws random numbers draws the same ones each time it sees the same batch.
        torch.default_generator.manual_seed(self.seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(self.seed)
        args, kwargs = self.inputs(batch)
        try:
            if self.spec.dtype is None:
                return self.model(*args, **kwargs)
            state = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
            converted = {name: t.detach().to(self.spec.dtype) for name, t in state.items() if t.is_floating_point()}
            return torch.func.functional_call(self.model, converted, args, kwargs)
        finally:
            self._given.clear()

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for a batch, in tensors of our own.

        The first module may be a tap, or the model may write into its input: never on the caller's tensors.
        """
        self._given.clear()
        batch_tensors: set[int] = set()

        def of_batch(tensor: Tensor) -> Tensor:
            batch_tensors.add(id(tensor))
            return tensor

        def own(tensor: Tensor) -> Tensor:
            copy = tensor.detach().to(
                self.spec.dtype or tensor.dtype if tensor.is_floating_point() else None, copy=True
            )
            plain = type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_inference()
            # Not what `input_fn` has made: it may use the same memory for the next batch.
            if id(tensor) in batch_tensors and plain and tensor.device.type == "cpu" and copy.dtype == tensor.dtype:
                self._given[id(copy)] = copy, tensor.detach()
            return copy

        inputs = map_tensors(self.spec.input_of(map_tensors(batch, of_batch)), own)
        if isinstance(inputs, Mapping):
            return (), dict(inputs)
        return (inputs if isinstance(inputs, tuple) else (inputs,)), {}

    def release(self) -> None:
        """Take tensors that outlive their forward pass (a state kept on a module, say) off our graphs."""
        for reference in self._changed:
            tensor = reference()
            if tensor is not None:
                tensor.detach_()
        self._changed.clear()


def _masked(cut: CapturedLayer, mask: Tensor) -> CapturedLayer:
    return dataclasses.replace(cut, mask=cut.layer.select(mask.to(cut.ends[0].device) != 0, cut.ends))
