"""Matches the features of two snapshots by their values on the same samples, which no reparametrization changes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lib_lightning._deprecated import renamed_fields
from lib_lightning.errors import SettingError

# Smallest squared correlation of a feature with the one it continues. If features within a snapshot are uncorrelated,
# no other feature can then correlate as strongly with either.
SAME = 0.5
# Smallest squared correlation of a new feature with the one it has split from, and of an ended one with the one it has
# merged into.
RELATED = 0.25
# Squared correlation from which a feature has not rotated.
_NOT_ROTATED = 0.95
# Samples that are needed for each dimension of a rotated subspace. Two random subspaces of k among N dimensions have
# squared cosines of up to 4 (k / N) (1 - k / N): 0.44, below SAME, with N = 8 k.
_SAMPLES_PER_DIMENSION = 8


@renamed_fields(heirs="merged_into")
@dataclass(frozen=True)
class Match:
    """The correspondence between the ``r`` features of one snapshot and the ``q`` features of a later one.

    Attributes:
        before: For each later feature the earlier one that it continues, -1 for none, shape ``(q,)``, int64.
        similarity: Absolute correlation of the two, shape ``(q,)``, float64; NaN for none.
        rotated: Whether the feature continues the other one only as a member of an unchanged subspace within which
            features have rotated, shape ``(q,)``, bool.
        parents: For each later feature that continues none, the earlier one that it has split from, -1 for none, shape
            ``(q,)``, int64.
        merged_into: For each earlier feature that ends, the later one that it has merged into, -1 for none, shape
            ``(r,)``, int64.
        overlap: Mean squared cosine of the principal angles between the spans of the two sets; 1 if they are equal.
            Missing dimensions of the smaller span count as right angles.
        reversed: Whether the correlation of a later feature with the one that it continues, or has split from, is
            negative, shape ``(q,)``, bool.
    """

    before: Tensor
    similarity: Tensor
    rotated: Tensor
    parents: Tensor
    merged_into: Tensor
    overlap: float
    reversed: Tensor

    @property
    def ended(self) -> Tensor:
        """Indices of the earlier features that end, int64."""
        ends = torch.ones(len(self.merged_into), dtype=torch.bool, device="cpu")
        ends[self.before[self.before >= 0]] = False
        return ends.nonzero().flatten()


def match_by_number(before: Tensor, after: Tensor, numbers_before: Tensor, numbers_after: Tensor) -> Match:
    """Match features that have numbers, such as latents of a dictionary: those with the same number continue.

    Args:
        before: Values of the earlier features, shape ``(N, r)``, any floating-point type.
        after: Values of the later features on the same samples in the same order, shape ``(N, q)``.
        numbers_before: Number of each earlier feature, shape ``(r,)``, int64, each at most once.
        numbers_after: Number of each later feature, shape ``(q,)``, int64.

    Returns:
        The match, without splits and merges. Its overlap is the mean squared correlation of features with the same
        number; those whose number is in one of the two snapshots count as 0.

    Example:
        >>> values = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        >>> match_by_number(values, values[:, 1:], torch.tensor([2, 5, 8]), torch.tensor([5, 8])).before
        tensor([1, 2])
    """
    same = numbers_after[:, None] == numbers_before
    origin = torch.where(same.any(1), same.to(torch.uint8).argmax(1), -1)
    known = origin >= 0
    A, B = standardised(before)[:, origin[known]], standardised(after)[:, known]
    similarity = A.new_full((len(origin),), torch.nan)
    similarity[known] = (A * B).sum(0).abs()
    none = torch.full_like(origin, -1)
    overlap = float(similarity[known].square().sum()) / max(1, len(numbers_before), len(numbers_after))
    is_new = torch.zeros_like(known)
    return Match(origin, similarity, is_new, none, torch.full_like(numbers_before, -1), overlap, is_new.clone())


def match_features(before: Tensor, after: Tensor, in_order: bool = False) -> Match:
    """Match features by the correlation of their values on the same samples.

    In three steps: features with a squared correlation of at least one half are matched, by a Hungarian assignment. The
    remaining features are matched if they span the same subspace, in which features have then only rotated. Each
    feature that is left is checked for a split from, or a merge into, another one.

    Args:
        before: Values of the earlier features, shape ``(N, r)``, any floating-point type.
        after: Values of the later features on the same samples in the same order, shape ``(N, q)``.
        in_order: Whether features are identified by their index, as single neurons are; then ``q = r``.

    Returns:
        The match. Features that do not vary beyond rounding correlate with none.

    Raises:
        SettingError: If the numbers of samples, or with ``in_order`` those of features, differ.

    Example:
        >>> values = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        >>> match_features(values, -values[:, [2, 0]]).before
        tensor([2, 0])
    """
    if len(before) != len(after):
        raise SettingError(f"Features must be matched on the same samples; got {len(before)} and {len(after)} of them.")
    A, B = standardised(before), standardised(after)
    correlation = A.T @ B
    shared = correlation.square()
    r, q = shared.shape
    if in_order:
        if r != q:
            raise SettingError(f"Features that are identified by their index must be equally many; got {r} and {q}.")
        pairs = torch.arange(q, device="cpu").repeat(2, 1)
        rotated_pairs = pairs[:, :0]
    else:
        pairs = _same(shared)
        rotated_pairs = _rotated(A, B, shared, pairs)
    found = torch.cat([pairs, rotated_pairs], dim=1)
    origin = torch.full((q,), -1, device="cpu").index_put((found[1],), found[0])
    similarity = shared.new_full((q,), torch.nan).index_put((found[1],), shared[found[0], found[1]].sqrt())
    rotated = torch.zeros(q, dtype=torch.bool, device="cpu").index_fill(0, rotated_pairs[1], True)
    parents = torch.where(origin < 0, _most_similar(shared.T), -1)
    continued = torch.zeros(r, dtype=torch.bool, device="cpu").index_fill(0, found[0], True)
    merged_into = torch.where(continued, -1, _most_similar(shared))
    # The last row stands for no feature, whose index is -1.
    signed = torch.cat([correlation, correlation.new_zeros(1, q)])
    reversed_ = signed.gather(0, torch.where(origin < 0, parents, origin).remainder(r + 1)[None])[0] < 0
    return Match(origin, similarity, rotated, parents, merged_into, span_overlap(A, B), reversed_)


def standardised(values: Tensor) -> Tensor:
    """Scale features to mean 0 and length 1 over samples.

    Args:
        values: Shape ``(N, r)``.

    Returns:
        The same in float64; 0 for features that do not vary.

    Example:
        >>> standardised(torch.tensor([[1.0, 5.0], [3.0, 5.0]]))
        tensor([[-0.7071,  0.0000],
                [ 0.7071,  0.0000]], dtype=torch.float64)
    """
    values = values.double()
    centred = values - values.mean(0)
    length = centred.norm(dim=0)
    rounding = torch.finfo(values.dtype).eps * values.norm(dim=0)
    return torch.where(length > 4 * rounding, centred / length, 0.0)


def span_overlap(A: Tensor, B: Tensor) -> float:
    """Overlap of the spans of two sets of vectors, from their principal angles.

    Args:
        A: Vectors in columns, shape ``(N, r)``.
        B: Vectors in columns, shape ``(N, q)``.

    Returns:
        Sum of the squared cosines of the angles, divided by the dimension of the larger span; 1 for two empty spans.

    Example:
        >>> x, y, z = torch.eye(3, dtype=torch.float64)
        >>> span_overlap(torch.stack([x, y], 1), torch.stack([x + y, x - y], 1))
        1.0
        >>> round(span_overlap(torch.stack([x, y], 1), torch.stack([x, z], 1)), 6)
        0.5
    """
    U, V = orthonormal(A), orthonormal(B)
    larger = max(U.shape[1], V.shape[1])
    return round(float((U.T @ V).square().sum()) / larger, 12) if larger else 1.0


def _same(shared: Tensor) -> Tensor:
    """As many index pairs with a squared correlation of at least SAME as possible, shape ``(2, k)``."""
    # The bonus for such pairs exceeds any sum of squared correlations: otherwise two weaker pairs could replace one.
    same = shared >= SAME
    if (same.sum(0) <= 1).all() and (same.sum(1) <= 1).all():
        return same.nonzero().T  # no two pairs compete, so the assignment below would contain all of them
    rows, columns = linear_sum_assignment((shared + min(shared.shape) * same).numpy(), maximize=True)
    pairs = torch.tensor([rows.tolist(), columns.tolist()], dtype=torch.int64, device="cpu")
    return pairs[:, same[pairs[0], pairs[1]]]


def _rotated(A: Tensor, B: Tensor, shared: Tensor, pairs: Tensor) -> Tensor:
    """Index pairs of features that have rotated within a subspace: as many as both spans have dimensions in common."""
    i, j = (_complement(size, some) for size, some in zip(shared.shape, pairs, strict=True))
    # Constant features have no direction.
    i, j = i[A[:, i].any(0)], j[B[:, j].any(0)]
    # Matched features that have rotated a little may belong to the same subspace.
    kept = pairs[:, shared[pairs[0], pairs[1]] < _NOT_ROTATED]
    before, after = torch.cat([i, kept[0]]), torch.cat([j, kept[1]])
    if not len(i) or not len(j) or len(A) < _SAMPLES_PER_DIMENSION * max(len(before), len(after)):
        return pairs[:, :0]
    cosines = torch.linalg.svdvals(orthonormal(A[:, before]).T @ orthonormal(B[:, after]))
    count = int((cosines.square() >= SAME).sum()) - kept.shape[1]
    if count <= 0:
        return pairs[:, :0]
    rows, columns = linear_sum_assignment(shared[i][:, j].numpy(), maximize=True)
    assigned = torch.stack([i[torch.from_numpy(rows)], j[torch.from_numpy(columns)]])
    most_similar = shared[assigned[0], assigned[1]].argsort(descending=True, stable=True)
    return assigned[:, most_similar[:count]]


def _complement(size: int, some: Tensor) -> Tensor:
    return torch.ones(size, dtype=torch.bool, device="cpu").index_fill(0, some, False).nonzero().flatten()


def _most_similar(shared: Tensor) -> Tensor:
    """For each row the column with the largest squared correlation, -1 if that is below RELATED."""
    if not shared.shape[1]:
        return torch.full((len(shared),), -1, device="cpu")
    largest, index = shared.max(1)
    return torch.where(largest >= RELATED, index, -1)


def orthonormal(A: Tensor) -> Tensor:
    """Orthonormal basis of the span, without directions that half precision, the precision of values, rounds away."""
    # Relative to squares: far above the rounding of the products in float64.
    rounding = torch.finfo(torch.float16).eps ** 2
    tall = 0 < A.shape[1] <= len(A)
    products = A.T @ A if tall else A @ A.T
    if tall:
        L, failed = torch.linalg.cholesky_ex(products)
        if not failed:
            inverse = torch.linalg.solve_triangular(L, torch.eye(len(L), dtype=L.dtype, device=L.device), upper=False)
            # Bounds of the smallest and the largest eigenvalue: if they suffice, all directions are above the rounding.
            if 1 / inverse.square().sum() > rounding * products.abs().sum(0).max():
                basis: Tensor = A @ inverse.T
                return basis
    squares, vectors = torch.linalg.eigh(products)
    significant = squares > rounding * squares[-1:].clamp_min(0)
    vectors = vectors[:, significant]
    spanned: Tensor = (A @ vectors) / squares[significant].sqrt() if tall else vectors
    return spanned
