"""Which features of a node layer are in another network, and which are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lib_lightning.comparison.chance import permuted_p_values, permuted_rows, rotated_p_values, strongest, total
from lib_lightning.comparison.paired_values import PairedValues
from lib_lightning.interventions.significance import benjamini_hochberg
from lib_lightning.lineage.matching import SAME, match_features, orthonormal, span_overlap, standardised

SHARED, ROTATED, SPLIT, MERGED, NEW, LOST = "shared", "rotated", "split", "merged", "new", "lost"
KINDS = (SHARED, SPLIT, MERGED, ROTATED, LOST, NEW)
# Kind of a feature that does not vary.
CONSTANT = "constant"
# Kinds of features that have a counterpart.
MATCHED = (SHARED, SPLIT, MERGED)
# Permutations for every test, and how many times as many as are needed to find a match at all.
_PERMUTATIONS, _MARGIN = 199, 2
# Share of the importance of a node layer up to which a feature is rounding.
_ROUNDING = 1e-12
# Permutations for the overlap of subspaces.
_PERMUTATIONS_OF_SPANS = 99


@dataclass(frozen=True)
class FeatureMatch:
    """A feature of one network and its counterpart in another.

    Attributes:
        a: Id of the feature of the first network.
        b: Id of the feature of the second one.
        kind: ``"shared"``: the same feature; ``"split"``: ``b`` is one of several features that ``a`` has become;
            ``"merged"``: ``a`` is one of several that have become ``b``.
        similarity: Absolute correlation of their values, from 0 to 1.
        p_value: How probable it is that chance makes features as similar.
    """

    a: str
    b: str
    kind: str
    similarity: float
    p_value: float


@dataclass(frozen=True)
class SideOfLayer:
    """The features of one of the networks at a node layer.

    Attributes:
        layer: Name of the node layer.
        ids: Ids of its ``r`` features.
        kinds: What each is: ``"shared"``, ``"split"`` or ``"merged"``, as of the `FeatureMatch` that it is in;
            ``"rotated"`` if it belongs to a subspace that both networks have, in which their features differ; else
            ``"lost"`` in the first network, ``"new"`` in the second one; ``"constant"`` if it does not vary.
        partners: Index of its counterpart in the other network, -1 for none, shape ``(r,)``, int64.
        similarity: Absolute correlation with the counterpart; without one, with the most similar feature, shape
            ``(r,)``, float64.
        p_values: How probable it is that chance makes features as similar, or as much of a rotated one explained; 1 for
            features that are too little similar for a match, shape ``(r,)``, float64.
        explained: Share of each feature's variance that all features of the other network explain together, shape
            ``(r,)``, float64.
        importance: Share of each feature in the importance of the node layer, shape ``(r,)``, float64.
    """

    layer: str
    ids: list[str]
    kinds: list[str]
    partners: Tensor
    similarity: Tensor
    p_values: Tensor
    explained: Tensor
    importance: Tensor

    @property
    def shared_importance(self) -> float:
        """Share of the importance in features that the other network shares."""
        return float(self.importance[[kind == SHARED for kind in self.kinds]].sum())

    @property
    def explained_importance(self) -> float:
        """Share of the importance that all features of the other network explain together, linearly."""
        return float((self.importance * self.explained).sum())


@dataclass(frozen=True)
class LayerComparison:
    """The features of a node layer in two networks.

    Attributes:
        a: Those of the first network.
        b: Those of the second one.
        overlap: Mean squared cosine of the principal angles between the spans of both, the mean squared canonical
            correlation (Hotelling 1936): 1 for the same subspace. Missing dimensions of the smaller one count as 0.
        overlap_p_value: How probable it is that chance makes them overlap as much.
        num_values: Number of values of each feature that this was found with.
    """

    a: SideOfLayer
    b: SideOfLayer
    overlap: float
    overlap_p_value: float
    num_values: int

    @property
    def matches(self) -> list[FeatureMatch]:
        """All matches, the most similar ones of each kind first."""
        found = [
            FeatureMatch(self.a.ids[i], self.b.ids[j], kind, similarity, p)
            for j, (i, kind, similarity, p) in enumerate(_rows(self.b))
            if kind in (SHARED, SPLIT)
        ] + [
            FeatureMatch(self.a.ids[i], self.b.ids[j], kind, similarity, p)
            for i, (j, kind, similarity, p) in enumerate(_rows(self.a))
            if kind == MERGED
        ]
        return sorted(found, key=lambda match: (KINDS.index(match.kind), -match.similarity))


def _rows(side: SideOfLayer) -> list[tuple[int, str, float, float]]:
    return list(zip(side.partners.tolist(), side.kinds, side.similarity.tolist(), side.p_values.tolist(), strict=True))


@dataclass(frozen=True)
class Names:
    """What a comparison of a node layer says of the features of one network.

    Attributes:
        layer: Name of the node layer.
        ids: Ids of the features.
        importance: Their importance, shape ``(r,)``.
    """

    layer: str
    ids: list[str]
    importance: Tensor


@dataclass
class _Side:
    """The features of one network while they are compared, with standardised values and a basis of their span."""

    names: Names
    values: Tensor
    span: Tensor
    explained: Tensor
    kinds: list[str]
    partners: Tensor
    similarity: Tensor
    p_values: Tensor
    rotated_p_values: Tensor

    def of_kinds(self, *kinds: str) -> Tensor:
        return torch.tensor([k for k, kind in enumerate(self.kinds) if kind in kinds], dtype=torch.int64, device="cpu")

    @property
    def own(self) -> Tensor:
        """Features that are in no pair."""
        return self.of_kinds(SPLIT, MERGED, LOST, NEW)


def compare_layers(
    values: Sequence[PairedValues], names: Sequence[tuple[Names, Names]], level: float, seed: int = 0
) -> list[LayerComparison]:
    """Match the features of node layers of two networks.

    Features are matched as lineages are (`lib_lightning.lineage.match_features`). For each match, samples are permuted
    within one network, and its subspace gets a random basis: the p-value is the larger one of both. Matches are kept
    that are significant with a false discovery rate over all features of all node layers. What remains of a subspace
    that both networks have are rotated features, by another test with samples permuted; all others are lost or new.

    Args:
        values: The values of the features, for each node layer.
        names: Ids and importances of the features of both networks.
        level: The false discovery rate.
        seed: Seed of permutations.

    Returns:
        The comparison of each node layer.
    """
    generator = np.random.default_rng(seed)
    found = _significant(values, names, level, generator)
    blocks = [value.block for value in values]
    tests = [_test_of_subspace(*sides, block) for sides, block in zip(found, blocks, strict=True)]
    _set_p_values(tests, sum(len(b.kinds) for _, b in found), level, generator)
    for a, b in found:
        rotated = b.of_kinds(ROTATED)
        a.rotated_p_values[b.partners[rotated]] = b.rotated_p_values[rotated]
    largest = _largest_significant([b.rotated_p_values for _, b in found], level)
    return [_result(value, *sides, largest, generator) for value, sides in zip(values, found, strict=True)]


@dataclass(frozen=True)
class SharedPair:
    """A pair of features of two networks that are the same feature, one to one.

    Attributes:
        a: Index of the feature of the first network.
        b: Index of the feature of the second one.
        similarity: Absolute correlation of their values.
        p_value: How probable it is that chance makes features as similar.
    """

    a: int
    b: int
    similarity: float
    p_value: float


def shared_pairs(
    values: Sequence[PairedValues], names: Sequence[tuple[Names, Names]], level: float, seed: int = 0
) -> list[list[SharedPair]]:
    """Find the shared features of many pairs of networks and node layers at once, by the rules of `compare_layers`.

    Args:
        values: The values of the features, for each pair of a node layer. The values of a network that is in several
            pairs should be one tensor, and its `Names` one object: they are then prepared once.
        names: Ids and importances of the features of both networks.
        level: The false discovery rate, over all features of all of them.
        seed: Seed of permutations.

    Returns:
        For each, its pairs of shared features.
    """
    found = _significant(values, names, level, np.random.default_rng(seed))
    return [
        [
            SharedPair(int(b.partners[j]), j, float(b.similarity[j]), float(b.p_values[j]))
            for j in b.of_kinds(SHARED).tolist()
        ]
        for _, b in found
    ]


def _significant(
    values: Sequence[PairedValues],
    names: Sequence[tuple[Names, Names]],
    level: float,
    generator: np.random.Generator,
) -> list[tuple[_Side, _Side]]:
    """Match features, and leave out what may be chance."""
    prepared: dict[tuple[int, int], _Prepared] = {}

    def prepare(x: Tensor, own: Names) -> _Prepared:
        key = id(x), id(own)
        if key not in prepared:
            prepared[key] = _prepare(x, own)
        return prepared[key]

    found = [_candidates(prepare(value.a, a), prepare(value.b, b)) for value, (a, b) in zip(values, names, strict=True)]
    blocks = [value.block for value in values]
    tests = [test for sides, block in zip(found, blocks, strict=True) for test in _tests_of_features(*sides, block)]
    _set_p_values(tests, sum(len(side.kinds) for sides in found for side in sides), level, generator)
    for a, b in found:
        shared = b.of_kinds(SHARED)
        a.p_values[b.partners[shared]] = b.p_values[shared]
    largest = _largest_significant([p for a, b in found for p in (a.p_values[a.own], b.p_values)], level)
    for a, b in found:
        _keep_significant(a, b, largest)
    return found


def _largest_significant(p_values: Sequence[Tensor], level: float) -> float:
    """The largest p-value that is significant at a false discovery rate, -1 if none is."""
    all_values = torch.cat([torch.ones(0, dtype=torch.float64, device="cpu"), *p_values])
    rejected = all_values[benjamini_hochberg(all_values, level)]
    return float(rejected.max()) if len(rejected) else -1.0


@dataclass(frozen=True)
class _Prepared:
    """The features of one network, with standardised values and an orthonormal basis of their span."""

    names: Names
    values: Tensor
    span: Tensor


def _prepare(values: Tensor, names: Names) -> _Prepared:
    standard = standardised(values) * _varies(names)
    return _Prepared(names, standard, orthonormal(standard))


def _candidates(first: _Prepared, second: _Prepared) -> tuple[_Side, _Side]:
    """Match features, as if no similarity were chance."""
    (a, A, U), (b, B, V) = ((one.names, one.values, one.span) for one in (first, second))
    match = match_features(A, B)
    before, q = match.before, len(match.before)
    paired = (before >= 0).nonzero().flatten()
    partners = match.merged_into.clone()
    partners[before[paired]] = paired
    kinds_b = [
        (ROTATED if match.rotated[j] else SHARED) if before[j] >= 0 else SPLIT if match.parents[j] >= 0 else NEW
        for j in range(q)
    ]
    kinds_a = [MERGED if into >= 0 else LOST for into in match.merged_into.tolist()]
    for j in paired.tolist():
        kinds_a[int(before[j])] = kinds_b[j]
    sides = []
    both = (a, A, U, B, V, kinds_a, partners), (b, B, V, A, U, kinds_b, torch.where(before >= 0, before, match.parents))
    for names, own, span, others, other_span, kinds, found in both:
        # A network may have no features at all, and a feature no partner: then the most similar feature counts.
        products = torch.cat([(own.T @ others).abs(), own.new_zeros(own.shape[1], 1)], dim=1)
        most_similar = torch.where(found >= 0, found, products.argmax(1))
        kinds = [kind if varies else CONSTANT for kind, varies in zip(kinds, own.any(0).tolist(), strict=True)]
        similarity = products.gather(1, most_similar.unsqueeze(1)).squeeze(1).clamp(max=1)
        explained = (other_span.T @ own).square().sum(0).clamp(max=1)
        p_values = torch.ones_like(similarity)
        sides.append(_Side(names, own, span, explained, kinds, found, similarity, p_values, p_values.clone()))
    return sides[0], sides[1]


def _varies(names: Names) -> Tensor:
    """Whether each feature varies beyond rounding, as dead neurons do not."""
    return names.importance > _ROUNDING * names.importance.sum()


@dataclass(frozen=True)
class _Test:
    """A permutation test of some features of one network."""

    p_values: Tensor
    indices: Tensor
    lowest: Tensor
    others: Tensor
    features: Tensor
    observed: Tensor
    statistic: Callable[[Tensor], Tensor]
    block: int | None

    def run(self, which: Tensor, count: int, generator: np.random.Generator) -> Tensor:
        """Permute samples, set the p-values of some of the features, and return those without the lower bound."""
        by_samples = permuted_p_values(
            self.others, self.features[:, which], self.observed[which], self.statistic, self.block, count, generator
        )
        self.p_values[self.indices[which]] = torch.maximum(by_samples, self.lowest[which])
        return by_samples


def _set_p_values(tests: Sequence[_Test], hypotheses: int, level: float, generator: np.random.Generator) -> None:
    """Run permutation tests: some permutations for all features, and as many more as needed for what these leave.

    A p-value of few permutations cannot be small enough to be significant among many hypotheses. Features that no
    permutation reaches are tested once more, with so many that they are significant if they remain so.
    """
    left = []
    for test in tests:
        test.p_values[test.indices] = test.lowest
        hopeful = (test.lowest <= level).nonzero().flatten()
        by_samples = test.run(hopeful, _PERMUTATIONS, generator)
        left.append(hopeful[by_samples * (1 + _PERMUTATIONS) < 1.5])
    # What would not be significant even if permutations never reached it need not be permuted further.
    best = [test.p_values[test.indices] for test in tests]
    for p_values, test, which in zip(best, tests, left, strict=True):
        p_values[which] = test.lowest[which]
    largest = _largest_significant(best, level)
    left = [which[test.lowest[which] <= largest] for test, which in zip(tests, left, strict=True)]
    count = round(_MARGIN * hypotheses / (level * max(1, sum(map(len, left)))))
    if count > _PERMUTATIONS and any(map(len, left)):
        for test, which in zip(tests, left, strict=True):
            test.run(which, count, generator)


def _tests_of_features(a: _Side, b: _Side, block: int | None) -> list[_Test]:
    """Tests of single features. A pair is tested from the second network's side."""
    tests = []
    for side, other, kinds in ((b, a, (SHARED, SPLIT)), (a, b, (MERGED,))):
        tested = side.of_kinds(*kinds)
        lowest = _by_rotation(side, other, tested)
        features, observed = side.values[:, tested], side.similarity[tested]
        tests.append(_Test(side.p_values, tested, lowest, other.values, features, observed, strongest, block))
    return tests


