"""Attributes of torch that are not part of its public interface, except those of autograd.

Each is used in one function here, and that function has a fallback for versions of torch without the attribute. Those
of autograd are in `lib_lightning.model.autograd_graph`, because they make sense only together with the graph.
``tests/model/test_torch_internals.py`` lists all of them, and what each fallback costs.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import checkpoint

# The names of the attributes, by what they are.
NAMES = {
    "children": "_modules",
    "parameters": "_parameters",
    "buffers": "_buffers",
    "backward hooks": "_backward_hooks",
    "backward pre-hooks": "_backward_pre_hooks",
    "compiled module": "_orig_mod",
    "no forward": "_forward_unimplemented",
    "backward engine": "_engine_run_backward",
    "storage": "_cdata",
    "reentrant checkpoint": "CheckpointFunction",
    "checkpoint": "_checkpoint_hook",
    "dispatch modes": "_python_dispatch",
    "compiled call": "_compiled_call_impl",
    "compiled function": "_torchdynamo_orig_callable",
    "number of parametrize.cached": "_cache_enabled",
    "cache of parametrize.cached": "_cache",
    "functorch": "_functorch",
}


def child(module: nn.Module, name: str) -> nn.Module | None:
    """The child of a module with a name, if there is one.

    Not ``getattr``, which a module may forward to another one. The public list of children is slow, because it has all
    descendants or omits modules that are registered twice.
    """
    children = getattr(module, NAMES["children"], None)
    if children is None:
        children = {path: m for path, m in module.named_modules(remove_duplicate=False) if path and "." not in path}
    # TorchScript has another type here, without get().
    return children.get(name) if isinstance(children, dict) else dict(children.items()).get(name)


def compiled_from(module: nn.Module) -> tuple[str, nn.Module] | None:
    """The module that `torch.compile` wraps, and its name in the wrapper; None if a module is not such a wrapper."""
    name = NAMES["compiled module"]
    inner = child(module, name)
    if inner is None and type(module).__name__ == "OptimizedModule":
        name, inner = next(module.named_children(), (name, None))
    return None if inner is None else (name, inner)


# Modules that only call another one: the names by which they have it, by the name of their class.
_WRAPPERS = {
    "DistributedDataParallel": ("module",),
    "DataParallel": ("module",),
    "AveragedModel": ("module",),
    # Of Lightning Fabric: the second one may be wrapped once more.
    "_FabricModule": ("_original_module", "_forward_module"),
}

WRAPPER_NAMES = frozenset({NAMES["compiled module"], *itertools.chain(*_WRAPPERS.values())})


def wrapped_module(module: nn.Module) -> tuple[tuple[str, ...], nn.Module] | None:
    """The module that a wrapper calls, and the names that it has in the wrapper; None for any other module.

    Wrappers are those of `torch.compile`, data parallelism, averaged weights and Lightning Fabric.
    """
    if found := compiled_from(module):
        return (found[0],), found[1]
    for cls in type(module).__mro__:
        names = _WRAPPERS.get(cls.__name__, ())
        if names and (inner := child(module, names[0])) is not None:
            return names, inner
    return None


def has_forward(module: nn.Module) -> bool:
    """Whether the class of a module, or of a LightningModule, defines ``forward``."""
    name = getattr(getattr(module, "forward", None), "__qualname__", "")
    return name not in (NAMES["no forward"], "LightningModule.forward")


def set_tensor(module: nn.Module, kind: Literal["parameters", "buffers"], name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer, if possible without a call of the module's ``__setattr__``.

    With ``__setattr__``, a buffer that the module has deleted in the meantime becomes a plain attribute.
    """
    tensors = getattr(module, NAMES[kind], None)
    if tensors is None:
        setattr(module, name, tensor)
    else:
        tensors[name] = tensor


def remove_backward_hooks(module: nn.Module) -> Callable[[], None]:
    """Remove the backward hooks of a module.

    Without these attributes the hooks remain. They are then called in our backward passes, and since torch passes views
    to modules with such hooks, `validate_node_layers` may refuse node layers next to a skip connection.

    Returns:
        A function that restores them.
    """
    names = [NAMES[kind] for kind in ("backward hooks", "backward pre-hooks")]
    saved = {name: hooks for name in names if (hooks := getattr(module, name, None)) is not None}
    for name, hooks in saved.items():
        setattr(module, name, type(hooks)())

    def restore() -> None:
        for name, hooks in saved.items():
            setattr(module, name, hooks)

    return restore


