"""The change detector against its definition; false alarms on noise; delays on changes of known size."""

from __future__ import annotations

import io
import math
from itertools import product

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from lib_lightning.lineage.change_detection import DURATIONS, SHIFTS, Change, ChangeDetector, _Whitening


def run(detector: ChangeDetector, series: Tensor, intervals: list[float] | None = None) -> list[tuple[int, Change]]:
    """All changes detected in series ``(m, N)``, with the snapshots at which they were detected."""
    intervals = [1.0] * series.shape[1] if intervals is None else intervals
    return [(t, c) for t in range(series.shape[1]) for c in detector.update(t, series[:, t], intervals[t])]


def walks(m: int, n: int, seed: int = 0, drift: float = 0.0) -> Tensor:
    noise = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (noise + drift).cumsum(1)


def autoregressive(m: int, n: int, phi: float, seed: int) -> Tensor:
    """Series of variance 1 with the autocorrelation ``phi``."""
    noise = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    series = [noise[:, 0]]
    for now in noise.T[1:]:
        series.append(phi * series[-1] + math.sqrt(1 - phi**2) * now)
    return torch.stack(series, 1)


def slow_ratio(d: np.ndarray, gaps: np.ndarray, s: int, power: float, resolution: float = 0.0) -> float:
    """Likelihood ratio of the maximal invariants for an onset before increment ``s``, from its definition.

    With ``Q`` an orthonormal basis of the complement of the trend, ``w = Q' y`` does not depend on it and has
    variance ``I + tau^2 z z'`` up to scale; integrated over the scale, its density is
    ``det(V)^(-1/2) (w' V^-1 w)^(-(n-1)/2)``.
    """
    n, root = len(d), gaps**power
    y, u = d / root, gaps / root
    Q = np.linalg.svd(u[None])[2][1:]
    w = Q @ y
    floor = (n - 1) * resolution**2
    ratios = []
    for duration, tau in product(DURATIONS, SHIFTS):
        inside = (np.arange(n) >= s) & (np.arange(n) < (s + duration if duration else n))
        z = Q @ (u * inside)
        V = np.eye(n - 1) + tau**2 * np.outer(z, z)
        quadratic = w @ np.linalg.solve(V, w) + floor
        ratios.append(np.linalg.det(V) ** -0.5 * ((w @ w + floor) / quadratic) ** ((n - 1) / 2))
    return float(np.mean(ratios))


def slow_evidence(x: np.ndarray, gaps: np.ndarray, m: int, resolution: float = 0.0, min_before: int = 3) -> float:
    """The statistic of a series without missing values; ``gaps`` are the intervals before each snapshot."""
    d = np.diff(x)
    onsets = range(min_before, len(d))
    return sum(min(slow_ratio(d, gaps[1:], s, power, resolution) for power in (0, 0.5)) / m for s in onsets)


def evidence_of(detector: ChangeDetector, series: Tensor, intervals: list[float] | None = None) -> Tensor:
    """Statistics at the last snapshot."""
    intervals = [1.0] * series.shape[1] if intervals is None else intervals
    assert run(detector, series[:, :-1], intervals) == []
    detector.false_alarms = math.inf  # reports every series
    changes = detector.update(series.shape[1], series[:, -1], intervals[-1])
    return 10 ** torch.tensor([change.evidence for change in changes], dtype=torch.float64)


@pytest.mark.parametrize("resolution", [0.0, 0.7])
@pytest.mark.parametrize("irregular", [False, True])
def test_statistic_equals_its_definition(resolution: float, irregular: bool) -> None:
    series = walks(3, 13, drift=0.3)
    gaps = [1.0, 1, 1, 0.25, 0.25, 0.5, 1, 1, 2, 1, 0.25, 1, 1] if irregular else [1.0] * 13
    found = evidence_of(ChangeDetector(1e-9, resolution=resolution), series, gaps)
    expected = [slow_evidence(x, np.array(gaps), 3, resolution) for x in series.numpy()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


def test_increments_before_the_window_still_contribute() -> None:
    series = walks(4, 30)
    d = np.diff(series[0].numpy())
    found = evidence_of(ChangeDetector(1e-9, window=5), series)[0]
    expected = sum(slow_ratio(d, np.ones(29), s, 0) for s in range(24, 29)) / 4
    assert float(found) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "g"), [(3, 0.5), (4, 100.0), (10, 3.0), (40, 4096.0)])
