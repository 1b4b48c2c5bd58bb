"""Pages of the viewer as axe, the accessibility checker, and a reader with little contrast see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Frame, Page
from torch import nn

from lib_lightning import compare, compute_interaction_graph
from lib_lightning.comparison.comparison import write_page
from lib_lightning.viewer import Run
from lib_lightning.viewer.cache import Cache
from lib_lightning.viewer.html_export import film_page
from lib_lightning.viewer.run_view import RunView
from tests.viewer.browser import READY, Watched
from tests.viewer.example_run import ExampleRun
from tests.viewer.test_tensorboard import Tab, tensorboard

Open = Callable[[str], Watched]
SCHEMES = pytest.mark.parametrize("scheme", ["light", "dark"])
pytest.importorskip("axe_playwright_python", reason="axe is missing: pip install axe-playwright-python")
AXE = (files("axe_playwright_python") / "axe.min.js").read_text("utf-8")
# Texts of the page, also in SVG, with less contrast (WCAG 2.1) with what is behind them than 4.5. axe leaves out those
# above a canvas. Texts in a control that is disabled are exempt.
FAINT = """() => {
  const parse = (text) => (text.match(/[\\d.]+/g) ?? [0, 0, 0, 0]).map(Number);
  const over = ([r, g, b, a = 1], below) => [r, g, b].map((x, i) => a * x + (1 - a) * below[i]);
  const behind = (element) => {
    if (!element) return [255, 255, 255];
    const color = parse(getComputedStyle(element).backgroundColor);
    return (color[3] ?? 1) === 1 ? color.slice(0, 3) : over(color, behind(element.parentElement));
  };
  const luminance = (color) => {
    const [r, g, b] = color.map((x) => x / 255).map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  let looked = 0;
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const isShown = element.checkVisibility({opacityProperty: true}) && element.getClientRects().length;
    if (!walker.currentNode.data.trim() || !isShown) continue;
    if (element.closest(":disabled, script, style, title, option")) continue;
    let opacity = 1;
    for (let one = element; one; one = one.parentElement) opacity *= Number(getComputedStyle(one).opacity);
    const style = getComputedStyle(element), below = behind(element);
    const color = parse(element.closest("svg") ? style.fill : style.color);
    const drawn = over([...color.slice(0, 3), (color[3] ?? 1) * opacity], below);
    const [a, b] = [luminance(drawn), luminance(below)];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    looked += 1;
    if (contrast < 4.5) found.push([walker.currentNode.data, contrast]);
  }
  return {looked, found};
}"""


def findings(page: Page | Frame) -> list[str]:
    """What axe finds serious or critical, and texts with too little contrast."""
    page.evaluate(AXE)
    result: dict[str, Any] = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    assert len(result["passes"]) > 10  # it has looked
    contrast = page.evaluate(FAINT)
    assert contrast["looked"] > 10
    return [
        f"{rule['id']}: {node['html'][:200]}"
        for rule in result["violations"]
        if rule["impact"] in ("serious", "critical")
        for node in rule["nodes"]
    ] + [f"contrast {value:.2f}: {text}" for text, value in contrast["found"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with all that the pages show, and a comparison."""
    logs = tmp_path_factory.mktemp("logs") / "version_0"
    ExampleRun(snapshots=4).write(logs / "lib")
    return logs / "lib"


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double() for _ in range(2)]
    batches = [torch.randn(300, 4).double()]
    graphs = [compute_interaction_graph(model, batches, ["input", "1", "output"]) for model in models]
    path = tmp_path_factory.mktemp("comparison") / "comparison.html"
    return write_page([compare(*graphs, *models, batches)], path)


