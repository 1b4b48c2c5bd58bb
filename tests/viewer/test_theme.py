"""Figures and viewer use the same colours, names and sizes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Route

import lib_lightning.plots
from lib_lightning.plots import palette
from lib_lightning.plots.legend import dot_area, edge_style
from lib_lightning.plots.steps_axis import is_log_spaced
from lib_lightning.viewer.bundle import static_files
from tests.viewer.browser import Watched

STEPS = [[0, 50, 100, 150], [0, 1, 3, 10, 32, 100], [2**k for k in range(12)], [5, 7], [0], [1, 2, 4, 8], [9, 3, 3, 0]]


def test_the_viewer_gets_the_theme_of_the_figures() -> None:
    module = static_files()["theme.js"]
    assert json.loads(module.removeprefix("export const THEME = ").removesuffix(";\n")) == palette.THEME


def test_colours_of_the_theme_are_written_down_once() -> None:
    colors = {color.lower() for color in re.findall("#[0-9A-Fa-f]{6}", json.dumps(palette.THEME))}
    files = {name: text for name, text in static_files().items() if name != "theme.js"}
    files |= {path.name: path.read_text("utf-8") for path in Path(lib_lightning.plots.__file__).parent.glob("*.py")}
    for name, text in files.items():
        code = re.sub(r">>>.*|^\s*\{.*\}$", "", text, flags=re.MULTILINE)  # doctests print colours
        assert not colors & {color.lower() for color in re.findall("#[0-9A-Fa-f]{6}", code)}, name


def contrast(one: str, other: str) -> float:
    """Contrast of two colours, as in WCAG 2.1."""

    def luminance(color: str) -> float:
        parts = [part / 255 for part in bytes.fromhex(color.removeprefix("#"))]
        linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_texts_on_light_and_dark_pages_have_contrast() -> None:
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)
    for page in (palette.THEME, palette.THEME["dark"]):
        for text in (page["text"], page["muted"], page["colors"]["blue"]):
            assert contrast(text, page["paper"]) >= 4.5, text
    dark = palette.THEME["dark"]
    assert dark["colors"].keys() == palette.THEME["colors"].keys()
    for color in (*dark["colors"].values(), dark["other_modules"], dark["no_module"]):
        assert contrast(color, dark["paper"]) >= 3, color
    assert len({dark["colors"][name] for name in palette.THEME["modules"]}) == len(palette.THEME["modules"])


@pytest.fixture
def modules(watched: Watched) -> Watched:
    """A page from which the viewer's modules can be imported."""

    def respond(route: Route) -> None:
        name = route.request.url.rsplit("/", 1)[1]
        kind = "text/javascript" if name.endswith(".js") else "text/html"
        route.fulfill(body=static_files().get(name, "<!DOCTYPE html>"), content_type=kind)

    watched.page.route("http://viewer.test/**", respond)
    watched.page.goto("http://viewer.test/page.html")
    return watched


def test_both_sides_compute_the_same_from_it(modules: Watched) -> None:
    shares = [1.0, 0.3, 0.01, 0.0]
    found = modules.page.evaluate(
        """async ([shares, steps, bases]) => {
          const {TEXT, MUTED, MODULE_COLORS, OTHER_MODULES, NO_MODULE, runColors, dotRadius, edgeStyle} =
            await import("./palette.js");
          const {isLogSpaced} = await import("./chart.js");
          return {
            colors: [TEXT, MUTED, ...MODULE_COLORS, OTHER_MODULES, NO_MODULE],
            bases: Object.fromEntries(runColors(bases.map((kind) => `a/${kind}`))),
            radii: shares.map((share) => dotRadius(share) / dotRadius(1)),
            edges: shares.map((share) => edgeStyle(share, 1)).map(({width, opacity}) => [width / 4.5, opacity]),
            log: steps.map(isLogSpaced),
          };
        }""",
        [shares, STEPS, list(palette.BASES)],
    )
    expected = [palette.TEXT, palette.MUTED, *palette.MODULES, palette.OTHER_MODULES, palette.NO_MODULE]
    assert found["colors"] == expected
    assert found["bases"] == {f"a/{kind}": color for kind, color in palette.BASES.items()}
    assert found["radii"] == pytest.approx([float((dot_area(s) / dot_area(1.0)) ** 0.5) for s in shares])
    assert found["edges"] == [pytest.approx([float(v) for v in edge_style(s, max_width=1.0)]) for s in shares]
    assert found["log"] == [is_log_spaced(steps) for steps in STEPS]