def test_a_ratio_is_1_on_average_without_a_change(n: int, g: float) -> None:
    # Without a change, R^2 has a Beta distribution for any trend and variance.
    share = stats.beta(0.5, (n - 2) / 2)

    def ratio(t: float) -> float:  # R^2 = sin(t)^2 removes the poles of the density
        r2 = math.sin(t) ** 2
        density = share.pdf(r2) * 2 * math.sin(t) * math.cos(t)
        return density * (1 + g) ** -0.5 * (1 - r2 * g / (1 + g)) ** (-(n - 1) / 2)

    assert integrate.quad(ratio, 0, math.pi / 2, epsabs=1e-12, limit=500)[0] == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("drift", [0.0, 5.0])
def test_null_distribution_of_the_statistic(drift: float) -> None:
    # Four increments have one possible onset, whose ratio is an increasing function of a Beta variable.
    statistic = 2000 * evidence_of(ChangeDetector(1e-9, window=4), walks(2000, 5, seed=3, drift=drift))
    explained = torch.linspace(0, 1, 200001, dtype=torch.float64)
    g = 0.75 * torch.tensor(SHIFTS, dtype=torch.float64)[:, None] ** 2
    ratio = ((1 + g) ** -0.5 * (1 - explained * g / (1 + g)) ** -1.5).mean(0)
    found = np.interp(statistic.numpy(), ratio.numpy(), explained.numpy())
    assert stats.kstest(found, stats.beta(0.5, 1).cdf).pvalue > 0.01


@pytest.mark.parametrize("drift", [0.0, 2.0])
@pytest.mark.parametrize(("alpha", "m"), [(1 / 50, 1), (1 / 200, 1), (0.5, 20)])
def test_false_alarms_stay_within_the_bound(alpha: float, m: int, drift: float) -> None:
    # 600 / m families of m series in one detector, with alarms at a rate of alpha/m for each series.
    copies, n = 600 // m, 100
    detector = ChangeDetector(0.999, window=32)
    # The threshold of a single family.
    detector.false_alarms = alpha * copies
    alarms = len(run(detector, walks(copies * m, n, seed=m, drift=drift)))
    assert 0 < alarms <= alpha * n * copies


