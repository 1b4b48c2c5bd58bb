"""Which outputs each feature raises and lowers: the model runs with the feature one standard deviation up and down.

``D_jo = 1/n sum_x mean_t [ z_to(f_j + sigma_j) - z_to(f_j - sigma_j) ] / 2``, with the feature moved at all positions
of a sample at once, and ``z_to`` output ``o`` at output position ``t``: its log-probability for classes and tokens, its
logit for yes-or-no answers, the number itself otherwise. Up and down because terms of second order then cancel, and
because the sign of a feature is free: with the other sign all ``D`` have the other sign. Of a linear model ``D`` is
``sigma_j`` times the sum of the derivatives over positions; of others it includes what saturates.

Both are forward passes, for which samples and features are chosen that fit into a share of the operations of the graph
(`lib_lightning.algorithm.effort`): samples evenly spread over the batches, and features by importance.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.output_changes import (
    OutputEffects,
    OutputPositions,
    chosen_samples,
    most_changed,
    some_samples,
    steps_of,
)
from lib_lightning.distributed.process_group import ProcessGroup, Reducible, all_reduce
from lib_lightning.model.agreement import agree, half_of_the_digits
from lib_lightning.model.batch import first_tensor
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.loops import parts_of
from lib_lightning.model.output_distribution import OutputDistribution
from lib_lightning.model.precision import for_sums, full_precision, product_dtype, to_float64
from lib_lightning.model.safe_points import vectors_multiplied
from lib_lightning.model.vjp import apply_mask


class EffectSums(Reducible):
    """Streaming mean and variance over samples of what some features of a node layer do to each output.

    Args:
        features: Indices of the features.
        num_outputs: Number of outputs.
        device: Where to sum.

    Attributes:
        features: Indices of the features.
    """

    sums = ("_total", "_squares", "_scale")

    def __init__(self, features: Tensor, num_outputs: int, device: torch.device) -> None:
        self.features = features
        shape = (len(features), num_outputs)
        self._total, self._squares = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2))
        # Number of samples, sum of the mean sizes of their outputs.
        self._scale = torch.zeros(2, dtype=torch.float64, device=device)

    def count(self, positions: OutputPositions) -> None:
        """Count the samples of a batch."""
        self._scale += positions.scale()

    def add(self, start: int, changes: Tensor) -> None:
        """Add the changes that some features make on a batch.

        Args:
            start: Which of the features is the first.
            changes: Shape ``(k, n, D)``; zero for samples without output positions.
        """
        changes = to_float64(changes)
        self._total[start : start + changes.shape[0]] += changes.sum(1)
        self._squares[start : start + changes.shape[0]] += changes.square().sum(1)

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return int(self._scale[0])

    def result(self, num_features: int, eps: float) -> OutputEffects:
        """The outputs that are raised and lowered most.

        Args:
            num_features: Number of all features of the node layer.
            eps: Relative rounding error of outputs.

        Returns:
            The effects, on the CPU.
        """
        total, squares = self._total.cpu(), self._squares.cpu()
        n, scale = self._scale.tolist()
        outputs, changes = most_changed(total / n, eps * scale / n)
        return OutputEffects.of(
            num_features, self.features, outputs, changes, squares.gather(1, outputs.clamp(min=0)), int(n)
        )


def step_along_features(
    instrumented: InstrumentedModel,
    batches: Sequence[Any],
    wanted: Sequence[tuple[Basis, Tensor]],
    output: OutputDistribution,
    num_samples: int,
    stack_elements: int,
    process_group: ProcessGroup,
) -> tuple[list[OutputEffects], int]:
    """Measure what features do to the outputs, the same on every process.

    Args:
        instrumented: The model and its node layers, after a first `capture`. Call this within `model_session`.
        batches: The batches of this process, none of them empty.
        wanted: Basis of each node layer, and indices of its features to measure, which may be none.
        output: What the output stands for, and its width.
        num_samples: Number of samples, over all processes.
        stack_elements: About how many numbers the largest tensor of a forward pass may have.
        process_group: The processes.

    Returns:
        The effects of each node layer, and the number of samples.
    """
    bases, features = zip(*wanted, strict=True)
    sums = [
        EffectSums(own, output.width, for_sums(basis.mean).device) for own, basis in zip(features, bases, strict=True)
    ]
    chosen = chosen_samples(list(map(instrumented.num_samples, batches)), num_samples, process_group)
    eps = 0.0
    restore = full_precision()
    try:
        with torch.no_grad():
            may_repeat = bool(chosen) and _is_same_when_repeated(instrumented, batches[chosen[0][0]])
            for index, count in chosen:
                instrumented.manual_seed(index)
                batch = some_samples(instrumented, batches[index], count) if may_repeat else batches[index]
                moved = _MovedFeatures(instrumented, batch, output, may_repeat)
                eps = moved.eps
                # In a trial there may be fewer samples than were planned.
                planned = num_samples / (moved.n * len(chosen))
                moved.add_to(sums, bases, stack_elements, planned)
    finally:
        restore()
    all_reduce(sums, process_group)
    eps = max(float(t) for t in process_group.gather(torch.tensor([eps], dtype=torch.float64, device="cpu")))
    return [one.result(basis.n_features, eps) for one, basis in zip(sums, bases, strict=True)], sums[0].num_samples


def _is_same_when_repeated(instrumented: InstrumentedModel, batch: Any) -> bool:
    """Whether outputs of a few samples stay the same when the batch has some of them more often.

    They do not where the model draws random numbers, or mixes the samples of a batch.
    """
    n = min(2, instrumented.num_samples(batch))
    with contextlib.suppress(Exception):
        instrumented.manual_seed(0)
        outputs = []
        once = torch.arange(n, device="cpu")
        more = once.repeat(3)[:-1]
        for index in (once, more):
            few = instrumented.select(batch, index)
            if instrumented.num_samples(few) != len(index):
                return False
            output = first_tensor(instrumented.run(few))
            assert output is not None
            outputs.append(output)
        return agree(outputs[1], outputs[0][more.to(outputs[0].device)], half_of_the_digits(outputs[0].dtype))
    return False


class _MovedFeatures:
    """A model at one batch, with single features one standard deviation up and down.

    Args:
        instrumented: The model.
        batch: One batch.
        output: What the output stands for.
        may_repeat: Whether a batch may contain samples several times, so that several features are moved at once.

    Attributes:
        n: Number of samples.
        eps: Relative rounding error of the outputs.
    """

    def __init__(
        self, instrumented: InstrumentedModel, batch: Any, output: OutputDistribution, may_repeat: bool
    ) -> None:
        self._instrumented, self._batch, self._may_repeat = instrumented, batch, may_repeat
        self._captured = instrumented.capture_to_output(batch)
        self._positions = OutputPositions(self._captured[-1])
        self._is_categorical = output.kind == "categorical"
        self.n, self.eps = self._positions.n, self._positions.eps

    def add_to(self, sums: Sequence[EffectSums], bases: Sequence[Basis], stack_elements: int, planned: float) -> None:
        """Add what features of all node layers do.

        Args:
            sums: The sums of each node layer.
            bases: Basis of each node layer.
            stack_elements: About how many numbers the largest tensor may have.
            planned: Number of samples that there are in truth, as a multiple of those of the batch; for trials.
        """
        size = max(layer.a[0].numel() for layer in self._captured)
        at_once = max(1, stack_elements // (2 * self.n * size)) if self._may_repeat else 1
        for one in sums:
            one.count(self._positions)
        parts = [
            (i, start, min(start + at_once, len(one.features)))
            for i, one in enumerate(sums)
            for start in range(0, len(one.features), at_once)
        ]
        steps = [
            steps_of(basis, one.features, self._captured[i].a)
            for i, (one, basis) in enumerate(zip(sums, bases, strict=True))
        ]
        for i, start, stop in parts_of(parts, math.ceil(len(parts) * planned)):
            sums[i].add(start, self._changes(i, steps[i][start:stop]))

    def _changes(self, i: int, steps: Tensor) -> Tensor:
        """Half of the difference of the outputs after steps up and down at a node layer, shape ``(k, n, D)``."""
        k = len(steps)
        if self._may_repeat:
            index = torch.arange(self.n, device="cpu").repeat(2 * k)
            batch = self._instrumented.select(self._batch, index)
            up, down = self._outputs(i, torch.cat([steps, -steps]), batch).chunk(2)
        else:
            up, down = (self._outputs(i, step, self._batch) for step in (steps, -steps))
        vectors_multiplied(2 * k * self.n)
        return (up - down) / 2 * self._positions.present[:, None]

    def _outputs(self, i: int, steps: Tensor, batch: Any) -> Tensor:
        """Means over positions of the outputs after each of some steps at a node layer, shape ``(k, n, D)``."""
        layer, last = self._captured[i], self._captured[-1]
        a = layer.a.to(steps)
        moved = a + apply_mask(steps[:, None, None].expand(-1, *a.shape), layer.mask)
        t = first_tensor(self._instrumented.output(batch, {i: moved.to(layer.a.dtype).flatten(0, 1)}))
        assert t is not None
        z = last.layer.read([t])
        z = z.to(product_dtype(z.dtype)).unflatten(0, (len(steps), self.n))
        weights = self._positions.weights.to(z)
        mean = torch.einsum("kntd,nt->knd", z, weights)
        if self._is_categorical:
            mean = mean - (z.logsumexp(-1) * weights).sum(-1, keepdim=True)
        return mean
