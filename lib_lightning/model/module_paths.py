"""Modules of a model by their paths."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import nn

from lib_lightning.errors import NodeLayerError, quoted
from lib_lightning.model.node_layer import INPUT, NodeLayer, split_tap


def find_module(model: nn.Module, path: str) -> nn.Module:
    """The module of a path, which need not name the wrappers that ``torch.compile`` puts around modules.

    Args:
        model: The model.
        path: ``"net.0"`` finds ``net._orig_mod.0``, too. Empty for the model itself.

    Returns:
        The module; the original one of a compiled module.

    Raises:
        AttributeError: If there is no such module.
    """
    module = _original(model)
    for name in path.split(".") if path else []:
        if name != _COMPILED:
            child = _child(module, name)
            if child is None:
                raise AttributeError(f"{type(module).__name__} has no module '{name}'")
            module = _original(child)
    return module


def module_paths(model: nn.Module) -> list[str]:
    """Paths of all modules, in the order of definition, without the wrappers that ``torch.compile`` puts around them.

    Args:
        model: The model, whose own path is empty.

    Returns:
        The paths; a module that stands in several places has several.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    plain = (".".join(part for part in name.split(".") if part != _COMPILED) for name in names)
    return list(dict.fromkeys(plain))


def _original(module: nn.Module) -> nn.Module:
    inner = _child(module, _COMPILED)
    return module if inner is None else _original(inner)


def _child(module: nn.Module, name: str) -> nn.Module | None:
    return dict(module._modules.items()).get(name)  # TorchScript's modules have no dict, but something like it


def check_taps(model: nn.Module, layers: Sequence[NodeLayer]) -> None:
    """Refuse taps that name modules the model does not have.

    Args:
        model: The model.
        layers: Node layers.

    Raises:
        NodeLayerError: With the nearest names that do exist; also for modules that take no hooks.
    """
    forward = getattr(find_module(model, ""), "forward", None)
    if getattr(forward, "__qualname__", "") in ("_forward_unimplemented", "LightningModule.forward"):
        raise NodeLayerError(
            f"{type(model).__name__} has no forward(), and that is what node layers cut. Write one that returns the "
            "model's output, such as: def forward(self, x): return self.net(x)"
        )
    for layer in layers:
        for name in layer.taps:
            tap = split_tap(name)
            try:
                module = find_module(model, tap.path)
                if isinstance(module, torch.jit.RecursiveScriptModule):  # type: ignore[attr-defined]
                    raise NodeLayerError(
                        f"'{name}' is a TorchScript module, which nobody can look into. Choose a module around it or "
                        "beside it, or take the one that it was made from."
                    )
            except AttributeError:
                names = module_paths(model)
                near = difflib.get_close_matches(tap.path, names, n=3, cutoff=0.4) or [n for n in names if n][:8]
                suffix = f":{tap.side}" if tap.side == INPUT else ""
                hint = f"Near matches: {quoted(n + suffix for n in near)}." if near else "It has no modules at all."
                raise NodeLayerError(
                    f"{type(model).__name__} has no module '{tap.path}' (node layer '{layer.name}'). {hint}"
                ) from None


# Where torch.compile keeps the module it wraps.
_COMPILED = "_orig_mod"
