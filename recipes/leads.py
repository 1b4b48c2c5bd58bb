"""Which of many quantities change before another one does: their steps compared over runs, with tests.

Each quantity has a step in each run, and so has what it is compared with. The ratio of the two is below 1 where the
quantity is first. Over runs there are the median ratio with an interval, and two tests: Wilcoxon's signed-rank test of
whether the logarithms of the ratios are symmetric about zero, and a sign test of whether the quantity changes in the
same direction in more runs than by chance. Noise has a step, too, but no direction: the larger of the two p-values is
that of a change that comes before or after the other. As many quantities are tried, p-values are corrected by Holm's
method, by which the chance of even one false lead among all that are tested is at most the level.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats

from lib_lightning.plots.palette import MODULES, MUTED, TEXT

LEVEL = 0.05


@dataclass(frozen=True)
class Lead:
    """Whether a quantity changes before what it is compared with.

    Attributes:
        ratios: Step of the quantity divided by that of the other, of each run that has both.
        times: Median of the ratios.
        interval: Interval of the median, see `median_interval`.
        before: Number of runs in which the quantity is first.
        rises: Number of runs in which the quantity rises; in all others it falls.
        p_value: Two-sided, the larger one of the two tests; NaN for fewer than two runs.
        rank_correlation: Spearman's correlation of the two steps over runs: whether a run in which the quantity is
            early is one in which the other is early. NaN for fewer than three runs.
    """

    ratios: tuple[float, ...]
    times: float
    interval: tuple[float, float]
    before: int
    rises: int
    p_value: float
    rank_correlation: float


def ends(steps: Sequence[float], values: Sequence[float], start: float) -> tuple[float, float]:
    """The value of a series at one step, and its final value.

    Args:
        steps: Steps, increasing.
        values: Values at these steps. The final value is the median of the last five, because training at a high
            learning rate has spikes, after which accuracy is low for some steps.
        start: Step of the first value.

    Returns:
        The two values.

    Example:
        >>> ends([0, 10, 20, 30, 40, 50], [5.0, 1.0, 3.0, 5.0, 0.0, 5.0], start=10)
        (1.0, 3.0)
    """
    first = next(value for step, value in zip(steps, values, strict=True) if step >= start)
    return first, statistics.median(values[-5:])


def halfway(steps: Sequence[float], values: Sequence[float], start: float) -> float:
    """Find when a series passes the midpoint between its value at one step and its final value.

    A noisy series passes it many times. Where it does so first is early, the more so the more noise there is. Of all
    passes in the direction of the change this is the one with the fewest values on the wrong side, before it and after
    it; the median if there are several.

    Args:
        steps: Steps, increasing.
        values: Values at these steps.
        start: Step of the first value, see `ends`.

    Returns:
        The step, interpolated; NaN if the final value equals the first, or is never reached from there.

    Example:
        >>> halfway([0, 10, 20, 30, 40, 50], [5.0, 1.0, 3.0, 5.0, 5.0, 5.0], start=10)
        20.0
        >>> halfway([0, 10, 20, 30, 40, 50], [0.0, 1.0, 0.0, 0.0, 1.0, 1.0], start=0)
        35.0
    """
    first, last = ends(steps, values, start)
    if last == first:
        return math.nan
    middle, sign = (first + last) / 2, math.copysign(1.0, last - first)
    known = [(step, sign * (value - middle)) for step, value in zip(steps, values, strict=True) if step >= start]
    wrong = sum(value < 0 for _, value in known)  # of a pass in front of all values
    passes: list[tuple[int, float]] = []
    for (before, a), (after, b) in itertools.pairwise(known):
        wrong += 1 if a >= 0 else -1
        if a < 0 <= b:
            passes.append((wrong, before + (after - before) * -a / (b - a)))
    if not passes:  # the final value is that of steps before the start
        return math.nan
    fewest, _ = min(passes)
    return statistics.median(step for number, step in passes if number == fewest)


def median_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Interval of the median of a distribution, without assumptions on its shape.

    Args:
        values: A sample of it.
        level: Largest probability that the median is not in the interval.

    Returns:
        Two values of the sample: as many as possible are left out on either side. With fewer than six values no
        interval has this level, and it is from the smallest to the largest.

    Example:
        >>> median_interval([1, 2, 3, 4, 5, 6, 7, 8, 9])
        (2, 8)
    """
    ordered, n = sorted(values), len(values)
    out = 0
    while 2 * (out + 1) < n and 2 * sum(math.comb(n, k) for k in range(out + 1)) / 2**n <= level:
        out += 1
    out = max(0, out - 1)
    return ordered[out], ordered[n - 1 - out]


