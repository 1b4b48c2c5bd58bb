"""Loss functions that a LightningModule calls in its step: they say what distribution its output stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lib_lightning.errors import is_out_of_memory
from lib_lightning.model.batch import map_tensors
from lib_lightning.model.steps import run_step, state_restored, steps_of


@dataclass(frozen=True)
class Loss:
    """A call of a loss function.

    Attributes:
        function: Its name in `torch.nn.functional`.
        shape: Shape of its input: of the predictions.
    """

    function: str
    shape: tuple[int, ...]


class _Observed(TorchFunctionMode):
    """Notes the calls of some functions of `torch.nn.functional`."""

    def __init__(self, functions: set[str]) -> None:
        super().__init__()
        self.functions, self.losses = functions, list[Loss]()

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in self.functions:
            predictions = args[0] if args else kwargs.get("input")
            if isinstance(predictions, Tensor):
                self.losses.append(Loss(name, tuple(predictions.shape)))
        return function(*args, **kwargs)


def losses_in_step(model: nn.Module, batch: Any, functions: set[str]) -> list[Loss]:
    """Run the first step of a LightningModule that calls a loss function.

    Args:
        model: Any module, in the state in which a snapshot runs it.
        batch: One batch, which is copied.
        functions: Names of functions in `torch.nn.functional`.

    Returns:
        The calls in order, of which some may come from metrics; none for modules without steps.

    Example:
        >>> losses_in_step(nn.Linear(1, 1), torch.ones(2, 1), {"mse_loss"})
        []
    """
    for step in steps_of(model):
        observed = _Observed(functions)
        try:
            with state_restored(model), observed, torch.no_grad():
                run_step(model, step, map_tensors(batch, lambda t: t.detach().clone()))
        except Exception as error:  # the call of the loss may have come before
            if is_out_of_memory(error):
                raise
        if observed.losses:
            return observed.losses
    return []
