"""A tool that knows nothing of lib-lightning: it estimates the local learning coefficient while a network trains.

The local learning coefficient (Lau, Furman, Wang, Murfet and Wei 2023, arXiv 2308.12108) says how many weights a
network needs, in the sense of singular learning theory: how slowly the loss grows around the weights. It is estimated
with stochastic gradient Langevin dynamics. The chain here is a short one: it has not converged, and its estimates say
where the coefficient rises and falls, not how large it is. `LearningCoefficient` writes it and the norm of the weights
to a CSV file in the log directory, at steps of its own: the tab shows both for the runs of `recipes.grokking_events`.
"""

from __future__ import annotations

import copy
import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

# The chain: its length, the steps at its beginning that are left out, samples of each gradient, and its step size.
LENGTH, BURN_IN, BATCH, STEP_SIZE = 60, 20, 512, 1e-5
# Strength of the pull back to the weights, per squared distance.
LOCALIZATION = 100.0


def learning_coefficient(
    model: nn.Module, inputs: Tensor, targets: Tensor, length: int = LENGTH, step_size: float = STEP_SIZE
) -> float:
    """Estimate the local learning coefficient of a classifier.

    Args:
        model: The classifier, which is not changed.
        inputs: Training inputs, shape ``(n, ...)``.
        targets: Their classes, shape ``(n,)``, int64.
        length: Number of steps of the chain.
        step_size: Its step size.

    Returns:
        ``n (E[loss] - loss) / log n``, where the mean is over the chain, at inverse temperature ``1 / log n`` as in
        the paper. The same each time, for the same weights.
    """
    generator = torch.Generator().manual_seed(0)
    n = len(inputs)
    n_beta = n / math.log(n)
    sampled, frozen = copy.deepcopy(model), copy.deepcopy(model)
    weights = [p for p in sampled.parameters() if p.requires_grad]
    center = [p.detach().clone() for p in weights]
    losses = []
    for step in range(length):
        rows = torch.randint(n, (min(BATCH, n),), generator=generator)
        with torch.enable_grad():
            loss = F.cross_entropy(sampled(inputs[rows]), targets[rows])
            gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            at_center = F.cross_entropy(frozen(inputs[rows]), targets[rows])
            if step >= min(BURN_IN, length - 1):
                losses.append(float(loss - at_center))
            for p, gradient, start in zip(weights, gradients, center, strict=True):
                noise = torch.empty_like(p).normal_(generator=generator)
                p -= step_size / 2 * (n_beta * gradient + LOCALIZATION * (p - start)) - math.sqrt(step_size) * noise
    return n_beta * sum(losses) / len(losses)


class LearningCoefficient(L.Callback):
    """Writes ``step,mean,weight_norm`` to a CSV file: the estimate and the norm of all weights.

    Args:
        path: The file. Its folder must exist.
        steps: Numbers of optimizer steps after which to estimate.
        inputs: Training inputs, shape ``(n, ...)``.
        targets: Their classes, shape ``(n,)``.
        network: Name of the classifier in the LightningModule.
    """

    def __init__(self, path: Path, steps: Sequence[int], inputs: Tensor, targets: Tensor, network: str) -> None:
        self.path, self.steps, self.network = path, frozenset(steps), network
        self.inputs, self.targets = inputs, targets

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the header, and the estimate before the first step."""
        self.path.write_text("step,mean,weight_norm\n")
        self._write(pl_module, 0)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Write the estimate after a step, where it is due."""
        self._write(pl_module, trainer.global_step)

    def _write(self, pl_module: L.LightningModule, step: int) -> None:
        if step not in self.steps:
            return
        model = pl_module.get_submodule(self.network)
        norm = math.sqrt(sum(float(p.detach().square().sum()) for p in model.parameters()))
        mean = learning_coefficient(model, self.inputs, self.targets)
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow([step, f"{mean:.4g}", f"{norm:.5g}"])
