"""Text in figures: measuring it, shortening it to fit, and formatting numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties

# Pixels per inch of all figures.
DPI = 140


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Measure a text without drawing it.

    Args:
        text: One line; dollar signs are not interpreted as math.
        size: Font size, in points.
        weight: "normal" or "bold".

    Returns:
        Its width in points.

    Example:
        >>> text_width("wide", 10) < text_width("wide", 12) < text_width("wider", 12)
        True
    """
    # Measured by the renderer itself: it rounds glyphs to whole pixels, so small text is wider than its outlines.
    width, _, _ = _renderer().get_text_width_height_descent(text, FontProperties(size=size, weight=weight), False)
    return float(width) * 72 / DPI


@cache
def _renderer() -> RendererAgg:
    return RendererAgg(1, 1, DPI)


def shorten(text: str, max_width: float, size: float) -> str:
    """Cut the end of a text to fit a width.

    Args:
        text: One line.
        max_width: Maximum width, in points.
        size: Font size, in points.

    Returns:
        The text, or its beginning and an ellipsis; "" if fewer than three letters would remain.

    Example:
        >>> shorten("a long name", 40, 10), shorten("name", 40, 10), shorten("name", 15, 10)
        ('a lon…', 'name', '')
    """
    if text_width(text, size) <= max_width:
        return text
    for end in range(len(text) - 1, 2, -1):
        cut = text[:end].rstrip() + "…"
        if text_width(cut, size) <= max_width:
            return cut
    return ""


def shorten_front(text: str, max_width: float, size: float, weight: str = "normal") -> str:
    """Cut the beginning of a text to fit a width; module paths usually differ at their ends.

    Args:
        text: One line.
        max_width: Maximum width, in points.
        size: Font size, in points.
        weight: "normal" or "bold".

    Returns:
        The text, or an ellipsis and its end, at least four letters.

    Example:
        >>> shorten_front("transformer.h.3", 40, 10)
        '…er.h.3'
    """
    kept = text
    while len(kept) > 5 and text_width(kept, size, weight) > max_width:
        kept = "…" + kept.removeprefix("…")[1:]
    return kept


def percent(share: float) -> str:
    """Format a fraction as a percentage, rounding to "100%" only if the rest is negligible.

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
    """Format a count compactly.

    Args:
        number: Any number.

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


def non_overlapping(heights: Sequence[float], distance: float) -> list[int]:
    """Select lines of text that do not overlap, in order of priority.

    Args:
        heights: Height of each line, the most important line first.
        distance: Minimum distance between two lines.

    Returns:
        Indices of the selected lines.

    Example:
        >>> non_overlapping([0.5, 0.6, 0.9], 0.2)
        [0, 2]
    """
    kept: list[int] = []
    for k, height in enumerate(heights):
        if all(abs(height - heights[other]) >= distance for other in kept):
            kept.append(k)
    return kept
