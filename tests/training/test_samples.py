"""Which samples snapshots are computed on."""

from __future__ import annotations

import torch

from lib_lightning.training.samples import SampleBuffer


def test_samples_are_copies_that_can_be_differentiated_through() -> None:
    buffer = SampleBuffer(5)
    with torch.inference_mode():
        batch = {"x": torch.ones(4, 2), "y": (torch.ones(4),), "scale": torch.ones(3)}
        buffer.add(batch)
        buffer.add(batch)
        buffer.add(batch)
        batch["x"].zero_()
    assert buffer.count == 5
    assert buffer.is_full
    assert [len(b["x"]) for b in buffer.batches] == [4, 1]
    assert [len(b["scale"]) for b in buffer.batches] == [3, 3]
    assert all(b["x"].all() and not b["x"].is_inference() for b in buffer.batches)
