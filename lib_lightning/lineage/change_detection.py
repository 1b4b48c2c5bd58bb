"""An online test for changes in many series at once, with a bound on the number of false alarms.

What is tested are the increments of a series from snapshot to snapshot. Without a change they scatter about one mean,
the trend, with one variance, both unknown. A change after snapshot ``s`` shifts their mean, for good (a new trend) or
for a few snapshots (a new level). For each ``s`` so far, the likelihood of such a change is divided by that of none, of
all that does not depend on the unknown trend and variance: the ratios of increments less the trend. It is a t-test that
bets on the size of the shift, ``N(0, tau^2)`` standard deviations, and on how long it lasts. Without a change each of
these ratios starts at 1 and stays 1 in expectation whenever one may stop, so their sum over ``s``, the Shiryaev-Roberts
statistic, has an expectation that grows by 1 a snapshot. It cannot reach ``1/alpha`` more often than once in so many
snapshots on average: no table, no simulation, nothing set beforehand. Each of ``m`` series is given ``1/m`` of it.

Sources: Shin, Ramdas and Rinaldo (2023), "E-detectors", arXiv 2203.03532, for sums of such ratios and false alarms;
Perez-Ortiz, Lardy, de Heide and Grunwald (2022), "E-statistics, group invariance and anytime valid testing", arXiv
2208.07610, for ratios over what is invariant. With a normal bet the ratio is the Bayes factor of Zellner's g-prior:
Liang et al. (2008), https://doi.org/10.1198/016214507000001337, equation 6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# tau: from hardly visible to far beyond all noise. Who knows few increments must bet high to win anything.
SHIFTS = (1.0, 4.0, 16.0, 64.0)
# Increments that are shifted; 0 is all from the onset on.
DURATIONS = (1, 2, 4, 8, 0)
_TINY = 1e-300


@dataclass(frozen=True)
class Change:
    """A change in one series.

    Attributes:
        series: Its number.
        onset: The last snapshot before the change, as it was called.
        before: Value at the onset.
        after: Value now.
        evidence: log10 of the evidence: as much comes by chance, in any of the series, at most once in so many
            snapshots on average.
    """

    series: int
    onset: int
    before: float
    after: float
    evidence: float


class ChangeDetector:
    """Watches many series for changes of their level or their trend, snapshot by snapshot.

    A steady trend is no change. Where a change is found, the history of its series starts anew. Series may begin at
    different times, and may be unknown (NaN) at some snapshots: the increment to the next known value is then one over
    a longer gap.

    Args:
        false_alarms: ``alpha``: in ``N`` snapshots at most ``alpha N`` changes are expected to be found in series that
            have none, in all series together, whatever they have to do with each other.
        min_change: Least change of the level, in the direction of the shift; 0 for any change, of the trend alone as
            well.
        min_level: Changes between two values below it do not count.
        resolution: Standard deviation of increments that are no surprise, ever; it is added to what is seen. Where it
            is 0, evidence does not depend on the unit of a series.
        persistence: Number of snapshots, up to the onset and again up to now, between each two of which the level must
            have changed that much: with 2, a single outlier is no change.
        min_before: Number of increments to know before an onset.
        window: Number of latest increments among which onsets are looked for.

    Raises:
        ValueError: If a setting is outside its range.

    Note:
        The bound on false alarms holds where the increments of a series without a change are independent and normal.
        ``min_change``, ``min_level``, ``resolution``, ``persistence`` and ``window`` only take alarms away. Measured
        without them, in 10, 100 and 400 series over 300 snapshots, as shares of the bound: 0.3, 0.1 and 0.1 for such
        increments; 0.03 or less for values that scatter independently about a level. Where the assumption fails, so may
        the bound: 0.5, 0.6 and 0.8 for increments with an autocorrelation of 0.3, but 0.8, 4 and 10 for one of 0.7, and
        0.4, 1.3 and 3.5 for Student increments with 3 degrees of freedom.

        A longer gap between snapshots has a proportionally larger trend. Whether it has a larger variance depends on
        whether a series scatters about its trend (it has not) or wanders (proportionally larger). Evidence is computed
        either way and the smaller one counts, so that neither denser snapshots nor the return to sparser ones raise
        alarms.

    Example:
        >>> detector = ChangeDetector(false_alarms=0.01)
        >>> noise = torch.randn(40, generator=torch.Generator().manual_seed(0)).double()
        >>> series = noise + 20 * (torch.arange(40) >= 25)
        >>> for t, value in enumerate(series):
        ...     for change in detector.update(t, value[None]):
        ...         print(t, change.onset, round(change.after - change.before))
        25 24 19
    """

    def __init__(
        self,
        false_alarms: float = 0.01,
        min_change: float = 0.0,
        min_level: float = -math.inf,
        resolution: float = 0.0,
        persistence: int = 1,
        min_before: int = 3,
        window: int = 64,
    ) -> None:
        if not 0 < false_alarms < 1:
            raise ValueError(f"false_alarms is a number of alarms per snapshot, between 0 and 1; got {false_alarms}.")
        for name, value in {"min_change": min_change, "resolution": resolution}.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} is a number from 0 on; got {value}.")
        if not 1 <= persistence <= window:
            raise ValueError(f"persistence is a number of snapshots, from 1 to window={window}; got {persistence}.")
        if min_before < 2:
            raise ValueError(f"min_before is a number of increments, from 2 on; got {min_before}.")
        self.false_alarms, self.min_change, self.min_level = false_alarms, min_change, min_level
        self.resolution, self.persistence, self.min_before, self.window = resolution, persistence, min_before, window
        self._series = _empty(0, window)

    def __len__(self) -> int:
        """Number of series."""
        return len(self._series["value"])

    def add(self, count: int, like: int | None = None) -> None:
        """Take on more series, numbered after those that there are.

        Args:
            count: How many.
            like: Number of a series whose history they share so far; None for none.
        """
        new = _empty(count, self.window)
        if like is not None:
            new = {name: tensor[[like] * count] for name, tensor in self._series.items()}
        self._series = {name: torch.cat([tensor, new[name]]) for name, tensor in self._series.items()}

    def keep(self, which: Tensor) -> None:
        """Forget all series but some; these are numbered anew.

        Args:
            which: Numbers of those to keep, in their new order, shape ``(k,)``, int64.
        """
        self._series = {name: tensor[which] for name, tensor in self._series.items()}

    def known(self, series: int) -> int:
        """Number of increments that are known of a series since its history last began."""
        return int(self._series["count"][series])

    def update(self, snapshot: int, values: Tensor, gap: float = 1.0) -> list[Change]:
        """Take in one snapshot.

        Args:
            snapshot: What to call it; the training step, say.
            values: One for each series, shape ``(m,)``; NaN for unknown. More values than series add series.
            gap: Distance from the snapshot before, in regular distances: 0.25 where snapshots are four times as dense
                for a while. What is regular, the schedule decides: with snapshots that are evenly spaced on a
                logarithmic axis, a steady trend of a logarithm is a power law.

        Returns:
            The changes found at this snapshot, at most one for each series.

        Raises:
            ValueError: If there are fewer values than series, or the gap is not positive.
        """
        values = values.detach().to("cpu", torch.float64)
        if values.ndim != 1 or len(values) < len(self):
            raise ValueError(f"There are {len(self)} series, and values of shape {tuple(values.shape)} for them.")
        if not 0 < gap < math.inf:
            raise ValueError(f"gap is a positive number of regular distances; got {gap}.")
        self.add(len(values) - len(self))
        known, s = values.isfinite(), self._series
        s["gap"] = s["gap"] + gap
        self._push(values, known & s["value"].isfinite())
        evidence = self._evidence(values).where(known[:, None], -math.inf)
        s["value"] = values.where(known, s["value"])
        s["snapshot"] = s["snapshot"].where(~known, snapshot)
        s["gap"] = s["gap"].where(~known, 0.0)
        return self._found(evidence)

    def _push(self, values: Tensor, rows: Tensor) -> None:
        """Let a new increment into the window, and the oldest one out into the sums."""
        s = self._series
        increment = values - s["value"]
        s["trend"] = (increment / s["gap"]).where(rows & (s["count"] == 0), s["trend"])
        oldest = [torch.stack([term[:, 0] for term in _terms(s, model)], 1) for model in (0, 1)]
        s["sums"] = s["sums"] + rows[:, None, None] * torch.stack(oldest, 1)
        new = {
            # Less the trend of the first increment: ratios do not depend on it, and a steep trend costs no digits.
            "increments": increment - s["trend"] * s["gap"],
            "gaps": s["gap"],
            "weights": torch.full_like(values, 1 / max(1, len(values))),
            "values": s["value"],
            "snapshots": s["snapshot"],
        }
        for name, column in new.items():
            s[name] = torch.cat([s[name][:, 1:], column[:, None]], 1).where(rows[:, None], s[name])
        s["count"] = s["count"] + rows

    def _evidence(self, values: Tensor) -> Tensor:
        """Logarithm of weight times likelihood ratio, for an onset just before each increment of the window."""
        s = self._series
        after = torch.arange(self.window, 0, -1)
        allowed = (s["gaps"] > 0) & (s["count"][:, None] - after >= self.min_before) & (after >= self.persistence)
        allowed &= torch.maximum(s["values"], values[:, None]) >= self.min_level
        latest = torch.cat([s["values"][:, self.window - self.persistence + 1 :], values[:, None]], 1)
        highest, lowest = (self._highest_before(sign * s["values"]) * sign for sign in (1, -1))
        up = latest.amin(1, keepdim=True) - highest >= self.min_change
        down = lowest - latest.amax(1, keepdim=True) >= self.min_change
        direction = up.double() - down.double() if self.min_change > 0 else None

        ratio = self._log_ratio(0, direction)
        if not ((s["gaps"] == 0) | (s["gaps"] == 1)).all() or not torch.equal(*s["sums"].unbind(1)):
            ratio = torch.minimum(ratio, self._log_ratio(1, direction))
        return (ratio + s["weights"].log()).where(allowed, -math.inf)

    def _highest_before(self, values: Tensor) -> Tensor:
        """Highest of the ``persistence`` values up to each onset."""
        there = values.where(self._series["gaps"] > 0, -math.inf)
        return F.pad(there, (self.persistence - 1, 0), value=-math.inf).unfold(1, self.persistence, 1).amax(-1)

    def _log_ratio(self, model: int, direction: Tensor | None) -> Tensor:
        """Likelihood of ``y = trend u + shift u [after the onset] + noise`` over that of ``y = trend u + noise``."""
        n = self._series["count"][:, None].double()
        since = [term.flip(1).cumsum(1).flip(1) for term in _terms(self._series, model)]
        whole = self._series["sums"][:, model, :, None] + torch.stack(since, 1)[:, :, :1]
        UU, UY, YY = whole.unbind(1)
        UU = UU.clamp_min(_TINY)
        variation = (YY - UY.square() / UU).clamp_min(0) + (n - 1).clamp_min(0) * self.resolution**2
        ratios = []
        for duration in DURATIONS:
            uu, uy = (x - F.pad(x, (0, duration))[:, duration:] if duration else x for x in since[:2])
            size, contrast = uu * (UU - uu) / UU, uy - uu * UY / UU
            explained = (contrast.square() / size.clamp_min(_TINY) / variation.clamp_min(_TINY)).clamp(0, 1)
            for shift in SHIFTS:
                g = size * shift**2
                ratio = -(n - 1) / 2 * torch.log1p(-explained * g / (1 + g)) - torch.log1p(g) / 2
                ratios.append(ratio if direction is None else ratio.where(contrast * direction > 0, -math.inf))
        return torch.stack(ratios).logsumexp(0) - math.log(len(ratios))

    def _found(self, evidence: Tensor) -> list[Change]:
        s, total = self._series, evidence.logsumexp(1)
        rows = (total >= -math.log(self.false_alarms)).nonzero().flatten()
        changes = []
        for i, j in zip(rows.tolist(), evidence[rows].argmax(1).tolist(), strict=True):
            onset, before, after = int(s["snapshots"][i, j]), float(s["values"][i, j]), float(s["value"][i])
            changes.append(Change(i, onset, before, after, float(total[i]) / math.log(10)))
        anew = _empty(len(rows), self.window)
        for name in s.keys() - {"value", "snapshot", "gap"}:
            s[name][rows] = anew[name]
        return changes

    def state_dict(self) -> dict[str, Any]:
        """State to go on from, of tensors."""
        return {name: tensor.clone() for name, tensor in self._series.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Args:
            state: What `state_dict` of a detector with the same settings gave.

        Raises:
            ValueError: If its window was another one.
        """
        if state["increments"].shape[1] != self.window:
            raise ValueError(f"The state has a window of {state['increments'].shape[1]}, not {self.window}.")
        self._series = {name: state[name].clone() for name in self._series}


