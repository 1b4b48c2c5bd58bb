"""Cutting a live model at its node layers, without touching the model.

A hook at each tap sees the tensor ``t`` that the model is about to use. It keeps a copy as the *end* of the section
before, makes a fresh *leaf*, and lets ``t`` itself, in place, go on as a copy of that leaf. In place matters: whatever
else holds the same tensor object (the skip path of a residual block) then hangs on the new leaf too, so one forward
pass yields every section between two node layers as its own small autograd graph.

Two kinds of tensors cannot be changed in place: views (autograd forbids it) and tensors that belong to the model
(parameters, buffers). There the module is handed a copy of the leaf instead, which is right wherever nobody else uses
that tensor; `lib_lightning.model.validate` tells when somebody does.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lib_lightning.errors import ActivationError, NodeLayerError, quoted
from lib_lightning.model.batch import first_tensor, replace_first_tensor
from lib_lightning.model.module_paths import find_module
from lib_lightning.model.node_layer import INPUT, NodeLayer, split_tap


@dataclass(frozen=True)
class CapturedLayer:
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


class StopForward(BaseException):
    """All has been seen that is wanted of this forward pass."""


class ActivationRecorder:
    """The hooks of one forward pass and what they saw.

    Args:
        model: The model.
        layers: Node layers in forward order.
        replace: For each of them activations ``(n, S, d)`` to go on with, or None.
        widths: Number of features of each tap, by node layer and tap; filled as they run.
        given: Tensors of the model's input, and what each is a copy of, by the ``id`` of the copy.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[NodeLayer],
        replace: Sequence[Tensor | None],
        widths: dict[tuple[int, int], int],
        given: dict[int, tuple[Tensor, Tensor]],
    ) -> None:
        self.model, self.layers, self.replace, self.widths, self.given = model, layers, replace, widths, given
        self.owned = {id(t) for t in (*model.parameters(), *model.buffers())}
        self.seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.changed: list[weakref.ref[Tensor]] = []
        self.last: int | None = None  # node layer after which the model need not go on
        self.reached = False  # whether it has come that far

    @contextmanager
    def hooked(self, only: Collection[int] | None = None) -> Iterator[None]:
        """Have the hooks in place, of all node layers or of some."""
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

    def finish(self) -> list[CapturedLayer]:
        """The cuts, once the model has run.

        Raises:
            NodeLayerError: If a node layer did not run, or not in its turn.
        """
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
            cuts.append(CapturedLayer(layer, ends, leaves, tuple(k for j, k in self.seen if j == i)))
        return cuts

    def _attach(self, name: str, key: tuple[int, int]) -> RemovableHandle:
        tap = split_tap(name)
        module = find_module(self.model, tap.path)
        calls = itertools.count()

        def visit(value: Any) -> Any:
            if self.reached:  # a model that catches whatever comes is trying again
                raise StopForward
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
        end = self._kept(t)
        replacement = self._replacement(key, t)
        # The leaf may share the end's memory: nobody else has it, and nobody writes there.
        leaf = (end if replacement is None else replacement.clone()).detach().requires_grad_(torch.is_grad_enabled())
        self.seen[key] = (end, leaf)
        if key[0] == self.last and sum(i == self.last for i, _ in self.seen) == len(self.layers[key[0]].taps):
            self.reached = True
            raise StopForward
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

    def _kept(self, t: Tensor) -> Tensor:
        """A copy of a tensor that nobody writes to: of an input the caller has one, if the model has left it as is."""
        copy, given = self.given.pop(id(t), (None, t))
        # Large inputs would take as long to copy, into new memory, as the rest of a small model; devices copy fast.
        # Where another tap has been before, it is no input any more, though it may well hold the same numbers.
        return given if copy is t and not t.requires_grad and torch.equal(given, t) else t.clone()

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
