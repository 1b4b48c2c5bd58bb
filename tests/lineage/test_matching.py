"""Matching of two snapshots: known answers, invariances, and comparison with all pairings."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lib_lightning.lineage import match_features
from lib_lightning.lineage.matching import SAME, span_overlap, standardised

N = 1000


def directions(count: int, seed: int = 0, samples: int = N) -> Tensor:
    """Uncorrelated features with mean 0 and length 1."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, count + 1, generator=g, dtype=torch.float64)
    x[:, 0] = 1
    return torch.linalg.qr(x).Q[:, 1:]


def rotation(k: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(k, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q


def test_order_sign_scale_and_shift_do_not_matter() -> None:
    x = directions(12)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    scale = torch.linspace(-1e-6, 3e4, 12, dtype=torch.float64) + 1e-7
    match = match_features(x, x[:, order] * scale + 100 * scale)
    assert match.before.tolist() == order.tolist()
    assert not match.rotated.any()
    torch.testing.assert_close(match.similarity, torch.ones(12).double(), rtol=0, atol=1e-9)
    assert match.overlap == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("seed", range(20))
def test_no_pairing_shares_more(seed: int) -> None:
    """Compared with all pairings: as many similar pairs as possible, and among those the most similar ones."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(40, 5, generator=g, dtype=torch.float64)
    b = a[:, torch.randperm(5, generator=g)] + 0.8 * torch.randn(40, 5, generator=g, dtype=torch.float64)
    shared = torch.corrcoef(torch.cat([a, b], 1).T)[:5, 5:].square()

    def worth(pairs: list[tuple[int, int]]) -> tuple[int, float]:
        same = [float(shared[i, j]) for i, j in pairs if shared[i, j] >= SAME]
        return len(same), sum(same)

    best = max((list(zip(order, range(5), strict=True)) for order in itertools.permutations(range(5))), key=worth)
    match = match_features(a, b)
    found = [(i, j) for j, i in enumerate(match.before.tolist()) if i >= 0 and not match.rotated[j]]
    assert len(found) == worth(best)[0]
    assert worth(found)[1] == pytest.approx(worth(best)[1])


def test_similar_pairs_are_never_separated() -> None:
    # A Hungarian assignment of the shares alone would take the two pairs with 0.49 instead of the one with 0.5.
    x = directions(4)
    a = torch.stack([x[:, 0], 0.7 * x[:, 1] + 0.5 * x[:, 2]], 1)
    b = torch.stack([0.72 * x[:, 0] + 0.69 * a[:, 1] / a[:, 1].norm(), x[:, 0] * 0.69 + 0.72 * x[:, 3]], 1)
    shared = (standardised(a).T @ standardised(b)).square()
    assert shared[0, 0] > 0.5 > shared[0, 1] > 0.47
    assert shared[0, 1] + shared[1, 0] > shared[0, 0] + shared[1, 1]
    assert match_features(a, b).before[0] == 0


@pytest.mark.parametrize("k", [2, 3, 10, 40])
def test_a_rotation_of_any_size_is_no_death_and_no_birth(k: int) -> None:
    x = directions(50)
    y = x.clone()
    y[:, :k] = x[:, :k] @ rotation(k, seed=k)
    match = match_features(x, y)
    assert sorted(match.before.tolist()) == list(range(50))
    assert match.before[k:].tolist() == list(range(k, 50))
    assert not match.rotated[k:].any()
    assert len(match.ended) == 0
    assert (match.parents == -1).all()
    assert match.overlap == pytest.approx(1, abs=1e-9)
    if k >= 10:  # hardly any feature has a squared correlation of one half with a single one
        assert match.rotated.sum() > k / 2


def test_deaths_and_births_inside_a_rotation_are_counted() -> None:
    x = directions(30)
    before, after = x[:, :20], torch.cat([x[:, 3:20] @ rotation(17), x[:, 20:25]], 1)  # 3 die, 5 are born
    match = match_features(before, after)
    assert (match.before[:17] >= 0).all()
    assert (match.before[17:] == -1).all()
    assert match.ended.tolist() == [0, 1, 2]
    assert match.overlap == pytest.approx(17 / 22, abs=1e-9)


def test_births_at_random_directions_are_no_rotation() -> None:
    match = match_features(directions(60, seed=1), directions(60, seed=2))
    assert (match.before == -1).all()
    assert len(match.ended) == 60
    assert (match.parents == -1).all()
    assert (match.merged_into == -1).all()
    assert match.overlap < 0.1


def test_few_samples_show_no_rotations() -> None:
    # In 40 dimensions two random subspaces of 30 have directions in common.
    match = match_features(directions(30, seed=1, samples=40), directions(30, seed=2, samples=40))
    assert not match.rotated.any()


@pytest.mark.parametrize("share", [0.5 + 1e-9, 0.6, 0.74])
def test_splits_and_merges(share: float) -> None:
    x = directions(3)
    a, b = share**0.5, (1 - share) ** 0.5
    one = x[:, [0, 1]]
    two = torch.stack([a * x[:, 0] + b * x[:, 2], x[:, 1], b * x[:, 0] - a * x[:, 2]], 1)
    split = match_features(one, two)
    assert split.before.tolist() == [0, 1, -1]
    assert split.parents.tolist() == [-1, -1, 0]
    merge = match_features(two, one)
    assert merge.before.tolist() == [0, 1]
    assert merge.merged_into.tolist() == [-1, -1, 0]
    assert merge.ended.tolist() == [2]


def test_small_similarity_is_no_split() -> None:
    x = directions(2)
    a, b = 0.78**0.5, 0.22**0.5
    match = match_features(x[:, :1], torch.stack([a * x[:, 0] + b * x[:, 1], b * x[:, 0] - a * x[:, 1]], 1))
    assert match.before.tolist() == [0, -1]
    assert match.parents.tolist() == [-1, -1]


def test_neurons_are_matched_by_index() -> None:
    x = directions(4)
    match = match_features(x, x[:, [1, 0, 2, 3]], in_order=True)
    assert match.before.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(match.similarity, torch.tensor([0, 0, 1, 1]).double(), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="must be equally many"):
        match_features(x, x[:, :3], in_order=True)


def test_constant_features_match_nothing() -> None:
    x = directions(2)
    x[:, 1] = 7
    match = match_features(x, x)
    assert match.before.tolist() == [0, -1]
    assert match.ended.tolist() == [1]


def test_no_features() -> None:
    x = directions(2)
    assert match_features(x[:, :0], x).before.tolist() == [-1, -1]
    assert match_features(x, x[:, :0]).ended.tolist() == [0, 1]
    assert match_features(x[:, :0], x[:, :0]).overlap == 1


def test_other_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1000 and 999"):
        match_features(directions(2), directions(2)[1:])


def test_half_precision_is_enough() -> None:
    x = directions(40)
    y = x.clone()
    y[:, :20] = x[:, :20] @ rotation(20)
    exact, rounded = match_features(x, y), match_features((x * N**0.5).half(), (y * N**0.5).half())
    assert exact.before.tolist() == rounded.before.tolist()
    # Half precision keeps three digits of each value; their errors average out.
    torch.testing.assert_close(exact.similarity, rounded.similarity, rtol=0, atol=1e-4)
    assert rounded.overlap == pytest.approx(exact.overlap, abs=1e-4)


def test_overlap_is_that_of_principal_angles() -> None:
    from scipy.linalg import subspace_angles

    a, b = directions(7, seed=3) @ rotation(7), directions(5, seed=4) + directions(7, seed=3)[:, :5]
    cosines = torch.from_numpy(subspace_angles(a.numpy(), b.numpy())).cos()
    assert span_overlap(a, b) == pytest.approx(float(cosines.square().sum()) / 7, abs=1e-9)