def compare(steps: Sequence[float], others: Sequence[float], rises: Sequence[bool]) -> Lead:
    """Compare the steps of a quantity with those of another.

    Args:
        steps: Step of the quantity in each run; NaN where it has none.
        others: Step of the other in the same runs; NaN where it has none.
        rises: Whether the quantity rises in each run.

    Returns:
        The comparison.

    Example:
        >>> found = compare([10, 20, 30, 40, 50, 60], [20, 50, 40, 90, 70, 130], [True] * 6)
        >>> found.before, round(found.times, 3), round(found.p_value, 3)
        (6, 0.481, 0.031)
        >>> compare([10, 20, 30, 40, 50, 60], [20, 50, 40, 90, 70, 130], [True, False] * 3).p_value
        1.0
    """
    known = [(a, b, rise) for a, b, rise in zip(steps, others, rises, strict=True) if a > 0 and b > 0]
    if not known:
        return Lead((), math.nan, (math.nan, math.nan), 0, 0, math.nan, math.nan)
    pairs, upwards = [(a, b) for a, b, _ in known], sum(rise for *_, rise in known)
    ratios = [a / b for a, b in pairs]
    differs = len(pairs) > 1 and any(ratio != 1 for ratio in ratios)
    of_order = float(stats.wilcoxon([math.log(ratio) for ratio in ratios]).pvalue) if differs else math.nan
    of_direction = float(stats.binomtest(upwards, len(pairs)).pvalue)
    varies = len(pairs) > 2 and all(len(set(column)) > 1 for column in zip(*pairs, strict=True))
    return Lead(
        tuple(ratios),
        statistics.median(ratios),
        median_interval(ratios),
        sum(ratio < 1 for ratio in ratios),
        upwards,
        max(of_order, of_direction) if differs else math.nan,
        float(stats.spearmanr(*zip(*pairs, strict=True)).statistic) if varies else math.nan,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p-values for their number, by Holm's method (1979).

    Args:
        p_values: The p-values; NaN for what was not tested.

    Returns:
        Corrected ones, in the same order: those up to a level are significant at this level, together.

    Example:
        >>> holm([0.01, 0.04, 0.03, float("nan")])
        [0.03, 0.06, 0.06, nan]
    """
    tested = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, p * (len(tested) - rank)))
        corrected[i] = largest
    return corrected


def verdict(lead: Lead, corrected: float) -> str:
    """What a comparison says: ``"before"``, ``"after"``, or ``""`` if it cannot be told.

    Args:
        lead: The comparison.
        corrected: Its p-value, corrected for the number of comparisons.

    Returns:
        One word.
    """
    if math.isnan(corrected) or corrected > LEVEL:
        return ""
    return "before" if lead.times < 1 else "after"


def table(title: str, leads: Mapping[str, Lead], corrected: Mapping[str, float]) -> str:
    """Tabulate comparisons.

    Args:
        title: Heading of the first column.
        leads: Comparisons by the name of the quantity.
        corrected: Their corrected p-values.

    Returns:
        Markdown.
    """
    head = f"| {title} | rises in | times its step | 95% | first in | rank correlation | p, corrected | |"
    lines = [head, "|---" * 8 + "|"]
    for name, lead in leads.items():
        if not lead.ratios:
            lines.append(f"| {name} | - | - | - | - | - | - | |")
            continue
        low, high = lead.interval
        correlation = "-" if math.isnan(lead.rank_correlation) else f"{lead.rank_correlation:.2f}"
        p = "-" if math.isnan(corrected[name]) else f"{corrected[name]:.2g}"
        lines.append(
            f"| {name} | {lead.rises} of {len(lead.ratios)} | {lead.times:.2f} | {low:.2f} to {high:.2f} | "
            f"{lead.before} of {len(lead.ratios)} | "
            f"{correlation} | {p} | {verdict(lead, corrected[name])} |"
        )
    return "\n".join(lines)


def draw(
    titles: Sequence[str], columns: Sequence[Mapping[str, Lead]], corrected: Sequence[Mapping[str, float]], other: str
) -> Figure:
    """Draw for each quantity its step in each run, as a multiple of the step of the other.

    Args:
        titles: Titles of the columns.
        columns: Comparisons by the name of the quantity; the same names in each column.
        corrected: Their corrected p-values.
        other: What quantities are compared with.

    Returns:
        The figure.
    """
    names = list(dict.fromkeys(name for column in columns for name in column))
    height = 1.7 + 0.27 * len(names)
    figure = Figure(figsize=(4.2 + 3.3 * len(columns), height), dpi=100, facecolor="white")
    width = figure.get_figwidth()
    figure.text(
        0.1 / width, 1 - 0.3 / height, f"What changes before {other}, and what after it", fontsize=14, weight="bold",
        color=TEXT,
    )  # fmt: skip
    every = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(
        left=3.55 / width, right=1 - 0.15 / width, top=1 - 0.8 / height, bottom=0.85 / height, wspace=0.06
    )
    colors = {"before": MODULES[0], "after": MODULES[1], "": MUTED}
    for axes, title, column, p_values in zip(every, titles, columns, corrected, strict=True):
        axes.set_title(title, fontsize=10.5, weight="bold", color=TEXT, loc="left")
        for y, name in enumerate(names):
            axes.axhline(y, color=MUTED, lw=0.4, alpha=0.4, zorder=0)
            lead = column.get(name)
            if lead is None or not lead.ratios:
                continue
            color = colors[verdict(lead, p_values[name])]
            axes.plot(lead.ratios, [y] * len(lead.ratios), "o", color=color, ms=4, alpha=0.4, mew=0)
            axes.plot(lead.interval, [y, y], color=color, lw=3, solid_capstyle="butt")
            axes.plot([lead.times], [y], "|", color=TEXT, ms=12, mew=2)
        axes.axvline(1, color=TEXT, lw=1, ls=(0, (4, 2)), zorder=1)
        axes.set_xscale("log")
        axes.set_xlim(0.04, 12)
        axes.set_xticks([0.1, 0.3, 1, 3, 10], ["0.1", "0.3", "1", "3", "10"])
        axes.minorticks_off()
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(labelsize=9.5, colors=TEXT, length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    every[0].set_ylim(len(names) - 0.5, -0.5)
    middle = (3.55 / width + 1) / 2
    axis = f"step of the quantity, divided by that of {other}"
    figure.text(middle, 0.42 / height, axis, fontsize=9.5, color=TEXT, ha="center")
    words = {"before": f"before {other}", "after": "after it", "": "cannot be told apart"}
    handles = [Line2D([], [], color=colors[key], lw=3, label=label) for key, label in words.items()]
    median = "median of the runs (dots), with 95% interval"
    handles.append(Line2D([], [], color=TEXT, marker="|", ms=12, mew=2, ls="", label=median))
    figure.legend(
        handles=handles, loc="lower center", bbox_to_anchor=(middle, 0.02 / height), ncol=4, frameon=False,
        fontsize=9.5, labelcolor=TEXT,
    )  # fmt: skip
    return figure
