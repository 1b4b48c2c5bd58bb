"""Saving the state of a model that has to run itself, because it cannot be copied, and restoring it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lib_lightning.model.process_state import in_turn
from lib_lightning.model.saved_value import Saver, entries_of, has_address, save_memory, save_tensor
from lib_lightning.model.torch_internals import remove_backward_hooks, set_tensor
from lib_lightning.model.trainer_view import silence, view_of

# Saves something, and returns the function that restores it.
Save = Callable[[nn.Module], Callable[[], None]]

# Attributes of every module (flags, parameters, buffers, children and hooks), which are saved separately.
_MODULE_NAMES = frozenset(nn.Module().__dict__)
_REGISTRIES = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, dict))


def saved_state(saver: Saver) -> tuple[Save, ...]:
    """Everything of a model that is saved before a block and restored, in reverse order, after it."""
    return (
        replace_inference_tensors,  # tensors made in inference mode: replaced by copies that autograd accepts
        partial(save_registered, saver=saver),  # children and hooks: which are registered
        partial(
            preserve_attributes, saver=saver
        ),  # other attributes of modules, and the contents of what they refer to
        save_buffers,  # which tensor is registered, and its values
        save_parameters,  # memory, grad and requires_grad; values where a module writes to its weights (max_norm)
        save_training_flags,
        save_backward_hooks,  # removed in the block
        silence_loggers,  # LightningModules do not log in the block
    )


def saver_of(model: nn.Module) -> Saver:
    """Saves what modules refer to, but neither the modules themselves nor their parameters and buffers."""
    return Saver([*model.modules(), *model.parameters(), *model.buffers()])


def preserve_attributes(model: nn.Module, saver: Saver | None = None) -> Callable[[], None]:
    """Save what a forward pass may store in plain attributes: a number of calls, the last state, a running metric.

    Args:
        model: The model.
        saver: Saves the contents of what the attributes refer to; by default, a new one.

    Returns:
        A function that restores the attributes of all modules, and the contents of what they refer to. It may be called
        several times.
    """
    saver = saver or saver_of(model)
    saved = [
        (module, {k: (value, saver.save(value)) for k, value in _attributes(module).items()})
        for module in model.modules()
    ]

    def restore() -> None:
        for module, attributes in saved:
            for name in _attributes(module).keys() - attributes.keys():
                del module.__dict__[name]
            for name, (value, restore_value) in attributes.items():
                module.__dict__[name] = value
                if restore_value:
                    restore_value()

    return restore


def tensors_unchanged(model: nn.Module) -> Callable[[], bool]:
    """Save the values of the tensors that a model stores beside its parameters: buffers, and those in plain attributes.

    Args:
        model: The model.

    Returns:
        A function that returns whether these tensors have the same values as now. Tensors that have been assigned in
        their place are not considered.
    """
    attributes = [value for module in model.modules() for value in _attributes(module).values()]
    tensors = [*model.buffers(), *_tensors_in(attributes, set())]
    # Sparse tensors cannot be compared; for those autograd's own check for modifications has to be enough.
    saved = [(t, t.detach().clone()) for t in tensors if has_address(t)]
    return lambda: all(_equal(t, copy) for t, copy in saved)


def replace_inference_tensors(model: nn.Module) -> Callable[[], None]:
    """Tensors made in inference mode, for example a table computed during validation; replaced by copies."""
    undo: list[Callable[[], None]] = []
    copies: dict[int, Tensor] = {}

    def copy_of(t: Tensor) -> Tensor:
        if id(t) not in copies:
            copies[id(t)] = nn.Parameter(t.clone(), False) if isinstance(t, nn.Parameter) else t.clone()
        return copies[id(t)]

    with torch.inference_mode(False):
        for module in model.modules():
            for name, value in list(module.__dict__.items()):
                if isinstance(value, Tensor) and value.is_inference():
                    undo.append(partial(module.__dict__.__setitem__, name, value))
                    module.__dict__[name] = copy_of(value)
            for kind, name, t in _registered(module):
                if t.is_inference():
                    undo.append(partial(set_tensor, module, kind, name, t))
                    set_tensor(module, kind, name, copy_of(t))
    return in_turn(undo)


def save_registered(model: nn.Module, saver: Saver) -> Callable[[], None]:
    """Which children, parameters and hooks are registered, in which order; and what hooks refer to."""
    # `fully_shard` registers the whole parameters and their parts in turn, and knows itself which it has registered.
    sharded = {id(m) for m in model.modules() if not all(map(has_address, m.parameters()))}
    registries = [
        value
        for m in model.modules()
        for name, value in vars(m).items()
        if name in _REGISTRIES and not (id(m) in sharded and any(isinstance(x, Tensor) for x in value.values()))
    ]
    return in_turn([restore for x in registries if (restore := saver.save(x))])


def save_buffers(model: nn.Module) -> Callable[[], None]:
    """Buffers: which tensor is registered, and its values."""
    saved = [
        (module, name, t, save_tensor(t))
        for module in model.modules()
        for kind, name, t in _registered(module)
        if kind == "buffers"
    ]

    def restore() -> None:
        for module, name, buffer, restore_values in saved:
            set_tensor(module, "buffers", name, buffer)
            restore_values()

    return restore


def save_parameters(model: nn.Module) -> Callable[[], None]:
    """Parameters: memory, ``requires_grad`` and ``grad``. The block does not write to their values, with one exception.

    An embedding with ``max_norm`` shortens vectors in its own table when it looks them up.
    """
    saved = [(p, save_memory(p), p.requires_grad, p.grad) for p in model.parameters()]
    embeddings = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    tables = [save_tensor(m.weight) for m in embeddings if m.max_norm is not None]

    def restore() -> None:
        for parameter, restore_memory, requires_grad, grad in saved:
            restore_memory()
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for restore_values in tables:
            restore_values()

    return restore


def save_values(model: nn.Module) -> Callable[[], None]:
    """Values of all ordinary parameters, for modules that write to their weights."""
    return in_turn([save_tensor(p) for p in ordinary_parameters(model)])


def ordinary_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model that are in strided memory, and not sharded over processes."""
    return [p for p in model.parameters() if has_address(p)]


def save_training_flags(model: nn.Module) -> Callable[[], None]:
    """The training flag of every module."""
    flags = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, training in flags:
            module.training = training

    return restore


def save_backward_hooks(model: nn.Module) -> Callable[[], None]:
    """Backward hooks of modules. Removed: they are meant for training, and torch passes views to modules with hooks."""
    removed = [remove_backward_hooks(module) for module in model.modules()]
    return in_turn(removed)


def silence_loggers(model: nn.Module) -> Callable[[], None]:
    """LightningModules read their trainer's state, but do not log."""
    trainers = [(module, vars(module).get("_trainer")) for module in model.modules()]
    return in_turn([silence(module, None if trainer is None else view_of(trainer)) for module, trainer in trainers])


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Plain attributes of a module."""
    return {name: value for name, value in module.__dict__.items() if name not in _MODULE_NAMES}


def _registered(module: nn.Module) -> Iterator[tuple[Literal["parameters", "buffers"], str, Tensor]]:
    """Kind, name and value of a module's own parameters and buffers."""
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        yield "parameters", name, parameter
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        yield "buffers", name, buffer


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether tensors are equal, with NaN equal to NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def _tensors_in(value: Any, seen: set[int]) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (list, tuple, deque, dict, set)) or id(value) in seen:
        return []
    seen.add(id(value))
    return [t for entry in entries_of(value) for t in _tensors_in(entry, seen)]
