"""When final features first became recognisable, in trajectories in which that is known."""

from __future__ import annotations

import pytest
import torch

from lib_lightning.lineage import retrace


def mixed(share: float, direction: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A feature with so much of its variance in common with a direction."""
    return share**0.5 * direction + (1 - share) ** 0.5 * other


def test_steps_at_which_features_become_recognisable() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, 5, generator=g, dtype=torch.float64)
    x[:, 0] = 1
    x = torch.linalg.qr(x).Q[:, 1:]  # mean 0
    shares = {0: (0.1, 1.0), 10: (0.6, 1.0), 20: (0.4, 1.0), 30: (0.55, 1.0), 40: (0.9, 1.0)}
    earlier = [torch.stack([-mixed(a, x[:, 0], x[:, 2]), mixed(b, x[:, 1], x[:, 3])], 1) for a, b in shares.values()]
    earlier[2] = earlier[2][:, [1, 0]]  # order does not matter
    seen = retrace(x[:, :2], list(shares), earlier)
    expected = torch.tensor(list(shares.values()), dtype=torch.float64).sqrt()
    torch.testing.assert_close(seen.similarity, expected, rtol=0, atol=1e-9)
    assert seen.first().tolist() == [10, 0]
    assert seen.since().tolist() == [30, 0]
    assert seen.first(0.95).tolist() == [-1, 0]
    assert seen.since(0.85).tolist() == [40, 0]


def test_neurons_are_compared_with_themselves() -> None:
    x = torch.linalg.qr(torch.randn(50, 3, dtype=torch.float64)).Q
    x = x - x.mean(0)
    seen = retrace(x, [0, 1], [x[:, [1, 0, 2]], x], in_order=True)
    assert seen.since().tolist() == [1, 1, 0]


def test_no_earlier_snapshot_and_none_with_features() -> None:
    x = torch.randn(20, 2)
    assert retrace(x, [], []).first().tolist() == [-1, -1]
    assert retrace(x, [5], [x[:, :0]]).since().tolist() == [-1, -1]


def test_other_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="same samples"):
        retrace(torch.randn(20, 2), [0], [torch.randn(19, 2)])
