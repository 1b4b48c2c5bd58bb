"""Comparisons as one HTML file, which a browser opens without server or network."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lib_lightning.comparison.scene import Picture
from lib_lightning.plots.palette import MODULES, MUTED, NO_MODULE, PAPER, TEXT, VERMILION, dark_variables, ink
from lib_lightning.viewer.bundle import comparison_script
from lib_lightning.viewer.html_page import html_page

_COLUMN, _HEIGHT, _TOP, _EDGE = 120, 420, 64, 44
_PAPER, _INK, _FAINT = ink(PAPER), ink(TEXT), ink(MUTED)
_STYLE = f"""
:root {{ --soft: #f3f4f5; }}
body {{ margin: 0; padding: 14px 20px 24px; color: {_INK}; background: {_PAPER};
  font: 13px/1.4 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }}
h1 {{ font-size: 18px; margin: 0 0 10px; overflow-wrap: anywhere; }}
h2 {{ font-size: 14px; margin: 18px 0 4px; overflow-wrap: anywhere; }}
.graphs {{ display: flex; flex-wrap: wrap; gap: 8px 24px; }}
figure {{ margin: 0; flex: 1 1 min(420px, 100%); min-width: 0; }}
figcaption {{ font-weight: 600; overflow-wrap: anywhere; }}
svg {{ width: 100%; height: auto; display: block; }}
svg text {{ text-anchor: middle; fill: {_INK}; }}
svg .count {{ fill: {_FAINT}; font-size: 11px; }}
circle {{ cursor: pointer; }}
circle:focus {{ outline: none; }}
circle:focus-visible, .chosen circle.on {{ stroke: {_INK}; stroke-width: 2.5; }}
.chosen circle:not(.on) {{ opacity: 0.25; }}
.chosen line:not(.on) {{ opacity: 0.04; }}
pre {{ overflow-x: auto; padding: 10px; background: var(--soft); }}
.legend {{ color: {_FAINT}; margin: 6px 0; }}
.legend svg {{ display: inline; width: 14px; height: 10px; margin: 0 2px 0 12px; }}
.said {{ min-height: 3em; margin: 6px 0; }}
@media (max-width: 620px) {{ body {{ padding: 10px 12px 20px; }} }}
@media (prefers-color-scheme: dark) {{
  :root {{ {dark_variables()} --soft: #2a2a2a; color-scheme: dark; }}
}}
"""


@dataclass(frozen=True)
class PageSection:
    """One comparison on the page.

    Attributes:
        names: What the networks are called.
        pictures: Their graphs.
        table: The results as text.
    """

    names: tuple[str, str]
    pictures: tuple[Picture, Picture]
    table: str


def comparison_page(sections: Sequence[PageSection]) -> str:
    """Write comparisons as one page: both graphs side by side, and the table.

    Shared features are at the same height and in the same colour; a click on one shows it and its edges in both graphs.

    Args:
        sections: The comparisons, one below the other.

    Returns:
        Text of the file.
    """
    title = ", ".join(f"{one.names[0]} and {one.names[1]}" for one in sections)
    parts = (line for number, one in enumerate(sections) for line in _section(number, one))
    return html_page(
        title, _STYLE, ["<main>", "<h1>Features of two networks</h1>", *parts, "</main>"], comparison_script()
    )


def _section(number: int, section: PageSection) -> Iterator[str]:
    names = [html.escape(name) for name in section.names]
    yield "<section>"
    yield f"<h2>{names[0]} and {names[1]}</h2>"
    yield f'<p class="legend">{_legend()}</p>'
    yield '<div class="graphs">'
    for k, (name, picture) in enumerate(zip(names, section.pictures, strict=True)):
        yield f"<figure><figcaption>{name}</figcaption>{_svg(picture, f'c{number}-{k}', name)}</figure>"
    yield "</div>"
    yield '<div class="said" aria-live="polite"></div>'
    yield f'<pre tabindex="0">{html.escape(section.table)}</pre>'
    yield "</section>"


def _legend() -> str:
    def dot(fill: str, stroke: str) -> str:
        shape = f'<circle cx="7" cy="5" r="4" fill="{fill}" stroke="{stroke}"/>'
        return f'<svg viewBox="0 0 14 10" aria-hidden="true">{shape}</svg>'

    stroke = f'<line x1="0" y1="5" x2="14" y2="5" stroke="{ink(VERMILION)}" stroke-width="2"/>'
    line = f'<svg viewBox="0 0 14 10" aria-hidden="true">{stroke}</svg>'
    return (
        f"{dot(ink(MODULES[0]), _PAPER)} shared: same height and colour {dot(_PAPER, ink(NO_MODULE))} rotated, split "
        f"or merged {dot(_PAPER, _INK)} only here {line} edge that differs. A click on a feature shows it in both "
        "graphs; on the keyboard, Tab and arrow keys lead to one, and Enter shows it."
    )


def _svg(picture: Picture, prefix: str, network: str) -> str:
    width, height = _COLUMN * len(picture.layers), _TOP + _HEIGHT + 12
    numbers = {id(dot): f"{prefix}-{n}" for n, dot in enumerate(picture.dots)}

    def at(x: int, y: float) -> tuple[float, float]:
        return _COLUMN * (x + 0.5), _TOP + _HEIGHT * y

    parts = [f'<svg viewBox="0 0 {width} {height}" role="group" aria-label="features of {network}">']
    for line in picture.lines:
        (x, y), (x2, y2) = at(line.start.x, line.start.y), at(line.end.x, line.end.y)
        ends = f"{numbers[id(line.start)]} {numbers[id(line.end)]}"
        parts.append(
            f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{ink(line.color)}" '
            f'stroke-width="{line.width:.2f}" opacity="{line.opacity:.2f}" data-ends="{ends}">'
            f"<title>{html.escape(line.text)}</title></line>"
        )
    for n, dot in enumerate(picture.dots):
        x, y = at(dot.x, dot.y)
        fill, stroke = (ink(dot.color), _PAPER) if dot.is_filled else (_PAPER, ink(dot.color))
        pair = f' data-pair="{dot.x}-{dot.row}"' if dot.is_filled else ""
        text = html.escape(dot.text)
        parts.append(
            f'<circle id="{numbers[id(dot)]}" cx="{x:.1f}" cy="{y:.1f}" r="{dot.radius:.1f}" fill="{fill}" '
            f'stroke="{stroke}" role="button" tabindex="{0 if n == 0 else -1}" aria-label="{text}"{pair}>'
            f"<title>{text}</title></circle>"
        )
    for x, (name, count) in enumerate(picture.layers):
        left = _COLUMN * (x + 0.5)
        size = min(13.0, 1.6 * _COLUMN / max(1, len(name)))
        parts.append(
            f'<text x="{left}" y="{_EDGE - 16}" font-size="{size:.1f}" font-weight="600">{html.escape(name)}</text>'
        )
        parts.append(f'<text class="count" x="{left}" y="{_EDGE}">{html.escape(count)}</text>')
    return "".join([*parts, "</svg>"])
