"""Examples of features: the samples and positions at which each is largest and smallest, and some in between."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# Bins of a histogram, half of them on either side of zero.
NUM_BINS = 64


@dataclass(frozen=True)
class FeatureExamples:
    """Where each feature of a node layer has which values, by the samples that the graph was computed on.

    Samples are numbered from 0 in the order of the batches, those of one process after those of the one before. A
    sample appears once among the largest and once among the smallest values of a feature: at the position where it has
    its largest or smallest. Missing examples, such as of a graph of few samples, have sample and position -1 and value
    NaN.

    Attributes:
        samples: Number of the sample of each example, shape ``(r, K)``, int32.
        positions: Index of its position among the positions of the sample, as flattened, shape ``(r, K)``, int32. Where
            a `NodeLayer` selects positions, it is the index among all of them.
        values: Value of the feature there, shape ``(r, K)``, float32.
        counts: How the ``K`` examples of a feature are divided: the largest ones, in descending order; the smallest
            ones, in ascending order; and some that are spread over its range, in descending order.
        shape: Shape of the positions of a sample: ``()`` for a single one, ``(T,)`` for a sequence, ``(H, W)`` for an
            image.
        context: Values of the feature at the positions around each example in a sequence, shape ``(r, K, W)``,
            float16; NaN where there is no position, or one that is left out. ``W`` is 0 if positions are no sequence.
        before: How many of these ``W`` positions are before the example's own.
        histogram: Number of values in each of 64 intervals of equal width, symmetric about 0, the feature's mean, shape
            ``(r, 64)``, int64.
        bin_width: Width of the intervals, shape ``(r,)``, float32: a power of two times an eighth of the feature's
            standard deviation, the smallest with which all values are in the histogram.
    """

    samples: Tensor
    positions: Tensor
    values: Tensor
    counts: tuple[int, int, int]
    shape: tuple[int, ...]
    context: Tensor
    before: int
    histogram: Tensor
    bin_width: Tensor

    @property
    def kinds(self) -> list[str]:
        """What each of the ``K`` examples of a feature is: ``"largest"``, ``"smallest"`` or ``"spread"``."""
        names = ("largest", "smallest", "spread")
        return [name for name, count in zip(names, self.counts, strict=True) for _ in range(count)]
