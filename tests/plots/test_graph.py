"""The graph figure: its texts, its marks, and that no memory is kept."""

from __future__ import annotations

import gc
import io
import resource
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from lib_lightning.plots.graph import Annotations, draw_graph
from lib_lightning.plots.image import render_png
from lib_lightning.plots.palette import AGAINST, DRIVES, paler
from tests.plots.pages import layer


def texts(figure: Figure) -> list[str]:
    return [t.get_text() for t in (*figure.texts, *figure.axes[0].texts)]


@pytest.fixture
def wide() -> Figure:
    bases = [layer("first", torch.rand(60).sort(descending=True).values), layer("output", torch.rand(5), "neuron")]
    return draw_graph(bases, [torch.rand(5, 60)], "A title", max_edges=100, max_features=40)


def test_texts_give_the_numbers_shown_and_the_totals(wide: Figure) -> None:
    said = texts(wide)
    assert {"A title", "first", "output", "40 of 60 features", "5 neurons"} <= set(said)
    (edges,) = (text for text in said if "edges" in text)
    assert edges.startswith("100 of 300 edges\n")
    assert edges.endswith("% of strength")


def test_the_strongest_edges_are_drawn_last() -> None:
    E = torch.tensor([[1.0, 0.25], [0.0, 0.04]])
    figure = draw_graph([layer("a", torch.tensor([1.0, 0.1])), layer("b", torch.tensor([1.0, 0.1]))], [E], max_edges=2)
    (lines,) = (c for c in figure.axes[0].collections if isinstance(c, LineCollection))
    widths, opacity = np.asarray(lines.get_linewidths()), lines.get_colors()[:, 3]
    assert len(widths) == 2
    assert widths[1] > widths[0]
    assert opacity[1] > opacity[0]
    assert "2 of 3 edges\n97% of strength" in texts(figure)


@pytest.mark.parametrize("modules", [None, [torch.tensor([0, 1]), torch.tensor([0, 1])]])
def test_signs_are_colours_and_dashes_and_lines_between_modules_are_paler(modules: list[torch.Tensor] | None) -> None:
    layers = [layer(name, torch.tensor([1.0, 0.1])) for name in "ab"]
    E, A = torch.tensor([[1.0, 0.25], [0.5, 0.04]]), torch.tensor([[1.0, -0.25], [0.5, -0.04]])
    figure = draw_graph(layers, [E], annotations=Annotations(modules), attributions=[A])
    drawn = {}
    for lines in (c for c in figure.axes[0].collections if isinstance(c, LineCollection)):
        for segment, color in zip(lines.get_segments(), lines.get_colors(), strict=True):
            drawn[tuple(map(float, segment[:, 1]))] = (to_hex(color).upper(), lines.get_linestyles()[0][1] is not None)
    high, low = sorted({y for ends in drawn for y in ends}, reverse=True)
    between = (lambda color: color) if modules is None else paler
    assert drawn == {
        (high, high): (DRIVES, False), (high, low): (between(DRIVES), False),
        (low, high): (between(AGAINST), True), (low, low): (AGAINST, True),
    }  # fmt: skip
    legend = {text.get_text() for box in figure.legends for text in box.get_texts()}
    assert {"drives", "holds against"} <= legend
    assert ("between modules" in legend) == (modules is not None)


def test_dots_grow_with_importance(wide: Figure) -> None:
    dots = [c for c in wide.axes[0].collections if not isinstance(c, LineCollection)]
    sizes = dots[0].get_sizes()
    assert (np.diff(sizes) <= 0).all()


@pytest.mark.parametrize("sizes", [(1, 1), (0, 3), (3, 0), (300, 300), (12, 40, 3, 7, 9, 2)])
def test_any_size_is_drawn_without_overlapping_text(sizes: tuple[int, ...]) -> None:
    bases = [layer(f"blocks.{k}.attention:input", torch.rand(r)) for k, r in enumerate(sizes)]
    figure = draw_graph(bases, [torch.rand(b, a) for a, b in pairwise(sizes)])
    png = render_png(figure)
    image = Image.open(io.BytesIO(png.data))
    assert image.size == (png.width, png.height)
    renderer = figure.canvas.get_renderer()
    boxes = [t.get_window_extent(renderer) for t in (*figure.texts, *figure.axes[0].texts) if len(t.get_text()) > 3]
    for k, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.x1 <= png.width
        assert not any(box.overlaps(other) for other in boxes[k + 1 :])


def test_the_image_is_small() -> None:
    bases = [layer(str(k), torch.rand(40)) for k in range(4)]
    png = render_png(draw_graph(bases, [torch.rand(40, 40)] * 3, max_edges=500))
    assert len(png.data) < 250_000


def test_hundreds_of_figures_are_freed() -> None:
    bases = [layer("a", torch.ones(2)), layer("b", torch.ones(2))]
    alive: weakref.WeakSet[Figure] = weakref.WeakSet()

    def draw(times: int) -> int:
        for _ in range(times):
            figure = draw_graph(bases, [torch.eye(2)])
            render_png(figure)
            alive.add(figure)
        del figure
        gc.collect()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    settled = draw(50)
    grown = draw(80) - settled
    assert not alive
    assert not pyplot.get_fignums()
    # Kilobytes. A figure holds over 2 MB of pixels, so a leak would be at least 160,000.
    assert grown < 100_000