def test_scatter_about_a_level_raises_fewer_alarms() -> None:
    detector = ChangeDetector(0.999, window=32)
    detector.false_alarms = 600 / 50
    scatter = torch.randn(600, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert len(run(detector, scatter)) <= 0.2 * 100 * 600 / 50


@pytest.mark.parametrize("wandering", [True, False])
def test_denser_snapshots_raise_no_alarms(wandering: bool) -> None:
    gaps = [1.0] * 20 + [0.25] * 40 + [1.0] * 20
    noise = torch.randn(500, 80, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    time = torch.tensor(gaps, dtype=torch.float64)
    # A steady trend, ten times the noise, continues while snapshots are denser.
    series = 10 * time.cumsum(0) + ((noise * time.sqrt()).cumsum(1) if wandering else noise)
    detector = ChangeDetector(0.999, window=32)
    detector.false_alarms = 500 / 50
    assert len(run(detector, series, gaps)) <= 80 * 500 / 50
    # Without the intervals, the trend seems to change twice in every series.
    naive = ChangeDetector(0.999, window=32)
    naive.false_alarms = 500 / 50
    assert len(run(naive, series)) >= 900


@pytest.mark.parametrize(
    ("jump", "slope", "delay"),
    [(20.0, 0.0, 1), (-20.0, 0.0, 1), (0.0, 5.0, 4), (0.0, -5.0, 4)],
)
def test_detection_delay(jump: float, slope: float, delay: int) -> None:
    # Increments have standard deviation 1, 20 of them before the change; one false alarm per 100 snapshots is allowed.
    time = torch.arange(30, dtype=torch.float64)
    change = jump * (time >= 21) + slope * (time - 20).clamp_min(0)
    detector = ChangeDetector(0.999)
    detector.false_alarms = 50 * 0.01
    alarms = run(detector, walks(50, 30, seed=1, drift=0.5) + change)
    found = {c.series for t, c in alarms if 20 < t <= 20 + delay and 18 <= c.onset <= 21}
    assert len(found) >= 48


def test_reported_change() -> None:
    x = walks(1, 40, seed=7) + 30.0 * (torch.arange(40) >= 25)
    [(t, change)] = run(ChangeDetector(0.01), x)
    assert (t, change.series, change.onset) == (25, 0, 24)
    assert (change.before, change.after) == (float(x[0, 24]), float(x[0, 25]))
    assert change.evidence == pytest.approx(math.log10(slow_evidence(x[0, :26].numpy(), np.ones(26), 1)), rel=1e-9)


def test_a_constant_that_jumps() -> None:
    constant = torch.zeros(1, 30, dtype=torch.float64)
    assert run(ChangeDetector(0.05), constant) == []
    assert run(ChangeDetector(0.05, resolution=0.1), constant) == []
    jump = constant + 1.0 * (torch.arange(30) >= 15)
    for resolution in (0.0, 0.1):
        assert [(t, c.onset) for t, c in run(ChangeDetector(0.01, resolution=resolution), jump)] == [(15, 14)]
    # A change below the resolution is not detected.
    assert run(ChangeDetector(0.01, resolution=0.1), jump * 0.05) == []


def test_units_and_origins_do_not_matter() -> None:
    series = walks(5, 60) + 12.0 * (torch.arange(60) >= 30)
    trend = torch.arange(60) * 2.0**10
    expected = run(ChangeDetector(0.05), series)
    for scale, shift in [(2.0**20, 0.0), (2.0**-20, 2.0**-10), (1.0, 2.0**12), (1.0, trend)]:
        found = run(ChangeDetector(0.05), series * scale + shift)
        assert [(t, c.series, c.onset) for t, c in found] == [(t, c.series, c.onset) for t, c in expected]
        assert [c.evidence for _, c in found] == pytest.approx([c.evidence for _, c in expected], rel=1e-8)
    assert len(expected) >= 5


def test_small_low_and_short_changes_are_ignored() -> None:
    time = torch.arange(30)
    jump = walks(1, 30, seed=2) * 0.01 + 1.0 * (time >= 15)
    spike = walks(1, 30, seed=2) * 0.01 + 1.0 * (time == 15)
    assert len(run(ChangeDetector(0.01, min_change=0.9), jump)) == 1
    assert run(ChangeDetector(0.01, min_change=1.2), jump) == []
    assert len(run(ChangeDetector(0.01, min_level=0.9), jump)) == 1
    assert run(ChangeDetector(0.01, min_level=1.2), jump) == []
    assert [t for t, _ in run(ChangeDetector(0.01, min_change=0.5), spike)] == [15]
    assert run(ChangeDetector(0.01, min_change=0.5, persistence=2), spike) == []
    assert [(t, c.onset) for t, c in run(ChangeDetector(0.01, min_change=0.5, persistence=2), jump)] == [(16, 14)]
    # When a decline slows down, the trend shifts upwards, but the level still falls.
    slower = walks(1, 30, seed=2) * 0.01 - time.clamp_max(15) - 0.1 * (time - 15).clamp_min(0)
    assert len(run(ChangeDetector(0.01), slower)) == 1
    assert run(ChangeDetector(0.01, min_change=0.5), slower) == []


def test_missing_values_are_skipped() -> None:
    series = walks(1, 30, seed=5, drift=3.0)
    holes = series.clone()
    holes[0, [4, 11, 12, 29]] = math.nan
    known = [t for t in range(29) if t not in (4, 11, 12)]
    gaps = np.diff(known, prepend=0).astype(float)
    found = evidence_of(ChangeDetector(1e-9), holes[:, :29])
    assert float(found) == pytest.approx(slow_evidence(series[0, known].numpy(), gaps, 1), rel=1e-9)
    detector = ChangeDetector(1e-9)
    run(detector, holes[:, :29])
    detector.false_alarms = 1e300
    assert detector.update(29, holes[:, 29]) == []
    # A series that begins later has the same statistic.
    late = torch.cat([torch.full((1, 7), math.nan, dtype=torch.float64), series], 1)
    expected = evidence_of(ChangeDetector(1e-9), series)
    torch.testing.assert_close(evidence_of(ChangeDetector(1e-9), late), expected, rtol=1e-12, atol=0)


def test_many_series_are_detected_as_one_at_a_time() -> None:
    series = walks(6, 50) + 25.0 * (torch.arange(50) >= torch.arange(20, 26)[:, None])
    joint = run(ChangeDetector(0.06), series)
    alone = [(t, i, c) for i in range(6) for t, c in run(ChangeDetector(0.01), series[i : i + 1])]
    assert [(t, c.series, c.onset) for t, c in joint] == [
        (t, i, c.onset) for t, i, c in sorted(alone, key=lambda x: x[:2])
    ]
    assert len(joint) >= 6


def test_state_survives_a_checkpoint() -> None:
    series = walks(8, 80) + 15.0 * (torch.arange(80) >= 60)
    detector = ChangeDetector(0.2, window=16)
    run(detector, series[:, :41])
    file = io.BytesIO()
    torch.save(detector.state_dict(), file)
    file.seek(0)
    resumed = ChangeDetector(0.2, window=16)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    rest = [detector.update(t, series[:, t]) for t in range(41, 80)]
    assert [resumed.update(t, series[:, t]) for t in range(41, 80)] == rest
    assert any(rest)
    with pytest.raises(ValueError, match="window of 16, not 64"):
        ChangeDetector().load_state_dict(detector.state_dict())


def test_series_are_added_and_removed() -> None:
    series = walks(4, 40)
    detector = ChangeDetector(1e-9)
    run(detector, series[:3, :20])
    detector.add(1, copy_of=1)
    assert (len(detector), detector.num_increments(3)) == (4, 19)
    detector.keep(torch.tensor([3, 0]))
    twin = ChangeDetector(1e-9)
    run(twin, series[[1, 0, 2], :20])
    twin.keep(torch.tensor([0, 1]))
    for t in range(20, 39):
        assert detector.update(t, series[[1, 0], t]) == twin.update(t, series[[1, 0], t]) == []
    for one in (detector, twin):
        one.false_alarms = math.inf
    changes = [one.update(39, series[[1, 0], 39]) for one in (detector, twin)]
    assert [c.evidence for c in changes[0]] == pytest.approx([c.evidence for c in changes[1]], rel=1e-12)
    assert [len(x) for x in changes] == [2, 2]


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.7])
def test_the_autocorrelation_is_estimated(phi: float) -> None:
    detector = ChangeDetector(1e-9, autocorrelated=True)
    trend = torch.arange(60) * 0.5
    run(detector, autoregressive(30, 60, phi, seed=1).cumsum(1) + trend)
    assert detector.autocorrelation == pytest.approx(phi, abs=0.06)
    # Series that do not move, and missing values, say nothing about it.
    still, before = torch.zeros(30, dtype=torch.float64), detector.autocorrelation
    series = autoregressive(60, 60, phi, seed=1).cumsum(1)
    detector = ChangeDetector(1e-9, autocorrelated=True)
    for t, values in enumerate(series[:30].T):
        missing = torch.full((1,), math.nan if t % 2 else 1.0, dtype=torch.float64)
        detector.update(t, torch.cat([values + trend[t], still, missing]))
    assert detector.autocorrelation == pytest.approx(before, abs=0.03)


