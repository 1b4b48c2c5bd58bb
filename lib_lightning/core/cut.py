"""Cutting a live model at its node layers, without touching the model.

A hook at each tap sees the tensor ``t`` that the model is about to use. It keeps an alias of ``t`` as the *end* of the
section before, then turns ``t`` itself, in place, into a fresh leaf. In place matters: whatever else holds the same
tensor object (the skip path of a residual block) then hangs on the new leaf too, so one forward pass yields every
section between two node layers as its own small autograd graph.

Two kinds of tensors cannot be changed in place: views (autograd forbids it) and tensors that belong to the model
(parameters, buffers). There a new leaf is handed on instead, which is right wherever nobody else uses that tensor;
`find_bypass` tells when somebody does. The module always receives a clone of the leaf, because it may overwrite its
input (``ReLU(inplace=True)``).
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lib_lightning.core.errors import ActivationError, NodeLayerError
from lib_lightning.core.layers import INPUT, NodeLayer, split_tap
from lib_lightning.core.nested import first_tensor, map_tensors, replace_first_tensor

InputFn = Callable[[Any], Any]


@dataclass(frozen=True)
class Cut:
    """One node layer in one forward pass.

    Attributes:
        layer: The node layer.
        ends: The tapped tensors as computed, on the graph of the section before.
        leaves: The same values as leaves, on which the section after hangs.
    """

    layer: NodeLayer
    ends: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]

    @property
    def a(self) -> Tensor:
        """Activations ``(n, S, d)`` as computed, differentiable towards the node layer before."""
        return self.layer.read(self.ends)


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

    Raises:
        NodeLayerError: If a tap names a module the model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[NodeLayer],
        input_fn: InputFn | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.layers = list(layers)
        self.input_fn = input_fn or default_input_fn
        self.dtype = dtype
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
        recorder = _Recorder(self.model, self.layers, replace or [None] * len(self.layers))
        with recorder.hooked():
            self.run(batch)
        return recorder.finish()

    def run(self, batch: Any) -> Any:
        """Call the model on a batch, in the computation dtype, and return what it returns."""
        inputs = map_tensors(self.input_fn(batch), self._own)
        args, kwargs = _as_call(inputs)
        if self.dtype is None:
            return self.model(*args, **kwargs)
        state = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        converted = {name: t.detach().to(self.dtype) for name, t in state.items() if t.is_floating_point()}
        return torch.func.functional_call(self.model, converted, args, kwargs)

    def _own(self, tensor: Tensor) -> Tensor:
        # The first module may be a tap, and its input is then cut in place: never on the caller's tensor.
        return tensor.detach().to(self.dtype or tensor.dtype, copy=True) if tensor.is_floating_point() else tensor


class _Recorder:
    """The hooks of one forward pass and what they saw."""

    def __init__(self, model: nn.Module, layers: Sequence[NodeLayer], replace: Sequence[Tensor | None]) -> None:
        self.model, self.layers, self.replace = model, layers, replace
        self.owned = {id(t) for t in (*model.parameters(), *model.buffers())}
        self.seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @contextmanager
    def hooked(self) -> Iterator[None]:
        handles: list[RemovableHandle] = []
        try:
            for layer_index, layer in enumerate(self.layers):
                for tap_index, tap in enumerate(layer.taps):
                    handles.append(self._attach(tap, (layer_index, tap_index)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def finish(self) -> list[Cut]:
        missing = [
            tap for i, layer in enumerate(self.layers) for k, tap in enumerate(layer.taps) if (i, k) not in self.seen
        ]
        if missing:
            raise NodeLayerError(
                f"{_quoted(missing)} did not run in the model's forward pass. Choose modules that forward() calls."
            )
        order = [layer_index for layer_index, _ in self.seen]
        if order != sorted(order):
            ran = list(dict.fromkeys(self.layers[i].name for i in order))
            raise NodeLayerError(f"Node layers are out of order: give them as they run, {_quoted(ran)}.")
        cuts = []
        for i, layer in enumerate(self.layers):
            ends, leaves = zip(*(self.seen[i, k] for k in range(len(layer.taps))), strict=True)
            cuts.append(Cut(layer, ends, leaves))
        return cuts

    def _attach(self, tap: str, key: tuple[int, int]) -> RemovableHandle:
        path, side = split_tap(tap)
        module = self.model.get_submodule(path)

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            args, kwargs = self._visit(tap, key, (args, kwargs))
            return args, kwargs

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            return self._visit(tap, key, output)

        if side == INPUT:
            return module.register_forward_pre_hook(before, with_kwargs=True)
        return module.register_forward_hook(after)

    def _visit(self, tap: str, key: tuple[int, int], value: Any) -> Any:
        if key in self.seen:
            raise NodeLayerError(
                f"'{tap}' runs more than once in a forward pass, so it does not cut the computation at one place. "
                "Choose a module that runs once, or the block around it."
            )
        t = first_tensor(value)
        if t is None:
            raise ActivationError(f"'{tap}' holds no tensor, but {type(value).__name__}.")
        if not t.is_floating_point():
            raise ActivationError(
                f"'{tap}' holds {str(t.dtype).removeprefix('torch.')} numbers, which have no gradient. "
                "Choose a node layer after they become activations, such as the embedding's output."
            )
        end, leaf = self._cut_tensor(t, self._replacement(key, t))
        self.seen[key] = (end, leaf)
        return replace_first_tensor(value, leaf.clone())

    def _replacement(self, key: tuple[int, int], t: Tensor) -> Tensor | None:
        layer_index, tap_index = key
        values = self.replace[layer_index]
        if values is None:
            return None
        layer = self.layers[layer_index]
        if len(layer.taps) == 1:
            return layer.write(values, [t])[0].to(t.dtype).contiguous()
        # Taps of one layer arrive one by one; each takes its own share of the features.
        start = sum(self._width(layer_index, k) for k in range(tap_index))
        single = NodeLayer([layer.taps[tap_index]], positions=layer.positions, feature_dim=layer.feature_dim)
        width = single.read([t]).shape[-1]
        return single.write(values[..., start : start + width], [t])[0].to(t.dtype).contiguous()

    def _width(self, layer_index: int, tap_index: int) -> int:
        layer = self.layers[layer_index]
        single = NodeLayer([layer.taps[tap_index]], feature_dim=layer.feature_dim)
        return single.read([self.seen[layer_index, tap_index][0]]).shape[-1]

    def _cut_tensor(self, t: Tensor, replacement: Tensor | None) -> tuple[Tensor, Tensor]:
        in_place = not (t._is_view() or id(t) in self.owned or (t.is_leaf and t.requires_grad))
        grad = torch.is_grad_enabled()
        if not in_place:
            leaf = (t if replacement is None else replacement).detach().clone()
            return t, leaf.requires_grad_(grad)
        # A view of a tensor without history would start to require grad together with it: no alias of `t` there.
        end = t.view_as(t) if t.requires_grad else t.detach()
        t.detach_()
        if replacement is not None:
            # New memory for the same tensor object: `end`, and what autograd saved of it, keep the old.
            t.data = replacement.detach()
        return end, t.requires_grad_(grad)


def find_bypass(cuts: Sequence[Cut]) -> tuple[str, str, str] | None:
    """Look for a path from one node layer to a later one around those between them.

    Args:
        cuts: One forward pass with gradients.

    Returns:
        Names of the layer the path leaves, of one it passes by and of the one it reaches; None if every node layer is
        a proper cut.

    Note:
        Source: section 2 of arXiv 2405.10928 requires that a layer's activations determine everything after it.
    """
    for later in range(2, len(cuts)):
        leaves = [leaf for cut in cuts[: later - 1] for leaf in cut.leaves]
        owners = [k for k, cut in enumerate(cuts[: later - 1]) for _ in cut.leaves]
        ends = [end for end in cuts[later].ends if end.requires_grad]
        if not ends:
            continue
        total = sum((end.sum() for end in ends[1:]), ends[0].sum())
        grads = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
        for owner, grad in zip(owners, grads, strict=True):
            if grad is not None:
                return cuts[owner].layer.name, cuts[later - 1].layer.name, cuts[later].layer.name
    return None


def check_cuts(cuts: Sequence[Cut]) -> None:
    """Refuse node layers that do not cut the computation.

    Args:
        cuts: One forward pass with gradients.

    Raises:
        NodeLayerError: Naming the bypass, or the node layer that the next one does not depend on.
    """
    bypass = find_bypass(cuts)
    if bypass:
        start, passed, reached = bypass
        raise NodeLayerError(
            f"Node layer '{passed}' does not cut the computation: '{reached}' also depends on '{start}' past it "
            "(a skip connection?). Tap the residual stream itself, such as a block's output or the input of the norm "
            "that follows, or join both paths in one NodeLayer(taps=[...])."
        )
    for before, after in itertools.pairwise(cuts):
        if not after.a.requires_grad:
            raise NodeLayerError(
                f"Node layer '{after.layer.name}' has no gradient with respect to '{before.layer.name}': it does not "
                "depend on it, or something between them (detach, argmax, no_grad) stops gradients."
            )
        if _passes_left_out_positions(before, after):
            raise NodeLayerError(
                f"Node layer '{before.layer.name}' does not cut the computation: '{after.layer.name}' also depends on "
                "it at positions that are left out. Look at all positions there, or at fewer afterwards."
            )


def _passes_left_out_positions(before: Cut, after: Cut) -> bool:
    if before.layer.positions is None:
        return False
    direction = torch.rand(after.a.shape, generator=torch.Generator().manual_seed(0)).to(after.a)
    grads = torch.autograd.grad(
        after.a, before.leaves, direction, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    seen = before.layer.write(before.layer.read(grads), [torch.zeros_like(grad) for grad in grads])
    return any(bool((grad != part).any()) for grad, part in zip(grads, seen, strict=True))


def check_taps(model: nn.Module, layers: Sequence[NodeLayer]) -> None:
    """Refuse taps that name modules the model does not have.

    Args:
        model: The model.
        layers: Node layers.

    Raises:
        NodeLayerError: With the nearest names that do exist.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for layer in layers:
        for tap in layer.taps:
            path, side = split_tap(tap)
            if path in names:
                continue
            near = difflib.get_close_matches(path, names, n=3, cutoff=0.4) or [name for name in names if name][:8]
            suffix = f":{side}" if side == INPUT else ""
            raise NodeLayerError(
                f"{type(model).__name__} has no module '{path}' (node layer '{layer.name}'). "
                f"Near matches: {_quoted([name + suffix for name in near])}."
            )


def default_input_fn(batch: Any) -> Any:
    """Take the model's input from a batch: the first entry of a tuple or list, anything else as it is.

    Args:
        batch: What the data loader gives.

    Returns:
        What to call the model with.

    Example:
        >>> default_input_fn(("inputs", "labels"))
        'inputs'
    """
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def _as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
