"""Finding the modules of a model by their paths."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Sequence

import torch
from torch import nn

from lib_lightning.errors import LIBError, NodeLayerError, SettingTypeError, quoted, shortened
from lib_lightning.model.node_layer import INPUT, OUTPUT, NodeLayer, Tap, readings, split_tap, tap_name
from lib_lightning.model.torch_internals import WRAPPER_NAMES, child, has_forward, wrapped_module


def find_module(model: nn.Module, path: str) -> nn.Module:
    """The module with a path. The path may omit wrappers, such as those of `torch.compile` and DDP.

    Args:
        model: The model.
        path: ``"net.0"`` also finds ``net._orig_mod.0`` and ``net.module.0``. Empty for the model itself.

    Returns:
        The module. For a wrapper the module inside it.

    Raises:
        AttributeError: If there is no such module.
    """
    module, wrappers = _unwrap(model)
    names = path.split(".") if path else []
    # The wrapper may have been taken off already.
    start = next((k for k, name in enumerate(names) if name not in WRAPPER_NAMES or child(module, name)), 0)
    for name in names[start:]:
        if name not in wrappers:
            found = child(module, name)
            if found is None:
                raise AttributeError(f"{type(module).__name__} has no module '{name}'")
            module, wrappers = _unwrap(found)
    return module


def module_paths(model: nn.Module) -> list[str]:
    """Paths of all modules, in the order of definition, without wrappers, such as those of `torch.compile`.

    Args:
        model: The model; its own path is empty.

    Returns:
        The paths. A module that is registered in several places has several.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    wrappers = {
        f"{path}.{name}".lstrip(".")
        for path, module in named.items()
        if (found := wrapped_module(module))
        for name in found[0]
    }

    def without_wrappers(path: str) -> str:
        names = path.split(".")
        return ".".join(name for i, name in enumerate(names) if ".".join(names[: i + 1]) not in wrappers)

    return list(dict.fromkeys(map(without_wrappers, named)))


def _unwrap(module: nn.Module) -> tuple[nn.Module, set[str]]:
    """The module inside wrappers, and the names that modules have in the wrappers."""
    names: set[str] = set()
    while found := wrapped_module(module):
        inside, module = found
        names |= set(inside)
    return module, names


def unwrapped(model: object) -> nn.Module:
    """A model without wrappers: what data parallelism, Fabric and averaging of weights add is of use in training only.

    Args:
        model: The model.

    Returns:
        The module inside the outermost wrappers, or the model itself.

    Raises:
        SettingTypeError: If it is not a module.
        LIBError: If its weights have no values.
    """
    if not isinstance(model, nn.Module):
        raise SettingTypeError(
            f"model must be a torch.nn.Module; got {shortened(repr(model), 80)}. A class needs its arguments, as in "
            "Net(); a function can be called by the forward() of a module."
        )
    empty = [name for name, t in itertools.chain(model.named_parameters(), model.named_buffers()) if t.is_meta]
    if empty:
        raise LIBError(
            f"{quoted(empty, limit=3)} have no values: they are on the device 'meta'. Load the weights first, or "
            "create the model on another device."
        )
    return _unwrap(model)[0]


def accepts_hooks(module: nn.Module) -> bool:
    """Whether hooks can be registered at a module. They cannot be at TorchScript modules, unless these are traced."""
    if isinstance(module, torch.jit.ScriptModule):
        try:
            module.register_forward_hook(lambda *_: None).remove()
        except RuntimeError:
            return False
    return True


def as_in_model(model: nn.Module, layer: NodeLayer) -> NodeLayer:
    """A node layer, where the string that it was given as may have names of modules with ``+`` or ``|`` in them.

    Args:
        model: The model.
        layer: The node layer.

    Returns:
        Of what its string may mean, that with the fewest taps that are all there: ``"a+b"`` is the module of this name
        if there is one. The node layer itself if nothing is there, or if it was not given as a string.

    Raises:
        NodeLayerError: If it could mean two things.
    """
    if all({"+", "|"}.isdisjoint(path) for path in module_paths(model)):
        return layer
    for same_count in readings(layer):
        found = [reading for reading in same_count if all(_has_tap(model, tap) for tap in reading.taps)]
        if len(found) > 1:
            shown = " or ".join(repr(list(reading.taps)) for reading in found)
            raise NodeLayerError(
                f"Node layer '{layer.name}' could join {shown}. Write it as one of these lists, or as a NodeLayer."
            )
        if found:
            return found[0]
    return layer


def _has_tap(model: nn.Module, tap: str) -> bool:
    try:
        find_module(model, split_tap(tap).path)
    except AttributeError:
        return False
    return True


def check_taps(model: nn.Module, layers: Sequence[NodeLayer], has_steps: bool = False) -> None:
    """Raise an error for taps that name modules the model does not have.

    Args:
        model: The model.
        layers: Node layers.
        has_steps: Whether steps of a LightningModule may take the place of ``forward``.

    Raises:
        NodeLayerError: With similar names that exist; also for modules that accept no hooks, and for a model without
            ``forward``.
    """
    if not has_forward(find_module(model, "")) and not has_steps:
        raise NodeLayerError(
            f"{type(model).__name__} has no forward(), which is what node layers cut. Write one that returns the "
            "model's output, such as: def forward(self, x): return self.net(x)"
        )
    for layer in layers:
        for name in as_in_model(model, layer).taps:
            tap = split_tap(name)
            try:
                module = find_module(model, tap.path)
                if not accepts_hooks(module):
                    raise NodeLayerError(
                        f"'{name}' is a TorchScript module, which accepts no hooks. Choose a module around it or "
                        "beside it, or use the module that it was made from."
                    )
            except AttributeError:
                near = similar_taps(model, tap)
                hint = f"Near matches: {quoted(near)}." if near else "It has no modules at all."
                raise NodeLayerError(
                    f"{type(model).__name__} has no module '{tap.path}' (node layer '{layer.name}'). {hint}"
                ) from None


def similar_taps(model: nn.Module, tap: Tap, count: int = 3) -> list[str]:
    """Taps of a model that are most likely meant by one that it does not have.

    Args:
        model: The model.
        tap: The tap, which names no module.
        count: Largest number of taps.

    Returns:
        Paths that end like the one given, or that the one given ends like; then similar ones; the first ones if there
        is nothing similar.
    """
    paths = [path for path in module_paths(model) if path]
    same_end = [path for path in paths if f".{path}".endswith(f".{tap.path}") or f".{tap.path}".endswith(f".{path}")]
    own = [INPUT, OUTPUT] if tap.side == OUTPUT and tap.call is None else []
    similar = difflib.get_close_matches(tap.path, [*own, *paths], n=count, cutoff=0.6)
    similar = similar or difflib.get_close_matches(tap.path, paths, n=count, cutoff=0.4)
    same_end.sort(key=lambda path: abs(len(path) - len(tap.path)))
    found = list(dict.fromkeys([*same_end, *similar]))[:count] or paths[: 2 * count]
    return [name if name in own else tap_name(Tap(name, tap.side, None)) for name in found]


def explain_own_names(model: nn.Module, layers: Sequence[NodeLayer]) -> str:
    """A sentence on the taps ``input`` and ``output`` of a model that has modules with these names; else empty."""
    taps = {tap for layer in layers for tap in layer.taps}
    shadowed = [tap for tap in (INPUT, OUTPUT) if tap in taps and child(find_module(model, ""), tap) is not None]
    return " ".join(
        f"'{tap}' is the {tap} of the whole model; of its module '{tap}', write '{tap}:input' or '{tap}:output'."
        for tap in shadowed
    )