@pytest.mark.parametrize("phi", [0.1, 0.5, 0.9])
def test_the_mean_of_bounded_products(phi: float) -> None:
    # Of x and y, normal with correlation phi, the angle alone counts: x, y = L (cos t, sin t) with Cholesky factor L.
    def product(t: float) -> float:
        x, y = math.cos(t), phi * math.cos(t) + math.sqrt(1 - phi**2) * math.sin(t)
        return 2 * x * y / (x * x + y * y) / (2 * math.pi)

    c = integrate.quad(product, 0, 2 * math.pi)[0]
    assert c == pytest.approx((1 - math.sqrt(1 - phi**2)) / phi, abs=1e-9)
    assert 2 * c / (1 + c**2) == pytest.approx(phi, abs=1e-9)


def test_without_autocorrelation_nothing_is_subtracted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Whitening, "autocorrelation", 0.0)
    series = walks(6, 40, seed=2)
    series[3, 20:] += 30
    expected = run(ChangeDetector(0.1), series)
    assert run(ChangeDetector(0.1, autocorrelated=True), series) == expected
    assert expected


def test_a_steady_trend_is_no_change_with_autocorrelation() -> None:
    # Gaps and increments become shorter by the same factor.
    gaps = [1.0] * 15 + [0.25] * 20 + [1.0] * 15
    time = torch.tensor(gaps, dtype=torch.float64).cumsum(0)
    smooth = 0.1 * autoregressive(20, 50, 0.5, seed=3).cumsum(1) + 100 * time
    # A trend that became a change would have a hundred digits of evidence; at 0.01, half a false alarm is expected.
    detector = ChangeDetector(0.001, autocorrelated=True)
    assert run(detector, smooth, gaps) == []
    assert detector.autocorrelation > 0.2


