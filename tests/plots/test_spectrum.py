"""The figure of importance spectra."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.lines import Line2D
from torch import nn

from lib_lightning import compute_interaction_graph
from lib_lightning.algorithm.basis import Basis
from lib_lightning.plots.palette import BLUE, VERMILION
from lib_lightning.plots.spectrum import FLOOR, draw_spectrum
from tests.plots.pages import assert_readable, layer, words


def spectra(axes: Axes) -> list[Line2D]:
    return [line for line in axes.lines if line.get_linestyle() == "-"]


def bands(axes: Axes) -> list[PolyCollection]:
    return [c for c in axes.collections if isinstance(c, PolyCollection) and c.get_paths()]


def marks(axes: Axes, hollow: bool) -> list[float]:
    lines = [line for line in axes.lines if line.get_linestyle() == "None"]
    return [x for line in lines if (line.get_markerfacecolor() == "white") is hollow for x in line.get_xdata()]


def test_each_basis_is_normalized_by_its_largest_importance() -> None:
    lib, neuron = torch.tensor([4.0, 2.0, 1.0]), torch.tensor([10.0, 40.0])
    figure = draw_spectrum({"lib": [layer("a", lib)], "pca": [layer("a", neuron, "neuron")]})
    first, second = spectra(figure.axes[0])
    assert (first.get_color(), second.get_color()) == (BLUE, VERMILION)
    assert first.get_ydata() == pytest.approx([1, 0.5, 0.25])
    assert second.get_ydata() == pytest.approx([1, 0.25])
    assert list(first.get_xdata()) == [1, 2, 3]
    assert figure.axes[0].get_yscale() == "log"
    assert {"LIB", "PCA", "features by importance; the largest of each basis is 1"} <= set(words(figure))
    assert first.get_zorder() > second.get_zorder()
    assert first.get_linewidth() < second.get_linewidth()


def test_bands_reach_two_standard_errors() -> None:
    basis = replace(layer("a", torch.tensor([4.0, 2.0])), importance_error=torch.tensor([0.4, 0.8]))
    figure = draw_spectrum({"lib": [basis, replace(basis, name="b", importance_error=None)]})
    (band,) = bands(figure.axes[0])
    y = {(x, round(v, 6)) for x, v in band.get_paths()[0].vertices}
    assert {(1, 0.8), (1, 1.2), (2, 0.1), (2, 0.9)} <= y
    assert not bands(figure.axes[1])
    assert "± 2 standard errors" in words(figure)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_invalid_errors_have_no_band(bad: float) -> None:
    basis = replace(layer("a", torch.tensor([4.0, 2.0])), importance_error=torch.full((2,), bad))
    figure = draw_spectrum({"lib": [basis]})
    assert not bands(figure.axes[0])
    assert "± 2 standard errors" not in words(figure)


def test_degenerate_features_are_hollow() -> None:
    basis = layer("a", torch.tensor([1.0, 4.0, 2.0]))
    figure = draw_spectrum({"lib": [replace(basis, degenerate=torch.tensor([True, False, False]))]})
    assert marks(figure.axes[0], hollow=True) == [3]  # positions in order of importance
    assert marks(figure.axes[0], hollow=False) == [1, 2]
    assert "direction not determined by the samples" in words(figure)
    assert "direction not determined by the samples" not in words(draw_spectrum({"lib": [basis]}))


def test_features_below_the_floor_are_counted() -> None:
    importance = torch.tensor([1.0, 0.1, 0.5 * FLOOR, 0.0, 0.0])
    figure = draw_spectrum({"lib": [layer("a", importance), layer("b", torch.zeros(2))]})
    (line,) = spectra(figure.axes[0])
    assert line.get_ydata() == pytest.approx([1, 0.1])
    assert not spectra(figure.axes[1])
    assert {"features below: 3 LIB", "features below: 2 LIB", "not drawn below"} <= set(words(figure))
    assert [FLOOR, FLOOR] in [list(line.get_ydata()) for line in figure.axes[0].lines]


@pytest.mark.parametrize("sizes", [(1,), (0, 3), (300,) * 8, (5,) * 13])
def test_any_size_is_readable(sizes: tuple[int, ...]) -> None:
    def basis(k: int, r: int, kind: str) -> Basis:
        importance = torch.logspace(0, -9, r)
        made = layer(f"transformer.h.{k}.attention.dropout:input", importance, kind)
        return replace(made, importance_error=0.2 * importance, degenerate=torch.rand(r) < 0.3)

    figure = draw_spectrum(
        {kind: [basis(k, r, kind) for k, r in enumerate(sizes)] for kind in ("lib", "pca", "neuron")}
    )
    assert len(figure.axes) == len(sizes)
    assert_readable(figure)


def test_plot_spectrum_draws_a_graph_and_its_baselines() -> None:
    model, batches = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), [torch.randn(50, 4)]
    lib, pca, neuron = (
        compute_interaction_graph(model, batches, ["input", "1", "output"], basis=kind)
        for kind in ("lib", "pca", "neuron")
    )
    lib.info["step"] = 1200
    figure = lib.plot_spectrum([pca, neuron])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["input", "1", "output"]
    assert {"LIB", "PCA", "neurons", "Importance of features after 1,200 steps"} <= set(words(figure))
    for axes, basis in zip(figure.axes, lib.bases.values(), strict=True):
        drawn = spectra(axes)
        assert len(drawn) == 3
        share = np.sort(basis.importance.numpy())[::-1] / float(basis.importance.max())
        assert drawn[0].get_ydata() == pytest.approx(share)
    assert len(spectra(lib.plot_spectrum().axes[0])) == 1


def test_plot_spectrum_numbers_graphs_in_a_basis_of_the_same_kind() -> None:
    model, batches = nn.Linear(4, 3), [torch.randn(50, 4)]
    first, second, third = (
        compute_interaction_graph(model, [batch * scale for batch in batches], ["input", "output"])
        for scale in (torch.ones(4), torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([9.0, 1.0, 1.0, 1.0]))
    )
    figure = first.plot_spectrum([second, third])
    drawn = spectra(figure.axes[0])
    assert len(drawn) == len({line.get_color() for line in drawn}) == 3
    assert {"LIB", "LIB (2)", "LIB (3)"} <= set(words(figure))
    for line, graph in zip(drawn, (first, second, third), strict=True):
        importance = graph.bases["input"].importance
        assert line.get_ydata() == pytest.approx((importance / importance.max()).numpy())
