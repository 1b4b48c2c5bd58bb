"""Finding the modules of a model by their paths."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import nn

from lib_lightning.errors import NodeLayerError, quoted
from lib_lightning.model.node_layer import INPUT, NodeLayer, split_tap
from lib_lightning.model.torch_internals import child, compiled_from, has_forward


def find_module(model: nn.Module, path: str) -> nn.Module:
    """The module with a path. The path may omit the wrappers of `torch.compile`.

    Args:
        model: The model.
        path: ``"net.0"`` also finds ``net._orig_mod.0``. Empty for the model itself.

    Returns:
        The module. For a compiled module the original one.

    Raises:
        AttributeError: If there is no such module.
    """
    module, wrappers = _unwrap(model)
    for name in path.split(".") if path else []:
        if name not in wrappers:
            found = child(module, name)
            if found is None:
                raise AttributeError(f"{type(module).__name__} has no module '{name}'")
            module, wrappers = _unwrap(found)
    return module


def module_paths(model: nn.Module) -> list[str]:
    """Paths of all modules, in the order of definition, without the wrappers of `torch.compile`.

    Args:
        model: The model; its own path is empty.

    Returns:
        The paths. A module that is registered in several places has several.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    wrappers = {f"{path}.{found[0]}".lstrip(".") for path, m in named.items() if (found := compiled_from(m))}

    def without_wrappers(path: str) -> str:
        names = path.split(".")
        return ".".join(name for i, name in enumerate(names) if ".".join(names[: i + 1]) not in wrappers)

    return list(dict.fromkeys(map(without_wrappers, named)))


def _unwrap(module: nn.Module) -> tuple[nn.Module, set[str]]:
    """The module inside wrappers of `torch.compile`, and the names that modules have in the wrappers."""
    names = set()
    while found := compiled_from(module):
        name, module = found
        names.add(name)
    return module, names


def accepts_hooks(module: nn.Module) -> bool:
    """Whether hooks can be registered at a module. They cannot be at TorchScript modules, unless these are traced."""
    if isinstance(module, torch.jit.ScriptModule):
        try:
            module.register_forward_hook(lambda *_: None).remove()
        except RuntimeError:
            return False
    return True


def check_taps(model: nn.Module, layers: Sequence[NodeLayer]) -> None:
    """Raise an error for taps that name modules the model does not have.

    Args:
        model: The model.
        layers: Node layers.

    Raises:
        NodeLayerError: With similar names that exist; also for modules that accept no hooks, and for a model without
            ``forward``.
    """
    if not has_forward(find_module(model, "")):
        raise NodeLayerError(
            f"{type(model).__name__} has no forward(), which is what node layers cut. Write one that returns the "
            "model's output, such as: def forward(self, x): return self.net(x)"
        )
    for layer in layers:
        for name in layer.taps:
            tap = split_tap(name)
            try:
                module = find_module(model, tap.path)
                if not accepts_hooks(module):
                    raise NodeLayerError(
                        f"'{name}' is a TorchScript module, which accepts no hooks. Choose a module around it or "
                        "beside it, or use the module that it was made from."
                    )
            except AttributeError:
                names = module_paths(model)
                near = difflib.get_close_matches(tap.path, names, n=3, cutoff=0.4) or [n for n in names if n][:8]
                suffix = f":{tap.side}" if tap.side == INPUT else ""
                hint = f"Near matches: {quoted(n + suffix for n in near)}." if near else "It has no modules at all."
                raise NodeLayerError(
                    f"{type(model).__name__} has no module '{tap.path}' (node layer '{layer.name}'). {hint}"
                ) from None
