"""FastAxes: the same ticks as matplotlib's own axes."""

from __future__ import annotations

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from lib_lightning.plots.fast_axes import FastAxes
from lib_lightning.plots.image import render_png


def prepared(axes: Axes, scale: str, limits: tuple[float, float]) -> Axes:
    axes.set(xscale=scale, yscale=scale, xlim=limits, ylim=limits)
    if scale == "linear":
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
    if scale == "symlog":
        axes.xaxis.set_major_locator(FixedLocator([0, 1, 100, 10**9]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"<{value:g}>"))
    return axes


@pytest.mark.parametrize(
    ("scale", "limits"), [("linear", (0.3, 17.0)), ("linear", (5, -5)), ("log", (0.02, 3e4)), ("symlog", (0, 5000))]
)
def test_ticks_are_those_of_plain_axes(scale: str, limits: tuple[float, float]) -> None:
    place = (0.2, 0.2, 0.7, 0.7)
    fast = Figure(figsize=(3, 2), dpi=140).add_axes(place, axes_class=FastAxes)
    plain = prepared(Figure(figsize=(3, 2), dpi=140).add_axes(place), scale, limits)
    assert isinstance(fast, FastAxes)
    prepared(fast, scale, limits)
    render_png(plain.figure)
    low, high = sorted(limits)
    for k, name in enumerate(("xaxis", "yaxis")):
        ticks = [tick for tick in getattr(plain, name).get_major_ticks() if low <= tick.get_loc() <= high]
        marks = [tick.tick1line for tick in ticks]
        expected = [
            (mark.get_transform().transform(mark.get_xydata())[0][k], tick.label1.get_text())
            for mark, tick in zip(marks, ticks, strict=True)
        ]
        found = fast.ticks(getattr(fast, name))
        assert [label for _, label in found] == [label for _, label in expected]
        assert [pixel for pixel, _ in found] == pytest.approx([pixel for pixel, _ in expected])
        assert len(found) > 1
