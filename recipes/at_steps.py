"""A callback that does something after some steps of a training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any

import lightning as L


class AtSteps(L.Callback, ABC):
    """Calls `take` before training and after steps, where one is due.

    Args:
        steps: Numbers of optimizer steps.
    """

    def __init__(self, steps: Collection[int]) -> None:
        self.steps = frozenset(steps)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Before the first step."""
        self._take_if_due(trainer.global_step, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After a step."""
        self._take_if_due(trainer.global_step, pl_module)

    def _take_if_due(self, step: int, module: L.LightningModule) -> None:
        if step in self.steps:
            self.take(step, module)

    @abstractmethod
    def take(self, step: int, module: L.LightningModule) -> None:
        """What is done.

        Args:
            step: Number of optimizer steps so far.
            module: The module that is trained.
        """