def _test_of_subspace(a: _Side, b: _Side, block: int | None) -> _Test:
    """Test of the subspace that candidates for rotated features belong to."""
    rotated = b.of_kinds(ROTATED)
    lowest = torch.zeros(len(rotated), dtype=torch.float64, device="cpu")
    features, observed = b.values[:, rotated], b.explained[rotated]
    return _Test(b.rotated_p_values, rotated, lowest, a.span, features, observed, total, block)


def _by_rotation(side: _Side, other: _Side, tested: Tensor) -> Tensor:
    # The larger of the two spans gets a random basis.
    larger, explained = other, side.explained[tested]
    if side.span.shape[1] > other.span.shape[1]:
        larger, explained = side, other.explained[side.partners[tested]]
    squared = side.similarity[tested].square()
    return rotated_p_values(squared, explained, larger.values.shape[1], larger.span.shape[1])


def _keep_significant(a: _Side, b: _Side, largest: float) -> None:
    """Leave out candidates that may be chance; of these, pairs may still be members of the same subspace."""
    for side, otherwise in ((b, NEW), (a, LOST)):
        for k, p in enumerate(side.p_values.tolist()):
            if side.kinds[k] in (SPLIT, MERGED) and p > largest:
                side.kinds[k] = otherwise
    for j in b.of_kinds(SHARED)[b.p_values[b.of_kinds(SHARED)] > largest].tolist():
        i = int(b.partners[j])
        spanned = min(float(a.explained[i]), float(b.explained[j])) >= SAME
        a.kinds[i], b.kinds[j] = (ROTATED, ROTATED) if spanned else (LOST, NEW)


