"""Offsets of the events of one kind from the steepest change of a scalar, in one run and over runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib_lightning.alignment.steepest import SteepestChange

# What follows is also in viewer/static/alignment.js: the tab computes the same numbers.
# Sums of weights that differ by less are equal.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class KindOffsets:
    """When the events of one kind come, in steps after the steepest change; negative before it.

    Attributes:
        kind: The kind of event.
        num_events: Number of events, in all runs.
        num_runs: Number of runs with such events and a steepest change.
        offset: Median over runs of the median of each; of a single run, the median over its events.
        quartiles: Lower and upper quartile of the same.
        times: Median over runs of the step of the events divided by that of the change.
        before: Number of runs in which they come before the range of the steepest change.
        within: Number of runs in which they come within it, so that neither is first.
        after: Number of runs in which they come after it.
        p_value: Of a two-sided sign test: the probability that, of the runs before and after, as many or more were on
            one side if both were as likely; NaN with fewer than two of these runs.
    """

    kind: str
    num_events: int
    num_runs: int
    offset: float
    quartiles: tuple[float, float]
    times: float
    before: int
    within: int
    after: int
    p_value: float


def kind_of(event: Mapping[str, Any]) -> str:
    """The kind of an event, by which those of metrics are told from those of features.

    Args:
        event: An event with ``kind`` and ``layer``.

    Returns:
        The kind.

    Example:
        >>> kind_of({"kind": "rose", "layer": None}), kind_of({"kind": "rose", "layer": "fc"})
        ('metric rose', 'rose')
    """
    return str(event["kind"]) if event["layer"] is not None else f"metric {event['kind']}"


def offsets_of(kind: str, runs: Sequence[tuple[SteepestChange, Sequence[tuple[int, float]]]]) -> KindOffsets:
    """Summarize the events of one kind.

    Args:
        kind: The kind.
        runs: For each run its steepest change, and steps and weights of its events; runs without events are left out.

    Returns:
        The summary.

    Example:
        >>> changes = [SteepestChange(100, 90, 110), SteepestChange(200, 190, 210)]
        >>> found = offsets_of("born", [(changes[0], [(40, 1.0), (60, 1.0)]), (changes[1], [(180, 1.0)])])
        >>> found.offset, found.quartiles, found.before, found.times
        (-35.0, (-50.0, -20.0), 2, 0.7)
    """
    runs = [(change, events) for change, events in runs if events]
    if not runs:
        return KindOffsets(kind, 0, 0, math.nan, (math.nan, math.nan), math.nan, 0, 0, 0, math.nan)
    medians = [(change, weighted_quantile(events, 0.5)) for change, events in runs]
    own = [(step - change.step, 1.0) for change, step in medians]
    if len(runs) == 1:
        change, events = runs[0]
        own = [(step - change.step, weight) for step, weight in events]
    before = sum(step < change.first for change, step in medians)
    after = sum(step > change.last for change, step in medians)
    return KindOffsets(
        kind,
        sum(len(events) for _, events in runs),
        len(runs),
        weighted_quantile(own, 0.5),
        (weighted_quantile(own, 0.25), weighted_quantile(own, 0.75)),
        weighted_quantile([(step / change.step, 1.0) for change, step in medians if change.step > 0], 0.5),
        before,
        len(runs) - before - after,
        after,
        sign_test(before, after),
    )


def weighted_quantile(values: Sequence[tuple[float, float]], q: float) -> float:
    """A quantile of weighted values.

    Args:
        values: Values and their weights, which are not negative. If all are zero, they count the same.
        q: Between 0 and 1.

    Returns:
        The smallest value up to which there is more than this part of the weight; if there is exactly this part up to
        a value, the mean of it and the next one. NaN without values.

    Example:
        >>> weighted_quantile([(3, 1), (1, 1), (2, 1)], 0.5), weighted_quantile([(1, 1), (2, 1)], 0.5)
        (2.0, 1.5)
        >>> weighted_quantile([(1, 1), (2, 1), (9, 5)], 0.5)
        9.0
    """
    total = sum(weight for _, weight in values)
    ordered = sorted((value, weight if total > 0 else 1.0) for value, weight in values)
    total = 0.0
    for _, weight in ordered:
        total += weight
    reached = 0.0
    for i, (value, weight) in enumerate(ordered):
        reached += weight
        if reached > q * total + _ROUNDING * total or i == len(ordered) - 1:
            return float(value)
        if reached >= q * total - _ROUNDING * total and weight > 0:
            following = next((later for later, w in ordered[i + 1 :] if w > 0), value)
            return float((value + following) / 2)
    return math.nan


def sign_test(before: int, after: int) -> float:
    """The p-value of a two-sided sign test.

    Args:
        before: Number of runs on one side.
        after: Number of runs on the other side.

    Returns:
        The probability that one side has as many or more if both are as likely; NaN for fewer than two runs.

    Example:
        >>> sign_test(5, 0), sign_test(3, 3)
        (0.0625, 1.0)
    """
    n = before + after
    if n < 2:
        return math.nan
    tail = sum(math.comb(n, k) for k in range(max(before, after), n + 1))
    return min(1.0, float(2 * tail / 2**n))