@pytest.mark.parametrize("duration_is_over", [False, True])
def test_statistic_with_autocorrelation_equals_its_definition(
    monkeypatch: pytest.MonkeyPatch, duration_is_over: bool
) -> None:
    # Shifts of the increments, and shifts of what remains of these when the autocorrelation has been subtracted.
    phi, n = 0.6, 14 if duration_is_over else 8
    monkeypatch.setattr(_Whitening, "autocorrelation", phi)
    series = autoregressive(3, n, phi, seed=9).cumsum(1)
    whiten = np.eye(n - 1) - phi * np.eye(n - 1, k=-1)
    Q = np.linalg.svd((whiten @ np.ones(n - 1))[None])[2][1:]
    expected = []
    for x in series.numpy():
        w, ratios = Q @ whiten @ np.diff(x), []
        for s, duration, tau in product(range(3, n - 1), DURATIONS, SHIFTS):
            inside = ((np.arange(n - 1) >= s) & (np.arange(n - 1) < (s + duration if duration else n))).astype(float)
            for shift in (whiten @ inside, (whiten @ np.ones(n - 1)) * inside):
                z = Q @ shift
                V = np.eye(n - 2) + tau**2 * np.outer(z, z)
                ratios.append(np.linalg.det(V) ** -0.5 * (w @ w / (w @ np.linalg.solve(V, w))) ** ((n - 2) / 2))
        expected.append(np.sum(ratios) / len(DURATIONS) / len(SHIFTS) / 2 / 3)
    found = evidence_of(ChangeDetector(1e-9, autocorrelated=True), series)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-9, atol=0)


def test_false_alarms_of_autocorrelated_increments() -> None:
    # As in the test of the bound, 30 families of 20 series.
    series, alarms = autoregressive(600, 100, 0.7, seed=4).cumsum(1), []
    for autocorrelated in (False, True):
        detector = ChangeDetector(0.999, window=32, autocorrelated=autocorrelated)
        detector.false_alarms = 0.1 * 30
        alarms.append(len(run(detector, series)))
    assert alarms[0] > 2 * 0.1 * 100 * 30
    assert 0 < alarms[1] <= 0.1 * 100 * 30


@pytest.mark.parametrize("phi", [0.0, 0.5])
def test_jumps_are_detected_beside_autocorrelation(phi: float) -> None:
    series = 0.1 * autoregressive(20, 40, phi, seed=5).cumsum(1)
    series[7, 25:] += 5
    [(t, change)] = run(ChangeDetector(0.01, autocorrelated=True), series)
    assert (t, change.series, change.onset) == (25, 7, 24)
    assert (change.before, change.after) == (float(series[7, 24]), float(series[7, 25]))


def test_the_autocorrelation_survives_a_checkpoint() -> None:
    series = autoregressive(8, 80, 0.6, seed=6).cumsum(1) + 15.0 * (torch.arange(80) >= 60)
    detector = ChangeDetector(0.2, window=16, autocorrelated=True)
    run(detector, series[:, :41])
    file = io.BytesIO()
    torch.save(detector.state_dict(), file)
    file.seek(0)
    resumed = ChangeDetector(0.2, window=16, autocorrelated=True)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.autocorrelation == detector.autocorrelation > 0
    rest = [detector.update(t, series[:, t]) for t in range(41, 80)]
    assert [resumed.update(t, series[:, t]) for t in range(41, 80)] == rest
    assert any(rest)
    # A state without one: the first snapshot is tested as of independent increments.
    plain = ChangeDetector(0.2, window=16)
    run(plain, series[:, :41])
    resumed.load_state_dict(plain.state_dict())
    assert resumed.autocorrelation == 0
    assert resumed.update(41, series[:, 41]) == plain.update(41, series[:, 41])
    # And the other way round.
    plain.load_state_dict(detector.state_dict())
    assert plain.autocorrelation == 0
    assert len(plain) == 8


def test_series_with_autocorrelation_are_added_and_removed() -> None:
    series = autoregressive(4, 40, 0.6, seed=7).cumsum(1)
    detector, twin = (ChangeDetector(1e-9, autocorrelated=True) for _ in range(2))
    run(detector, series[:3, :20])
    run(twin, series[:3, :20])
    detector.add(1, copy_of=1)
    detector.keep(torch.tensor([3, 0]))
    twin.keep(torch.tensor([1, 0]))
    for t in range(20, 40):
        for one in (detector, twin):
            one.false_alarms = math.inf if t == 39 else 1e-9
        changes = [one.update(t, series[[1, 0], t]) for one in (detector, twin)]
        assert changes[0] == changes[1]
    assert [len(x) for x in changes] == [2, 2]
    assert detector.autocorrelation == twin.autocorrelation > 0


def test_settings_are_checked() -> None:
    for wrong in ({"false_alarms": 0.0}, {"false_alarms": 1.0}, {"min_change": -1.0}, {"resolution": math.nan},
                  {"persistence": 0}, {"persistence": 65}, {"min_before": 1}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            ChangeDetector(**wrong)  # type: ignore[arg-type]
    detector = ChangeDetector()
    detector.update(0, torch.zeros(2))
    with pytest.raises(ValueError, match=r"There are 2 series, but values of shape \(1,\)"):
        detector.update(1, torch.zeros(1))
    with pytest.raises(ValueError, match="relative_interval must be positive"):
        detector.update(1, torch.zeros(2), relative_interval=0.0)