def _result(
    values: PairedValues, a: _Side, b: _Side, largest: float, generator: np.random.Generator
) -> LayerComparison:
    overlap = span_overlap(a.values, b.values)
    dimension = max(a.span.shape[1], b.span.shape[1])
    U, V = a.span.T.float(), b.span.float()
    by_chance = [
        float((U @ V[rows]).square().sum()) / max(1, dimension)
        for rows in permuted_rows(len(values.a), values.block, _PERMUTATIONS_OF_SPANS, generator)
    ]
    reached = sum(chance >= overlap * (1 - 1e-5) for chance in by_chance)
    p_value = (1 + reached) / (1 + len(by_chance))
    sides = [_of_layer(side, largest, otherwise) for side, otherwise in ((a, LOST), (b, NEW))]
    return LayerComparison(sides[0], sides[1], overlap, p_value, len(values.a))


def _of_layer(side: _Side, largest: float, otherwise: str) -> SideOfLayer:
    is_rotated = torch.tensor([kind == ROTATED for kind in side.kinds], dtype=torch.bool, device="cpu")
    kinds = [
        otherwise if kind == ROTATED and p > largest else kind
        for kind, p in zip(side.kinds, side.rotated_p_values.tolist(), strict=True)
    ]
    matched = torch.tensor([kind in MATCHED for kind in kinds], dtype=torch.bool, device="cpu")
    names = side.names
    return SideOfLayer(
        names.layer,
        names.ids,
        kinds,
        torch.where(matched, side.partners, -1),
        side.similarity,
        torch.where(is_rotated, side.rotated_p_values, side.p_values),
        side.explained,
        names.importance / names.importance.sum().clamp_min(torch.finfo(torch.float64).tiny),
    )
