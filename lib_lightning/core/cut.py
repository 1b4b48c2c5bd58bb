"""Cutting a live model at its node layers, without touching the model.

A hook at each tap sees the tensor ``t`` that the model is about to use. It keeps a copy as the *end* of the section
before, makes a fresh *leaf*, and lets ``t`` itself, in place, go on as a copy of that leaf. In place matters: whatever
else holds the same tensor object (the skip path of a residual block) then hangs on the new leaf too, so one forward
pass yields every section between two node layers as its own small autograd graph.

Two kinds of tensors cannot be changed in place: views (autograd forbids it) and tensors that belong to the model
(parameters, buffers). There the module is handed a copy of the leaf instead, which is right wherever nobody else uses
that tensor; `lib_lightning.core.check` tells when somebody does.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lib_lightning.core.errors import ActivationError, LIBError, NodeLayerError, quoted
from lib_lightning.core.guard import attributes_kept
from lib_lightning.core.layers import INPUT, NodeLayer, check_taps, find_module, split_tap
from lib_lightning.core.nested import default_input_fn, first_tensor, map_tensors, replace_first_tensor

InputFn = Callable[[Any], Any]
MaskFn = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Cut:
    """One node layer in one forward pass.

    Attributes:
        layer: The node layer.
        ends: The tapped tensors as computed, on the graph of the section before.
        leaves: What the model went on with, as leaves on which the section after hangs.
        order: Indices of the taps in the order in which they ran. A tap may be computed from another one of its layer
            that ran before; its end then hangs on that one's leaf.
        mask: True at positions that count, shape ``(n, S)``; None where all of them do.
    """

    layer: NodeLayer
    ends: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    order: tuple[int, ...]
    mask: Tensor | None = None

    @property
    def a(self) -> Tensor:
        """Activations ``(n, S, d)`` as computed, differentiable towards the node layer before."""
        return self.layer.read(self.ends)

    @property
    def rows(self) -> Tensor:
        """Activations at the positions that count, one a row: ``(m, d)``."""
        return rows_of(self.a.detach(), self.mask)


def rows_of(a: Tensor, mask: Tensor | None) -> Tensor:
    """Activations ``(n, S, d)`` one a row, ``(m, d)``: those at positions of a mask ``(n, S)``, if there is one."""
    return a.flatten(0, 1) if mask is None else a[mask]


class LiveModel:
    """A model, the node layers to cut it at, and how to feed it a batch.

    Args:
        model: Any module; never modified.
        layers: Node layers in forward order.
        input_fn: Turns a batch into what the model is called with: a mapping becomes keyword arguments, a tuple
            becomes positional arguments, anything else is the only argument. By default the first entry of a tuple or
            list batch, and any other batch as it is.
        dtype: Floating-point type to compute in; the model's own by default. Parameters are converted for the length
            of a call, on the side.
        mask_fn: Marks the positions of a batch that count, as a tensor of shape ``(n, S)``, true where they do: what
            it leaves out (padding) enters no sum. By default all of them.

    Attributes:
        seed: For random numbers that a forward pass may draw; to be set anew for each batch.

    Raises:
        NodeLayerError: If a tap names a module the model does not have, or the model has no ``forward``.
        LIBError: If the model is wrapped in FullyShardedDataParallel.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[NodeLayer],
        input_fn: InputFn | None = None,
        dtype: torch.dtype | None = None,
        mask_fn: MaskFn | None = None,
    ) -> None:
        self.model = model
        self.layers = list(layers)
        self.input_fn = input_fn or default_input_fn
        self.dtype = dtype
        self.mask_fn = mask_fn
        self.seed = 0
        self._changed: list[weakref.ref[Tensor]] = []
        self._put_back: Callable[[], None] | None = None  # what a forward pass that is left halfway has not
        self._widths: dict[tuple[int, int], int] = {}
        if any(cls.__name__ == "FullyShardedDataParallel" for m in model.modules() for cls in type(m).__mro__):
            raise LIBError(
                "FullyShardedDataParallel frees a module's weights after one backward pass, and a basis needs many "
                "over the same forward pass. Use its successor, torch.distributed.fsdp.fully_shard."
            )
        check_taps(model, self.layers)

    def activations(self, batch: Any) -> list[Tensor]:
        """Activations ``(n, S, d)`` of every node layer on one batch, without gradients."""
        with torch.no_grad():
            return [cut.a for cut in self.cut(batch)]

    def cut(self, batch: Any, replace: Sequence[Tensor | None] | None = None) -> list[Cut]:
        """Run the model once, cut at every node layer.

        Args:
            batch: One batch, as the data loader gives it.
            replace: For each node layer activations ``(n, S, d)`` to continue with instead of the computed ones, or
                None to leave it as it is.

        Returns:
            One `Cut` for each node layer, in order.

        Raises:
            NodeLayerError: If a node layer is never run, run repeatedly, or out of order.
            ActivationError: If its activations are not floating-point numbers.
        """
        recorder = _Recorder(self.model, self.layers, replace or [None] * len(self.layers), self._widths)
        with recorder.hooked():
            self.run(batch)
        self._changed += recorder.changed
        cuts = recorder.finish()
        return cuts if self.mask_fn is None else [_masked(cut, self.mask_fn(batch)) for cut in cuts]

    def output(self, batch: Any, replace: Mapping[int, Tensor]) -> Any:
        """Run the model with activations replaced, and nothing else in its way.

        Args:
            batch: One batch, as the data loader gives it.
            replace: Activations ``(n, S, d)`` to continue with, by index of the node layer. `cut` has run before.

        Returns:
            What the model returns.
        """
        values = [replace.get(i) for i in range(len(self.layers))]
        recorder = _Recorder(self.model, self.layers, values, self._widths)
        with recorder.hooked(replace):
            return self.run(batch)

    def next_activations(self, batch: Any, index: int, a: Tensor) -> Tensor:
        """The section after a node layer, at activations of one's own: the model runs up to the next node layer.

        Args:
            batch: One batch, as the data loader gives it.
            index: Index ``l`` of the node layer.
            a: Its activations ``a^l``, shape ``(n, S, d)``. `cut` has run before.

        Returns:
            ``a^{l+1}``, shape ``(n, S', d')``.
        """
        values = [a if i == index else None for i in range(len(self.layers))]
        recorder = _Recorder(self.model, self.layers, values, self._widths)
        recorder.last = index + 1
        self._put_back = self._put_back or attributes_kept(self.model)
        try:
            with recorder.hooked((index, index + 1)):
                self.run(batch)
        except (_Reached, Exception):
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
        if self.dtype is None:
            return self.model(*args, **kwargs)
        state = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        converted = {name: t.detach().to(self.dtype) for name, t in state.items() if t.is_floating_point()}
        return torch.func.functional_call(self.model, converted, args, kwargs)

    def inputs(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments for a batch, in tensors of our own.

        The first module may be a tap, or the model may write into its input: never on the caller's tensors.
        """

        def own(tensor: Tensor) -> Tensor:
            return tensor.detach().to(self.dtype or tensor.dtype if tensor.is_floating_point() else None, copy=True)

        inputs = map_tensors(self.input_fn(map_tensors(batch, lambda t: t)), own)
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


class _Reached(BaseException):
    """All has been seen that is wanted of this forward pass."""


class _Recorder:
    """The hooks of one forward pass and what they saw."""

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[NodeLayer],
        replace: Sequence[Tensor | None],
        widths: dict[tuple[int, int], int],
    ) -> None:
        self.model, self.layers, self.replace, self.widths = model, layers, replace, widths
        self.owned = {id(t) for t in (*model.parameters(), *model.buffers())}
        self.seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.changed: list[weakref.ref[Tensor]] = []
        self.last: int | None = None  # node layer after which the model need not go on
        self.reached = False  # whether it has come that far

    @contextmanager
    def hooked(self, only: Collection[int] | None = None) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        try:
            for layer_index, layer in enumerate(self.layers):
                for tap_index, tap in enumerate(layer.taps):
                    if only is None or layer_index in only:
                        handles.append(self._attach(tap, (layer_index, tap_index)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def finish(self) -> list[Cut]:
        taps = {(i, k): tap for i, layer in enumerate(self.layers) for k, tap in enumerate(layer.taps)}
        missing = [tap for key, tap in taps.items() if key not in self.seen]
        if missing:
            raise NodeLayerError(
                f"{quoted(missing)} did not run in the model's forward pass. Choose modules that forward() calls."
            )
        order = [i for i, _ in self.seen]
        if order != sorted(order):
            raise NodeLayerError(
                f"Node layers are out of order: give them as they run, {quoted([taps[key] for key in self.seen])}."
            )
        cuts = []
        for i, layer in enumerate(self.layers):
            ends, leaves = zip(*(self.seen[i, k] for k in range(len(layer.taps))), strict=True)
            cuts.append(Cut(layer, ends, leaves, tuple(k for j, k in self.seen if j == i)))
        return cuts

    def _attach(self, name: str, key: tuple[int, int]) -> RemovableHandle:
        tap = split_tap(name)
        module = find_module(self.model, tap.path)
        calls = itertools.count()

        def visit(value: Any) -> Any:
            if self.reached:  # a model that catches whatever comes is trying again
                raise _Reached
            call = next(calls)
            if tap.call is None and call:
                raise NodeLayerError(
                    f"'{name}' runs more than once in a forward pass, so it does not cut the computation at one place. "
                    f"Choose one of its calls ('{tap.path}#0' is the first), or the block around it."
                )
            return self._visit(name, key, value) if call == (tap.call or 0) else value

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            args, kwargs = visit((args, kwargs))
            return args, kwargs

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return visit(output)

        if tap.side == INPUT:
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after)

    def _visit(self, tap: str, key: tuple[int, int], value: Any) -> Any:
        t = first_tensor(value)
        if t is None:
            raise ActivationError(
                f"'{tap}' holds no tensor, but {type(value).__name__}. Choose a module inside it that gives tensors."
            )
        if hasattr(t, "full_tensor"):
            raise ActivationError(
                f"'{tap}' holds a DTensor, of which each process has a part. Choose a node layer where the whole "
                "tensor is on every process, such as the input or output of the block that is split."
            )
        if not t.is_floating_point():
            raise ActivationError(
                f"'{tap}' holds {str(t.dtype).removeprefix('torch.')} numbers, which have no gradient. "
                "Choose a node layer after they become activations, such as the embedding's output."
            )
        end = t.clone()
        replacement = self._replacement(key, t)
        # The leaf may share the end's memory: nobody else has it, and nobody writes there.
        leaf = (end if replacement is None else replacement.clone()).detach().requires_grad_(torch.is_grad_enabled())
        self.seen[key] = (end, leaf)
        if key[0] == self.last and sum(i == self.last for i, _ in self.seen) == len(self.layers[key[0]].taps):
            self.reached = True
            raise _Reached
        if t._is_view() or id(t) in self.owned or (t.is_leaf and t.requires_grad):
            return replace_first_tensor(value, leaf.clone())
        if not (has_graph := t.grad_fn is not None):
            self.changed.append(weakref.ref(t))
        t.detach_()
        # New memory for it: what autograd has saved of `t` keeps the old, and its check for writes need not be told.
        if has_graph or replacement is not None:
            t.data = torch.empty_like(leaf)
        with torch.autograd._unsafe_preserve_version_counter(t):  # type: ignore[attr-defined]
            t.copy_(leaf)
        return value

    def _replacement(self, key: tuple[int, int], t: Tensor) -> Tensor | None:
        layer_index, tap_index = key
        values = self.replace[layer_index]
        layer = self.layers[layer_index].only(tap_index)
        self.widths[key] = layer.width(t)
        if values is None:
            return None
        # Taps of one layer arrive one by one; each takes its own share of the features.
        start = sum(self.widths[layer_index, k] for k in range(tap_index))
        (written,) = layer.write(values[..., start : start + self.widths[key]], [t])
        return written.to(t.dtype)


def _masked(cut: Cut, mask: Tensor) -> Cut:
    return dataclasses.replace(cut, mask=cut.layer.select(mask.to(cut.ends[0].device) != 0, cut.ends))
