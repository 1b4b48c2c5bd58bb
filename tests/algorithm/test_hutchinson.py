"""Random sign vectors."""

from __future__ import annotations

import pytest
import torch

from lib_lightning.algorithm.hutchinson import OrthogonalSigns


@pytest.mark.parametrize("size", [1, 2, 3, 8, 100])
def test_vectors_of_a_set_are_orthogonal(size: int) -> None:
    signs = OrthogonalSigns(torch.Generator().manual_seed(0))
    whole = 2 ** max(1, size - 1).bit_length()
    first, rest = signs.draw(1, size), signs.draw(2 * whole - 1, size)
    drawn = torch.cat([first, rest]).double()
    assert set(drawn.unique().tolist()) <= {-1.0, 1.0}
    for z in drawn.split(whole):  # whole sets
        assert torch.equal(z.T @ z, whole * torch.eye(size).double())
