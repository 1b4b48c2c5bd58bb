"""The number of features that a model needs for its score, by node ablation, with standard errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lib_lightning.ablation.interventions import merge_masked
from lib_lightning.ablation.model_part import ModelPart
from lib_lightning.ablation.scored_model import Score, sample_scores
from lib_lightning.ablation.search import ScoreCache, bisect, scan
from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.dictionary_basis import DictionaryBasis
from lib_lightning.model.instrumented import InstrumentedModel

# Memory for the operations after a node layer while they are recorded.
_MAX_BYTES = 2**32


class NodeAblations:
    """A model with only some features of a node layer: `lib_lightning.ablation.node_ablation_curve` with errors.

    What is before the node layer runs once for all bases.

    Args:
        instrumented: The model. Use this within its session.
        batches: Batches to score on.
        score: As for `lib_lightning.ablation.node_ablation_curve`.
        keep: Whether the operations after a node layer are kept for the next call, with their outputs; otherwise the
            whole model runs each time.

    Attributes:
        unablated: Mean score without ablation.
    """

    def __init__(
        self, instrumented: InstrumentedModel, batches: Sequence[Any], score: Score, keep: bool = True
    ) -> None:
        self._instrumented, self._batches, self._score, self._keep = instrumented, batches, score, keep
        self._rest: dict[tuple[int, int], ModelPart] = {}
        self._captured, own = [], []
        with torch.no_grad():
            for batch in batches:
                captured = instrumented.capture(batch)
                self._captured.append([(layer.a.detach().clone(), layer.mask) for layer in captured])
                own.append(sample_scores(score, instrumented.run(batch), batch, instrumented.num_samples(batch)))
        self._own = torch.cat(own)
        self.unablated = float(self._own.mean())

    def changes(self, index: int, basis: Basis, is_kept: Tensor) -> Tensor:
        """Changes of the score of each sample, shape ``(n,)``, if all other features are at their means.

        Args:
            index: Index of the node layer.
            basis: Its basis. Of a dictionary, other latents are 0.
            is_kept: True for the features that are kept, shape ``(r,)``.
        """
        scores = []
        with torch.no_grad():
            for number, batch in enumerate(self._batches):
                a, mask = self._captured[number][index]
                if isinstance(basis, DictionaryBasis):
                    x = basis.coordinates(a) * basis.per_coordinate(is_kept.to(a))
                    new = basis.from_coordinates(x, a)
                else:
                    # Products of the kept columns alone, in the precision of the activations.
                    new = basis.mean.to(a) + (
                        (a - basis.mean.to(a)) @ basis.to_features[:, is_kept].to(a)
                    ) @ basis.from_features[is_kept].to(a)
                at = merge_masked(new, a, mask)
                if self._keep:
                    output = self._rest_of_model(index, number)(at)
                else:
                    output = self._instrumented.output(batch, {index: at})
                scores.append(sample_scores(self._score, output, batch, len(a)))
        return torch.cat(scores) - self._own

    def _rest_of_model(self, index: int, number: int) -> ModelPart:
        """The model after a node layer, at one batch."""
        if (index, number) not in self._rest:
            batch, (a, mask) = self._batches[number], self._captured[number][index]
            mean = merge_masked(a.mean((0, 1)).expand_as(a), a, mask)
            known = [(a, self._instrumented.run(batch))]

            def rest(x: Tensor) -> Any:
                return self._instrumented.output(batch, {index: x})

            self._rest[index, number] = ModelPart(self._instrumented, rest, mean, known, _MAX_BYTES)
        return self._rest[index, number]


def change(values: Tensor) -> dict[str, float]:
    """Mean and standard error of changes of a score, shape ``(n,)``."""
    n = len(values)
    return {"change": _short(values.mean()), "error": _short(values.std() / math.sqrt(n)) if n > 1 else math.nan}


def features_required(
    changes: Callable[[Tensor], Tensor],
    importance: Tensor,
    tolerance: float,
    search: str = "scan",
    always: Tensor | None = None,
) -> dict[str, Any]:
    """Find the smallest number of the most important features with which the score stays within a tolerance.

    Args:
        changes: From the features that are kept, ``(r,)``, to changes of the scores of all samples.
        importance: Importance of each feature, shape ``(r,)``.
        tolerance: Loss of the mean score that is accepted.
        search: As for `lib_lightning.ablation.edges_required`; a bisection starts with all features.
        always: Indices of features that are kept in any case and not counted.

    Returns:
        ``count``; None if all features do not suffice. ``low`` and ``high``, the counts if each mean were higher, or
        lower, by its standard error, among those tried. ``all``, the change of the score with all features, and
        ``curve``, changes by number of features.

    Example:
        >>> found = features_required(lambda kept: -torch.ones(4) * (~kept).sum(), torch.tensor([1.0, 3, 2]), 1.5)
        >>> found["count"], found["curve"]["1"]["change"]
        (2, -2.0)
    """
    kept_always = torch.zeros(len(importance), dtype=torch.bool)
    if always is not None:
        kept_always[always] = True
    order = importance.argsort(descending=True, stable=True)
    order = order[~kept_always[order]]
    found: dict[int, dict[str, float]] = {}

    def mean(count: int) -> float:
        is_kept = kept_always.clone()
        is_kept[order[:count]] = True
        found[count] = change(changes(is_kept))
        return found[count]["change"]

    cache = ScoreCache(mean, len(order), -tolerance)
    count = scan(cache) if search == "scan" else bisect(cache, len(order))
    cache(len(order))
    return {
        "count": count,
        "low": _sufficient(found, tolerance, 1.0),
        "high": _sufficient(found, tolerance, -1.0),
        "all": found[len(order)],
        "curve": {str(k): found[k] for k in sorted(found)},
    }


def _sufficient(found: Mapping[int, Mapping[str, float]], tolerance: float, errors: float) -> int | None:
    """The smallest number from which on all that were tried suffice, with scores raised by some standard errors."""
    answer = None
    for count in sorted(found, reverse=True):
        one = found[count]
        if one["change"] + errors * (0.0 if math.isnan(one["error"]) else one["error"]) < -tolerance:
            break
        answer = count
    return answer


def _short(value: Tensor) -> float:
    return float(f"{float(value):.4g}")
