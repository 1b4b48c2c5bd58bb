"""Running a model without leaving a trace: a copy runs in its place, and the state of the process is restored."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

from lib_lightning.errors import LIBError, quoted
from lib_lightning.model.process_state import PROCESS_LOCK, change_settings, save_rng
from lib_lightning.model.replica import CannotCopyError, CopiedState, Copier, copy_model, discard, num_bytes
from lib_lightning.model.saved_state import ordinary_parameters, save_values, saved_state, saver_of
from lib_lightning.model.saved_value import Saver
from lib_lightning.model.static_state import save_static_state
from lib_lightning.model.torch_internals import writes_refused
from lib_lightning.model.waiting_threads import considerate_threads

log = logging.getLogger(__name__)

# Share of `memory_limit` that a copy of the parameters may take. Larger parameters are shared with the copy.
COPIED_SHARE = 0.25
# The same for the default of `memory_limit`, in bytes.
MAX_COPIED_BYTES = 2**29
# Models that run themselves, because they cannot be copied, or can be reached from their copy.
_NOT_COPIED: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
# The copies that run in the blocks of `preserve_model` at present.
_RUNNING: dict[int, _Running] = {}


def copied_bytes(memory_limit: float) -> int:
    """The size of the parameters that are copied at most, in bytes.

    Args:
        memory_limit: In GiB.

    Returns:
        A quarter of it.
    """
    return int(memory_limit * 2**30 * COPIED_SHARE)


@dataclass(frozen=True)
class _Running:
    """A copy that runs, the model that it was made of, and what it held when it was made."""

    original: nn.Module
    max_bytes: int
    state: CopiedState


@contextmanager
def preserve_model(model: nn.Module, max_bytes: int = MAX_COPIED_BYTES) -> Iterator[nn.Module]:
    """Run a block in evaluation mode with gradients, on a copy of a model.

    In the block, second derivatives with respect to activations are available, even if the caller has disabled
    gradients (``no_grad``, ``inference_mode``). Parameters are constants. Mixed precision, TF32, compiled code,
    activation checkpointing and the modules' backward hooks are off, and LightningModules do not log. After the block,
    also after an exception, random states (torch, CUDA, NumPy, Python), settings of torch, and class attributes and
    global variables of the model's code are as before. Only one thread at a time is in such a block.

    A model that refuses to be copied runs itself. Its state is then saved before the block and restored after it.

    Args:
        model: The model.
        max_bytes: Copy the parameters, too, if they take no more memory than this. Larger ones are shared with the
            copy, which may then not write to them.

    Yields:
        The module to run. In further such blocks within this one it runs itself, as long as it is as it was made; what
        changes itself in a forward pass is copied anew.

    Raises:
        LIBError: If the model has lazy parameters, which take their shapes from the first batch of training; if it
            writes to parameters that are too large to copy; or if it changes itself from its copy.

    Example:
        >>> model = nn.Dropout()
        >>> with preserve_model(model) as copy, torch.no_grad():
        ...     copy is model, copy.training, torch.is_grad_enabled()
        (False, False, False)
        >>> model.training
        True
    """
    with PROCESS_LOCK, ExitStack() as stack:
        stack.callback(save_rng())
        running = _RUNNING.get(id(model))
        if running is not None and running.state.is_unchanged():
            with torch.inference_mode(False), torch.enable_grad():
                yield model
            return
        if running is not None:
            model, max_bytes = running.original, running.max_bytes
        _check_not_lazy(model)
        stack.enter_context(considerate_threads())
        module, copier = stack.enter_context(_module_to_run(model, max_bytes))
        stack.callback(change_settings())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device_type in {p.device.type for p in module.parameters()} | {"cpu"}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        # Fused attention has no second derivative.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # cuDNN differentiates recurrent layers in training mode only, and only once.
        if any(isinstance(m, nn.RNNBase) for m in module.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        # Compiled modules ignore hooks that are registered later.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        # Not module.eval(), which a module may override to do more than set the flag.
        for m in module.modules():
            m.training = False
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        if copier is not None:
            _RUNNING[id(module)] = _Running(model, max_bytes, CopiedState(copier.copies()))
            stack.callback(_RUNNING.pop, id(module))
        yield module


def is_running_copy(module: nn.Module) -> bool:
    """Whether a module is the copy that runs in a block of `preserve_model`.

    Example:
        >>> model = nn.Dropout()
        >>> with preserve_model(model) as copy:
        ...     is_running_copy(copy), is_running_copy(model)
        (True, False)
    """
    return id(module) in _RUNNING


@contextmanager
def _module_to_run(model: nn.Module, max_bytes: int) -> Iterator[tuple[nn.Module, Copier | None]]:
    if _NOT_COPIED.get(id(model)) is not model:
        try:
            copy, shared, copier = copy_model(model, max_bytes)
        except CannotCopyError as error:
            _NOT_COPIED[id(model)] = model
            log.warning(
                "%s cannot be copied, because of %s: snapshots run the model itself, and restore its state afterwards.",
                type(model).__name__, error,
            )  # fmt: skip
    if _NOT_COPIED.get(id(model)) is model:
        with _restored(model, max_bytes):
            yield model, None
        return
    saver = Saver([*model.modules(), *copier.shared])
    restores = [saver.save(x) for x in copier.uncopied]
    restores.append(save_static_state(copier.kinds | saver.kinds, [*copier.functions, *saver.functions], saver))
    before = _fingerprint(model)
    try:
        with _weights_protected(model, shared):
            yield copy, copier
    finally:
        discard(copy)
        for restore in restores:
            if restore is not None:
                restore()
    if _fingerprint(model) != before:
        _NOT_COPIED[id(model)] = model
        raise LIBError(
            f"A copy of {type(model).__name__} has changed the model itself, which its code must have another way to "
            "reach, such as a global variable. This result is dropped; from now on snapshots run the model itself, and "
            "restore its state afterwards."
        )


@contextmanager
def _restored(model: nn.Module, max_bytes: int) -> Iterator[None]:
    """Run a block that calls the model itself, and restore its state afterwards."""
    fits = num_bytes(model) <= max_bytes
    with ExitStack() as stack:
        saver, kinds = saver_of(model), {type(module) for module in model.modules()}
        if fits:
            stack.callback(save_values(model))
        for save in saved_state(saver):
            stack.callback(save(model))
        stack.callback(save_static_state(saver.kinds | kinds, list(saver.functions), saver))
        with _weights_protected(model, [] if fits else ordinary_parameters(model)):
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


def _weights_protected(model: nn.Module, shared: Sequence[Tensor]) -> AbstractContextManager[None]:
    def refuse() -> None:
        raise LIBError(
            f"{type(model).__name__} writes to its parameters in the forward pass, and they are too large to copy "
            f"({num_bytes(model) / 2**30:.2g} GiB). Raise memory_limit to at least "
            f"{num_bytes(model) / 2**30 / COPIED_SHARE:.2g} GiB; a quarter of it is for the copy."
        )

    return writes_refused(shared, refuse)


def _fingerprint(model: nn.Module) -> list[Any]:
    """Numbers that change if something is assigned to a module, or written to a registered tensor."""
    found: list[Any] = []
    for module in model.modules():
        for value in vars(module).values():
            found.append(id(value))
            if type(value) in (dict, OrderedDict):
                found.append(len(value))
    for t in itertools.chain(model.parameters(), model.buffers()):
        found.append((id(t), None if t.is_inference() else t._version, t.requires_grad))
    return found


def _check_not_lazy(model: nn.Module) -> None:
    lazy = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if is_lazy(t)]
    if lazy:
        raise LIBError(
            f"{quoted(lazy)} have no shape yet: lazy modules take it from the first batch, and would keep it. "
            "Run the model once before (model(batch)), or specify the shapes."
        )