@pytest.mark.parametrize(("scheme", "width"), [("dark", 390), ("light", 1400)])
def test_a_film(watched: Watched, folder: Path, tmp_path: Path, scheme: Any, width: int) -> None:
    watched.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    watched.page.set_viewport_size({"width": width, "height": 800})
    file = tmp_path / "film.html"
    file.write_text(film_page([RunView(folder, "version_0/lib", Cache(1 << 30))], "Film"), encoding="utf-8")
    watched.open(file.as_uri())
    assert findings(watched.page) == []
    # With all that can be opened, at a step with later events.
    watched.set("step", 1)
    watched.page.locator("[data-role='feature-list'] summary").click()
    watched.page.wait_for_selector("[data-role='feature-list'] button")
    watched.role("signs").check()
    watched.role("find").fill("hidden/1")
    watched.role("find").press("Enter")
    watched.page.wait_for_selector(".lib-feature[data-loaded]")
    assert watched.page.evaluate("document.documentElement.scrollWidth") == width
    assert findings(watched.page) == []
    watched.role("find").fill("hidden")
    assert findings(watched.page) == []
    assert watched.errors == []


def test_the_page_of_a_feature(watched: Watched, folder: Path, tmp_path: Path) -> None:
    watched.page.emulate_media(color_scheme="dark")
    file = Run(folder).feature("hidden/1").save(tmp_path / "feature.html")
    watched.open(file.as_uri())
    assert findings(watched.page) == []


@SCHEMES
def test_the_page_of_a_comparison(watched: Watched, comparison: Path, scheme: Any) -> None:
    watched.page.emulate_media(color_scheme=scheme)
    watched.page.set_viewport_size({"width": 390, "height": 800})
    watched.page.goto(comparison.as_uri())
    assert watched.page.evaluate("document.documentElement.scrollWidth") == 390
    assert findings(watched.page) == []
    dots = watched.page.locator("figure").first.locator("circle")
    paper, color = (
        watched.page.locator(of).first.evaluate(f"e => getComputedStyle(e).{what}")
        for of, what in (("body", "backgroundColor"), (".count", "fill"))
    )
    assert (paper, color) == (
        ("rgb(255, 255, 255)", "rgb(102, 102, 102)") if scheme == "light" else ("rgb(26, 26, 26)", "rgb(163, 163, 163)")
    )
    # The dots of a graph are one stop of the Tab key.
    assert dots.count() > 3
    dots.first.focus()
    watched.page.keyboard.press("ArrowDown")
    watched.page.keyboard.press("Enter")
    assert dots.nth(1).evaluate("e => e === document.activeElement && e.classList.contains('on')")
    assert [dots.nth(n).get_attribute("tabindex") for n in range(3)] == ["-1", "0", "-1"]


@pytest.fixture
def tab(watched: Watched, folder: Path, tmp_path: Path) -> Iterator[Tab]:
    with tensorboard(folder.parent, tmp_path / "site") as url:
        yield Tab(watched, url)


def test_the_tab(watched: Watched, tab: Tab) -> None:
    """Only the tab itself is checked, not TensorBoard around it."""
    assert findings(tab.frame) == []
    watched.page.evaluate("document.body.classList.add('dark-mode')")
    tab.frame.wait_for_selector(".lib-view.lib-dark")
    assert findings(tab.frame) == []
    # Below its log directory, the run would be called by the folder that the callback makes.
    assert tab.frame.locator(".lib-run").inner_text().strip() == "version_0"
    assert tab.state()["runs"] == "lib"
    # A link leads to step and feature. The part of the address is TensorBoard's for plugins.
    tab.set("step", 1)
    tab.frame.locator("[data-role='find']").fill("hidden/1")
    tab.frame.locator("[data-role='find']").press("Enter")
    tab.frame.wait_for_selector(".lib-feature[data-loaded]")
    address = watched.page.url
    assert address.endswith("#lib&p.lib.step=10&p.lib.feature=hidden/1")
    watched.page.goto("about:blank")
    watched.page.goto(address)
    watched.page.wait_for_timeout(500)
    frame = next(frame for frame in watched.page.frames if "plugin_entry" in frame.url)
    frame.wait_for_selector(f"{READY}[data-step='10'][data-following='hidden/1']")
    assert tab.errors == []
