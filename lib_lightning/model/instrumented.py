"""A model with its node layers: run on a batch, cut at the node layers, or with replaced activations."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lib_lightning.errors import ActivationError, LIBError, NodeLayerError, is_out_of_memory
from lib_lightning.model.autograd_graph import saved_as_copies, versions_of
from lib_lightning.model.batch import map_tensors, tensors_in
from lib_lightning.model.batch_layout import BatchLayout, find_layout, graph_sizes
from lib_lightning.model.calls import ModelCall, without_subclass
from lib_lightning.model.capture import ActivationRecorder, BatchContext, CapturedLayer, StopForward
from lib_lightning.model.conversion import convert_attributes, target_dtype
from lib_lightning.model.feature_axis import FeatureAxes, TensorRecord
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.module_paths import accepts_hooks, as_in_model, check_taps, find_module, unwrapped
from lib_lightning.model.node_layer import OUTPUT, NodeLayer, has_known_axis
from lib_lightning.model.not_called import NotCalledError, explain_not_called
from lib_lightning.model.preserve import MAX_COPIED_BYTES, is_running_copy, preserve_model
from lib_lightning.model.process_state import seed_all
from lib_lightning.model.replica import Copier
from lib_lightning.model.safe_points import interruptible, safe_point
from lib_lightning.model.saved_state import preserve_attributes
from lib_lightning.model.saved_value import has_address
from lib_lightning.model.sources import in_model
from lib_lightning.model.steps import arguments_in_step, can_be_called, find_call, forward_in_step

_DEFAULT = ModelSpec()
T = TypeVar("T")


class InstrumentedModel:
    """A model, the node layers to cut it at, and how to call it on a batch.

    Args:
        model: Any module; its code is not modified.
        layers: Node layers in forward order.
        spec: How to call the model on a batch. To compute in another dtype, each call converts copies of the
            parameters. Masked positions enter no sum.

    Attributes:
        model: The module that runs: in a `session`, the copy.
        seed: Seed of the random numbers that a forward pass draws; set by `manual_seed`.
        notes: What the check of the node layers could not test, or treated as a constant, in sentences.
        axis_notes: Which axes were taken for those of features without evidence, in sentences; known after `capture`.

    Raises:
        NodeLayerError: If a tap names a module that the model does not have, or the model has no ``forward``.
        LIBError: If the model is wrapped in FullyShardedDataParallel.
    """

    def __init__(self, model: nn.Module, layers: Sequence[NodeLayer], spec: ModelSpec = _DEFAULT) -> None:
        self.model = unwrapped(model)
        self.layers = [self._with_settings(as_in_model(self.model, layer), spec) for layer in layers]
        self.spec = spec
        self.seed = 0
        # Whether a forward pass has written to parameters, which graphs of earlier passes need as they were.
        self._writes_weights = False
        self._in_session = self._is_copy = False
        self.notes: list[str] = []
        self.axis_notes: list[str] = []
        self._knows_axes = all(map(has_known_axis, self.layers))
        self._output_layer = NodeLayer(OUTPUT)
        self._detached: list[weakref.ref[Tensor]] = []
        # Undoes what an interrupted forward pass has written to the attributes of modules.
        self._restore_attributes: Callable[[], None] | None = None
        self._widths: dict[tuple[int, int], int] = {}
        self._caller_tensors: dict[int, tuple[Tensor, Tensor]] = {}
        if any(cls.__name__ == "FullyShardedDataParallel" for m in model.modules() for cls in type(m).__mro__):
            raise LIBError(
                "FullyShardedDataParallel frees a module's weights after one backward pass, and a basis needs several "
                "over the same forward pass. Use its successor, torch.distributed.fsdp.fully_shard."
            )
        check_taps(self.model, self.layers, can_be_called(self.model, spec.input_fn))

    @staticmethod
    def _with_settings(layer: NodeLayer, spec: ModelSpec) -> NodeLayer:
        if layer.skip_positions is not None or spec.skip_positions is None:
            return layer
        return dataclasses.replace(layer, skip_positions=spec.skip_positions)

    def manual_seed(self, seed: int) -> None:
        """Set the seed of the random numbers that each of the following forward passes draws.

        Args:
            seed: The seed. With one seed per batch, a stochastic model repeats itself whenever it sees the same batch.
        """
        self.seed = seed

    @contextmanager
    def session(self, max_bytes: int = MAX_COPIED_BYTES) -> Iterator[None]:
        """A block in which a copy of the model runs, which is then `model`; see `preserve_model`.

        Args:
            max_bytes: Copy the parameters, too, if they take no more memory than this.

        Yields:
            Nothing. A block inside such a block runs the same copy.
        """
        if self._in_session:
            yield
            return
        original = self.model
        with preserve_model(original, max_bytes) as self.model:
            self._in_session, self._is_copy = True, is_running_copy(self.model)
            try:
                if self.spec.dtype is not None:
                    convert_attributes(self.model, self.spec.dtype)
                yield
            finally:
                self.release()
                self._in_session, self._is_copy, self._restore_attributes = False, False, None
                self.model = original

    @contextmanager
    def shared_copy(self, max_bytes: int = MAX_COPIED_BYTES) -> Iterator[None]:
        """A block whose sessions, and those of others on `model`, run one copy as long as that is as it was made.

        Args:
            max_bytes: As for `session`.

        Yields:
            Nothing.
        """
        original = self.model
        with ExitStack() as stack:
            self.model = stack.enter_context(preserve_model(original, max_bytes))
            if self.model is original:  # it cannot be copied: each session restores it
                stack.close()
            try:
                yield
            finally:
                self.model = original

    @property
    def to_output(self) -> InstrumentedModel:
        """The same model, with its output as the last node layer; use it in the same `session`."""
        if self.layers and tuple(self.layers[-1].taps) == (OUTPUT,):
            return self
        other = copy.copy(self)
        other.layers, other._widths, other.axis_notes = [*self.layers, self._output_layer], {}, []
        other._knows_axes = all(map(has_known_axis, other.layers))
        return other

    def capture_to_output(self, batch: Any) -> list[CapturedLayer]:
        """Cut the computation at every node layer and at the model's output.

        Args:
            batch: One batch, as the data loader gives it.

        Returns:
            One `CapturedLayer` for each node layer and one for the output, in order; a single one for both if the last
            node layer is the output.

        Raises:
            NodeLayerError: As for `capture`.
            ActivationError: If the output has no row for each sample.
        """
        cut = self.to_output
        captured = cut.capture(batch)
        if cut is not self:  # the axis of its features is known from now on
            self._output_layer = cut.layers[-1]
        samples, rows = len(captured[0].a), len(captured[-1].a)
        if samples != rows:
            raise ActivationError(f"The model's output has {rows:,} rows for {samples:,} samples.")
        return captured

    def activations(self, batch: Any) -> list[Tensor]:
        """Activations ``(n, S, d)`` of every node layer on one batch, without gradients."""
        with torch.no_grad():
            return [layer.a for layer in self.capture(batch)]

    def capture(self, batch: Any, replace: Sequence[Tensor | None] | None = None) -> list[CapturedLayer]:
        """Run the model once and cut the computation at every node layer.

        Args:
            batch: One batch, as the data loader gives it.
            replace: For each node layer, activations ``(n, S, d)`` to continue with, or None for the computed ones.

        Returns:
            One `CapturedLayer` for each node layer, in order.

        Raises:
            NodeLayerError: If a node layer is not called, called repeatedly, or called out of order.
            ActivationError: If its activations are not floating-point numbers.
        """
        return self.capture_with_output(batch, replace)[0]

    def capture_with_output(
        self, batch: Any, replace: Sequence[Tensor | None] | None = None
    ) -> tuple[list[CapturedLayer], Any]:
        """As `capture`, with the model's output as well."""
        wrote = self._writes_weights
        axes = None if self._knows_axes else FeatureAxes(fixed_tensors(self.model))
        recorder = self._recorder(batch, replace or [None] * len(self.layers), axes=axes)
        with recorder.hooked():
            output = self.run(batch)
        self._detached += recorder.detached
        if self._writes_weights and not wrote:  # from now on graphs keep the weights as they were
            return self.capture_with_output(batch, replace)
        try:
            captured = recorder.finish()
        except NotCalledError as error:
            said = explain_not_called(self.model, error.taps, self._called_modules(batch))
            raise NodeLayerError(said) from error
        if axes is not None:
            captured = self._with_axes(captured, axes, recorder.records)
        mask = self.spec.mask_of(batch)
        return [_with_masks(layer, mask) for layer in captured], output

    def _with_axes(
        self,
        captured: Sequence[CapturedLayer],
        axes: FeatureAxes,
        records: Mapping[tuple[int, int], TensorRecord],
    ) -> list[CapturedLayer]:
        """The captured node layers with their axes of features, which are kept from now on."""
        self._knows_axes = True
        for i, layer in enumerate(self.layers):
            if not has_known_axis(layer):
                found = [axes.axis_of(records[i, k]) for k in range(len(layer.taps))]
                axis = found[0].axis if len({one.axis for one in found}) == 1 else None
                self.layers[i] = dataclasses.replace(layer, feature_dim=axis)
                if (axis is None and len({one.axis for one in found}) > 1) or any(one.is_guess for one in found):
                    self.axis_notes.append(_guessed(self.layers[i], captured[i].outputs))
        changed = [
            dataclasses.replace(c, layer=dataclasses.replace(c.layer, feature_dim=layer.feature_dim))
            for c, layer in zip(captured, self.layers, strict=True)
        ]
        for i, (before, after) in enumerate(zip(captured, changed, strict=True)):
            if before.layer.feature_dim != after.layer.feature_dim:
                self._widths |= {(i, k): after.layer.width(t) for k, t in enumerate(after.outputs)}
        return changed

    def _called_modules(self, batch: Any) -> set[int]:
        """``id`` of each module that the model calls on a batch; in another forward pass."""
        called: set[int] = set()
        hookable = [module for module in self.model.modules() if accepts_hooks(module)]
        handles = [module.register_forward_pre_hook(lambda module, _: called.add(id(module))) for module in hookable]
        try:
            with torch.no_grad():
                self.run(batch)
        finally:
            for handle in handles:
                handle.remove()
        return called

    def output(self, batch: Any, replace: Mapping[int, Tensor]) -> Any:
        """Run the model with replaced activations; other node layers are not hooked.

        Args:
            batch: One batch, as the data loader gives it.
            replace: Activations ``(n, S, d)`` to continue with, by index of the node layer. Requires an earlier call
                of `capture`.

        Returns:
            The model's output.
        """
        with self._recorder(batch, [replace.get(i) for i in range(len(self.layers))]).hooked(replace):
            return self.run(batch)

    def output_and_gradient(
        self, batch: Any, index: int, a: Tensor, loss: Callable[[Any], Tensor]
    ) -> tuple[Any, Tensor]:
        """Run the model with replaced activations, and differentiate a loss of its output with respect to them.

        Args:
            batch: One batch, as the data loader gives it.
            index: Index of the node layer.
            a: Its activations, shape ``(n, S, d)``. Requires an earlier call of `capture`.
            loss: From the model's output to a scalar.

        Returns:
            The output, on its graph, and the gradient ``(n, S, d)``; zeros if the loss does not depend on ``a``.
        """
        recorder = self._recorder(batch, [a if i == index else None for i in range(len(self.layers))])
        with torch.enable_grad():
            with recorder.hooked([index]):
                output = self.run(batch)
            value, leaves = loss(output), recorder.leaves(index)
            found: Sequence[Tensor | None] = [None] * len(leaves)
            if value.requires_grad:
                found = torch.autograd.grad(value, leaves, allow_unused=True)
        self._detached += recorder.detached
        grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]
        return output, self.layers[index].read(grads)

    def next_activations(self, batch: Any, index: int, a: Tensor | None) -> Tensor:
        """Evaluate the section after a node layer at given activations. The model runs up to the next node layer.

        Args:
            batch: One batch, as the data loader gives it.
            index: Index ``l`` of the node layer; -1 for the model's input.
            a: Its activations ``a^l``, shape ``(n, S, d)``; None for those of the batch. Replacing them requires an
                earlier call of `capture`.

        Returns:
            ``a^{l+1}``, shape ``(n, S', d')``.
        """
        values = [a if i == index else None for i in range(len(self.layers))]
        # A forward pass of a sharded model has to end as it began, for the next one to find the weights.
        is_sharded = not all(map(has_address, self.model.parameters()))
        recorder = self._recorder(batch, values, stop_after=None if is_sharded else index + 1)
        self._restore_attributes = self._restore_attributes or preserve_attributes(self.model)
        try:
            with recorder.hooked((index, index + 1)):
                self.run(batch)
        except (StopForward, Exception):
            # A model with a catch-all handler may continue for a while and fail; the activations are known by then.
            if not recorder.stopped:
                raise
            self._restore_attributes()
        return recorder.activations(index + 1)

    def run(self, batch: Any) -> Any:
        """Call the model on a batch, in the computation dtype, and return its output."""
        safe_point()
        call = self.find_call(batch)
        # A model that draws random numbers draws the same ones whenever it sees the same batch.
        seed_all(self.seed)
        dtype = self.spec.dtype
        weights = list(self.model.parameters())
        versions = versions_of(weights)
        try:
            with (
                saved_as_copies(weights) if self._writes_weights else nullcontext(),
                self._interruptible(),
            ):
                if dtype is None:
                    return self._forward(call, batch)
                state = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
                tensors = {f"model.{name}": t.detach().to(target_dtype(t, dtype)) for name, t in state.items()}
                return torch.func.functional_call(_Function(self.model, self._forward), tensors, (call, batch))
        finally:
            self._writes_weights = self._writes_weights or versions_of(weights) != versions
            self._caller_tensors.clear()

    @property
    def is_repeatable(self) -> bool:
        """Whether the operations of a forward pass may be repeated without the model around them.

        Not if they write to parameters, or need the hooks of a sharded model, which bring its weights into memory.
        """
        return not self._writes_weights and all(map(has_address, self.model.parameters()))

    def fixed_tensors(self) -> Iterator[Tensor]:
        """Parameters and buffers of the model."""
        return fixed_tensors(self.model)

    def _interruptible(self) -> AbstractContextManager[None]:
        """A block in which the model runs. A signal ends it at once if that is a copy."""
        return interruptible() if self._is_copy else nullcontext()

    @property
    def entry(self) -> nn.Module:
        """The module whose input is the model's, known after the first batch."""
        call = self.spec.call
        return find_module(self.model, call.calls[0].path) if call and call.calls[0].path else self.model

    def find_call(self, batch: Any) -> ModelCall:
        """How the model is called; decided at the first batch, before any hooks are registered.

        Args:
            batch: One batch, as the data loader gives it.

        Returns:
            The call, which is from now on in ``spec``.

        Raises:
            LIBError: If the model cannot be called.
        """
        if self.spec.call is None:
            with self.session(), self._interruptible():
                seed_all(self.seed)
                call = find_call(self.model, batch, self.spec.input_fn)
            self.spec = dataclasses.replace(self.spec, input_fn=call)
        assert self.spec.call is not None
        return self.spec.call

    def layout(self, batch: Any) -> BatchLayout:
        """Which parts of a batch have one entry for each sample; decided at the first batch of several samples.

        Args:
            batch: One batch, as the data loader gives it.

        Returns:
            The layout.

        Raises:
            LIBError: If there are several possibilities that differ.
        """
        call = self.find_call(batch)
        if call.layout is None or not (call.layout.is_certain or call.layout.num_samples(batch) < 2):
            called_with = None if call.arguments is None else call.arguments.paths
            seed = self.seed
            try:
                with self.session(), torch.no_grad():
                    layout = find_layout(batch, called_with, self.run, lambda: self.manual_seed(seed + 1))
            finally:
                self.manual_seed(seed)
            call = dataclasses.replace(call, layout=layout)
            self.spec = dataclasses.replace(self.spec, input_fn=call)
        assert call.layout is not None
        return call.layout

    def num_samples(self, batch: Any) -> int:
        """Number of samples in a batch, as the model sees it."""
        return self.layout(batch).num_samples(batch)

    def parts(self, batches: Iterable[Any]) -> list[Any]:
        """Batches that can be run: those of graphs are divided into graphs with equally many nodes."""
        return [part for batch in batches for part in self.layout(batch).uniform_parts(batch)]

    def select(self, batch: Any, index: slice | Tensor) -> Any:
        """Samples of a batch, by a slice or indices ``(k,)``; the batch itself if it cannot be split."""
        return self.layout(batch).select(batch, index)

    def run_on_few(
        self,
        run: Callable[[Any], T],
        batch: Any,
        count: int,
        final: type[Exception] | tuple[type[Exception], ...] = (),
    ) -> T:
        """Run a function on the first samples of a batch, or on the whole batch if that fails.

        Args:
            run: The function.
            batch: One batch.
            count: Number of samples.
            final: Errors after which the whole batch is not tried; always those of memory.

        Returns:
            The result of the function.
        """
        if self.num_samples(batch) <= count:  # once: a model that fails may leave other state behind
            return run(batch)
        try:
            return run(self.select(batch, slice(0, count)))
        except Exception as error:
            if isinstance(error, final) or is_out_of_memory(error):
                raise
            return run(batch)

    def _forward(self, call: ModelCall, batch: Any) -> Any:
        if len(call.calls) > 1:
            copied = self._copied(batch)
            with in_model():
                return forward_in_step(self.model, call, copied)
        args, kwargs = self.inputs(batch)
        with in_model():
            return self.entry(*args, **kwargs)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for a batch, as copies.

        The first module may be tapped and the model may write into its input; neither may change the caller's tensors.
        """
        call = self.find_call(batch)
        if call.step is not None:
            return arguments_in_step(self.model, call, self._copied(batch))
        batch_tensors: dict[int, Tensor] = {}

        def register(tensor: Tensor) -> Tensor:
            batch_tensors[id(tensor)] = tensor
            return tensor

        arguments = call.arguments_of(map_tensors(self._with_copied_objects(batch), register))
        # Excludes tensors made by `input_fn`, which may use the same memory for the next batch.
        args, kwargs = map_tensors(
            arguments, lambda t: self._copy(without_subclass(t), may_share=id(t) in batch_tensors)
        )
        return args, kwargs

    def _copied(self, batch: Any) -> Any:
        """A copy of a batch, for a step, which may expect tensors of its own classes."""
        return map_tensors(self._with_copied_objects(batch), self._copy)

    def _with_copied_objects(self, batch: Any) -> Any:
        """The same tensors in copies of everything else, such as a graph that keeps what has been computed of it."""
        return batch if isinstance(batch, Tensor) else Copier(same=tensors_in(batch))(batch)

    def _copy(self, tensor: Tensor, may_share: bool = True) -> Tensor:
        copy = tensor.detach().to(target_dtype(tensor, self.spec.dtype), copy=True)
        is_plain = type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_inference()
        if may_share and is_plain and tensor.device.type == "cpu" and copy.dtype == tensor.dtype:
            self._caller_tensors[id(copy)] = copy, tensor.detach()
        return copy

    def release(self) -> None:
        """Detach tensors that outlive their forward pass, such as a recurrent state that a module stores."""
        for reference in self._detached:
            tensor = reference()
            if tensor is not None:
                tensor.detach_()
        self._detached.clear()

    def _recorder(
        self,
        batch: Any,
        replace: Sequence[Tensor | None],
        stop_after: int | None = None,
        axes: FeatureAxes | None = None,
    ) -> ActivationRecorder:
        context = BatchContext(self._caller_tensors, self.find_call(batch).locate, graph_sizes(batch))
        self._caller_tensors.clear()
        return ActivationRecorder(self.model, self.layers, replace, self._widths, context, stop_after, axes)


class _Function(nn.Module):
    """A function that runs a model, as a module that has the model's parameters."""

    def __init__(self, model: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


@contextmanager
def model_session(instrumented: InstrumentedModel, max_bytes: int = MAX_COPIED_BYTES) -> Iterator[None]:
    """Run a block that calls the model, on a copy of it; see `InstrumentedModel.session`."""
    with instrumented.session(max_bytes):
        yield


def fixed_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of a model."""
    return itertools.chain(model.parameters(), model.buffers())


def _guessed(layer: NodeLayer, tensors: Sequence[Tensor]) -> str:
    shapes = " and ".join(str(tuple(t.shape[1:])) for t in tensors)
    axes = " and ".join(str(layer.feature_axis(t.ndim) % t.ndim) for t in tensors)
    return (
        f"Which axis of '{layer.name}' has the features cannot be told from the modules around it; axis {axes} was "
        f"taken, of samples of shape {shapes} (axis 0 is the batch). NodeLayer({list(layer.taps)!r}, feature_dim=...) "
        "sets it."
    )


def _with_masks(captured: CapturedLayer, mask: Tensor | None) -> CapturedLayer:
    outputs = captured.outputs
    on_device = None if mask is None else mask.to(outputs[0].device) != 0
    valid, kept = captured.layer.masks(on_device, outputs)
    return captured if kept is None else dataclasses.replace(captured, mask=kept, valid=valid)
