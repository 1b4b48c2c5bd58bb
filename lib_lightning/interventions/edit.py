"""Features of a live model set to other values, as it runs.

A hook at each tap of a node layer sees the tensor that the model is about to use. It makes a new tensor in which some
features have other values, on the autograd graph of the old one, and makes the tensor *object* the new tensor, so that
any other reference to it (the skip path of a residual block) continues with the edited values, too.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import numbers
import operator
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from lib_lightning.algorithm.basis import Basis
from lib_lightning.errors import LIBError, NodeLayerError, SettingTypeError, brief, check_number, quoted, shortened
from lib_lightning.graph import InteractionGraph
from lib_lightning.interventions.names import FeatureName, find_features
from lib_lightning.model.autograd_graph import is_view, swap_in
from lib_lightning.model.batch import replace_first_tensor, tensors_in
from lib_lightning.model.calls import ModelCall
from lib_lightning.model.capture import hook_at, like, tensor_at
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.module_paths import find_module
from lib_lightning.model.node_layer import NodeLayer, Tap, split_tap
from lib_lightning.model.precision import full_precision, product_dtype
from lib_lightning.model.process_state import save_rng
from lib_lightning.model.replica import Copier
from lib_lightning.model.saved_state import preserve_attributes
from lib_lightning.model.sources import in_model
from lib_lightning.model.steps import is_preparing
from lib_lightning.model.torch_internals import disable_checkpointing
from lib_lightning.model.vjp import apply_mask

#: The mean of a feature. Its value is C^T (a - mean): activations are centred, so that this is 0 in every basis.
MEAN: Final = 0.0

# The new value of a feature: a number, or a function from its values ``(n, S)`` to new ones.
Edit = float | Callable[[Tensor], Tensor]


def scale(factor: float) -> Callable[[Tensor], Tensor]:
    """An edit that multiplies a feature's values, which are deviations from its mean.

    Args:
        factor: The factor: 0 sets the feature to its mean, 1 leaves it as it is, -1 mirrors it at its mean.

    Returns:
        A value of `edit_features`.

    Raises:
        SettingError: If it is NaN or infinite.
        SettingTypeError: If it is not a number.

    Example:
        >>> scale(2.0)(torch.tensor([1.0, -3.0]))
        tensor([ 2., -6.])
    """
    check_number("factor", factor, math.isfinite, "must be a finite number")
    return functools.partial(operator.mul, factor)


@contextmanager
def edit_features(
    model: nn.Module,
    graph: InteractionGraph,
    edits: Mapping[Any, Edit],
    mask: str | Tensor | None = None,
) -> Iterator[None]:
    """A block in which some features of a model have other values.

    In it, whatever runs the model (``model(x)``, ``model.generate(...)``, the ``training_step`` of a LightningModule,
    in training or evaluation mode, with or without gradients) computes the features as always, and continues with
    ``a + (f_new - f_old) C^+`` at each of the edited node layers: along the directions of the edited features alone,
    so that all others, and what the basis leaves out, stay as they are. Of latents of a dictionary it is
    ``a + decode(f_new) - decode(f_old)``, and 0 is the value of an inactive one; the error of the dictionary has its
    length as value. Gradients flow through the edit. Features of
    later node layers are those that result from edits of earlier ones. Blocks can be nested: the inner one edits what
    the outer one has left. At the end, also after an exception, the hooks are removed, and the model is as before.

    Args:
        model: The model that the graph was computed on, or one of the same shape, which runs itself and not as a copy.
        graph: An interaction graph in any basis.
        edits: New values of features. A feature is called by its id, such as ``"resid_post/17"`` (in a run the
            number is the lineage), by node layer and index, ``("resid_post", 2)``, or by a label that no other feature
            has. Its value is ``(a - mean) @ to_feature``, with the mean over the samples of the graph. It becomes

            - a number (or a tensor without axes), the same at all samples and positions; `MEAN`, which is 0, for the
              feature's mean;
            - ``scale(2.0)``: its values times a factor;
            - or what a function makes of its values ``(n, S)`` at all samples and positions: a tensor of this shape, or
              one that can be broadcast to it. For a node layer that joins positions it is called once for each tensor.
        mask: Marks the positions at which features are edited, such as those that are not padding: name of an argument
            of the model's ``forward``, such as ``"attention_mask"``, or a tensor ``(n, S)``. By default all are. Those
            that the graph leaves out (``skip_positions``) are not edited in any case.

    Yields:
        Nothing.

    Raises:
        LIBError: If a feature is not found, or not by this name alone; if the model ran without one of the node layers.
        NodeLayerError: If the graph belongs to a model of a different shape.
        SettingTypeError: If a value is neither a finite number nor a function.

    Note:
        Hooks belong to the model, so that other threads that run it meanwhile see the edits, too: let one thread at a
        time edit a model. In the block, modules compiled by `torch.compile` run uncompiled, and activation
        checkpointing is off, so that nothing runs a second time. Features of a node layer that concatenates those of
        several tensors are known only after the model has used the first of them: the model first runs up to the last
        one, without a trace in random states, buffers and attributes.

    Example:
        >>> from lib_lightning import compute_interaction_graph
        >>> model, x = nn.Linear(3, 2), torch.randn(9, 3)
        >>> graph = compute_interaction_graph(model, [x], ["input", "output"])
        >>> with edit_features(model, graph, {"output/0": MEAN, ("output", 1): scale(2.0)}):
        ...     y = model(x)
        >>> torch.allclose(y[:, 0], model(x)[:, 0].mean())
        True
    """
    by_layer: dict[str, dict[int, Edit]] = {}
    for (layer, index), name in find_features(graph, edits).items():
        by_layer.setdefault(layer, {})[index] = _checked(edits[name], name)
    if not (mask is None or isinstance(mask, (str, Tensor))):
        raise SettingTypeError(f"mask is the name of an argument, or a tensor; got {shortened(repr(mask), 80)}.")
    layers = [layer for layer in graph.node_layer_specs() if layer.name in by_layer]
    # Checks the taps; the model that runs is the caller's.
    instrumented = InstrumentedModel(model, layers)
    editors = [
        LayerEditor(layer, graph.bases[layer.name], by_layer[layer.name], spec.name)
        for layer, spec in zip(instrumented.layers, layers, strict=True)
    ]
    with ExitStack() as stack:
        # Compiled modules ignore hooks that are registered later.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        # What runs again in a backward pass would see tensor objects that are edited already.
        stack.callback(disable_checkpointing())
        run = _Run(instrumented.model, ModelCall.from_plain(graph.model_call) or ModelCall(), editors, mask)
        stack.enter_context(run.hooked())
        yield
        run.check_complete()


def _checked(edit: object, name: FeatureName) -> Edit:
    if isinstance(edit, Tensor) and edit.ndim == 0:
        return lambda f: edit  # on its graph, if it has one
    if not isinstance(edit, bool) and isinstance(edit, numbers.Real) and math.isfinite(edit):
        return float(edit)
    if callable(edit):
        return edit
    raise SettingTypeError(
        f"Feature {name!r} becomes a finite number, or what a function such as scale(2.0) makes of its values; got "
        f"{shortened(repr(edit), 80)}."
    )


def edited(a: Tensor, basis: Basis, edits: Mapping[int, Edit], mask: Tensor | None = None) -> Tensor:
    """Activations in which some features have other values: ``a + (f_new - f_old) C^+``.

    Args:
        a: Activations, shape ``(n, S, d)``.
        basis: Basis of the node layer.
        edits: New values of features, by index.
        mask: True at the positions to edit, shape ``(n, S)``; None for all.

    Returns:
        Activations, shape ``(n, S, d)``, differentiable with respect to ``a``.

    Raises:
        LIBError: If a function returns anything but a tensor that can be broadcast to ``(n, S)``.

    Example:
        >>> from lib_lightning.algorithm.basis import neuron_basis
        >>> basis = neuron_basis("fc", torch.tensor([1.0, 2.0]), torch.eye(2))
        >>> edited(torch.tensor([[[5.0, 6.0]]]), basis, {0: 0.0, 1: lambda f: f + 1})
        tensor([[[1., 7.]]])
    """
    index = torch.tensor(list(edits), device="cpu")
    dtype = product_dtype(a.dtype)
    restore = full_precision()
    try:
        with torch.autocast(a.device.type, enabled=False):
            wide = a.to(dtype)
            f = basis.values(wide, index)
            new = [_new_values(edit, f[..., k], basis.name) for k, edit in enumerate(edits.values())]
            change = basis.change(wide, index, f, torch.stack(new, -1))
            return (wide + apply_mask(change, mask)).to(a.dtype)
    finally:
        restore()


def _new_values(edit: Edit, f: Tensor, layer: str) -> Tensor:
    if not callable(edit):
        return torch.full_like(f, edit)
    new = edit(f)
    if isinstance(new, Tensor):
        try:
            return new.to(f).expand_as(f)
        except RuntimeError:
            pass
    got = f"shape {tuple(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
    raise LIBError(
        f"The function of a feature of '{layer}' must return a tensor of the shape of its argument, {tuple(f.shape)}; "
        f"got {got}."
    )


class LayerEditor:
    """The edits of one node layer.

    Args:
        layer: The node layer.
        basis: Its basis.
        edits: New values of its features, by index.
        name: Its name in the graph.

    Attributes:
        is_joined: Whether features of several tensors are concatenated. They are known when the last of these tensors
            is, which may be too late to edit the first one.
        edited_parts: The tensors with edited features, by tap, if they were computed beforehand.
        was_edited: Whether the model has continued with edited features.
    """

    def __init__(self, layer: NodeLayer, basis: Basis, edits: Mapping[int, Edit], name: str) -> None:
        self.layer, self.basis, self.edits, self.name = layer, basis, edits, name
        self.is_joined = len(layer.taps) > 1 and layer.join == "features"
        self.edited_parts: list[Tensor] | None = None
        self.was_edited = False
        self._recorded: dict[int, Tensor] = {}
        # Numbers of positions of tensors whose positions are joined, by tap.
        self._widths: dict[int, int] = {}

    def forget(self) -> None:
        """Begin a forward pass."""
        self.edited_parts = None
        self._recorded.clear()

    def record(self, k: int, t: Tensor, mask: Tensor | None) -> bool:
        """Record the tensor of a tap, and compute `edited_parts` as soon as those of all taps are there.

        Args:
            k: Index of the tap.
            t: Its tensor.
            mask: True at positions to edit, shape ``(n, S)``; None for all.

        Returns:
            Whether all of them are there.
        """
        self._recorded[k] = t.clone()
        if len(self._recorded) < len(self.layer.taps):
            return False
        self.edited_parts = self._edited(self.layer, [self._recorded[i] for i in range(len(self.layer.taps))], mask)
        return True

    def new_tensor(self, k: int, t: Tensor, mask: Tensor | None) -> Tensor:
        """The tensor of a tap with edited features.

        Args:
            k: Index of the tap.
            t: Its tensor.
            mask: True at positions to edit, shape ``(n, S)``; None for all.

        Returns:
            A new tensor, on the graph of the old one.
        """
        if self.is_joined:
            if self.edited_parts is None:
                raise NodeLayerError(
                    f"Node layer '{self.name}' concatenates several tensors, so that its features are computed before "
                    "the model runs: call the model itself, as model(x), and not parts of it."
                )
            new = self.edited_parts[k]
        else:
            layer = self.layer.only(k)
            (new,) = self._edited(layer, [t], None if mask is None else self._part(k, layer.width(t), mask))
        self.was_edited = True
        return like(t, new)

    def _edited(self, layer: NodeLayer, tensors: Sequence[Tensor], mask: Tensor | None) -> list[Tensor]:
        # Copies, so that autograd keeps no reference to the tensor objects themselves, which become others.
        copies = [t.clone() for t in tensors]
        a = layer.read(copies)
        if a.shape[-1] != self.basis.mean.shape[0]:
            raise NodeLayerError(
                f"The basis of '{self.name}' has width {self.basis.mean.shape[0]}, but the model has {a.shape[-1]} "
                "activations per position there: the graph was computed on another model, or at another place in it."
            )
        _, kept = layer.masks(None if mask is None else mask.to(a.device) != 0, copies)
        return layer.write(edited(a, self.basis, self.edits, kept), copies)

    def _part(self, k: int, width: int, mask: Tensor) -> Tensor:
        """The part of a mask that belongs to a tap."""
        self._widths[k] = width
        if len(self.layer.taps) == 1:
            return mask
        start = sum(self._widths.get(i, 0) for i in range(k))
        return mask[:, start : start + width]


class _TapHook(NamedTuple):
    """What is done at the taps of one place in the model."""

    editor: LayerEditor
    tap_index: int
    name: str
    tap: Tap


# Whether the features of a node layer are computed beforehand, by any of several blocks.
_in_thread = threading.local()


class _StopForward(BaseException):
    """Ends a forward pass when the features of a node layer are known.

    Args:
        run: The block that has begun it.
    """

    def __init__(self, run: _Run) -> None:
        super().__init__()
        self.run = run


class _Run:
    """The hooks of a block, and what they know of the forward pass that is under way.

    Args:
        model: The model.
        call: Which modules make up its forward pass.
        editors: Edits of node layers, in forward order.
        mask: Name of an argument, or a tensor ``(n, S)``.
    """

    def __init__(
        self, model: nn.Module, call: ModelCall, editors: Sequence[LayerEditor], mask: str | Tensor | None
    ) -> None:
        self._model, self._editors, self._mask_argument = model, editors, mask
        self._call = call
        self._mask = None if isinstance(mask, str) else mask
        # Kept, so that no other object has the same id.
        attributes = [x for module in model.modules() for x in vars(module).values() if isinstance(x, Tensor)]
        self._fixed = {id(t): t for t in (*model.parameters(), *model.buffers(), *attributes)}
        self._of_caller: dict[int, Tensor] = {}
        self._n_calls: Counter[str] = Counter()
        self._has_begun = self._has_ended = self._has_visited = False
        # The node layer whose features are computed beforehand, in a forward pass of its own.
        self._recording: LayerEditor | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Register the hooks."""
        with ExitStack() as stack:
            first, last = self._call.calls[0], self._call.calls[-1]
            for module in dict.fromkeys([self._model, find_module(self._model, first.path)]):
                handle = module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
                stack.callback(module.register_forward_hook(self._end).remove)
            for editor in self._editors:
                for k, name in enumerate(editor.layer.taps):
                    tap = self._call.locate(split_tap(name))
                    hook = _TapHook(editor, k, name, tap)
                    handle = hook_at(find_module(self._model, tap.path), tap.side, functools.partial(self._visit, hook))
                    stack.callback(handle.remove)
            if len(self._call.calls) > 1:  # the model itself may not be called
                module = find_module(self._model, last.path)
                handle = module.register_forward_hook(functools.partial(self._leave, last.path, last.index))
                stack.callback(handle.remove)
            yield

    def check_complete(self) -> None:
        """Raise an error if the model ran without one of the node layers."""
        missing = [editor.name for editor in self._editors if not editor.was_edited]
        if missing and (self._has_ended or (self._has_visited and not self._has_begun)):
            raise LIBError(
                f"The model ran without calling {quoted(missing)} as a module, so that features there were not edited. "
                "Hooks see module(x), and not module.forward(x)."
            )

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if is_preparing() or self._recording is not None:
            return None
        if len(self._call.calls) == 1 or module is self._model:  # else the module may be called again
            self._n_calls.clear()
            for editor in self._editors:
                editor.forget()
        self._has_begun = True
        if isinstance(self._mask_argument, str):
            self._mask = _argument(module, args, kwargs, self._mask_argument)
        is_joined = [editor.is_joined and editor.edited_parts is None for editor in self._editors]
        for editor in itertools.compress(self._editors, is_joined):
            self._compute_beforehand(editor, module, args, kwargs)
        own: tuple[Any, Any] = self._own((args, kwargs))
        return own

    def _compute_beforehand(
        self, editor: LayerEditor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Run the model up to the last tensor of a node layer that concatenates several, and leave no trace of that."""
        if getattr(_in_thread, "is_recording", False):
            raise LIBError(
                f"Features of '{editor.name}', which concatenates several tensors, are edited in a block inside of one "
                "that does so as well. Edit all of them in one block."
            )
        buffers = {name: t.detach().clone() for name, t in module.named_buffers()}
        args, kwargs = Copier(same=tensors_in((args, kwargs)))((args, kwargs))
        self._recording, _in_thread.is_recording = editor, True
        with ExitStack() as stack:
            stack.callback(save_rng())
            stack.callback(preserve_attributes(self._model))
            try:
                torch.func.functional_call(module, buffers, *self._own((args, kwargs)))
            except _StopForward as stopped:
                if stopped.run is not self:
                    raise
            finally:
                self._recording, _in_thread.is_recording = None, False
                self._n_calls.clear()

    def _own(self, arguments: Any) -> Any:
        """The same arguments with copies of their tensors, so that those of the caller stay as they are."""
        own = _own_tensors(arguments)
        passed = {id(t) for t in _tensors(own)}
        # Tensors in other objects become no others.
        self._of_caller = {id(t): t for t in tensors_in(own) if id(t) not in passed}
        return own

    def _end(self, *_: Any) -> None:
        self._has_ended = True

    def _leave(self, path: str, index: int, *_: Any) -> None:
        self._n_calls[f"{path} done"] += 1
        if self._n_calls[f"{path} done"] > index:
            self._n_calls.clear()

    def _visit(self, hook: _TapHook, value: Any) -> Any:
        if is_preparing():
            return value
        self._has_visited = True
        if hook.tap.call is not None:
            call = self._n_calls[hook.name]
            self._n_calls[hook.name] += 1
            if call != hook.tap.call:
                return value
        t = tensor_at(hook.name, value)
        # A tensor with a graph keeps it where the model has switched gradients off, for its other references.
        with in_model(False), torch.set_grad_enabled(torch.is_grad_enabled() or t.requires_grad):
            if self._recording is hook.editor:
                if hook.editor.record(hook.tap_index, t, self._mask):
                    raise _StopForward(self)
                return value
            if self._recording and hook.editor.is_joined and hook.editor.edited_parts is None:
                return value  # of a later node layer
            new = self._replace(t, hook.editor.new_tensor(hook.tap_index, t, self._mask))
            return value if new is t else replace_first_tensor(value, new)

    def _replace(self, t: Tensor, new: Tensor) -> Tensor:
        """Make a tensor object another tensor; return the tensor to continue with, the same object if possible."""
        if id(t) in self._fixed or id(t) in self._of_caller or (t.is_leaf and t.requires_grad):
            return new
        if swap_in(t, new):
            return t
        if is_view(t):
            return new
        # Autograd has saved the object, or a view of it is in use. A backward pass checks that it can be changed.
        t.copy_(new)
        return t


def _argument(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> Tensor | None:
    """An argument of a call; None if it was not given, or is None."""
    if name in kwargs:
        found = kwargs[name]
    else:
        try:
            bound = inspect.signature(module.forward).bind_partial(*args)
        except (TypeError, ValueError) as error:
            raise LIBError(f"mask='{name}' is not found among the arguments of the model: {brief(error)}.") from error
        if name not in bound.signature.parameters:
            raise LIBError(
                f"mask='{name}' is no argument of {type(module).__name__}.forward, which has "
                f"{quoted(bound.signature.parameters)}."
            )
        found = bound.arguments.get(name)
    if not (found is None or isinstance(found, Tensor)):
        raise LIBError(f"mask='{name}' must be a tensor of shape (n, S); got {type(found).__name__}.")
    return found


def _own_tensors(value: Any) -> Any:
    """The same arguments with copies of their tensors, on the graphs of these."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(map(_own_tensors, value))
    return {key: _own_tensors(x) for key, x in value.items()} if type(value) is dict else value


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors that `_own_tensors` copies."""
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (tuple, list, dict):
        for x in value.values() if type(value) is dict else value:
            yield from _tensors(x)