def attributes_to_copy(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that its copy has, too: no compiled version of it, and no backward hooks.

    Without these names, both are copied: backward hooks as for `remove_backward_hooks`, and compiled code is that of
    the original module.
    """
    attributes = {name: value for name, value in vars(module).items() if name != NAMES["compiled call"]}
    for name in (NAMES["backward hooks"], NAMES["backward pre-hooks"]):
        if name in attributes:
            attributes[name] = type(attributes[name])()
    return attributes


def compiled_function(function: Any) -> Any:
    """The function that `torch.compile` was called with; None if a function is not compiled, or without the name."""
    return getattr(function, "__dict__", {}).get(NAMES["compiled function"])


def disable_parametrization_cache() -> Callable[[], None]:
    """Disable `torch.nn.utils.parametrize.cached`: weights computed in the block would be kept after it.

    Without these names it remains enabled: what a snapshot computes is then cached by the caller.

    Returns:
        A function that enables it again, with what was in the cache.
    """
    names = [NAMES[kind] for kind in ("number of parametrize.cached", "cache of parametrize.cached")]
    saved = {name: vars(parametrize)[name] for name in names if name in vars(parametrize)}
    if not any(saved.values()):
        return lambda: None
    vars(parametrize).update((name, type(value)()) for name, value in saved.items())
    return lambda: vars(parametrize).update(saved)


@contextmanager
def writes_refused(tensors: Sequence[Tensor], refuse: Callable[[], None]) -> Iterator[None]:
    """A block in which no operation of torch writes to some tensors.

    Args:
        tensors: The tensors.
        refuse: Called ahead of an operation that would write to the memory of one of them; raises an error. Without the
            module of dispatch modes it is called after the block, if the version counter of one of them has changed.

    Yields:
        Nothing.
    """
    modes = getattr(torch.utils, NAMES["dispatch modes"], None)
    protected = {storage_key(t) for t in tensors}
    versions = [t._version for t in tensors]

    def check(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        schema = getattr(func, "_schema", None)
        for value, argument in zip(args, schema.arguments if schema and schema.is_mutable else (), strict=False):
            for t in value if isinstance(value, (list, tuple)) else (value,):
                writes = argument.alias_info is not None and argument.alias_info.is_write
                if writes and isinstance(t, Tensor) and t.layout == torch.strided and storage_key(t) in protected:
                    refuse()
        for value in kwargs.values():  # out=
            if isinstance(value, Tensor) and storage_key(value) in protected and schema and schema.is_mutable:
                refuse()

    if not tensors:
        yield
        return
    if modes is None:
        yield
    else:

        class Mode(modes.TorchDispatchMode):  # type: ignore[misc, name-defined]
            supports_higher_order_operators = True

            def __torch_dispatch__(
                self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
            ) -> Any:
                check(func, args, kwargs or {})
                return func(*args, **(kwargs or {}))

        with Mode():
            yield
    if [t._version for t in tensors] != versions:
        refuse()


def written_tensors(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that an operation of torch writes to.

    Args:
        func: The operator.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        The tensors.

    Example:
        >>> x = torch.zeros(2)
        >>> len(written_tensors(torch.ops.aten.add_.Tensor, (x, torch.ones(2)), {}))
        1
    """
    schema = getattr(func, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    given = {argument.name: value for value, argument in zip(args, schema.arguments, strict=False)} | kwargs
    values = [given.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    nested = [value if isinstance(value, (list, tuple)) else (value,) for value in values]
    return [t for value in nested for t in value if isinstance(t, Tensor)]


def operations_handled(
    handle: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any],
) -> AbstractContextManager[object] | None:
    """A block in which a function is called in place of every operation of torch.

    Args:
        handle: Called with operator, positional and keyword arguments; returns the operator's result.

    Returns:
        The context manager; None without the module of dispatch modes.
    """
    modes = getattr(torch.utils, NAMES["dispatch modes"], None)
    if modes is None:
        return None

    class Mode(modes.TorchDispatchMode):  # type: ignore[misc, name-defined]
        supports_higher_order_operators = True

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            return handle(func, args, kwargs or {})

    mode: AbstractContextManager[object] = Mode()
    return mode


def has_memory(t: Tensor) -> bool:
    """Whether the values of a tensor can be read: not if its memory has been freed, as of parameters that are sharded.

    Example:
        >>> x = torch.ones(2)
        >>> before = has_memory(x)
        >>> _ = x.untyped_storage().resize_(0)
        >>> before, has_memory(x)
        (True, False)
    """
    if t.layout != torch.strided or not t.numel():
        return True
    try:
        last = t.storage_offset() + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        return t.untyped_storage().nbytes() >= (last + 1) * t.element_size()
    except (RuntimeError, NotImplementedError):  # tensors inside a transformation of torch.func, among others
        return True


def storage_key(t: Tensor) -> int:
    """A number that identifies the memory of a tensor."""
    storage = t.untyped_storage()
    key = getattr(storage, NAMES["storage"], None)
    return storage.data_ptr() if key is None else key


def operations_observed(
    observe: Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None],
) -> AbstractContextManager[object]:
    """A block in which a function is called after every operation of torch.

    Args:
        observe: Called with operator, positional arguments, keyword arguments and result. Without the module of
            dispatch modes it is never called.

    Returns:
        The context manager.
    """
    modes = getattr(torch.utils, NAMES["dispatch modes"], None)
    if modes is None:
        return nullcontext()

    class Mode(modes.TorchDispatchMode):  # type: ignore[misc, name-defined]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            observe(func, args, kwargs or {}, out)
            return out

    mode: AbstractContextManager[object] = Mode()
    return mode


def disable_checkpointing() -> Callable[[], None]:
    """Disable activation checkpointing in this thread: what it computes again would not be cut.

    Both kinds are replaced inside torch, where every call arrives, however a model has imported ``checkpoint``: the
    reentrant kind is an autograd function, the other one a pair of hooks on saved tensors. Without these attributes
    ``checkpoint`` itself is replaced, in every module that has imported it by its name. References in other places,
    such as a `functools.partial`, remain; a model that keeps one there may then be refused.

    Returns:
        A function that enables it again.
    """
    thread = threading.get_ident()

    def in_this_thread(plain: Callable[..., Any], usual: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (plain if threading.get_ident() == thread else usual)(*args)

    reentrant, hooks = (vars(checkpoint).get(NAMES[kind]) for kind in ("reentrant checkpoint", "checkpoint"))
    plain = {
        NAMES["reentrant checkpoint"]: reentrant
        and SimpleNamespace(
            apply=in_this_thread(lambda function, preserve_rng, *args: function(*args), reentrant.apply)
        ),
        NAMES["checkpoint"]: hooks and in_this_thread(lambda frame: nullcontext(), hooks),
    }
    saved = {name: vars(checkpoint)[name] for name in plain if name in vars(checkpoint)}
    vars(checkpoint).update((name, plain[name]) for name in saved)
    replaced = [] if len(saved) == len(plain) else _replace_everywhere(checkpoint.checkpoint, _not_checkpointed)

    def restore() -> None:
        vars(checkpoint).update(saved)
        for names, name, original in replaced:
            names[name] = original

    return restore


def _not_checkpointed(
    function: Callable[..., Any],
    *args: Any,
    use_reentrant: bool | None = None,
    preserve_rng_state: bool = True,
    context_fn: Any = None,
    determinism_check: str = "",
    debug: bool = False,
    early_stop: bool = True,
    **kwargs: Any,
) -> Any:
    """`torch.utils.checkpoint.checkpoint` without checkpointing."""
    return function(*args, **kwargs)


def _replace_everywhere(old: Any, new: Any) -> list[tuple[dict[str, Any], str, Any]]:
    """Replace a global variable in all loaded modules; returns where, and the old value."""
    found = [
        (names, name, old)
        for module in list(sys.modules.values())
        if isinstance(names := getattr(module, "__dict__", None), dict)
        for name, value in list(names.items())
        if value is old
    ]
    for names, name, _ in found:
        names[name] = new
    return found


def is_functorch_tensor(t: Tensor) -> bool:
    """Whether a tensor exists only inside a transformation of `torch.func`, where its values cannot be read."""
    module = getattr(torch._C, NAMES["functorch"], None)
    return module is not None and bool(module.is_functorch_wrapped_tensor(t))
