"""Modules, labels and degenerate features in the graph figure."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch import Tensor

from lib_lightning import InteractionGraph
from lib_lightning.algorithm.basis import Basis
from lib_lightning.plots.graph import Annotations, draw_graph
from lib_lightning.plots.legend import legend_rows
from lib_lightning.plots.palette import BETWEEN_MODULES, MODULES, NO_MODULE, OTHER_MODULES
from tests.plots.pages import assert_readable, words


def layer(name: str, r: int, kind: str = "lib", unsure: Tensor | None = None) -> Basis:
    eye = torch.eye(r)
    return Basis(name, kind, torch.zeros(r), eye, eye, torch.linspace(1, 0.1, r), degenerate=unsure)


def dots(figure: Figure) -> list[PathCollection]:
    return [c for c in figure.axes[0].collections if isinstance(c, PathCollection)]


def lines(figure: Figure) -> list[LineCollection]:
    return [c for c in figure.axes[0].collections if isinstance(c, LineCollection)]


def faces(figure: Figure, column: int) -> list[str]:
    return [to_hex(color).upper() for color in dots(figure)[column].get_facecolor()]


def heights(figure: Figure, column: int) -> np.ndarray:
    return np.asarray(dots(figure)[column].get_offsets())[:, 1]


BASES = [layer("a", 5), layer("b", 4)]
# Module 6 is the largest, then 2; feature 0 of "a" and feature 3 of "b" are in no module.
OF = [torch.tensor([-1, 6, 2, 6, 6]), torch.tensor([2, 6, 6, -1])]
E = torch.tensor(
    [[0.0, 0.0, 4.0, 1.0, 0.0], [0.0, 2.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.5, 0.0], [2.0, 0.0, 0.5, 0.0, 0.0]]
)


@pytest.fixture
def figure() -> Figure:
    return draw_graph(BASES, [E], annotations=Annotations(OF))


def test_features_are_ordered_by_module_size_and_then_by_importance(figure: Figure) -> None:
    first, second = MODULES[6], MODULES[2]
    assert faces(figure, 0) == [first] * 3 + [second, NO_MODULE]
    assert faces(figure, 1) == [first] * 2 + [second, NO_MODULE]
    indices = [text.get_text() for text in figure.axes[0].texts if text.get_text().isdigit()]
    assert indices == ["1", "3", "4", "2", "0", "1", "2", "0", "3"]


def test_a_module_has_the_same_height_in_all_columns(figure: Figure) -> None:
    before, after = heights(figure, 0), heights(figure, 1)
    assert (np.diff(before) < 0).all()
    assert (np.diff(after) < 0).all()
    assert before[:3].mean() == pytest.approx(after[:2].mean())
    assert before[3:] == pytest.approx(after[2:])


def test_edges_inside_modules_are_coloured_and_others_dashed(figure: Figure) -> None:
    between, inside = lines(figure)
    assert between.get_linestyles()[0][1] is not None
    assert inside.get_linestyles()[0][1] is None
    assert {to_hex(color).upper() for color in between.get_colors()} == {BETWEEN_MODULES}
    # Weakest first: the strongest edge, of module 2, is drawn last.
    assert [to_hex(color).upper() for color in inside.get_colors()] == [MODULES[6], MODULES[6], MODULES[2]]
    assert len(between.get_segments()) == 3
    inside_strength, total = 4 + 2 + 0.5, E.sum()
    assert f"6 of 6 edges\n100% of strength\n{100 * inside_strength / total:.0f}% inside modules" in words(figure)


def test_lines_end_at_their_features(figure: Figure) -> None:
    _, inside = lines(figure)
    strongest = inside.get_segments()[-1]  # from feature 2 of "a" to feature 0 of "b"
    assert strongest[:, 1] == pytest.approx([heights(figure, 0)[3], heights(figure, 1)[2]])


def test_modules_beyond_the_palette_share_a_neutral_colour() -> None:
    sizes = [3] * len(MODULES) + [1] * 5
    of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    figure = draw_graph(
        [layer("a", len(of)), layer("b", len(of))], [torch.eye(len(of))], max_features=40,
        annotations=Annotations([of, of]),
    )  # fmt: skip
    assert faces(figure, 0)[:3] == [MODULES[0]] * 3
    assert faces(figure, 0)[-5:] == [OTHER_MODULES] * 5
    said = words(figure)
    assert {"modules", "5 more", "between modules"} <= set(said)
    assert "none" not in said
    (row,) = (row for legend in figure.legends if "5 more" in (row := [t.get_text() for t in legend.get_texts()]))
    assert row == [*map(str, range(len(MODULES))), "5 more"]


def test_degenerate_features_are_hollow_and_explained_in_the_legend() -> None:
    unsure = torch.tensor([False, True, False])
    figure = draw_graph([layer("a", 3, unsure=unsure), layer("b", 3, unsure=~unsure)], [torch.eye(3)])
    assert [face == "#FFFFFF" for face in faces(figure, 0)] == unsure.tolist()
    assert [face == "#FFFFFF" for face in faces(figure, 1)] == (~unsure).tolist()
    assert "direction not determined" in words(figure)
    sure = draw_graph([layer("a", 3, unsure=unsure & ~unsure), layer("b", 3)], [torch.eye(3)])
    assert "direction not determined" not in words(sure)
    assert len(legend_rows()) == 2
    assert "numbers: indices" in words(sure)


def test_hollow_dots_keep_the_colour_of_their_module() -> None:
    bases = [replace(basis, degenerate=torch.ones(basis.n_features, dtype=torch.bool)) for basis in BASES]
    edge_colors = dots(draw_graph(bases, [E], annotations=Annotations(OF)))[0].get_edgecolor()
    assert [to_hex(color).upper() for color in edge_colors] == [MODULES[6]] * 3 + [MODULES[2], NO_MODULE]


def test_labels_are_beside_their_dots() -> None:
    names = [[f"k={j} a+b 9{j}%" for j in range(5)], ["", "x", "", "y"]]
    figure = draw_graph(BASES, [E], annotations=Annotations(OF, names))
    assert_readable(figure)
    placed = {t.get_text(): t.xy for t in figure.axes[0].texts if hasattr(t, "xy")}
    assert placed["k=2 a+b 92%"] == pytest.approx((0, heights(figure, 0)[3]))
    assert placed["y"] == pytest.approx((1, heights(figure, 1)[3]))


def test_long_labels_are_shortened_and_important_features_have_priority() -> None:
    long = "a name of a feature that is a good deal longer than the space for it"
    figure = draw_graph(
        [layer(str(k), 16) for k in range(4)],
        [torch.rand(16, 16)] * 3,
        max_features=40,
        annotations=Annotations(labels=[[long] * 16] * 4),
    )
    assert_readable(figure)
    assert sum(text.startswith("a name") and text.endswith("…") for text in words(figure)) == 4 * 16
    names = [f"name {j}" for j in range(40)]
    crowd = draw_graph(
        [layer("a", 40), layer("b", 2)], [torch.rand(2, 40)], annotations=Annotations(labels=[names, ["", "$x"]])
    )
    written = [int(text.removeprefix("name ")) for text in words(crowd) if text.startswith("name")]
    assert min(written) == 0
    assert max(written) < 16
    assert 1 < len(written) < 16, "there is not enough space for all of them"
    assert "$x" in words(crowd)


@pytest.mark.parametrize("sizes", [(1, 1), (0, 3), (300, 300), (12, 40, 3, 7, 9, 2), (16,) * 8, (60,) * 8])
@pytest.mark.parametrize("n_modules", [3, 40])
def test_any_size_is_readable(sizes: tuple[int, ...], n_modules: int) -> None:
    torch.manual_seed(0)
    bases = [
        layer(f"transformer.h.{k}.attention.dropout:input", r, unsure=torch.rand(r) < 0.3) for k, r in enumerate(sizes)
    ]
    modules = [torch.randint(-1, n_modules, (r,)) for r in sizes]
    labels = [[f"k={j} a+b 93%" for j in range(r)] for r in sizes]
    edges = [torch.rand(b, a) for a, b in pairwise(sizes)]
    assert_readable(draw_graph(bases, edges, "A title", annotations=Annotations(modules, labels)))


def test_plot_shows_modules_and_labels_if_known() -> None:
    graph = InteractionGraph({b.name: b for b in BASES}, {("a", "b"): E})
    plain = words(graph.plot())
    assert "modules" not in plain
    graph.modules, graph.labels = {"a": OF[0]}, {"b": ["", "cos 3", "", ""]}
    said = words(graph.plot())
    assert {"modules", "none", "cos 3"} <= set(said)
    assert any(text.endswith("\n0% inside modules") for text in said)  # the other layer has no modules
