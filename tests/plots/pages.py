"""Bases to draw, and checks for every figure: no text outside the page or overlapping another, no pyplot state."""

from __future__ import annotations

import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.text import Text

from lib_lightning.algorithm.basis import Basis
from lib_lightning.plots.image import render_png


def layer(name: str, importance: torch.Tensor, kind: str = "lib") -> Basis:
    """A basis with some importances."""
    eye = torch.eye(len(importance))
    return Basis(name, kind, torch.zeros(len(importance)), eye, eye, importance)


def all_texts(figure: Figure) -> list[Text]:
    """All non-empty texts except tick labels, which matplotlib places."""
    texts = [*figure.texts, *(t for legend in figure.legends for t in legend.get_texts())]
    for axes in figure.axes:
        texts += [child for child in axes.get_children() if isinstance(child, Text)]
    return [text for text in texts if text.get_text().strip()]


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in all_texts(figure)]


def assert_readable(figure: Figure) -> None:
    """No text leaves the page or overlaps another one, and pyplot does not hold the figure."""
    png = render_png(figure)
    renderer = figure.canvas.get_renderer()
    texts = all_texts(figure)
    boxes = [text.get_window_extent(renderer) for text in texts]
    for k, (text, box) in enumerate(zip(texts, boxes, strict=True)):
        assert box.x0 >= 0, text
        assert box.x1 <= png.width, text
        assert box.y0 >= 0, text
        assert box.y1 <= png.height, text
        for other, below in zip(texts[k + 1 :], boxes[k + 1 :], strict=True):
            assert not box.overlaps(below), (text, other)
    assert not pyplot.get_fignums()