def _terms(s: dict[str, Tensor], model: int) -> tuple[Tensor, Tensor, Tensor]:
    """``u^2``, ``u y`` and ``y^2`` over the noise's variance: 1 (model 0), or the gap (model 1). ``u`` is the gap."""
    gaps, y = s["gaps"], s["increments"]
    variance = gaps.where(gaps > 0, 1.0) if model else torch.ones_like(gaps)
    return gaps.square() / variance, gaps * y / variance, y.square() / variance


def _empty(count: int, window: int) -> dict[str, Tensor]:
    """All that is known of series that have not begun."""
    number: dict[str, Any] = {"dtype": torch.float64}
    return {
        "value": torch.full((count,), math.nan, **number),
        "snapshot": torch.full((count,), -1),
        "gap": torch.zeros(count, **number),
        "count": torch.zeros(count, dtype=torch.int64),
        "trend": torch.zeros(count, **number),
        # Of increments that have left the window: by model, the three terms.
        "sums": torch.zeros(count, 2, 3, **number),
        "increments": torch.zeros(count, window, **number),
        "gaps": torch.zeros(count, window, **number),
        "weights": torch.zeros(count, window, **number),
        # Just before each increment.
        "values": torch.zeros(count, window, **number),
        "snapshots": torch.full((count, window), -1),
    }
