"""The built pages as axe, the accessibility checker, sees them: for `tox -e recipes`, which builds them first."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from tests.viewer.browser import Watched, browser, watched

__all__ = ["browser", "watched"]

SITE = Path(__file__).parents[2] / "docs" / "_build" / "html"
# Prose with a picture, long tables, and a tutorial with its output.
PAGES = ["index.html", "tab.html", "callback.html", "tutorials/4_one_feature.html"]


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
