"""Cutting the forward pass of a model at its node layers, without changing the model's code.

A hook at each tap receives the tensor ``t`` that the model is about to use. It keeps a copy as the *output* of the
section before, makes a new *leaf*, and overwrites ``t`` in place with a copy of that leaf. In place, because any other
reference to the same tensor object (the skip path of a residual block) then continues from the leaf, too. One forward
pass thus yields a separate autograd graph for each section between two node layers.

Two kinds of tensors cannot be overwritten in place: views (autograd forbids it) and the model's own parameters and
buffers. The object of a view becomes another tensor, a copy of the leaf. Where that is impossible, and for parameters,
the hook returns a copy of the leaf. That is correct if nothing else uses the tensor, which
`lib_lightning.model.validate` checks.
"""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lib_lightning.errors import ActivationError, NodeLayerError, quoted
from lib_lightning.model.autograd_graph import is_view, overwrite, saved_tensors_kept, swap_in
from lib_lightning.model.batch import first_tensor, replace_first_tensor, why_not_dense
from lib_lightning.model.batch_layout import GraphSizes
from lib_lightning.model.feature_axis import FeatureAxes, TensorRecord, following
from lib_lightning.model.module_paths import find_module
from lib_lightning.model.node_layer import INPUT, NodeLayer, Tap, split_tap
from lib_lightning.model.not_called import NotCalledError
from lib_lightning.model.sources import in_model
from lib_lightning.model.steps import is_preparing


@dataclass(frozen=True)
class CapturedLayer:
    """One node layer in one forward pass.

    Attributes:
        layer: The node layer.
        outputs: The tapped tensors as computed, one for each tap: outputs of the section before, on its graph.
        leaves: The tensors that the model continued with: leaves of the graph of the section after.
        order: Indices of the taps in the order in which they were called. A tap may be computed from another tap of
            the same node layer; its output is then on the graph of that tap's leaf.
        mask: True at positions that features are made of, shape ``(n, S)``; None for all: the valid ones without those
            that are left out.
        valid: True at valid positions, shape ``(n, S)``; None if all positions are valid.
    """

    layer: NodeLayer
    outputs: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    order: tuple[int, ...]
    mask: Tensor | None = None
    valid: Tensor | None = None

    @property
    def a(self) -> Tensor:
        """Activations ``(n, S, d)`` as computed, differentiable with respect to the node layer before."""
        return self.layer.read(self.outputs)

    @property
    def rows(self) -> Tensor:
        """Detached activations at valid positions, one per row: ``(m, d)``."""
        return rows_of(self.a.detach(), self.mask)


def rows_of(a: Tensor, mask: Tensor | None) -> Tensor:
    """Activations ``(n, S, d)`` at the positions of a mask ``(n, S)``, one per row: ``(m, d)``."""
    return a.flatten(0, 1) if mask is None else a[mask]


class StopForward(BaseException):
    """Ends a forward pass after the last node layer that is needed."""


def hook_at(module: nn.Module, side: str, visit: Callable[[Any], Any]) -> RemovableHandle:
    """Let a function replace what a module takes or returns.

    Args:
        module: The module.
        side: ``"input"`` or ``"output"``.
        visit: From a pair of positional and keyword arguments, or the output, to what the model continues with.

    Returns:
        The handle that ends it.
    """

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        args, kwargs = visit((args, kwargs))
        return args, kwargs

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return visit(output)

    if side == INPUT:
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def tensor_at(tap: str, value: Any) -> Tensor:
    """The tensor of a tap.

    Args:
        tap: Name of the tap, for errors.
        value: What the module takes or returns.

    Returns:
        Its first tensor.

    Raises:
        ActivationError: If there is none, or it is no ordinary one of floating-point numbers.
    """
    t = first_tensor(value)
    if t is None:
        raise ActivationError(
            f"'{tap}' holds no tensor, but {type(value).__name__}. Choose a module inside it that returns tensors."
        )
    if hasattr(t, "full_tensor"):
        raise ActivationError(
            f"'{tap}' holds a DTensor, of which each process has a part. Choose a node layer where the whole "
            "tensor is on every process, such as the input or output of the block that is split."
        )
    if what := why_not_dense(value):
        raise ActivationError(
            f"'{tap}' holds {what}, in which samples have no rows of their own. Choose a module before or after it "
            "that has one row for each sample, such as the embedding or the head."
        )
    if not t.is_floating_point():
        raise ActivationError(
            f"'{tap}' holds {str(t.dtype).removeprefix('torch.')} numbers, which have no gradient. "
            "Choose a node layer after they become activations, such as the embedding's output."
        )
    return t


