"""Online detection of changes in many time series at once, with a bound on the rate of false alarms.

*Hypotheses.* The increments of a series from snapshot to snapshot are tested. Under the null hypothesis they are
independent and normal with the same mean (the trend) and the same variance, both unknown. Under the alternative, a
change happened right after some snapshot ``s``: from there on the mean is shifted, permanently (a new trend) or for a
few increments (a new level).

*Statistic.* For each ``s``, the likelihood of the alternative is divided by that of the null, both of the maximal
invariant of the increments, which depends on neither the trend nor the variance: their ratios after the trend has been
removed. The size of the shift has the prior ``N(0, tau^2)`` in units of the standard deviation, and the ratio is
averaged over several ``tau`` and durations. Under the null, each ratio starts at 1 and has expectation 1 at every
stopping time (it is an e-process). The sum over all ``s``, the Shiryaev-Roberts statistic, then has an expectation that
grows by 1 with each snapshot.

*False alarms.* A change is reported when the sum reaches ``1/alpha``. Without changes this happens at most ``alpha N``
times in ``N`` snapshots in expectation, whatever trend and variance are; no threshold is simulated or looked up. With
``m`` series, ratios are weighted by ``1/m``, and the bound holds for all series taken together, however they depend on
each other.

*Autocorrelated increments.* Increments of smooth curves resemble their neighbours, and are not independent. Optionally,
each increment is freed first of what the autocorrelation of all increments so far predicts from the one before. If
increments are autoregressive of first order, what remains is independent, with a mean that is proportional to the
trend, and the test is the same. There are two alternatives then, each with half of the weight: a shift of the
increments themselves, which the subtraction changes where the shift begins and ends, such as a jump of the level; and a
shift of what remains, which the autocorrelation then carries on.

Sources: Shin, Ramdas and Rinaldo (2023), "E-detectors", arXiv 2203.03532, for sums of e-processes and false alarms;
Perez-Ortiz, Lardy, de Heide and Grunwald (2022), "E-statistics, group invariance and anytime valid testing", arXiv
2208.07610, for likelihood ratios of invariants. With a normal prior the ratio is the Bayes factor of Zellner's g-prior:
Liang et al. (2008), https://doi.org/10.1198/016214507000001337, equation 6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lib_lightning.errors import SettingError

# Values of tau: from shifts that are hardly visible to those far beyond the noise. With few increments, only large
# values of tau give evidence.
SHIFTS = (1.0, 4.0, 16.0, 64.0)
# Numbers of increments that are shifted; 0 for all after the change.
DURATIONS = (1, 2, 4, 8, 0)
# A steady trend would be invisible with an autocorrelation of 1.
_MAX_AUTOCORRELATION = 0.95
_TINY = 1e-300


@dataclass(frozen=True)
class Change:
    """A change in one series.

    Attributes:
        series: Index of the series.
        onset: The last snapshot before the change, as passed to `ChangeDetector.update`.
        before: Value at the onset.
        after: Value at the snapshot at which the change was detected.
        evidence: log10 of the statistic. A statistic of ``x`` occurs by chance, in any of the series, at most once in
            ``x`` snapshots in expectation.
    """

    series: int
    onset: int
    before: float
    after: float
    evidence: float


class ChangeDetector:
    """Detects changes of level or trend in many series, snapshot by snapshot.

    A steady trend is not a change. After a change, the history of the series starts anew. Series may begin at different
    times, and may be missing (NaN) at some snapshots: the next increment then spans a longer interval.

    Args:
        false_alarms: ``alpha``: in ``N`` snapshots, at most ``alpha N`` changes are reported in expectation if there
            are none, in all series together.
        min_change: Smallest change of the level, in the direction of the shift; 0 for any change, including changes of
            the trend alone.
        min_level: Changes between two values below it are ignored.
        resolution: Standard deviation of increments that never count as evidence; it is added to the observed one. If
            it is 0, the evidence does not depend on the unit of a series.
        persistence: Number of snapshots, up to the onset and up to the present one, between any two of which the level
            must have changed by ``min_change``: with 2, a single outlier is not a change.
        min_before: Smallest number of increments before an onset.
        window: Number of latest increments that are considered as onsets.
        autocorrelated: Whether increments may be autocorrelated without a change. From each increment ``phi`` times the
            one before is subtracted, and ``1 - phi`` of the trend remains. ``phi``, from 0 to 0.95, is the
            autocorrelation of the increments of all series until then, so that a change does not explain itself; it is
            in `autocorrelation`. ``min_change`` and ``min_level`` refer to the values themselves.

    Raises:
        SettingError: If a setting is outside its range.

    Note:
        The bound on false alarms assumes that the increments of a series without changes are independent and normal.
        ``min_change``, ``min_level``, ``resolution``, ``persistence`` and ``window`` only remove alarms. Without them,
        the measured number of false alarms in 10, 100 and 400 series over 300 snapshots, divided by the bound, was 0.3,
        0.1 and 0.1 for such increments, and 0.03 or less for values that scatter independently about a level. If the
        assumption does not hold, the bound may not either: the quotient was 0.5, 0.6 and 0.8 for increments with an
        autocorrelation of 0.3, but 0.8, 4 and 10 with 0.7, and 0.4, 1.3 and 3.5 for increments with Student's t
        distribution with 3 degrees of freedom.

        With ``autocorrelated``, the bound assumes that the increments about the trend are a normal autoregressive
        process of first order, with the same correlation, from 0 to 0.95, in all series and between all snapshots, and
        that the estimate is near it; at the first snapshots there are few increments to estimate it from. Increments
        with heavy tails raise about as many alarms as without it. A change that is as smooth as the curve before it is
        not detected.

        Over a longer interval between snapshots, the trend is proportionally larger. The variance is proportionally
        larger for a random walk, and the same for a series that scatters about its trend. The evidence is computed for
        both and the smaller one is used, so neither denser snapshots nor the return to sparser ones raise alarms.

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
        autocorrelated: bool = False,
    ) -> None:
        if not 0 < false_alarms < 1:
            raise SettingError(f"false_alarms must be between 0 and 1 per snapshot; got {false_alarms}.")
        for name, value in {"min_change": min_change, "resolution": resolution}.items():
            if not 0 <= value < math.inf:
                raise SettingError(f"{name} must be at least 0 and finite; got {value}.")
        if not 1 <= persistence <= window:
            raise SettingError(f"persistence must be between 1 and window={window} snapshots; got {persistence}.")
        if min_before < 2:
            raise SettingError(f"min_before must be at least 2 increments; got {min_before}.")
        self.false_alarms, self.min_change, self.min_level = false_alarms, min_change, min_level
        self.resolution, self.persistence, self.min_before, self.window = resolution, persistence, min_before, window
        self._series = _empty(0, window)
        self._whitening = _Whitening() if autocorrelated else None

    @property
    def autocorrelation(self) -> float:
        """Autocorrelation that is subtracted from the next increments; 0 if they are taken to be independent."""
        return 0.0 if self._whitening is None else self._whitening.autocorrelation

    def __len__(self) -> int:
        """Number of series."""
        return len(self._series["value"])

    def add(self, count: int, copy_of: int | None = None) -> None:
        """Add series after the existing ones.

        Args:
            count: Number of series to add.
            copy_of: Index of a series whose history they share so far; None for no history.
        """
        new = _empty(count, self.window)
        if copy_of is not None:
            new = {name: tensor[[copy_of] * count] for name, tensor in self._series.items()}
        self._series = {name: torch.cat([tensor, new[name]]) for name, tensor in self._series.items()}
        if self._whitening is not None:
            self._whitening.add(count, copy_of)

    def keep(self, which: Tensor) -> None:
        """Remove all series but some, which get new indices.

        Args:
            which: Indices of the series to keep, in their new order, shape ``(k,)``, int64.
        """
        self._series = {name: tensor[which] for name, tensor in self._series.items()}
        if self._whitening is not None:
            self._whitening.keep(which)

    def num_increments(self, series: int) -> int:
        """Number of increments in the present history of a series."""
        return int(self._series["count"][series])

    def update(self, snapshot: int, values: Tensor, relative_interval: float = 1.0) -> list[Change]:
        """Add one snapshot.

        Args:
            snapshot: Identifies it in `Change.onset`, such as the training step.
            values: One value for each series, shape ``(m,)``; NaN if missing. More values than series add series.
            relative_interval: Interval from the previous snapshot, divided by the regular one: 0.25 while snapshots are
                four times as dense. The schedule defines what is regular: with snapshots evenly spaced on a logarithmic
                axis, a steady trend of a logarithm is a power law.

        Returns:
            The changes detected at this snapshot, at most one for each series.

        Raises:
            SettingError: If there are fewer values than series, or the interval is not positive.
        """
        values = values.detach().to("cpu", torch.float64)
        if values.ndim != 1 or len(values) < len(self):
            raise SettingError(f"There are {len(self)} series, but values of shape {tuple(values.shape)}.")
        if not 0 < relative_interval < math.inf:
            raise SettingError(f"relative_interval must be positive and finite; got {relative_interval}.")
        self.add(len(values) - len(self))
        known, s = values.isfinite(), self._series
        s["gap"] = s["gap"] + relative_interval
        self._push(values, known & s["value"].isfinite())
        evidence = self._evidence(values).where(known[:, None], -math.inf)
        s["value"] = values.where(known, s["value"])
        s["snapshot"] = s["snapshot"].where(~known, snapshot)
        s["gap"] = s["gap"].where(~known, 0.0)
        return self._detected(evidence)

    def _push(self, values: Tensor, rows: Tensor) -> None:
        """Move the window by one increment in some series; the oldest one is added to the sums."""
        s = self._series
        increment, gap = values - s["value"], s["gap"]
        if self._whitening is not None:
            increment, gap = self._whitening.whiten(increment, gap, rows)
        s["trend"] = (increment / gap).where(rows & (s["count"] == 0), s["trend"])
        oldest = [torch.stack([term[:, 0] for term in _terms(s, model)], 1) for model in (0, 1)]
        s["sums"] = s["sums"] + rows[:, None, None] * torch.stack(oldest, 1)
        new = {
            # Minus the trend of the first increment, on which ratios do not depend: a steep trend would cost precision.
            "increments": increment - s["trend"] * gap,
            "gaps": gap,
            "intervals": s["gap"],
            "weights": torch.full_like(values, 1 / max(1, len(values))),
            "values": s["value"],
            "snapshots": s["snapshot"],
        }
        for name, column in new.items():
            s[name] = torch.cat([s[name][:, 1:], column[:, None]], 1).where(rows[:, None], s[name])
        s["count"] = s["count"] + rows

    def _evidence(self, values: Tensor) -> Tensor:
        """Log of weight times likelihood ratio for a change before each increment of the window, ``(m, window)``."""
        s = self._series
        after = torch.arange(self.window, 0, -1, device="cpu")
        allowed = (s["gaps"] > 0) & (s["count"][:, None] - after >= self.min_before) & (after >= self.persistence)
        allowed &= torch.maximum(s["values"], values[:, None]) >= self.min_level
        latest = torch.cat([s["values"][:, self.window - self.persistence + 1 :], values[:, None]], 1)
        highest, lowest = (self._highest_before(sign * s["values"]) * sign for sign in (1, -1))
        up = latest.amin(1, keepdim=True) - highest >= self.min_change
        down = lowest - latest.amax(1, keepdim=True) >= self.min_change
        direction = up.double() - down.double() if self.min_change > 0 else None
        if direction is not None:
            allowed &= direction != 0

        evidence = torch.full_like(s["weights"], -math.inf)
        rows = allowed.any(1).nonzero().flatten()  # few of many series, where small changes do not count
        part = {name: s[name][rows] for name in ("count", "sums", "increments", "gaps", "intervals")}
        direction = None if direction is None else direction[rows]
        ratio = self._log_ratio(part, 0, direction)
        if not ((part["intervals"] == 0) | (part["intervals"] == 1)).all() or not torch.equal(*part["sums"].unbind(1)):
            ratio = torch.minimum(ratio, self._log_ratio(part, 1, direction))
        evidence[rows] = (ratio + s["weights"][rows].log()).where(allowed[rows], -math.inf)
        return evidence

    def _highest_before(self, values: Tensor) -> Tensor:
        """Highest of the ``persistence`` values up to each onset, ``(m, window)``."""
        present = values.where(self._series["gaps"] > 0, -math.inf)
        return F.pad(present, (self.persistence - 1, 0), value=-math.inf).unfold(1, self.persistence, 1).amax(-1)

    def _log_ratio(self, s: dict[str, Tensor], model: int, direction: Tensor | None) -> Tensor:
        """Log likelihood ratio of ``y = trend u + shift u [after the onset] + noise`` and ``y = trend u + noise``.

        With ``UU = sum u^2`` over all ``n`` increments and ``uu`` over those that are shifted, ``UY``, ``uy`` and
        ``YY`` likewise, the shift explains the share ``R^2`` of the variation about the trend. With ``g = tau^2`` times
        the ``size`` of the shifted part, the ratio is ``(1 + g)^(-1/2) (1 - R^2 g / (1 + g))^(-(n - 1) / 2)``: the
        Bayes factor of Liang et al. with the trend as the only other regressor.

        Args:
            s: State of the series, or of some of them.
            model: Model of the noise, as for `_terms`.
            direction: Sign that the shift must have, shape ``(m, window)``; None for any.

        Returns:
            Mean over durations and sizes of the shift, shape ``(m, window)``.
        """
        n = s["count"][:, None].double()
        since = [term.flip(1).cumsum(1).flip(1) for term in _terms(s, model)]
        whole = s["sums"][:, model, :, None] + torch.stack(since, 1)[:, :, :1]
        UU, UY, YY = whole.unbind(1)
        UU = UU.clamp_min(_TINY)
        variation = (YY - UY.square() / UU).clamp_min(0) + (n - 1).clamp_min(0) * self.resolution**2
        ratios = []
        for duration in DURATIONS:
            uu, uy = (x - F.pad(x, (0, duration))[:, duration:] if duration else x for x in since[:2])
            shifts = [(uu * (UU - uu) / UU, uy - uu * UY / UU)]
            if self._whitening is not None:
                zz, zu, zy = (x + edge for x, edge in zip((uu, uu, uy), _edges(s, model, duration), strict=True))
                shifts.append(((zz - zu.square() / UU).clamp_min(0), zy - zu * UY / UU))
            for size, contrast in shifts:
                explained = (contrast.square() / size.clamp_min(_TINY) / variation.clamp_min(_TINY)).clamp(0, 1)
                for shift in SHIFTS:
                    g = size * shift**2
                    ratio = -(n - 1) / 2 * torch.log1p(-explained * g / (1 + g)) - torch.log1p(g) / 2
                    ratios.append(ratio if direction is None else ratio.where(contrast * direction > 0, -math.inf))
        return torch.stack(ratios).logsumexp(0) - math.log(len(ratios))

    def _detected(self, evidence: Tensor) -> list[Change]:
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
        """Tensors from which `load_state_dict` restores the detector."""
        whitening = {} if self._whitening is None else self._whitening.state_dict()
        return {name: tensor.clone() for name, tensor in self._series.items()} | whitening

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a detector with the same settings.

        Args:
            state: A result of `state_dict`. If it has no autocorrelation, as of a detector of independent increments,
                this is estimated anew.

        Raises:
            SettingError: If its window was different.
        """
        if state["increments"].shape[1] != self.window:
            raise SettingError(f"The state has a window of {state['increments'].shape[1]}, not {self.window}.")
        # Older states have no intervals, since nothing was subtracted from them.
        state = {"intervals": state["gaps"]} | state
        self._series = {name: state[name].clone() for name in self._series}
        if self._whitening is not None:
            self._whitening = _Whitening()
            self._whitening.add(len(self))
            self._whitening.load_state_dict(state)


class _Whitening:
    """Frees the increments of many series of their autocorrelation, snapshot by snapshot.

    The autocorrelation is the same for all series. It is estimated from the deviations ``x`` and ``y`` of successive
    increments from the mean of all earlier increments of their series, as the mean ``c`` of ``2 x y / (x^2 + y^2)``.
    These products are between -1 and 1, so that no series, and no increment, counts more than others. Pairs with an
    increment of exactly 0 are left out. If ``x`` and ``y`` are normal with the same variance and the correlation
    ``phi``, the product is ``sin(a)``, with ``a`` twice the angle of ``(x, y)``, whose density is
    ``sqrt(1 - phi^2) / (1 - phi sin(a)) / (2 pi)``. Its mean is ``c = (1 - sqrt(1 - phi^2)) / phi``, so that
    ``phi = 2 c / (1 + c^2)``.
    """

    def __init__(self) -> None:
        # For each series: the increment before and its interval, sums of increments and intervals, and the deviation.
        self._past = torch.zeros(0, 5, dtype=torch.float64, device="cpu")
        # Sum of all products, and their number.
        self._products, self._pairs = 0.0, 0.0

    @property
    def autocorrelation(self) -> float:
        c = self._products / (self._pairs + 1)
        return min(_MAX_AUTOCORRELATION, max(0.0, 2 * c / (1 + c**2)))

    def add(self, count: int, copy_of: int | None = None) -> None:
        new = self._past.new_zeros(count, 5) if copy_of is None else self._past[[copy_of] * count]
        self._past = torch.cat([self._past, new])

    def keep(self, which: Tensor) -> None:
        self._past = self._past[which]

    def whiten(self, increments: Tensor, gaps: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Subtract what is predicted from the increment before, and learn from the new ones.

        Args:
            increments: One for each series, shape ``(m,)``.
            gaps: Their intervals, shape ``(m,)``.
            rows: Series that have an increment, shape ``(m,)``, bool.

        Returns:
            Increments, and intervals that are shorter by the same factor, so that a steady trend stays one.
        """
        phi, y = self.autocorrelation, increments.where(rows, 0.0)
        before, interval, total, time, deviation = self._past.unbind(1)
        has = rows & (interval > 0)
        predicted = phi * before * gaps / interval.clamp_min(_TINY)
        now = (y - gaps * total / time.clamp_min(_TINY)).where(has, 0.0)
        # Increments of exactly 0, as of shares at their floor, would all deviate from the mean by the same.
        known = has & (y != 0) & (before != 0) & (deviation != 0)
        products = 2 * now * deviation / (deviation.square() + now.square()).clamp_min(_TINY)
        self._products += float(products[known].sum())
        self._pairs += float(known.sum())
        past = torch.stack([y, gaps, total + y, time + gaps, now], 1)
        self._past = past.where(rows[:, None], self._past)
        return (increments - predicted).where(has, increments), (gaps * (1 - phi)).where(has, gaps)

    def state_dict(self) -> dict[str, Any]:
        products = torch.tensor([self._products, self._pairs], dtype=torch.float64, device="cpu")
        return {"past": self._past.clone(), "products": products}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state; one without an autocorrelation changes nothing."""
        if "past" in state:
            self._past = state["past"].clone()
            self._products, self._pairs = state["products"].tolist()


def _terms(s: dict[str, Tensor], model: int) -> tuple[Tensor, Tensor, Tensor]:
    """``u^2``, ``u y`` and ``y^2`` of increments ``y`` over intervals ``u``, divided by the variance of the noise.

    The variance is 1 in model 0 (scatter about a trend) and the interval in model 1 (random walk).
    """
    u, y, variance = s["gaps"], s["increments"], _variance(s, model)
    return u.square() / variance, u * y / variance, y.square() / variance


def _edges(s: dict[str, Tensor], model: int, duration: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a shift of the increments before whitening adds to ``uu``, ``uu`` and ``uy`` of one of whitened ones.

    A shift of ``v`` of an increment is one of ``v - p`` in the whitened increments, ``p`` being what was subtracted
    from the interval ``v``; but of ``v`` in the first one, before which nothing was shifted, and of ``-p`` in the
    one after the last.
    """
    u, p, y = s["gaps"], s["intervals"] - s["gaps"], s["increments"]
    variance = _variance(s, model)
    zz, zu, zy = (2 * u * p + p.square()) / variance, u * p / variance, p * y / variance
    if duration:
        after = p.square() / variance, -zu, -zy
        zz, zu, zy = (x + F.pad(end, (0, duration))[:, duration:] for x, end in zip((zz, zu, zy), after, strict=True))
    return zz, zu, zy


def _variance(s: dict[str, Tensor], model: int) -> Tensor:
    intervals = s["intervals"]
    return intervals.where(intervals > 0, 1.0) if model else torch.ones_like(intervals)


def _empty(count: int, window: int) -> dict[str, Tensor]:
    """State of series without any values."""
    number: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    return {
        # The latest value, its snapshot, and the interval since.
        "value": torch.full((count,), math.nan, **number),
        "snapshot": torch.full((count,), -1, device="cpu"),
        "gap": torch.zeros(count, **number),
        "count": torch.zeros(count, dtype=torch.int64, device="cpu"),
        "trend": torch.zeros(count, **number),
        # The three `_terms` of each model, summed over the increments that have left the window.
        "sums": torch.zeros(count, 2, 3, **number),
        "increments": torch.zeros(count, window, **number),
        "gaps": torch.zeros(count, window, **number),
        # Intervals before whitening, which makes the `gaps` shorter.
        "intervals": torch.zeros(count, window, **number),
        "weights": torch.zeros(count, window, **number),
        # Value and snapshot right before each increment.
        "values": torch.zeros(count, window, **number),
        "snapshots": torch.full((count, window), -1, device="cpu"),
    }
