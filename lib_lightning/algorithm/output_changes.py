"""What a feature does to the outputs of a model: which it raises and lowers, by how much, and on which samples.

``D_jo = 1/n sum_x mean_t (change of z_to)`` for feature ``j`` and output ``o``, with ``z_to`` at output position ``t``:
its log-probability for classes and tokens, its logit for yes-or-no answers, the number itself otherwise. The change is
that for a feature one standard deviation higher at all positions of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib_lightning.algorithm.basis import Basis
from lib_lightning.distributed.process_group import ProcessGroup
from lib_lightning.model.capture import CapturedLayer
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.precision import product_dtype, to_float64

# Name of the phase, for progress.
OUTPUT_EFFECTS = "effects on the output"
# Outputs that are kept of each feature, of those raised most and of those lowered most.
TOP = 5
# Changes of up to so many rounding errors of a typical output count as none. Outputs above the second number are not
# typical.
_ROUNDING = 8
_HUGE = 1e4


@dataclass(frozen=True)
class OutputEffects:
    """Which outputs of the model, such as classes or tokens, each feature of a node layer raises and lowers most.

    A feature is raised and lowered by one standard deviation, at all its positions, and half of the difference is its
    effect: on log-probabilities of classes and tokens, on logits of yes-or-no answers, or on numbers. Where moving each
    feature takes too long, the effect is the derivative times the standard deviation.

    Attributes:
        outputs: Index of the output, shape ``(r, 2 k)``, int32: first the ``k`` that are raised most, then the ``k``
            that are lowered most; -1 for none.
        changes: Mean change of this output over samples and output positions, shape ``(r, 2 k)``, float32; NaN for
            none.
        errors: Its standard error over samples, shape ``(r, 2 k)``, float32; NaN where it is not known.

    Note:
        Where even derivatives take too long, only the most important features have effects, or none.
    """

    outputs: Tensor
    changes: Tensor
    errors: Tensor

    @classmethod
    def of(
        cls, num_features: int, features: Tensor, outputs: Tensor, changes: Tensor, squares: Tensor, n: int
    ) -> OutputEffects:
        """From sums over samples.

        Args:
            num_features: Number of all features of the node layer.
            features: Indices of those that were measured.
            outputs: The outputs that they raise and lower most, as in the attribute, shape ``(m, 2 k)``.
            changes: Their mean changes, shape ``(m, 2 k)``, float64.
            squares: Sums over samples of their squared changes, shape ``(m, 2 k)``, float64.
            n: Number of samples.

        Returns:
            The effects, on the CPU.
        """
        variance = (squares - n * changes.square()).clamp(min=0) / (n - 1 if n > 1 else math.nan)
        found = cls(
            torch.full((num_features, 2 * TOP), -1, dtype=torch.int32, device="cpu"),
            *(torch.full((num_features, 2 * TOP), math.nan, dtype=torch.float32, device="cpu") for _ in range(2)),
        )
        is_change = outputs >= 0
        for kept, values, none in (
            (found.outputs, outputs, -1),
            (found.changes, changes, math.nan),
            (found.errors, (variance / n).sqrt(), math.nan),
        ):
            kept[features.cpu()] = torch.where(is_change, values, none).to(kept.dtype)
        return found


def most_changed(mean: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """The outputs that features raise and lower most.

    Args:
        mean: Mean changes of all outputs, shape ``(m, D)``, on the CPU.
        rounding: Rounding error of a typical output.

    Returns:
        The outputs, as in `OutputEffects`, and their mean changes, float64, both of shape ``(m, 2 k)``. An output is -1
        where no further one changes by more than rounding errors.
    """
    mean = mean.nan_to_num(0.0)
    outputs = torch.full((len(mean), 2 * TOP), -1, dtype=torch.int64, device="cpu")
    changes = torch.zeros(len(mean), 2 * TOP, dtype=torch.float64, device="cpu")
    for sign, start in ((1, 0), (-1, TOP)):
        largest, own = (sign * mean).topk(min(TOP, mean.shape[1]))
        columns = slice(start, start + own.shape[1])
        outputs[:, columns] = torch.where(largest > _ROUNDING * rounding, own, -1)
        changes[:, columns] = sign * largest.double()
    return outputs, changes


class OutputPositions:
    """The outputs of a batch, and the positions over which they are averaged.

    Args:
        last: The model's output.

    Attributes:
        z: Outputs, shape ``(n, T, D)``.
        n: Number of samples.
        eps: Relative rounding error of the outputs.
        weights: Weight of each output position in the mean of its sample, shape ``(n, T)``.
        present: 1 for samples with any output position, else 0, shape ``(n,)``.
    """

    def __init__(self, last: CapturedLayer) -> None:
        self.z = last.a.detach()
        self.n, positions = self.z.shape[:2]
        self.eps = torch.finfo(self.z.dtype).eps
        valid = torch.ones(self.n, positions, device=self.z.device) if last.mask is None else last.mask
        valid = valid.to(product_dtype(self.z.dtype))
        count = valid.sum(1, keepdim=True)
        self.weights, self.present = valid / count.clamp(min=1), (count[:, 0] > 0).to(valid)

    def scale(self) -> Tensor:
        """Number of samples, and the sum of the mean absolute output of each, float64."""
        # Some models set the logits of classes that do not exist to the lowest number that there is.
        sizes = torch.where(self.z.abs() < _HUGE, self.z.abs(), 0.0).to(self.weights).mean(-1)
        return torch.stack([to_float64(self.present.sum()), to_float64((sizes * self.weights).sum())])


def most_important(basis: Basis, count: int, by_output: bool = False) -> Tensor:
    """Indices of the most important features.

    Args:
        basis: The basis.
        count: How many, at most.
        by_output: Whether to go by the importance for the output, if that is known.

    Returns:
        The indices in ascending order, int64, on the CPU.
    """
    importance = basis.importance
    if by_output and basis.output_importance is not None:
        importance = basis.output_importance
    return importance.cpu().argsort(descending=True, stable=True)[:count].sort().values


def chosen_samples(
    sizes: Sequence[int], num_samples: int, process_group: ProcessGroup, batches: int = 1
) -> list[tuple[int, int]]:
    """Choose some samples of all processes.

    Args:
        sizes: Number of samples in each batch of this process.
        num_samples: How many to choose.
        process_group: The processes.
        batches: Smallest number of batches to choose from; all of them if there are fewer.

    Returns:
        Indices of batches of this process, evenly spread over those of all, and the number of samples to take of each.

    Example:
        >>> chosen_samples([10, 10, 10, 10], 8, ProcessGroup()), chosen_samples([10, 10, 10, 10], 8, ProcessGroup(), 4)
        ([(2, 8)], [(0, 2), (1, 2), (2, 2), (3, 2)])
    """
    gathered = process_group.gather(torch.tensor(sizes, dtype=torch.int64, device="cpu"))
    every = [(rank, i, size) for rank, own in enumerate(gathered) for i, size in enumerate(own.tolist())]
    if not every:
        return []
    total = sum(size for _, _, size in every)
    count = min(len(every), max(batches, math.ceil(num_samples * len(every) / total))) - 1
    found: list[tuple[int, int, int]] = []
    while count < len(every) and sum(size for _, _, size in found) < num_samples:
        count += 1
        found = [every[(2 * k + 1) * len(every) // (2 * count)] for k in range(count)]
    taken: dict[tuple[int, int], int] = {}
    for rank, i, size in sorted(found, key=lambda batch: batch[2]):
        share = math.ceil((num_samples - sum(taken.values())) / (count - len(taken)))
        taken[rank, i] = min(size, share)
    # Where every process has all samples, nothing is gathered.
    own = 0 if len(gathered) == 1 else process_group.rank
    return sorted((i, n) for (rank, i), n in taken.items() if rank == own and n)


def some_samples(instrumented: InstrumentedModel, batch: Any, count: int) -> Any:
    """Some samples of a batch, at even distances."""
    n = instrumented.num_samples(batch)
    return batch if n == count else instrumented.select(batch, torch.arange(count, device="cpu") * n // count)


def steps_of(basis: Basis, features: Tensor, a: Tensor) -> Tensor:
    """Steps in the activations that move features by one standard deviation, shape ``(m, d)``."""
    features = features.to(basis.mean.device)
    deviations = basis.importance[features].clamp(min=0).sqrt()
    C_pinv = basis.from_features[features]
    return (C_pinv * deviations.to(C_pinv)[:, None]).to(a.device, product_dtype(a.dtype))
