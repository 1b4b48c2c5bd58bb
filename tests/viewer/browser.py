"""A browser for tests of the viewer, and pages that record their requests and errors."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

READY = ".lib-view[data-ready='true']"
_NAMES = ("chromium", "chromium-browser", "google-chrome")


class Watched:
    """A page with its requests and the errors in its console."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.requests: list[str] = []
        self.errors: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))

    def open(self, address: str) -> None:
        """Open a page with a viewer and wait until it is drawn."""
        self.page.goto(address)
        self.page.wait_for_selector(READY)

    def state(self) -> dict[str, str]:
        """The state of the viewer, once it is drawn."""
        self.page.wait_for_selector(READY)
        state: dict[str, str] = self.page.eval_on_selector(READY, "element => ({...element.dataset})")
        return state

    def position(self, run: str, layer: str, lineage: int) -> dict[str, float] | None:
        """Position of a feature."""
        where: dict[str, float] | None = self.page.eval_on_selector(
            ".lib-view", "(view, place) => view.libView.positionOf(...place)", [run, layer, lineage]
        )
        return where

    def role(self, role: str) -> Any:
        """A control or text of the viewer."""
        return self.page.locator(f"[data-role='{role}']")

    def set(self, role: str, value: float) -> None:
        """Move a slider."""
        self.role(role).evaluate(
            "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", value
        )
        self.page.wait_for_selector(READY)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Headless Chromium, shared by all tests."""
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium found: install Debian's package chromium, or Google Chrome, to test the viewer")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def watched(browser: Browser) -> Iterator[Watched]:
    """A new page without animations."""
    context = browser.new_context(viewport={"width": 1500, "height": 1000}, reduced_motion="reduce")
    yield Watched(context.new_page())
    context.close()


@pytest.fixture
def opened(watched: Watched, tmp_path: Path) -> Callable[[str], Watched]:
    """Opens HTML from a file."""

    def open_page(html: str) -> Watched:
        file = tmp_path / "film.html"
        file.write_text(html, encoding="utf-8")
        watched.open(file.as_uri())
        return watched

    return open_page
