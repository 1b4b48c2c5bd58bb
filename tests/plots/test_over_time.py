"""Figures of scalars and spectra over training time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from lib_lightning.plots.fast_axes import FastAxes
from lib_lightning.plots.over_time import Curve, Panel, draw_over_time, draw_sparsity_over_time
from lib_lightning.plots.palette import BLUE, MODULES, VERMILION
from lib_lightning.plots.spectrum_over_time import counts_above, draw_spectrum_over_time
from lib_lightning.plots.steps_axis import is_log_spaced, set_step_axis
from tests.plots.pages import assert_readable, words

NAN = float("nan")
LOG = sorted({0, *(round(10 ** (k / 10)) for k in range(35))})


def curves(axes: Axes) -> list[list[float]]:
    return [list(line.get_ydata()) for line in axes.lines if line.get_linewidth() == 1.7]


@pytest.mark.parametrize(
    ("steps", "log"),
    [(LOG, True), (LOG[1:], True), ([2**k for k in range(12)], True), (range(0, 3000, 50), False), ([0], False),
     ([], False), ([5, 7], False), ([1, 2, 4, 8], False), ([*range(0, 500, 50), 480], False)],
)  # fmt: skip
def test_axis_scale_depends_on_the_spacing_of_steps(steps: list[int], log: bool) -> None:
    assert is_log_spaced(steps) is log
    axes = Figure().add_subplot()
    set_step_axis(axes, steps)
    assert axes.get_xscale() == ("linear" if not log else "symlog" if 0 in steps else "log")
    left, right = axes.get_xlim()
    assert left < right
    if len(steps) > 1:
        assert (left, right) == (min(steps), max(steps))


def test_step_0_is_half_a_decade_before_step_1() -> None:
    axes = Figure().add_subplot()
    set_step_axis(axes, LOG)
    zero, one, ten, hundred = (axes.transData.transform((step, 0))[0] for step in (0, 1, 10, 100))
    assert hundred - ten == pytest.approx(ten - one)
    assert one - zero == pytest.approx((ten - one) / 2)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0", "1", "10", "100", "1k"]


def test_panels_of_a_column_share_the_step_axis() -> None:
    accuracy = Panel("accuracy", [Curve("train", LOG, np.ones(len(LOG)) - 0.999), Curve("test", [0, 2000], [0, 1])],
                     limits=(0, 1))  # fmt: skip
    features = Panel("features", [Curve("lib", LOG, np.geomspace(900, 3, len(LOG)))])
    figure = draw_over_time([accuracy, features], "Grokking", marks={"99% test accuracy": 1700})
    first, second = figure.axes
    assert first.get_xlim() == second.get_xlim() == (0, max(LOG))
    assert first.get_xscale() == second.get_xscale() == "symlog"
    assert (first.get_yscale(), second.get_yscale()) == ("linear", "log")
    assert first.get_ylim() == (0, 1)
    assert first.get_position().x0 == second.get_position().x0
    assert first.get_position().y0 > second.get_position().y1
    assert isinstance(first, FastAxes)
    assert isinstance(second, FastAxes)
    steps = ["0", "1", "10", "100", "1k"]
    assert [axes.bottom_labels for axes in (first, second)] == [False, True]
    assert [t.get_text() for t in second.tick_labels()][:5] == steps
    assert not set(steps[2:]) & {t.get_text() for t in first.tick_labels()}
    assert {"Grokking", "train", "test", "LIB", "99% test accuracy"} <= set(words(figure))
    assert [1700, 1700] in [list(line.get_xdata()) for line in second.lines]
    colors = {t.get_text(): t.get_color() for axes in figure.axes for t in axes.texts}
    assert colors == {"train": MODULES[0], "test": MODULES[1], "LIB": BLUE}
    assert_readable(figure)


def test_several_runs_are_drawn_as_thin_lines_with_their_median() -> None:
    runs = [[1.0, 2.0, NAN], [3.0, 4.0, NAN], [8.0, NAN, NAN]]
    (axes,) = draw_over_time([Panel("a", [Curve("x", [0, 10, 20], runs)])]).axes
    (median,) = curves(axes)
    assert median == pytest.approx([3.0, 3.0, NAN], nan_ok=True)
    thin = [list(line.get_ydata()) for line in axes.lines if line.get_linewidth() < 1]
    assert thin == [pytest.approx(run, nan_ok=True) for run in runs]


def test_panels_of_a_row_share_the_y_axis() -> None:
    def column(top: float) -> list[Panel]:
        return [Panel(name, [Curve("x", [0, 10], [0, top])]), Panel("b", [Curve("y", [0, 10], [1, 2 * top])])]

    name = "a name that is longer than one of the columns"
    figure = draw_over_time({"seed 0": column(1), "seed 1": column(50)})
    first, second, third, fourth = figure.axes
    assert first.get_ylim() == second.get_ylim() != third.get_ylim()
    assert third.get_ylim() == fourth.get_ylim()
    assert first.get_ylim()[1] >= 50
    assert {"seed 0", "seed 1"} <= set(words(figure))
    assert first.get_title(loc="left") == name
    assert sum(text == "x" for text in words(figure)) == 1
    assert_readable(figure)
    with pytest.raises(ValueError, match="panels of the same names"):
        draw_over_time({"seed 0": column(1), "seed 1": column(1)[::-1]})


def test_overlapping_names_are_moved_apart() -> None:
    many = [Curve(f"curve number {k}", [0, 10], [k, 5.0]) for k in range(9)]
    figure = draw_over_time([Panel("a", many)])
    assert_readable(figure)
    assert {curve.name for curve in many} <= set(words(figure))


def test_different_numbers_of_steps_and_values_raise() -> None:
    with pytest.raises(ValueError, match="'lib' has 2 values, but there are 3 steps"):
        draw_sparsity_over_time([0, 1, 2], {"gini": {"lib": [0.1, 0.2]}})


def test_each_metric_has_a_panel_with_a_line_per_basis() -> None:
    scalars = {
        "effective_features": {"lib": [9.0, 4.0, 2.0], "pca": [9.5, 8.0, 7.0]},
        "edges_required": {"lib": [300.0, NAN, 3.0]},
        "gini": {"pca": [NAN, NAN, NAN]},
    }
    figure = draw_sparsity_over_time([0, 100, 200], scalars)
    first, second, third = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["effective features", "edges required", "gini"]
    assert curves(first) == [[9.0, 4.0, 2.0], [9.5, 8.0, 7.0]]
    assert [line.get_color() for line in first.lines] == [BLUE, VERMILION]
    assert (first.get_yscale(), second.get_yscale()) == ("linear", "log")
    assert first.get_ylim()[0] == 0
    (line,) = second.lines
    assert (line.get_linestyle(), line.get_marker()) == ("-", "o"), "nothing is drawn at missing values"
    assert np.isfinite(line.get_ydata()).tolist() == [True, False, True]
    assert all(math.isnan(value) for value in curves(third)[0])
    assert {"LIB", "PCA"} <= set(words(figure))
    assert_readable(figure)


def test_edges_of_the_shades_are_the_counts_above_thresholds() -> None:
    spectra = [torch.tensor([1.0, 0.2, 0.05, 5e-3, 5e-4, 5e-5, 5e-7]), torch.tensor([8.0, 9e-4]), torch.zeros(3)]
    assert [counts_above(s) for s in spectra] == [[2, 3, 4, 5, 6], [1, 1, 1, 2, 2], [0] * 5]
    figure = draw_spectrum_over_time([0, 10, 20], {"a": spectra, "b": spectra[:1] * 3})
    axes, other = figure.axes
    rims = [line.get_ydata() for line in axes.lines]
    lowest = axes.get_ylim()[0]
    assert [list(rim) for rim in rims] == [
        [n, m, lowest] for n, m in zip((2, 3, 4, 5, 6), (1, 1, 1, 2, 2), strict=True)
    ]
    shades = [c for c in axes.collections if isinstance(c, PolyCollection)]
    assert len(shades) == 5
    assert {y for x, y in shades[1].get_paths()[0].vertices if x == 0} == {2, 3}
    assert lowest < 1
    assert not axes.texts, "no counts are left at the end"
    assert {t.get_text() for t in other.texts} <= {"2", "3", "4", "5", "6"}
    assert_readable(figure)
    with pytest.raises(ValueError, match="'a' has 1 snapshots, but there are 2 steps"):
        draw_spectrum_over_time([0, 1], {"a": spectra[:1]})


@pytest.mark.parametrize(("layers", "features", "snapshots"), [(1, 1, 1), (8, 300, 200), (5, 0, 3)])
def test_spectra_of_any_size_are_readable(layers: int, features: int, snapshots: int) -> None:
    names = [f"transformer.h.{k}.attention.dropout:input" for k in range(layers)]
    spectra = [torch.logspace(0, -8, features) for _ in range(snapshots)]
    assert_readable(draw_spectrum_over_time(range(snapshots), dict.fromkeys(names, spectra)))
