"""Importance spectra: one panel for each node layer, one line for each basis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator

from lib_lightning.algorithm.basis import Basis
from lib_lightning.plots.lineage_series import as_array, degenerate_mask
from lib_lightning.plots.palette import MUTED, basis_styles, basis_title
from lib_lightning.plots.panels import add_legend, panels
from lib_lightning.plots.text_metrics import DPI, shorten

# Importances below this fraction of the layer's largest are not drawn.
FLOOR = 1e-6
# Points between features below which markers are drawn only for features of undetermined direction.
_MIN_SPACING = 3.0
_FONT_SIZE = 8.5
# Tick labels as plain text: laying them out as math takes longer than the rest of the figure.
_TICKS = {1.0: "1", 1e-2: "10⁻²", 1e-4: "10⁻⁴", FLOOR: "10⁻⁶"}
_FLOOR_LINE: dict[str, Any] = {"lw": 0.9, "ls": (0, (4, 2))}


def draw_spectrum(bases: Mapping[str, Sequence[Basis]], title: str = "Importance of features") -> Figure:
    """Draw importance spectra.

    Each basis is normalized by its largest importance in the layer, since importances in different bases are different
    quantities. Bands show two standard errors, and features whose direction the samples do not determine are hollow,
    if the bases have this information.

    Args:
        bases: For each basis, by name ("lib", "pca", "random" or any other), its node layers.
        title: Title of the figure.

    Returns:
        A matplotlib figure that is not registered with pyplot.

    Example:
        >>> import torch
        >>> from lib_lightning.algorithm.basis import neuron_basis
        >>> figure = draw_spectrum({"neuron": [neuron_basis("fc", torch.zeros(3), torch.eye(3))]})
        >>> len(figure.axes)
        1
    """
    layers = list(dict.fromkeys(basis.name for layer in bases.values() for basis in layer))
    styles = basis_styles(list(bases))
    all_bases = [basis for layer in bases.values() for basis in layer]
    degenerate = any(degenerate_mask(basis).any() for basis in all_bases)
    with_errors = any(np.isfinite(_errors(basis)).any() for basis in all_bases)
    optional_entries = [
        (Line2D([], [], color=MUTED, lw=7, alpha=0.3, solid_capstyle="butt"), "± 2 standard errors", with_errors),
        (
            Line2D([], [], ls="", marker="o", color=MUTED, markerfacecolor="white", ms=6),
            "direction not determined by the samples",
            degenerate,
        ),
    ]
    meaning = [(mark, label) for mark, label, present in optional_entries if present]
    lines = [
        (Line2D([], [], color=styles[name][0], marker=styles[name][1], ms=5, lw=1.6), basis_title(name))
        for name in bases
    ]
    lines.append((Line2D([], [], color=MUTED, **_FLOOR_LINE), "not drawn below"))
    entries = [lines, meaning] if meaning else [lines]

    figure, all_axes = panels(
        layers, title, "features by importance; the largest of each basis is 1", "importance", len(entries)
    )
    for axes, layer in zip(all_axes, layers, strict=True):
        by_basis = {name: basis for name, of_layers in bases.items() for basis in of_layers if basis.name == layer}
        _frame(axes, max(basis.n_features for basis in by_basis.values()))
        # Earlier bases are drawn on top with thinner lines, so that all remain visible where they coincide.
        n_below_floor = {name: _draw_line(axes, by_basis[name], styles[name], k) for k, name in enumerate(by_basis)}
        below_counts = ", ".join(f"{n:,} {basis_title(name)}" for name, n in n_below_floor.items() if n)
        if below_counts:
            text = shorten(f"features below: {below_counts}", 0.95 * 72 * axes.bbox.width / DPI, _FONT_SIZE)
            axes.text(
                0.03, 0.02, text, transform=axes.transAxes, fontsize=_FONT_SIZE, color=MUTED, parse_math=False
            )  # fmt: skip
    add_legend(figure, entries)
    return figure


def _frame(axes: Axes, longest: int) -> None:
    axes.set_xlim(1 - 0.03 * longest - 0.3, longest + 0.03 * longest + 0.3)
    axes.set_yscale("log")
    axes.set_ylim(0.03 * FLOOR, 3)
    axes.yaxis.set_major_locator(FixedLocator(list(_TICKS)))
    axes.yaxis.set_major_formatter(FixedFormatter(list(_TICKS.values())))
    axes.axhline(FLOOR, color=MUTED, zorder=1, **_FLOOR_LINE)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))


def _draw_line(axes: Axes, basis: Basis, style: tuple[str, str], depth: int) -> int:
    """Draw one spectrum down to the floor, and return the number of features below it."""
    importance = as_array(basis.importance)
    largest = importance.max(initial=0.0)
    if largest <= 0:
        return len(importance)
    order = np.argsort(-importance, kind="stable")
    share = importance[order] / largest
    error = _errors(basis)[order] / largest
    degenerate = degenerate_mask(basis)[order]
    count = int((share >= FLOOR).sum())
    x, share, error, degenerate = np.arange(1, count + 1), share[:count], error[:count], degenerate[:count]
    color, marker = style
    has_error = np.isfinite(error)
    z = 4 - depth / 10
    low, high = np.maximum(share - 2 * error, FLOOR), share + 2 * error
    axes.fill_between(x, low, high, where=has_error, color=color, alpha=0.25, lw=0, zorder=2)
    axes.plot(x, share, color=color, lw=1.7 + 0.8 * depth, zorder=z)
    spacing = axes.bbox.width * 72 / DPI / np.ptp(axes.get_xlim())
    size = float(np.clip(spacing, 3.0, 5.0 + 1.5 * depth))
    filled = ~degenerate & (spacing >= _MIN_SPACING)
    for chosen, face in ((filled, color), (degenerate, "white")):
        axes.plot(
            x[chosen], share[chosen], marker, ms=size, color=color, markerfacecolor=face, mew=1.0, zorder=z + 0.01
        )
    return len(order) - count


def _errors(basis: Basis) -> np.ndarray:
    """Standard errors, NaN where they are not valid."""
    if basis.importance_error is None:
        return np.full(basis.n_features, np.nan)
    error = as_array(basis.importance_error)
    return np.where(error >= 0, error, np.nan)
