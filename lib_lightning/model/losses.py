"""Loss functions that a LightningModule calls in its step: they say what distribution its output stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
        predictions: The predictions; None if they are not kept.
        targets: What they are compared with; None if that is no tensor.
        ignored: The class index that does not count.
    """

    function: str
    shape: tuple[int, ...]
    predictions: Tensor | None = field(default=None, repr=False, compare=False)
    targets: Tensor | None = field(default=None, repr=False, compare=False)
    ignored: int = field(default=-100, repr=False, compare=False)


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
            targets = args[1] if len(args) > 1 else kwargs.get("target")
            if isinstance(predictions, Tensor):
                targets = targets.detach() if isinstance(targets, Tensor) else None
                ignored = kwargs.get("ignore_index", -100)
                self.losses.append(Loss(name, tuple(predictions.shape), predictions.detach(), targets, ignored))
        return function(*args, **kwargs)


@contextmanager
def losses_observed(functions: set[str]) -> Iterator[list[Loss]]:
    """A block in which calls of loss functions are noted.

    Args:
        functions: Names of functions in `torch.nn.functional`.

    Yields:
        A list that the calls are added to.

    Example:
        >>> with losses_observed({"mse_loss"}) as losses:
        ...     _ = nn.MSELoss()(torch.ones(2, 1), torch.zeros(2, 1))
        >>> losses
        [Loss(function='mse_loss', shape=(2, 1))]
    """
    observed = _Observed(functions)
    with observed:
        yield observed.losses


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
