"""Text in figures: measuring it, shortening it to fit, and formatting numbers."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache

from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties

# Pixels per inch of all figures.
DPI = 140
# Bold names in smaller letters are hard to read.
_READABLE = 9.0


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


@lru_cache(maxsize=64)
def fit_names(
    names: tuple[str, ...], max_width: float, largest: float, smallest: float, lines: int = 1
) -> tuple[tuple[str, ...], float]:
    """Fit bold names of node layers into a width: all in one font size, and all without the same beginning.

    As much as is needed is done of this, in turn: the size is reduced to one that is read with ease, components that
    all paths begin with are left out, names are broken into lines, the size is reduced to the smallest one, and
    the beginnings of those that still do not fit are cut.

    Args:
        names: The names; taps of one node layer are joined by ``|`` or ``+``.
        max_width: Maximum width, in points.
        largest: Largest font size, in points.
        smallest: Smallest font size, in points.
        lines: Largest number of lines of a name.

    Returns:
        The texts and their font size.

    Example:
        >>> texts, size = fit_names(("net.model.embed", "net.model.layers.0", "output"), 90, 13, 7)
        >>> texts
        ('…model.embed', '…model.layers.0', 'output')
    """
    readable = max(smallest, min(largest, _READABLE))
    texts = names
    for texts in _without_beginning(names):
        for size in _sizes(largest, readable):
            if _fits(texts, max_width, size):
                return texts, size
    texts = tuple(_broken(text, max_width, readable, lines) for text in texts)
    # Three lines need the space of two larger ones.
    largest = min(largest, 2 * largest / max(text.count("\n") + 1 for text in texts))
    for size in _sizes(largest, smallest):
        if _fits(texts, max_width, size):
            return texts, size
    cut = ("\n".join(shorten_front(line, max_width, smallest, "bold") for line in text.split("\n")) for text in texts)
    return tuple(cut), smallest


def _sizes(largest: float, smallest: float) -> list[float]:
    return [largest - step / 2 for step in range(int(2 * (largest - smallest)) + 1)]


def _fits(texts: Sequence[str], max_width: float, size: float) -> bool:
    return all(text_width(line, size, "bold") <= max_width for text in texts for line in text.split("\n"))


def _without_beginning(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The names without 0, 1, 2, ... of the components that all paths of several components begin with."""
    paths = [tap.split(".") for name in names for tap in re.split(r"[|+]", name) if "." in tap]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*(path[:-1] for path in paths), strict=False))
    common = [parts[0] for parts in shared]
    for count in range(len(common) + 1):
        if count and any(path[count].isdigit() for path in paths):  # a number alone says nothing
            continue
        beginning = "".join(f"{part}." for part in common[:count])
        pattern = re.compile(rf"(?:(?<=[|+])|^){re.escape(beginning)}")
        yield tuple(pattern.sub("…", name) if beginning else name for name in names)


def _broken(text: str, max_width: float, size: float, most: int) -> str:
    """A name in as few lines as fit, of about the same length, broken between components of its path or words."""
    ends = [match.end() for match in re.finditer(r"[.|+_](?=.)|.(?=:)", text)]
    best = text
    for count in range(min(most, len(ends) + 1)):
        cuts = ([0, *chosen, None] for chosen in itertools.combinations(ends, count))
        choices = ([text[start:end] for start, end in itertools.pairwise(cut)] for cut in cuts)
        best = "\n".join(min(choices, key=lambda lines: max(map(len, lines))))
        if _fits([best], max_width, size):
            break
    return best


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
