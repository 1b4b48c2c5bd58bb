"""Axes whose frame, marks and numbers are a few lines and words: a page of panels is drawn in half the time."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backend_bases import RendererBase
from matplotlib.collections import LineCollection
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import IdentityTransform

from lib_lightning.plots.palette import MUTED
from lib_lightning.plots.text_metrics import DPI, short_number

_FRAME, _GRID = "#999999", "#E6E6E6"
_SIZE = 9.5
# Points: how long marks are, how far numbers are from the frame, how wide lines are.
_MARK, _PAD, _WIDTH, _GRID_WIDTH = 3.5, 7.0, 0.8, 0.6


class FastAxes(Axes):
    """Axes with a frame at the left and below, for `Figure.add_axes(..., axes_class=FastAxes)`.

    Matplotlib's own axes make five artists for each mark, whether it is seen or not. These ask the same locators and
    formatters, and make what is seen, when they are drawn.

    Attributes:
        numbers_left: Whether numbers stand at the left.
        numbers_below: Whether numbers stand below.
        grid_lines: Whether there is a line across the panel at each mark at the left.

    Example:
        >>> from matplotlib.figure import Figure
        >>> axes = Figure().add_axes((0.1, 0.1, 0.8, 0.8), axes_class=FastAxes)
        >>> _ = axes.set(xlim=(0, 2000), ylim=(0, 1), xticks=[0, 2000], yticks=[1])
        >>> [number.get_text() for number in axes.numbers()]
        ['0', '2k', '1']
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.numbers_left = self.numbers_below = True
        self.grid_lines = False
        self.set_axis_off()
        for axis in (self.xaxis, self.yaxis):
            axis.set_major_formatter(FuncFormatter(_written))

    def numbers(self) -> list[Text]:
        """The numbers at the axes, from the left and from below."""
        made = []
        if self.numbers_below:
            y = self.bbox.y0 - _PAD * DPI / 72
            made += [Text(x, y, word, ha="center", va="top", **self._style()) for x, word in self._marks(self.xaxis)]
        if self.numbers_left:
            x = self.bbox.x0 - _PAD * DPI / 72
            made += [Text(x, y, word, ha="right", va="center_baseline", **self._style())
                for y, word in self._marks(self.yaxis)]  # fmt: skip
        for number in made:
            number.set_figure(self.figure)
        return made

    def _style(self) -> dict[str, Any]:
        return {"fontsize": _SIZE, "color": MUTED, "parse_math": False, "transform": IdentityTransform()}

    def _marks(self, axis: Axis) -> list[tuple[float, str]]:
        """Pixels of the marks that are in view, and what is written there."""
        across = axis is self.xaxis
        low, high = sorted(self.get_xlim() if across else self.get_ylim())
        locations = np.asarray(axis.get_majorticklocs(), dtype=float)
        words = axis.get_major_formatter().format_ticks(list(locations))
        other = np.full(len(locations), (self.get_ylim() if across else self.get_xlim())[0])
        points = np.column_stack([locations, other] if across else [other, locations])
        pixels = self.transData.transform(points)[:, 0 if across else 1]
        slack = 1e-9 * (high - low)
        return [
            (float(pixel), word)
            for location, pixel, word in zip(locations, pixels, words, strict=True)
            if low - slack <= location <= high + slack
        ]

    def _lines(self) -> list[LineCollection]:
        (x0, y0), (x1, y1) = self.bbox.min, self.bbox.max
        mark = _MARK * DPI / 72
        left, below = ([place for place, _ in self._marks(axis)] for axis in (self.yaxis, self.xaxis))
        frame = [[(x, y0), (x, y0 - mark)] for x in below] + [[(x0, y), (x0 - mark, y)] for y in left]
        if self.spines["left"].get_visible():
            frame.append([(x0, y0), (x0, y1)])
        if self.spines["bottom"].get_visible():
            frame.append([(x0, y0), (x1, y0)])
        grid = [[(x0, y), (x1, y)] for y in left] if self.grid_lines else []
        made = [
            LineCollection(lines, colors=color, linewidths=width, transform=IdentityTransform(), capstyle="projecting")
            for lines, color, width in ((grid, _GRID, _GRID_WIDTH), (frame, _FRAME, _WIDTH))
        ]
        for lines in made:
            lines.set_figure(self.figure)
        return made

    def draw(self, renderer: RendererBase) -> None:
        """Draw the frame, and everything in it."""
        for artist in (*self._lines(), *self.numbers()):
            artist.draw(renderer)
        super().draw(renderer)


def _written(number: float, _: int | None = None) -> str:
    return short_number(number).replace("-", "\N{MINUS SIGN}")
