"""The built pages in a browser, and as axe, the accessibility checker, sees them: `tox -e recipes` builds them first.

Figures, tables and formulas of all pages fit the windows of a phone, a tablet and a computer.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from tests.viewer.browser import Watched

SITE = Path(__file__).parents[2] / "docs" / "_build" / "html"
# Prose with a picture, long tables, and a tutorial with its output.
PAGES = ["index.html", "tab.html", "callback.html", "tutorials/4_one_feature.html"]
WIDTHS = (390, 768, 1400)


@pytest.mark.recipe
def test_every_page_fits_three_windows_and_loads_without_errors(watched: Watched) -> None:
    if not SITE.is_dir():
        pytest.skip("the pages have not been built: tox -e docs")
    pages = [path for path in sorted(SITE.rglob("*.html")) if not {"_modules", "_static"} & set(path.parts)]
    # Pages of single names are alike.
    names = [path for path in pages if "generated" in path.parts]
    others = [path for path in pages if path not in names]
    assert len(others) > 50
    too_wide = []
    for path in others + names[::12]:
        watched.page.goto(path.as_uri())
        for width in WIDTHS:
            watched.page.set_viewport_size({"width": width, "height": 900})
            found = watched.page.evaluate("document.documentElement.scrollWidth")
            if found > width:
                too_wide.append((str(path.relative_to(SITE)), width, found))
        broken = watched.page.evaluate(
            "[...document.images].filter(image => image.complete && !image.naturalWidth).map(image => image.src)"
        )
        assert broken == [], path
    assert too_wide == []
    assert watched.errors == []


@pytest.mark.recipe
@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing_serious_on_a_page(watched: Watched, name: str) -> None:
    if not SITE.is_dir():
        pytest.skip("the pages have not been built: tox -e docs")
    axe = pytest.importorskip("axe_playwright_python", reason="axe is missing: pip install axe-playwright-python")
    code = (files(axe) / "axe.min.js").read_text("utf-8")
    found: list[Any] = []
    # On a dark page, nothing but colours differs.
    for scheme, rules in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):
        watched.page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        watched.page.goto((SITE / name).as_uri())
        watched.page.evaluate(code)
        result = watched.page.evaluate("rules => axe.run(document, {resultTypes: ['violations'], ...rules})", rules)
        assert result["passes"]  # it has looked
        found += [
            (scheme, rule["id"], node["html"][:200])
            for rule in result["violations"]
            if rule["impact"] in ("serious", "critical")
            for node in rule["nodes"]
        ]
    assert found == []