def like(t: Tensor, values: Tensor) -> Tensor:
    """Values in the type and the order of memory of a tensor, which the model may rely on, on their own graph."""
    return torch.empty_like(t, requires_grad=False).copy_(values)


@dataclass(frozen=True)
class BatchContext:
    """What is known of the batch of a forward pass.

    Attributes:
        caller_tensors: Copies of the caller's input tensors and the originals, by ``id`` of the copy.
        locate: From a tap to the tap of the module that it stands for; see `lib_lightning.model.calls.ModelCall`.
        graphs: Sizes of the graphs, if the batch is one of graphs.
    """

    caller_tensors: dict[int, tuple[Tensor, Tensor]]
    locate: Callable[[Tap], Tap] = lambda tap: tap
    graphs: GraphSizes | None = None


class ActivationRecorder:
    """The hooks of one forward pass, and the tensors they recorded.

    Args:
        model: The model.
        layers: Node layers in forward order.
        replace: For each node layer, activations ``(n, S, d)`` to continue with, or None for the computed ones.
        widths: Number of features of each tap, by node layer and tap; filled during the forward pass.
        batch: What is known of the batch.
        stop_after: Index of the node layer after which to end the forward pass; None to run all of it.
        axes: Follows the operations, to find the axes of features; None where these are known.

    Attributes:
        detached: Tensors without a graph that were overwritten with leaves. A module may store them.
        stopped: Whether the node layer ``stop_after`` has been recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[NodeLayer],
        replace: Sequence[Tensor | None],
        widths: dict[tuple[int, int], int],
        batch: BatchContext,
        stop_after: int | None = None,
        axes: FeatureAxes | None = None,
    ) -> None:
        self._batch, self._axes = batch, axes
        # What is known of the tensor of each tap before it was cut.
        self.records: dict[tuple[int, int], TensorRecord] = {}
        self._model, self._layers, self._replace = model, list(layers), replace
        self._widths, self._stop_after = widths, stop_after
        self._parameter_ids = {id(t) for t in (*model.parameters(), *model.buffers())}
        # Output and leaf of each tap, by node layer and tap, in the order of the calls.
        self._recorded: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        # Taps of node layers that are part of an earlier one as well, and what the model continued with at each tap.
        self._shared: dict[int, list[int]] = defaultdict(list)
        self._continued: dict[str, Tensor] = {}
        self.detached: list[weakref.ref[Tensor]] = []
        self.stopped = False

    @contextmanager
    def hooked(self, only: Collection[int] | None = None) -> Iterator[None]:
        """Register the hooks of all node layers, or of those with the indices ``only``."""
        handles: list[RemovableHandle] = []
        attached: set[str] = set()
        try:
            for layer_index, layer in enumerate(self._layers):
                for tap_index, tap in enumerate(layer.taps):
                    if only is not None and layer_index not in only:
                        continue
                    if tap in attached:
                        self._shared[layer_index].append(tap_index)
                    else:
                        attached.add(tap)
                        handles.append(self._attach(tap, (layer_index, tap_index)))
            with saved_tensors_kept(after_use=bool(self._shared)), following(self._axes):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def finish(self) -> list[CapturedLayer]:
        """All node layers, after the forward pass.

        Raises:
            NodeLayerError: If a node layer was not called, or called out of order.
        """
        taps = {(i, k): tap for i, layer in enumerate(self._layers) for k, tap in enumerate(layer.taps)}
        missing = [tap for key, tap in taps.items() if key not in self._recorded]
        if missing:
            raise NotCalledError(missing)
        order = [i for i, _ in self._recorded]
        if order != sorted(order):
            raise NodeLayerError(
                "Node layers are out of order: list them in the order of the forward pass, "
                f"{quoted([taps[key] for key in self._recorded])}."
            )
        captured = []
        for i, layer in enumerate(self._layers):
            outputs, leaves = zip(*(self._recorded[i, k] for k in range(len(layer.taps))), strict=True)
            captured.append(CapturedLayer(layer, outputs, leaves, tuple(k for j, k in self._recorded if j == i)))
        return captured

    def activations(self, index: int) -> Tensor:
        """Recorded activations ``(n, S, d)`` of one node layer."""
        layer = self._layers[index]
        return layer.read([self._recorded[index, k][0] for k in range(len(layer.taps))])

    def leaves(self, index: int) -> list[Tensor]:
        """The tensors that the model continued with at one node layer, one for each tap."""
        return [self._recorded[index, k][1] for k in range(len(self._layers[index].taps))]

    def _attach(self, name: str, key: tuple[int, int]) -> RemovableHandle:
        tap = self._batch.locate(split_tap(name))
        module = find_module(self._model, tap.path)
        calls = itertools.count()

        def visit(value: Any) -> Any:
            if self.stopped:  # a model with a catch-all handler has caught the exception and continues
                raise StopForward
            if is_preparing():
                return value
            call = next(calls)
            if tap.call is None and call:
                raise NodeLayerError(
                    f"'{name}' runs more than once in a forward pass, so it does not cut the computation at one place. "
                    f"Choose one of its calls ('{tap.path}#0' is the first), or the block around it."
                )
            if call != (tap.call or 0):
                return value
            with in_model(False):
                return self._record(name, key, value)

        return hook_at(module, tap.side, visit)

    def _record(self, tap: str, key: tuple[int, int], value: Any) -> Any:
        """Record the tensor of one tap, and return the value that the model continues with."""
        t = tensor_at(tap, value)
        if self._batch.graphs is not None:
            self._layers[key[0]] = self._batch.graphs.fit(self._layers[key[0]], len(t), tap)
        if self._axes is not None:
            self.records[key] = self._axes.record(t)
        output = self._unmodified_copy(t)
        replacement = self._replacement(key, t)
        # The leaf may share the output's memory: nothing else has a reference to it, and nothing writes to it.
        leaf = (output if replacement is None else replacement.clone()).detach()
        leaf.requires_grad_(torch.is_grad_enabled())
        self._recorded[key] = (output, leaf)
        if self._is_complete(key[0]) and key[0] == self._stop_after:
            self.stopped = True
            raise StopForward
        new = self._continue(t, leaf, replacement is not None)
        self._continued[tap] = new
        self._record_shared(key[0])
        return value if new is t else replace_first_tensor(value, new)

    def _continue(self, t: Tensor, leaf: Tensor, is_replaced: bool) -> Tensor:
        """Let the model continue from a leaf: in the same tensor object, or else in the one that is returned."""
        if id(t) in self._parameter_ids or (t.is_leaf and t.requires_grad):
            return leaf.clone()
        if is_view(t):
            new = leaf.clone()
            return t if swap_in(t, new) else new
        has_graph = t.grad_fn is not None
        if not has_graph:
            self.detached.append(weakref.ref(t))
        overwrite(t, leaf, new_memory=has_graph or is_replaced)
        return t

    def _is_complete(self, layer_index: int) -> bool:
        return all((layer_index, k) in self._recorded for k in range(len(self._layers[layer_index].taps)))

    def _record_shared(self, layer_index: int) -> None:
        """Record the taps of a node layer that an earlier one has, too, as soon as its other taps are recorded.

        From here on the model continues from new leaves, in the same tensor objects.
        """
        shared = [k for k in self._shared[layer_index] if (layer_index, k) not in self._recorded]
        taps = self._layers[layer_index].taps
        if not shared or any((layer_index, k) not in self._recorded for k in range(len(taps)) if k not in shared):
            return
        for k in shared:
            t = self._continued[taps[k]]
            key = layer_index, k
            if self._axes is not None:
                self.records[key] = self._axes.record(t)
            output, replacement = t.clone(), self._replacement(key, t)
            leaf = (output if replacement is None else replacement.clone()).detach()
            leaf.requires_grad_(torch.is_grad_enabled())
            self._recorded[key] = output, leaf
            if self._continue(t, leaf, replacement is not None) is not t:
                raise NodeLayerError(
                    f"'{taps[k]}' cannot be in node layer '{self._layers[layer_index].name}' and in one before it, "
                    "because it is a view or a parameter. Leave one of the two node layers out."
                )
        if layer_index == self._stop_after:
            self.stopped = True
            raise StopForward

    def _unmodified_copy(self, t: Tensor) -> Tensor:
        """A copy that nothing writes to. For an unmodified input of the model, that is the caller's tensor."""
        copy, original = self._batch.caller_tensors.pop(id(t), (None, t))
        # Copying a large input into new memory would take as long as the rest of a small model; devices copy fast.
        # After another tap it is no longer the input, though it may have the same values.
        return original if copy is t and not t.requires_grad and torch.equal(original, t) else t.clone()

    def _replacement(self, key: tuple[int, int], t: Tensor) -> Tensor | None:
        layer_index, tap_index = key
        values = self._replace[layer_index]
        layer = self._layers[layer_index].only(tap_index)
        self._widths[key] = layer.width(t)
        if values is None:
            return None
        # The taps of one node layer are called one after another; each takes its part of the features.
        start = sum(self._widths[layer_index, k] for k in range(tap_index))
        (written,) = layer.write(layer.part(values, start, self._widths[key]), [t])
        return like(t, written)
