"""Words in figures: how wide they are, and how they are made to fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties

# Pixels per inch of all figures.
DPI = 140


def width_of(text: str, size: float, weight: str = "normal") -> float:
    """Measure a text without drawing it.

    Args:
        text: One line; dollar signs are dollar signs.
        size: Size of the letters, in points.
        weight: "normal" or "bold".

    Returns:
        Its width in points.

    Example:
        >>> width_of("wide", 10) < width_of("wide", 12) < width_of("wider", 12)
        True
    """
    # The renderer's own answer: it sets letters on whole pixels, which makes small ones wider than their outlines.
    width, _, _ = _renderer().get_text_width_height_descent(text, FontProperties(size=size, weight=weight), False)
    return float(width) * 72 / DPI


@cache
def _renderer() -> RendererAgg:
    return RendererAgg(1, 1, DPI)


def shorten(text: str, room: float, size: float) -> str:
    """Cut a text until it fits.

    Args:
        text: One line.
        room: How wide it may be, in points.
        size: Size of the letters, in points.

    Returns:
        The text, or its beginning and an ellipsis; "" where fewer than three letters of it would remain.

    Example:
        >>> shorten("a long name", 40, 10), shorten("name", 40, 10), shorten("name", 15, 10)
        ('a lon…', 'name', '')
    """
    if width_of(text, size) <= room:
        return text
    for end in range(len(text) - 1, 2, -1):
        cut = text[:end].rstrip() + "…"
        if width_of(cut, size) <= room:
            return cut
    return ""


def shorten_front(text: str, room: float, size: float, weight: str = "normal") -> str:
    """Cut the beginning of a text until it fits: what tells names of modules apart is often at the end.

    Args:
        text: One line.
        room: How wide it may be, in points.
        size: Size of the letters, in points.
        weight: "normal" or "bold".

    Returns:
        The text, or an ellipsis and its end, of four letters at least.

    Example:
        >>> shorten_front("transformer.h.3", 40, 10)
        '…er.h.3'
    """
    kept = text
    while len(kept) > 5 and width_of(kept, size, weight) > room:
        kept = "…" + kept.removeprefix("…")[1:]
    return kept


def percent(share: float) -> str:
    """Write a share as a percentage, "100%" only where nothing that matters is left out.

    Args:
        share: From 0 to 1.

    Returns:
        The text.

    Example:
        >>> percent(0.5), percent(0.998), percent(1.0)
        ('50%', '99.8%', '100%')
    """
    return f"{100 * share:.0f}%" if share < 0.995 or share > 0.9999 else f"{math.floor(1000 * share) / 10:g}%"


def short_number(number: float) -> str:
    """Write a count in few letters.

    Args:
        number: What to write.

    Returns:
        The text, with k for thousands and M for millions.

    Example:
        >>> short_number(30), short_number(1500), short_number(2e6)
        ('30', '1.5k', '2M')
    """
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def apart(heights: Sequence[float], least: float) -> list[int]:
    """Choose which lines of text to write, so that none lies on another.

    Args:
        heights: Where each would stand, the most wanted first.
        least: How far apart neighbours must be at least.

    Returns:
        The places in ``heights`` of those that are written.

    Example:
        >>> apart([0.5, 0.6, 0.9], 0.2)
        [0, 2]
    """
    kept: list[int] = []
    for k, height in enumerate(heights):
        if all(abs(height - heights[other]) >= least for other in kept):
            kept.append(k)
    return kept
