"""Labels by examples: what the places have in common at which a feature is largest, and at which it is smallest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lib_lightning.errors import SettingError, check_number
from lib_lightning.features.renderers import ImageRenderer, Renderer, TableRenderer, TokenRenderer
from lib_lightning.interventions.significance import benjamini_hochberg
from lib_lightning.labels.auroc import areas
from lib_lightning.labels.candidates import MAX_VALUES, Kind, weights
from lib_lightning.labels.labeller import MAX_POSITIONS, FeatureSamples, Labels
from lib_lightning.labels.properties import Texts, properties

# A feature is active where it is above half of its largest value, but at the largest hundredth of the positions at
# least, and at the largest tenth at most.
_FEWEST_ACTIVE, _MOST_ACTIVE = 0.01, 0.1
# Positions that these quantiles are estimated on, and values that are compared at once.
_QUANTILE_POSITIONS, _AT_ONCE = 4096, 2**22
_SEED = 0


@dataclass(frozen=True)
class ExampleLabels:
    """Labels features by what the places have in common at which they are most active, without knowledge of the task.

    Features have two ends, and each of them may get a name: ``high: “the” “a”; low: class 3``. What is tried: the
    class of the sample, and its target; tokens at the position, before and after it, and anywhere in the sample; kinds
    of tokens, if their text is known; columns of a table; brightness, colours and place in an image; channels of a
    series; the position. Half of the samples choose the name; the other half decide whether it is given: its score is
    the area under its ROC curve (AUROC), the probability that it tells a place where the feature is active from one
    where it is not, 0.5 by chance. Of the names that are given, the share of those that are chance is at most `level`.

    A feature is active where it is above half of its largest value, but at the largest hundredth of all places at least
    and the largest tenth at most: so features that are rarely active are named by these places.

    Args:
        tokenizer: As for `lib_lightning.features.TokenRenderer`, to write tokens as text; None for their numbers.
        columns: Names of the columns of a table.
        classes: Names of the classes: a list, or a dict by number.
        renderer: Instead of `tokenizer` and `columns`, a renderer that has them; an ImageRenderer with a shape says
            which columns are which pixels.
        level: The false discovery rate among the names of a node layer.
        min_score: Names that predict worse are not given.
        max_positions: Positions to look at. With more samples than this, the first ones are taken; of longer samples,
            some positions of each.

    Raises:
        SettingError: If a number is outside its range.

    Example:
        >>> tokens = torch.randint(0, 5, (400, 6), generator=torch.Generator().manual_seed(0))
        >>> feature = (tokens == 3).float()[..., None] - 0.2
        >>> ExampleLabels(tokenizer=["a", "b", "c", "d", "e"])(feature, tokens)
        ['high: “d”; low: “a” “e” “c”']
    """

    tokenizer: Any = None
    columns: Sequence[str] | None = None
    classes: Sequence[str] | Mapping[int, str] | None = None
    renderer: Renderer | None = None
    level: float = 0.05
    min_score: float = 0.6
    max_positions: int = MAX_POSITIONS

    def __post_init__(self) -> None:
        check_number("level", self.level, lambda x: 0 < x < 1, "is a false discovery rate between 0 and 1")
        check_number("min_score", self.min_score, lambda x: 0.5 <= x <= 1, "is an AUROC from 0.5 to 1")
        check_number("max_positions", self.max_positions, lambda n: n >= 2, "is a number of at least 2", integer=True)
        if self.renderer is not None and (self.tokenizer is not None or self.columns is not None):
            raise SettingError("Of renderer=, and tokenizer= or columns=, only one can say how inputs are called.")
        if self.renderer is None and self.tokenizer is not None:
            object.__setattr__(self, "renderer", TokenRenderer(self.tokenizer))
        elif self.renderer is None and self.columns is not None:
            object.__setattr__(self, "renderer", TableRenderer(self.columns))

    def with_defaults(self, renderer: Renderer | None, classes: object) -> ExampleLabels:
        """The same labeller, with names from elsewhere where it has none of its own.

        Args:
            renderer: How samples look.
            classes: Names of the model's outputs, as far as they are a list or a dict by number.

        Returns:
            The labeller.
        """
        names = classes if isinstance(classes, (list, tuple, Mapping)) else None
        return replace(
            self,
            tokenizer=None,
            columns=None,
            renderer=renderer if self.renderer is None else self.renderer,
            classes=names if self.classes is None else self.classes,
        )

    def __call__(self, features: Tensor, inputs: Tensor, /) -> list[str]:
        """Label the features of one node layer by the model's inputs alone, as any `Labeller`."""
        return self.label(FeatureSamples.of(features, inputs)).names

    def label(self, samples: FeatureSamples) -> Labels:
        """Label the features of one node layer, with scores.

        Args:
            samples: The features and what is known of the samples.

        Returns:
            For each feature its label, "" for none, and its score: the AUROC of the end that comes first in the label,
            which is the one that its name predicts better on the samples that have chosen it.
        """
        n, _, r = samples.features.shape
        order = torch.randperm(n, generator=torch.Generator().manual_seed(_SEED), device="cpu")
        halves = order[: n // 2].sort().values, order[n // 2 :].sort().values
        if n < 4 or not r:
            return Labels([""] * r, torch.full((r,), math.nan, dtype=torch.float32, device="cpu"))
        kinds = properties(samples, self._texts(samples))
        step = max(1, _AT_ONCE // samples.features[:, :, 0].numel() // 2)
        parts = [_ends(samples, slice(start, min(start + step, r)), kinds, halves) for start in range(0, r, step)]
        ends = _Ends(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        tried = ends.p_value.isfinite()
        given = torch.zeros_like(tried)
        given[tried] = benjamini_hochberg(ends.p_value[tried], self.level)
        given &= ends.area >= self.min_score
        return _labels(ends, given, kinds)

    def _texts(self, samples: FeatureSamples) -> Texts:
        classes, renderer = self.classes, self.renderer
        names = classes if classes is not None else samples.class_names
        known = dict(names) if isinstance(names, Mapping) else dict(enumerate(names))
        shape = renderer.shape if isinstance(renderer, ImageRenderer) else None
        return Texts(
            renderer.text if isinstance(renderer, TokenRenderer) and renderer.tokenizer is not None else None,
            renderer.columns if isinstance(renderer, TableRenderer) else None,
            lambda k: str(known.get(k, k)),
            None if shape is None or math.prod(shape[:-2]) != 1 else (shape[-2], shape[-1]),
        )


class _Ends(NamedTuple):
    """The best name of each end of each feature, shape ``(r, 2)``; the last axis is high and low.

    Attributes:
        kind: Number of its kind, int64.
        numbers: Numbers of its candidates, shape ``(r, 2, 3)``, int64.
        difference: By how much it predicts activity where it was chosen.
        area: The same on other samples, as an AUROC.
        p_value: Of its being chance; NaN where there is no name.
    """

    kind: Tensor
    numbers: Tensor
    difference: Tensor
    area: Tensor
    p_value: Tensor


def _ends(samples: FeatureSamples, columns: slice, kinds: Sequence[Kind], halves: tuple[Tensor, Tensor]) -> _Ends:
    """Choose names for some features on half of the samples, and score them on the other half."""
    f = samples.features[..., columns].float()
    values, valid = torch.cat([f, -f], 2), samples.valid
    naming, scoring = halves
    threshold, strict = _activity(values[naming], valid[naming])
    active = torch.where(strict, values > threshold, values >= threshold)
    w = weights(active[naming], valid[naming])
    k = values.shape[2]
    best, kind = torch.zeros(k, dtype=torch.float32, device="cpu"), torch.full((k,), -1, device="cpu")
    index = torch.full((k, MAX_VALUES), -1, device="cpu")
    difference = torch.full((k,), math.nan, dtype=torch.float32, device="cpu")
    for number, one in enumerate(kinds):
        choice = one.choose(naming, w)
        better = choice.bound > best
        best, difference = torch.where(better, choice.bound, best), torch.where(better, choice.difference, difference)
        kind, index = torch.where(better, number, kind), torch.where(better[:, None], choice.numbers, index)
    area, p_value = (torch.full((k,), math.nan, dtype=torch.float64, device="cpu") for _ in range(2))
    active, valid = active[scoring], valid[scoring]
    for number, one in enumerate(kinds):
        those = (kind == number).nonzero().flatten()
        if len(those):
            c = one.predictor(scoring, valid, index[those]).expand(*valid.shape, -1)
            found = areas(c, active[..., those], None if samples.mask is None else valid)
            area[those], p_value[those] = found.area, found.p_value
    both = (kind, index, difference, area, p_value)
    return _Ends(*(x.unflatten(0, (2, -1)).movedim(0, 1) for x in both))


def _activity(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The values above which features are active, shape ``(k,)``, and whether they are not at these values."""
    rows = values[valid]
    k = rows.shape[1]
    if not len(rows):
        return torch.zeros(k, dtype=torch.float32, device="cpu"), torch.ones(k, dtype=torch.bool, device="cpu")
    at = torch.linspace(0, len(rows) - 1, min(len(rows), _QUANTILE_POSITIONS), device="cpu").long()
    some = rows[at.to(rows.device)].T
    count = max(1, round(_MOST_ACTIVE * some.shape[1]))
    top = some.topk(count, dim=1).values
    fewest = top[:, max(0, round(_FEWEST_ACTIVE * some.shape[1]) - 1)]
    largest = rows.max(0).values
    threshold = torch.maximum(torch.minimum(largest / 2, fewest), top[:, -1])
    # Of many equal values none may be above.
    return threshold, threshold < largest


def _labels(ends: _Ends, given: Tensor, kinds: Sequence[Kind]) -> Labels:
    names, scores = [], torch.full((len(given),), math.nan, dtype=torch.float32, device="cpu")
    order = ends.difference.nan_to_num(-1.0).argsort(dim=1, descending=True).tolist()
    for j in given.any(1).nonzero().flatten().tolist():
        shown = [end for end in order[j] if given[j, end]]
        scores[j] = float(ends.area[j, shown[0]])
        texts = {end: kinds[int(ends.kind[j, end])].text(ends.numbers[j, end].tolist()) for end in shown}
        names.append((j, "; ".join(f"{('high', 'low')[end]}: {text}" for end, text in texts.items())))
    found = [""] * len(given)
    for j, name in names:
        found[j] = name
    return Labels(found, scores)
