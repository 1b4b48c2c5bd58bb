"""Leaving no trace: whatever happens inside, model and random numbers come out as they went in."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# What every module has: flags, parameters, buffers, children and hooks, which are looked after on their own.
_MODULE_NAMES = frozenset(nn.Module().__dict__)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a block of code in evaluation mode with gradients, then restore the model and all random states.

    Inside, gradients with respect to activations can be taken twice, even where the caller has switched them off
    (``no_grad``, ``inference_mode``); parameters are constants, mixed precision and compiled code are off. Afterwards,
    also after an exception, these are as before: the training flag of every module, its buffers and plain attributes
    (numbers, tensors, lists and dicts of them), ``grad`` and ``requires_grad`` of every parameter, and the random
    states of torch (CPU and CUDA), NumPy and Python.

    Args:
        model: The model that the block is going to run.

    Yields:
        Nothing.

    Example:
        >>> model = nn.Dropout()
        >>> with undisturbed(model), torch.no_grad():
        ...     model.training, torch.is_grad_enabled()
        (False, False)
        >>> model.training
        True
    """
    with ExitStack() as stack:
        stack.callback(_random_states())
        for save in (_attributes, _buffers, _parameters, _training_flags):
            stack.callback(save(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device_type in {p.device.type for p in model.parameters()} | {"cpu"}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        # Fused attention has no second derivative, and the fast path of nn.TransformerEncoder none at all.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        # cuDNN differentiates recurrent layers in training mode only, and once.
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
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
def random_states_kept() -> Iterator[None]:
    """Run a block of code that may draw random numbers, then restore all random states.

    Yields:
        Nothing.
    """
    restore = _random_states()
    try:
        yield
    finally:
        restore()


def _training_flags(model: nn.Module) -> Callable[[], None]:
    flags = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, training in flags:
            module.training = training

    return restore


def _attributes(model: nn.Module) -> Callable[[], None]:
    # What a forward pass may keep for the next one: a count of calls, the last hidden state, a running metric.
    saved = [
        (module, {name: (value, _copy(value)) for name, value in module.__dict__.items() if name not in _MODULE_NAMES})
        for module in model.modules()
    ]

    def restore() -> None:
        with torch.no_grad():
            for module, attributes in saved:
                for name in [name for name in module.__dict__ if name not in _MODULE_NAMES and name not in attributes]:
                    del module.__dict__[name]
                for name, (value, copy) in attributes.items():
                    module.__dict__[name] = value
                    if isinstance(value, Tensor) and not torch.equal(value, copy):
                        value.copy_(copy)
                    elif type(value) is list:
                        value[:] = copy
                    elif type(value) in (dict, set):
                        value.clear()
                        value.update(copy)

    return restore


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return type(value)(value) if type(value) in (list, dict, set) else None


def _buffers(model: nn.Module) -> Callable[[], None]:
    saved = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]

    def restore() -> None:
        with torch.no_grad():
            for module, name, buffer, value in saved:
                module._buffers[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)

    return restore


def _parameters(model: nn.Module) -> Callable[[], None]:
    saved = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def restore() -> None:
        for parameter, requires_grad, grad in saved:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad

    return restore
