"""What to tap instead of a module that the model does not call."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from lib_lightning.errors import NodeLayerError, quoted
from lib_lightning.model.module_paths import find_module, module_paths
from lib_lightning.model.node_layer import INPUT, OUTPUT, Tap, split_tap, tap_name
from lib_lightning.model.torch_internals import has_forward


class NotCalledError(NodeLayerError):
    """Node layers at modules that the forward pass does not call.

    Args:
        taps: The taps that did not run.
    """

    def __init__(self, taps: Collection[str]) -> None:
        super().__init__(f"{quoted(taps)} did not run in the model's forward pass.")
        self.taps = list(taps)


def explain_not_called(model: nn.Module, taps: Collection[str], called: Collection[int]) -> str:
    """Say why taps did not run, and which ones near the first of them did.

    Args:
        model: The model.
        taps: The taps that did not run.
        called: ``id`` of each module that the forward pass calls.

    Returns:
        The sentences.
    """
    tap = split_tap(next(iter(taps)))
    sentence = f"{quoted(taps)} did not run in the model's forward pass"
    module = find_module(model, tap.path)
    if id(module) in called:
        return f"{sentence}: {type(module).__name__} is called less often than that. The first call is '{tap.path}#0'."
    ran = [path for path in module_paths(model) if path and id(find_module(model, path)) in called]
    inside = [path for path in ran if path.startswith(f"{tap.path}.")]
    if inside:
        direct = [path for path in inside if path.count(".") == min(p.count(".") for p in inside)]
        what = "" if has_forward(module) else f", as any {type(module).__name__}"
        return f"{sentence}: it is never called itself{what}. What is inside it runs: {quoted(direct, limit=5)}."
    user = tap.path.rpartition(".")[0]
    while user and id(find_module(model, user)) not in called:
        user = user.rpartition(".")[0]
    if user and any(True for _ in module.parameters()):
        owner = find_module(model, user)
        uses = "uses" if isinstance(owner, nn.MultiheadAttention) else "may use"
        ends = [tap_name(Tap(user, side, None)) for side in (INPUT, OUTPUT)]
        return (
            f"{sentence}: {type(owner).__name__} '{user}' {uses} its weights without calling it. Tap the input or the "
            f"output of that: {quoted(ends)}."
        )
    near = [path for path in ran if path.startswith(f"{user}." if user else "")] or ran
    return f"{sentence}. Choose modules that forward() calls: {quoted(near, limit=5) or 'there are none'}."
