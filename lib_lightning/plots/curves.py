"""Ablation curves: the score of a model against the number of edges or features that are kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, NullLocator
from torch import Tensor

from lib_lightning.plots.lineage_series import as_array
from lib_lightning.plots.palette import TEXT, basis_styles, basis_title
from lib_lightning.plots.panels import add_legend, panels
from lib_lightning.plots.text_metrics import short_number

_STROKE = [withStroke(linewidth=2.5, foreground="white")]
_COUNT_SIZE = 9.5


def draw_ablation_curves(
    curves: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
    unablated: float,
    tolerance: float | None = None,
    required: Mapping[str, Mapping[str, int]] | None = None,
    xlabel: str = "edges kept",
    ylabel: str = "score",
    title: str = "Edge ablation",
) -> Figure:
    """Draw the score against the number of edges or features that are kept.

    Args:
        curves: For each section (or node layer) and each basis ("lib", "pca", "neuron"), the numbers kept, shape
            ``(k,)``, and the scores, shape ``(k,)``.
        unablated: Score of the unablated model.
        tolerance: Allowed deviation from the unablated score; shaded.
        required: For each section and basis, the smallest number kept with a score within the tolerance. Bases that
            never reach the tolerance have no entry.
        xlabel: Label of the x axes.
        ylabel: Label of the y axes.
        title: Title of the figure.

    Returns:
        A matplotlib figure that is not registered with pyplot.

    Example:
        >>> import torch
        >>> curve = torch.tensor([1, 10, 100]), torch.tensor([0.1, 0.6, 0.9])
        >>> figure = draw_ablation_curves({"fc1 -> fc2": {"lib": curve}}, unablated=0.9, tolerance=0.05)
        >>> len(figure.axes)
        1
    """
    names = list(dict.fromkeys(name for section in curves.values() for name in section))
    styles = basis_styles(names)
    basis_entries = [
        (Line2D([], [], color=styles[name][0], marker=styles[name][1], ms=5, lw=1.6), basis_title(name))
        for name in names
    ]
    unablated_label = "unablated model" if tolerance is None else f"unablated model ± {tolerance:g}"
    mark_entries = [(Line2D([], [], color=TEXT, lw=1.2, ls=(0, (4, 2))), unablated_label)]
    if required:
        ring = Line2D([], [], ls="", marker="o", ms=9, color=TEXT, markerfacecolor="none", mew=1.4)
        mark_entries.append((ring, "required" if tolerance is None else "required to stay within"))
    figure, all_axes = panels(list(curves), title, xlabel, ylabel, 2)
    with_zero = any(bool((counts <= 0).any()) for section in curves.values() for counts, _ in section.values())
    for axes, by_basis in zip(all_axes, curves.values(), strict=True):
        axes.set_xscale("symlog", linthresh=1, linscale=0.4) if with_zero else axes.set_xscale("log")
        if tolerance is not None:
            axes.axhspan(unablated - tolerance, unablated + tolerance, color="#DDDDDD", lw=0, zorder=0)
        axes.axhline(unablated, color=TEXT, lw=1.2, ls=(0, (4, 2)), zorder=1)
        for name, (counts, scores) in by_basis.items():
            x, y = _curve(counts, scores)
            axes.plot(x, y, color=styles[name][0], marker=styles[name][1], ms=3.2, lw=1.6, zorder=3)
    _same_scale(all_axes)
    for axes, (section, by_basis) in zip(all_axes, curves.items(), strict=True):
        wanted = {name: count for name, count in ((required or {}).get(section) or {}).items() if name in by_basis}
        _mark_required(axes, by_basis, wanted, unablated, {name: color for name, (color, _) in styles.items()})
    add_legend(figure, [basis_entries, mark_entries])
    return figure


def _curve(counts: Tensor, scores: Tensor) -> tuple[np.ndarray, np.ndarray]:
    x, y = map(as_array, (counts, scores))
    order = np.argsort(x, kind="stable")
    finite = np.isfinite(y[order])
    return x[order][finite], y[order][finite]


def _same_scale(all_axes: Sequence[Axes]) -> None:
    """Give all panels the same score axis, and format counts without powers of ten."""
    if not all_axes:
        return
    lows, highs = zip(*(axes.get_ylim() for axes in all_axes), strict=True)
    for axes in all_axes:
        axes.set_ylim(min(lows), max(highs))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: short_number(count)))
        axes.xaxis.set_minor_locator(NullLocator())


def _mark_required(
    axes: Axes,
    by_basis: Mapping[str, tuple[Tensor, Tensor]],
    required: Mapping[str, int],
    unablated: float,
    colors: Mapping[str, str],
) -> None:
    low, high = axes.get_ylim()
    # Curves approach the unablated score from one side; beyond the required count, the rest of that side is empty.
    from_below = unablated > (low + high) / 2
    left, right = axes.get_xlim()
    to_axis = axes.xaxis.get_transform().transform
    for k, (name, count) in enumerate(sorted(required.items(), key=lambda item: -item[1])):
        x, y = _curve(*by_basis[name])
        # Interpolate in the coordinates of the axis, where the curve is drawn as straight lines.
        score = float(np.interp(to_axis([float(count)]), to_axis(x), y)[0]) if len(x) else unablated
        offset = 0.07 + 0.125 * k
        y_text = low + (high - low) * (offset if from_below else 1 - offset)
        axes.plot([count, count], [score, y_text], color=colors[name], lw=0.9, ls=(0, (1, 1.5)), zorder=2)
        axes.plot([count], [score], "o", ms=9, color=colors[name], markerfacecolor="none", mew=1.6, zorder=5)
        across = axes.transAxes.inverted().transform(axes.transData.transform((count, y_text)))[0]
        axes.annotate(
            f"{count:,}", (count, y_text), xytext=(3 if across < 0.6 else -3, 0), textcoords="offset points",
            ha="left" if across < 0.6 else "right", va="center", fontsize=_COUNT_SIZE, color=colors[name],
            path_effects=_STROKE, zorder=6,
        )  # fmt: skip
    axes.set_xlim(left, right)
