"""Running a model without leaving a trace: its state and all random states are saved before and restored afterwards."""

from __future__ import annotations

import random
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

from lib_lightning.errors import LIBError, quoted
from lib_lightning.model.precision import full_precision
from lib_lightning.model.torch_internals import disable_checkpointing, remove_backward_hooks, set_tensor

# Saves something, and returns the function that restores it.
Save = Callable[[nn.Module], Callable[[], None]]

# Attributes of every module (flags, parameters, buffers, children and hooks), which are saved separately.
_MODULE_NAMES = frozenset(nn.Module().__dict__)


def _saved_state() -> tuple[Save, ...]:
    """Everything that is saved before a block and restored, in reverse order, after it."""
    return (
        save_rng,  # random states of torch (CPU and CUDA), NumPy and Python
        replace_inference_tensors,  # tensors made in inference mode: replaced by copies that autograd accepts
        preserve_attributes,  # plain attributes of modules: numbers, tensors, arrays, and containers of these
        save_buffers,  # which tensor is registered, and its values
        save_parameters,  # memory, grad and requires_grad; values where a module writes to its weights (max_norm)
        save_training_flags,
        save_backward_hooks,  # removed in the block
        save_settings,  # precision of products, fused attention, activation checkpointing: off in the block
    )


@contextmanager
def preserve_model(model: nn.Module) -> Iterator[None]:
    """Run a block in evaluation mode with gradients, then restore the model and all random states.

    In the block, second derivatives with respect to activations are available, even if the caller has disabled
    gradients (``no_grad``, ``inference_mode``). Parameters are constants. Mixed precision, TF32, compiled code,
    activation checkpointing and the modules' backward hooks are off. After the block, also after an exception, the
    following are as before: the training flag of every module, its buffers and plain attributes (numbers, tensors,
    arrays, and containers of them), ``data``, ``grad`` and ``requires_grad`` of every parameter, the weights that
    ``max_norm`` writes to, and the random states of torch (CPU and CUDA), NumPy and Python.

    Args:
        model: The model that the block runs.

    Yields:
        Nothing.

    Raises:
        LIBError: If the model has lazy parameters, which take their shapes from the first batch of training.

    Example:
        >>> model = nn.Dropout()
        >>> with preserve_model(model), torch.no_grad():
        ...     model.training, torch.is_grad_enabled()
        (False, False)
        >>> model.training
        True
    """
    _check_not_lazy(model)
    with ExitStack() as stack:
        for save in _saved_state():
            stack.callback(save(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device_type in {p.device.type for p in model.parameters()} | {"cpu"}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        # Fused attention has no second derivative.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # cuDNN differentiates recurrent layers in training mode only, and only once.
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        # Compiled modules ignore hooks that are registered later.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        # Not model.eval(), which a module may override to do more than set the flag.
        for module in model.modules():
            module.training = False
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield


@contextmanager
def preserve_rng(generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Run a block that may draw random numbers, then restore all random states.

    Args:
        generators: Generators to restore in addition to the global ones.

    Yields:
        Nothing.
    """
    restore, states = save_rng(), [g.get_state() for g in generators]
    try:
        yield
    finally:
        restore()
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def preserve_attributes(model: nn.Module) -> Callable[[], None]:
    """Save what a forward pass may store in plain attributes: a number of calls, the last state, a running metric.

    Args:
        model: The model.

    Returns:
        A function that restores the attributes of all modules, and the values of tensors and containers in them. It may
        be called several times.
    """
    seen: set[int] = set()
    saved = [
        (module, {k: (value, _save_value(value, seen)) for k, value in _attributes(module).items()})
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
    saved = [(t, t.detach().clone()) for t in tensors if _has_address(t)]
    return lambda: all(_equal(t, copy) for t, copy in saved)


def save_rng(model: nn.Module | None = None) -> Callable[[], None]:
    """Random states of torch (CPU and CUDA), NumPy and Python."""
    cpu, python = torch.get_rng_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    numpy: Any = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy else None

    def restore() -> None:
        torch.set_rng_state(cpu)
        random.setstate(python)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if numpy:
            numpy.random.set_state(numpy_state)

    return restore


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
    return _in_turn(undo)


def save_buffers(model: nn.Module) -> Callable[[], None]:
    """Buffers: which tensor is registered, and its values."""
    saved = [
        (module, name, t, _save_tensor(t))
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
    saved = [(p, _save_memory(p), p.requires_grad, p.grad) for p in model.parameters()]
    embeddings = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))]
    tables = [_save_tensor(m.weight) for m in embeddings if m.max_norm is not None]

    def restore() -> None:
        for parameter, restore_memory, requires_grad, grad in saved:
            restore_memory()
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for restore_values in tables:
            restore_values()

    return restore


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
    return _in_turn(removed)


def save_settings(model: nn.Module) -> Callable[[], None]:
    """Settings of torch that have no context manager."""
    # The fast path of nn.TransformerEncoder has no derivative.
    mha = torch.backends.mha
    fastpath = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    return _in_turn([full_precision(), lambda: mha.set_fastpath_enabled(fastpath), disable_checkpointing()])


def _in_turn(restores: Sequence[Callable[[], object]]) -> Callable[[], None]:
    def restore() -> None:
        for one in restores:
            one()

    return restore


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Plain attributes of a module."""
    return {name: value for name, value in module.__dict__.items() if name not in _MODULE_NAMES}


def _registered(module: nn.Module) -> Iterator[tuple[Literal["parameters", "buffers"], str, Tensor]]:
    """Kind, name and value of a module's own parameters and buffers."""
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        yield "parameters", name, parameter
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        yield "buffers", name, buffer


def _save_value(value: Any, seen: set[int]) -> Callable[[], object] | None:
    """Save the contents of a mutable value, including those of nested containers; None for any other value."""
    numpy: Any = sys.modules.get("numpy")
    if isinstance(value, Tensor):
        return _save_tensor(value)
    if numpy and isinstance(value, numpy.ndarray) and value.flags.writeable:
        return partial(numpy.copyto, value, value.copy())
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if numpy and isinstance(value, numpy.random.RandomState):
        return partial(value.set_state, value.get_state())
    if numpy and isinstance(value, numpy.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if not isinstance(value, (list, tuple, deque, dict, set)) or id(value) in seen:
        return None
    seen.add(id(value))
    entries = _entries(value)
    nested = [saved for entry in entries if (saved := _save_value(entry, seen))]

    def restore() -> None:
        if not isinstance(value, tuple) and list(map(id, _entries(value))) != list(map(id, entries)):
            value.clear()
            if isinstance(value, dict):
                for key, entry in zip(entries[::2], entries[1::2], strict=True):
                    value[key] = entry  # not update(), which adds up in a Counter
            elif isinstance(value, set):
                value.update(entries)
            else:
                value.extend(entries)
        for restore_entry in nested:
            restore_entry()

    return restore


def _save_tensor(t: Tensor) -> Callable[[], None]:
    """Save the memory and the values of a tensor."""
    restore_memory, copy = _save_memory(t), t.detach().clone()

    def restore() -> None:
        restore_memory()
        try:
            is_same = torch.equal(t, copy)
        except (NotImplementedError, RuntimeError):  # sparse tensors cannot be compared
            is_same = False
        if not is_same:
            with torch.no_grad():
                t.copy_(copy)

    return restore


def _save_memory(t: Tensor) -> Callable[[], None]:
    """Save the memory of a tensor, which ``t.data = ...`` replaces."""
    data, address = t.data, _address(t)

    def restore() -> None:
        if _address(t) != address:
            t.data = data

    return restore


def _address(t: Tensor) -> int | None:
    return t.data_ptr() if _has_address(t) else None


def _has_address(t: Tensor) -> bool:
    """Whether a tensor is an ordinary one in strided memory, unlike sparse and sharded tensors, for example."""
    return type(t.data) is Tensor and t.layout == torch.strided


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether tensors are equal, with NaN equal to NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def _tensors_in(value: Any, seen: set[int]) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (list, tuple, deque, dict, set)) or id(value) in seen:
        return []
    seen.add(id(value))
    return [t for entry in _entries(value) for t in _tensors_in(entry, seen)]


def _entries(container: Any) -> list[Any]:
    return [x for pair in container.items() for x in pair] if isinstance(container, dict) else list(container)


def _check_not_lazy(model: nn.Module) -> None:
    lazy = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if is_lazy(t)]
    if lazy:
        raise LIBError(
            f"{quoted(lazy)} have no shape yet: lazy modules take it from the first batch, and would keep it. "
            "Run the model once before (model(batch)), or specify the shapes."
        )
