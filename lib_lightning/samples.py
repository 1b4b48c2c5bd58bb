"""A fixed set of validation samples, kept for snapshots to be computed on."""

from __future__ import annotations

from typing import Any

import torch

from lib_lightning.core.nested import batch_size, map_tensors, samples_between


class SampleBuffer:
    """Copies of batches, up to a number of samples.

    Args:
        num_samples: Samples to keep.

    Example:
        >>> buffer = SampleBuffer(3)
        >>> for _ in range(2): buffer.add((torch.zeros(2, 5), torch.zeros(2)))
        >>> [inputs.shape[0] for inputs, labels in buffer.batches], buffer.full
        ([2, 1], True)
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.batches: list[Any] = []
        self.count = 0

    @property
    def full(self) -> bool:
        """Whether all samples are there."""
        return self.count >= self.num_samples

    def add(self, batch: Any) -> None:
        """Copy a batch, or as many of its samples as are still wanted."""
        if self.full:
            return
        # Copies made outside inference mode are ordinary tensors, which gradients can be taken through.
        with torch.inference_mode(False):
            wanted = self.num_samples - self.count
            kept = batch if batch_size(batch) <= wanted else samples_between(batch, 0, wanted)
            self.batches.append(map_tensors(kept, lambda t: t.detach().clone()))
        self.count += batch_size(kept)

    def clear(self) -> None:
        """Drop everything."""
        self.batches, self.count = [], 0
