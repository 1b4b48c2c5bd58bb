"""Leaving no trace: whatever happens inside, model and random numbers come out as they went in."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils import checkpoint

from lib_lightning.errors import LIBError, quoted
from lib_lightning.model.precision import full_precision

# What every module has: flags, parameters, buffers, children and hooks, which are looked after on their own.
_MODULE_NAMES = frozenset(nn.Module().__dict__)
_TABLES = (nn.Embedding, nn.EmbeddingBag)


@contextmanager
def preserve_model(model: nn.Module) -> Iterator[None]:
    """Run a block of code in evaluation mode with gradients, then restore the model and all random states.

    Inside, gradients with respect to activations can be taken twice, even where the caller has switched them off
    (``no_grad``, ``inference_mode``); parameters are constants; mixed precision, TF32, compiled code, activation
    checkpointing and the modules' backward hooks are off. Afterwards, also after an exception, these are as before: the
    training flag of every module, its buffers and plain attributes (numbers, tensors, arrays, and containers of them),
    ``data``, ``grad`` and ``requires_grad`` of every parameter, the weights that ``max_norm`` writes into, and the
    random states of torch (CPU and CUDA), NumPy and Python.

    Args:
        model: The model that the block is going to run.

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
    _refuse_lazy(model)
    with ExitStack() as stack:
        stack.callback(_random_states())
        for save in (_inference_tensors, preserve_attributes, _buffers, _parameters, _training_flags, _backward_hooks):
            stack.callback(save(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device_type in {p.device.type for p in model.parameters()} | {"cpu"}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.callback(full_precision())
        # Fused attention has no second derivative, and the fast path of nn.TransformerEncoder none at all.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        # cuDNN differentiates recurrent layers in training mode only, and once.
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.callback(_checkpointing())
        # Compiled modules ignore hooks that come later; run what they were compiled from.
        if hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        # Not model.eval(): a module may do more than note the flag when told so.
        for module in model.modules():
            module.training = False
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield


def _random_states() -> Callable[[], None]:
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


@contextmanager
def preserve_rng(generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Run a block of code that may draw random numbers, then restore all random states.

    Args:
        generators: Generators to restore beside the global ones.

    Yields:
        Nothing.
    """
    restore, states = _random_states(), [g.get_state() for g in generators]
    try:
        yield
    finally:
        restore()
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _training_flags(model: nn.Module) -> Callable[[], None]:
    flags = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, training in flags:
            module.training = training

    return restore


def _inference_tensors(model: nn.Module) -> Callable[[], None]:
    """Have copies stand in for what was made in inference mode, such as a table that validation has left behind."""
    saved: list[tuple[dict[str, Any], str, Tensor]] = []
    copies: dict[int, Tensor] = {}
    places: list[dict[str, Any]]
    for module in model.modules():
        places = [module.__dict__, module._parameters, module._buffers]
        for place in places:
            found = [(k, t) for k, t in place.items() if isinstance(t, Tensor) and t.is_inference()]
            with torch.inference_mode(False):
                for name, t in found:
                    copy = nn.Parameter(t.clone(), False) if isinstance(t, nn.Parameter) else t.clone()
                    place[name] = copies.setdefault(id(t), copy)
                    saved.append((place, name, t))

    def restore() -> None:
        for place, name, t in saved:
            place[name] = t

    return restore


def preserve_attributes(model: nn.Module) -> Callable[[], None]:
    """Take note of what a forward pass may keep for the next one: a count of calls, the last state, a running metric.

    Args:
        model: The model.

    Returns:
        Puts back what stands in the plain attributes of its modules now.
    """
    seen: set[int] = set()
    saved = [
        (module, {k: (value, _contents(value, seen)) for k, value in module.__dict__.items() if k not in _MODULE_NAMES})
        for module in model.modules()
    ]

    def restore() -> None:
        for module, attributes in saved:
            for name in [name for name in module.__dict__ if name not in _MODULE_NAMES and name not in attributes]:
                del module.__dict__[name]
            for name, (value, refill) in attributes.items():
                module.__dict__[name] = value
                if refill:
                    refill()

    return restore


def tensors_unchanged(model: nn.Module) -> Callable[[], bool]:
    """Take note of the tensors that a model keeps beside its parameters: buffers, and those in its plain attributes.

    Args:
        model: The model.

    Returns:
        Tells whether these tensors (not others that have been put in their place) still hold what they hold now.
    """
    plain = [value for m in model.modules() for name, value in m.__dict__.items() if name not in _MODULE_NAMES]
    found = [*model.buffers(), *_tensors(plain, set())]
    # Of others autograd's own count of writes has to do: there is no comparing sparse tensors.
    saved = [(t, t.detach().clone()) for t in found if type(t.data) is Tensor and t.layout == torch.strided]
    return lambda: all(_equal(t, copy) for t, copy in saved)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def _tensors(value: Any, seen: set[int]) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, (list, tuple, deque, dict, set)) or id(value) in seen:
        return []
    seen.add(id(value))
    return [t for entry in _entries(value) for t in _tensors(entry, seen)]


def _contents(value: Any, seen: set[int]) -> Callable[[], object] | None:
    """Take note of what a tensor, an array or a container holds, down to the last one; the result puts it back."""
    numpy: Any = sys.modules.get("numpy")
    if isinstance(value, Tensor):
        return _numbers(value)
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
    inside = [refill for entry in entries if (refill := _contents(entry, seen))]

    def restore() -> None:
        if not isinstance(value, tuple) and list(map(id, _entries(value))) != list(map(id, entries)):
            value.clear()
            if isinstance(value, dict):
                for key, entry in zip(entries[::2], entries[1::2], strict=True):
                    value[key] = entry  # not update(), with which a Counter counts
            elif isinstance(value, set):
                value.update(entries)
            else:
                value.extend(entries)
        for refill in inside:
            refill()

    return restore


def _entries(container: Any) -> list[Any]:
    return [x for pair in container.items() for x in pair] if isinstance(container, dict) else list(container)


def _numbers(t: Tensor) -> Callable[[], None]:
    """Take note of what stands in a tensor, and where; the result puts it back there."""
    memory, copy = _memory(t), t.detach().clone()

    def restore() -> None:
        memory()
        try:
            same = torch.equal(t, copy)
        except (NotImplementedError, RuntimeError):  # sparse tensors, for one, cannot be compared
            same = False
        if not same:
            with torch.no_grad():
                t.copy_(copy)

    return restore


def _memory(t: Tensor) -> Callable[[], None]:
    """Take note of where a tensor's numbers stand, in case that others are put in their place (``t.data = ...``)."""
    data, address = t.data, _address(t)

    def restore() -> None:
        if _address(t) != address:
            t.data = data

    return restore


def _address(t: Tensor) -> int | None:
    # Sparse and sharded tensors and the like have no single place.
    return t.data_ptr() if type(t.data) is Tensor and t.layout == torch.strided else None


def _buffers(model: nn.Module) -> Callable[[], None]:
    saved = [
        (module, name, buffer, _numbers(buffer))
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]

    def restore() -> None:
        for module, name, buffer, refill in saved:
            module._buffers[name] = buffer
            refill()

    return restore


def _parameters(model: nn.Module) -> Callable[[], None]:
    saved = [(p, _memory(p), p.requires_grad, p.grad) for p in model.parameters()]
    # An embedding with a greatest norm shortens vectors that are longer as it looks them up, in the table itself.
    tables = [m.weight for m in model.modules() if isinstance(m, _TABLES) and m.max_norm is not None]
    copies = [_numbers(table) for table in tables]

    def restore() -> None:
        for parameter, replace, requires_grad, grad in saved:
            replace()
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for refill in copies:
            refill()

    return restore


def _backward_hooks(model: nn.Module) -> Callable[[], None]:
    """Take them off: they are about the gradients of training, and where they are, torch hands on views."""
    saved = [(module, module._backward_hooks, module._backward_pre_hooks) for module in model.modules()]
    for module, *_ in saved:
        module._backward_hooks, module._backward_pre_hooks = OrderedDict(), OrderedDict()

    def restore() -> None:
        for module, hooks, pre_hooks in saved:
            module._backward_hooks, module._backward_pre_hooks = hooks, pre_hooks

    return restore


def _checkpointing() -> Callable[[], None]:
    """Switch activation checkpointing off: what it runs again would lack our cuts, and give other tensors.

    Both kinds are met inside torch, where all who call ``checkpoint`` come by, however they have imported it: the
    reentrant one is an autograd function around what it is given to run, the other one a hook on saved tensors.
    """
    plain = {
        "CheckpointFunction": SimpleNamespace(apply=lambda function, preserve_rng_state, *args: function(*args)),
        "_checkpoint_hook": lambda frame: nullcontext(),
    }
    saved = {name: vars(checkpoint)[name] for name in plain if name in vars(checkpoint)}
    vars(checkpoint).update((name, plain[name]) for name in saved)
    return lambda: vars(checkpoint).update(saved)


def _refuse_lazy(model: nn.Module) -> None:
    lazy = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if is_lazy(t)]
    if lazy:
        raise LIBError(
            f"{quoted(lazy)} have no shape yet: lazy modules take it from the first batch they see, and would keep it. "
            "Run the model once before (model(batch)), or give the shapes yourself."
        )
