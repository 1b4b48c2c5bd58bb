"""Which features of one snapshot are those of another: by what they do on the same samples, however weights rotate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

# The share of its variance that a feature has in common with the one it continues. Of uncorrelated features no other
# can then have as much in common with either.
SAME = 0.5
# The share that a new feature has in common with the one it has split from, or an ended one with where it went.
RELATED = 0.25
# The share from which on a feature has not turned.
_STILL = 0.95
# Samples for each dimension that may have turned: k directions drawn at random among N have others of their kind in
# common up to a squared cosine of 4 (k / N) (1 - k / N), 0.44 at eight.
_SAMPLES_PER_DIMENSION = 8


@dataclass(frozen=True)
class Match:
    """How the features of one snapshot, ``r`` of them, go over into those of another, ``q``.

    Attributes:
        before: For each later feature the earlier one that it continues, -1 for none, shape ``(q,)``, int64.
        similarity: Its correlation with that one, absolute value, shape ``(q,)``, float64; NaN for none.
        rotated: Whether it continues it only as part of a subspace that is the same, within which features have
            turned, shape ``(q,)``.
        parents: For each later feature that continues none, the earlier one that it has split from, -1 for none, shape
            ``(q,)``, int64.
        heirs: For each earlier feature that ends, the later one that it has merged into, -1 for none, shape ``(r,)``,
            int64.
        overlap: Mean squared cosine of the principal angles between the spans of both; 1 if they are equal. The smaller
            span counts as if it had right angles for what it lacks.
    """

    before: Tensor
    similarity: Tensor
    rotated: Tensor
    parents: Tensor
    heirs: Tensor
    overlap: float

    @property
    def ended(self) -> Tensor:
        """Indices of the earlier features that end, int64."""
        ends = torch.ones(len(self.heirs), dtype=torch.bool)
        ends[self.before[self.before >= 0]] = False
        return ends.nonzero().flatten()


def match_features(before: Tensor, after: Tensor, in_order: bool = False) -> Match:
    """Match features by the correlation of their values on the same samples.

    Three questions are asked in turn. Which features share at least half of their variance (a Hungarian assignment)?
    Do some of the others span the same directions, so that features have merely turned among themselves? What of the
    rest has split from, or merged into, another?

    Args:
        before: Values of the earlier features, shape ``(N, r)``, any floating-point type.
        after: Values of the later features on the same samples in the same order, shape ``(N, q)``.
        in_order: Whether features are what they are by their number, such as single neurons; then ``q = r``.

    Returns:
        The match. What is too small to be told from its mean correlates with nothing.

    Raises:
        ValueError: If the samples, or with ``in_order`` the features, are not equally many.

    Example:
        >>> values = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        >>> match_features(values, -values[:, [2, 0]]).before
        tensor([2, 0])
    """
    if len(before) != len(after):
        raise ValueError(f"Features are matched on the same samples; got {len(before)} and {len(after)} of them.")
    A, B = standardised(before), standardised(after)
    shared = (A.T @ B).square()
    r, q = shared.shape
    if in_order:
        if r != q:
            raise ValueError(f"Features that are what their number says are equally many; got {r} and {q}.")
        pairs = torch.arange(q).repeat(2, 1)
        turned = pairs[:, :0]
    else:
        pairs = _same(shared)
        turned = _turned(A, B, shared, pairs)
    found = torch.cat([pairs, turned], dim=1)
    origin = torch.full((q,), -1).index_put((found[1],), found[0])
    similarity = shared.new_full((q,), torch.nan).index_put((found[1],), shared[found[0], found[1]].sqrt())
    rotated = torch.zeros(q, dtype=torch.bool).index_fill(0, turned[1], True)
    parents = torch.where(origin < 0, _most_alike(shared.T), -1)
    goes_on = torch.zeros(r, dtype=torch.bool).index_fill(0, found[0], True)
    heirs = torch.where(goes_on, -1, _most_alike(shared))
    return Match(origin, similarity, rotated, parents, heirs, span_overlap(A, B))


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
    """Compare the spans of two sets of vectors by their principal angles.

    Args:
        A: Vectors in columns, shape ``(N, r)``.
        B: Vectors in columns, shape ``(N, q)``.

    Returns:
        Mean squared cosine of the angles, over as many as the larger span has dimensions; 1 for two empty spans.

    Example:
        >>> x, y, z = torch.eye(3, dtype=torch.float64)
        >>> span_overlap(torch.stack([x, y], 1), torch.stack([x + y, x - y], 1))
        1.0
        >>> round(span_overlap(torch.stack([x, y], 1), torch.stack([x, z], 1)), 6)
        0.5
    """
    U, V = _orthonormal(A), _orthonormal(B)
    larger = max(U.shape[1], V.shape[1])
    return round(float((U.T @ V).square().sum()) / larger, 12) if larger else 1.0


def _same(shared: Tensor) -> Tensor:
    # Features with half their variance in common come first; a sum of shares alone might tear such a pair apart for the
    # sake of two lesser ones.
    same = shared >= SAME
    if (same.sum(0) <= 1).all() and (same.sum(1) <= 1).all():
        return same.nonzero().T  # nobody competes, so the assignment below would have all of these
    rows, columns = linear_sum_assignment((shared + min(shared.shape) * same).numpy(), maximize=True)
    pairs = torch.tensor([rows.tolist(), columns.tolist()], dtype=torch.int64)
    return pairs[:, same[pairs[0], pairs[1]]]


def _turned(A: Tensor, B: Tensor, shared: Tensor, pairs: Tensor) -> Tensor:
    """Pair those of the others that have turned among themselves: as many as dimensions are in both spans."""
    i, j = (_others(size, some) for size, some in zip(shared.shape, pairs, strict=True))
    # What does not vary has no direction.
    i, j = i[A[:, i].any(0)], j[B[:, j].any(0)]
    # Features that have kept their lineage may have turned with them: their dimensions are shared out together.
    kept = pairs[:, shared[pairs[0], pairs[1]] < _STILL]
    before, after = torch.cat([i, kept[0]]), torch.cat([j, kept[1]])
    if not len(i) or not len(j) or len(A) < _SAMPLES_PER_DIMENSION * max(len(before), len(after)):
        return pairs[:, :0]
    cosines = torch.linalg.svdvals(_orthonormal(A[:, before]).T @ _orthonormal(B[:, after]))
    count = int((cosines.square() >= SAME).sum()) - kept.shape[1]
    if count <= 0:
        return pairs[:, :0]
    rows, columns = linear_sum_assignment(shared[i][:, j].numpy(), maximize=True)
    turned = torch.stack([i[torch.from_numpy(rows)], j[torch.from_numpy(columns)]])
    best = shared[turned[0], turned[1]].argsort(descending=True, stable=True)
    return turned[:, best[: max(count, 0)]]


def _others(size: int, some: Tensor) -> Tensor:
    return torch.ones(size, dtype=torch.bool).index_fill(0, some, False).nonzero().flatten()


def _most_alike(shared: Tensor) -> Tensor:
    """For each row the column with most in common, -1 where that is too little."""
    if not shared.shape[1]:
        return torch.full((len(shared),), -1)
    most, where = shared.max(1)
    return torch.where(most >= RELATED, where, -1)


def _orthonormal(A: Tensor) -> Tensor:
    """Span the same, as far as half precision, in which values come, can tell directions from rounding."""
    least = torch.finfo(torch.float16).eps ** 2  # of squares: far above the rounding of the products
    tall = 0 < A.shape[1] <= len(A)
    products = A.T @ A if tall else A @ A.T
    if tall:
        L, failed = torch.linalg.cholesky_ex(products)
        if not failed:
            inverse = torch.linalg.solve_triangular(L, torch.eye(len(L)).to(L), upper=False)
            # Bounds of the smallest and the largest eigenvalue: if these say that nothing is rounding, nothing is.
            if 1 / inverse.square().sum() > least * products.abs().sum(0).max():
                basis: Tensor = A @ inverse.T
                return basis
    squares, vectors = torch.linalg.eigh(products)
    there = squares > least * squares[-1:].clamp_min(0)
    vectors = vectors[:, there]
    found: Tensor = (A @ vectors) / squares[there].sqrt() if tall else vectors
    return found
