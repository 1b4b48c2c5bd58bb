"""The figure of ablation curves: scores, tolerance, and the required numbers."""

from __future__ import annotations

import math

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from lib_lightning.plots.curves import draw_ablation_curves
from lib_lightning.plots.palette import BLUE, VERMILION
from tests.plots.pages import assert_readable, words

COUNTS = torch.tensor([100, 1, 10, 1000])  # in any order
CURVES = {
    "embed -> mlp:input": {
        "lib": (COUNTS, torch.tensor([0.97, 0.1, 0.6, 0.99])),
        "pca": (COUNTS, torch.tensor([0.8, 0.1, 0.3, 0.99])),
    },
    "mlp:input -> output": {"lib": (COUNTS, torch.tensor([0.99, 0.2, 0.9, 0.99]))},
}
REQUIRED = {"embed -> mlp:input": {"lib": 100, "pca": 1000}, "mlp:input -> output": {"lib": 55}}


@pytest.fixture
def figure() -> Figure:
    return draw_ablation_curves(CURVES, 0.99, 0.02, REQUIRED, ylabel="accuracy")


def curves(axes: Axes) -> list[Line2D]:
    return [line for line in axes.lines if line.get_linestyle() == "-"]


def rings(axes: Axes) -> dict[str, tuple[float, float]]:
    found = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    return {line.get_color(): (line.get_xdata()[0], line.get_ydata()[0]) for line in found}


def test_each_section_has_a_line_for_each_basis(figure: Figure) -> None:
    first, second = figure.axes
    assert [line.get_color() for line in curves(first)] == [BLUE, VERMILION]
    assert list(curves(first)[0].get_xdata()) == [1, 10, 100, 1000]
    assert curves(first)[0].get_ydata() == pytest.approx([0.1, 0.6, 0.97, 0.99])
    assert len(curves(second)) == 1
    assert first.get_xscale() == second.get_xscale() == "log"
    assert first.get_ylim() == second.get_ylim()
    assert {"LIB", "PCA", "edges kept", "accuracy", "unablated model ± 0.02"} <= set(words(figure))


def test_the_unablated_score_is_a_line_inside_its_tolerance(figure: Figure) -> None:
    for axes in figure.axes:
        assert [0.99, 0.99] in [list(line.get_ydata()) for line in axes.lines]
        (tolerance,) = axes.patches
        assert tolerance.get_y() == pytest.approx(0.97)
        assert tolerance.get_height() == pytest.approx(0.04)
    assert not draw_ablation_curves(CURVES, 0.99).axes[0].patches


def test_required_counts_are_marked_on_their_curves(figure: Figure) -> None:
    first, second = figure.axes
    assert rings(first)[BLUE] == pytest.approx((100, 0.97))
    assert rings(first)[VERMILION] == pytest.approx((1000, 0.99))
    # 55 is between 10 and 100 on a logarithmic axis.
    assert rings(second)[BLUE] == pytest.approx((55, 0.9 + 0.09 * (math.log10(55) - 1)))
    assert {t.get_text(): t.get_color() for t in first.texts} == {"100": BLUE, "1,000": VERMILION}
    assert not rings(draw_ablation_curves(CURVES, 0.99).axes[0])


def test_a_count_of_zero_is_drawn() -> None:
    curve = torch.tensor([0, 1, 50]), torch.tensor([0.1, 0.2, 0.9])
    axes = draw_ablation_curves({"fc": {"lib": curve}}, 0.9).axes[0]
    assert axes.get_xscale() == "symlog"
    assert axes.get_xlim()[0] < 0
    assert list(curves(axes)[0].get_xdata()) == [0, 1, 50]


def test_scores_that_are_not_finite_are_not_drawn() -> None:
    curve = torch.tensor([1, 2, 50]), torch.tensor([float("nan"), float("inf"), 0.9])
    assert list(curves(draw_ablation_curves({"fc": {"lib": curve}}, 0.9).axes[0])[0].get_xdata()) == [50]


def curve(top: float, bottom: float) -> tuple[Tensor, Tensor]:
    counts = torch.logspace(0, 5, 12).round()
    return counts, bottom + (top - bottom) * torch.sigmoid(counts.log() - 5)


@pytest.mark.parametrize("n_panels", [1, 2, 3, 8, 13])
@pytest.mark.parametrize(("unablated", "ablated"), [(0.99, 0.01), (3.2, 9.8)])
def test_any_number_of_panels_is_readable(n_panels: int, unablated: float, ablated: float) -> None:
    names = [f"transformer.h.{k}.attention -> transformer.h.{k + 1}.attention" for k in range(n_panels)]
    of_bases = {kind: curve(unablated, ablated) for kind in ("lib", "pca", "neuron")}
    required = {name: {"lib": 1200, "pca": 1300, "neuron": 90000} for name in names}
    figure = draw_ablation_curves(dict.fromkeys(names, of_bases), unablated, 0.02, required)
    assert len(figure.axes) == n_panels
    assert_readable(figure)
