"""The page of a feature in a browser: in the film, and in TensorBoard's tab."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Locator

from lib_lightning.viewer import Run
from tests.viewer.browser import READY, Watched
from tests.viewer.example_run import ExampleRun
from tests.viewer.saved_run import SavedRun
from tests.viewer.test_feature import EarlierRun, page_of
from tests.viewer.test_tensorboard import Tab, tensorboard

LAYERS = ("embed", "hidden", "output")
RUN = "version_0/lib"

Open = Callable[[str], Watched]


def film(tmp_path: Path, run: SavedRun) -> str:
    folder = tmp_path / "version_0" / "lib"
    run.write(folder)
    return Run(folder).view().read_text("utf-8")


def panel(view: Watched, feature: str) -> Locator:
    """The page of a feature, opened with the keyboard and loaded."""
    view.role("find").fill(feature)
    view.role("find").press("Enter")
    view.page.wait_for_selector(f".lib-feature[data-feature='{feature}'][data-loaded]")
    return view.role("feature")


def part(of: Locator, name: str) -> Locator:
    return of.locator(f"[data-part='{name}']")


@pytest.mark.parametrize("rendering", ["tokens", "image", "row", "series"])
def test_the_film_shows_the_page_of_a_feature(opened: Open, tmp_path: Path, rendering: str) -> None:
    run = ExampleRun(LAYERS, rendering=rendering)
    view = opened(film(tmp_path, run))
    which = next(i for i, one in enumerate(run.lineages[1]) if one.birth == 0 and one.death == 8 and i % 4 != 3)
    shown = panel(view, f"hidden/{which}")
    page = page_of(tmp_path / "version_0" / "lib", 70, 1, which)
    text = shown.inner_text()
    assert text.startswith(f"hidden/{which}\n")
    assert page["label"] in text
    assert f"AUROC {page['label_score']:.3g}" in text
    assert "accuracy changes by \u22120." in text
    # All examples, as they look.
    found = part(shown, "examples").locator("[data-sample]")
    assert found.evaluate_all("all => all.map(e => Number(e.dataset.sample))") == [
        e["sample"] for e in page["examples"]
    ]
    first = page["examples"][0]
    look = page["renderings"][str(first["sample"])]
    assert look["label"] in found.first.inner_text()
    assert f"{first['value']:.3g}" in found.first.inner_text()
    if rendering == "tokens":
        here = found.first.locator(".lib-token-here")
        assert here.inner_text() == look["tokens"][first["position"]]
        assert here.get_attribute("title") == f"{first['value']:.3g} at position {first['position']}"
    elif rendering == "image":
        drawn, box = found.first.locator("img").bounding_box(), found.first.locator(".lib-box").bounding_box()
        assert drawn
        assert box
        row, column = divmod(first["position"], 4)
        assert box["x"] - drawn["x"] == pytest.approx(column * drawn["width"] / 4, abs=1)
        assert box["y"] - drawn["y"] == pytest.approx(row * drawn["height"] / 4, abs=1)
    elif rendering == "series":
        assert found.first.locator("polyline").count() == 2
        assert found.first.locator("rect").count() == 1
    # How they changed: at the first snapshot of the lineage, half-way, and now.
    steps = part(shown, "comparison").locator(".lib-compared").evaluate_all("all => all.map(e => e.dataset.step)")
    assert steps == ["0", "40", "70"]
    assert part(shown, "histogram").locator("rect").count() > 5
    links = part(shown, "interactions").locator("button")
    ids = [one["id"] for one in [*page["inputs"], *page["outputs"]]]
    assert links.evaluate_all("all => all.map(e => e.dataset.feature)") == ids
    signs = ["drives" if one["attribution"] > 0 else "holds against" for one in [*page["inputs"], *page["outputs"]]]
    assert re.findall(r"[+\u2212] (drives|holds against)", part(shown, "interactions").inner_text()) == signs
    assert "<two>" in part(shown, "outputs").inner_text()
    curves = part(shown, "curves").locator("[data-curve]").evaluate_all("all => all.map(e => e.dataset.curve)")
    assert curves == ["importance", "nats", "effect"]
    assert view.errors == []
    assert {address.split(":")[0] for address in view.requests} <= {"file", "data"}


def test_the_page_is_reached_and_left_with_the_keyboard(opened: Open, tmp_path: Path) -> None:
    run = ExampleRun(LAYERS, snapshots=4)
    view = opened(film(tmp_path, run))
    keyboard, page = view.page.keyboard, view.page
    view.role("find").focus()
    keyboard.type("hidden/")
    options = page.locator("[role='option']")
    names = [text.split()[0] for text in options.all_inner_texts()]
    assert len(names) > 3
    assert all(name.startswith("hidden/") for name in names)
    for key in ("ArrowDown", "ArrowDown", "ArrowUp", "ArrowUp", "ArrowUp"):
        keyboard.press(key)
    assert page.locator("[role='option'][aria-selected='true']").inner_text().split()[0] == names[-2]
    assert view.role("find").get_attribute("aria-activedescendant") == f"lib-match-{len(names) - 2}"
    keyboard.press("Enter")
    page.wait_for_selector(f".lib-feature[data-feature='{names[-2]}'][data-loaded]")
    focused = (
        "document.activeElement.id || document.activeElement.dataset.role || document.activeElement.dataset.feature"
    )
    assert page.evaluate(focused) == "lib-feature-name"
    # The next element is a button, and so on to an interaction, which opens the page of that feature.
    for _ in range(40):
        keyboard.press("Tab")
        if "/" in (reached := page.evaluate(focused) or ""):
            break
    keyboard.press("Enter")
    page.wait_for_selector(f".lib-feature[data-feature='{reached}'][data-loaded]")
    assert view.state()["following"] == reached
    assert page.evaluate(focused) == "lib-feature-name"
    # Arrow keys still move to other steps, and the page follows.
    keyboard.press("Home")
    page.wait_for_selector(f"{READY}[data-step='0']")
    keyboard.press("Escape")
    assert view.role("feature").is_hidden()
    assert page.evaluate(focused) == "find"
    assert view.state()["following"] == ""
    assert view.errors == []


def test_the_page_says_what_is_missing(opened: Open, tmp_path: Path) -> None:
    view = opened(film(tmp_path, EarlierRun(LAYERS, snapshots=3)))
    for layer in LAYERS:
        text = panel(view, f"{layer}/0").inner_text()
        assert "This snapshot has no examples of this feature" in text
        assert "Not measured in this snapshot" in text
        assert "no score has been measured" in text
        assert "does not have the signs" in text
        assert "null" not in text
        assert "undefined" not in text
    assert view.errors == []


def test_a_feature_that_is_absent_is_shown_as_it_was(opened: Open, tmp_path: Path) -> None:
    run = ExampleRun(LAYERS)
    view = opened(film(tmp_path, run))
    late, one = next((i, one) for i, one in enumerate(run.lineages[1]) if one.birth > 1 and one.death == 8)
    shown = panel(view, f"hidden/{late}")
    view.set("step", 0)
    view.page.wait_for_selector(f".lib-feature[data-step='{10 * one.birth}']")
    assert f"not present at step 0; this is how it was at step {10 * one.birth}" in shown.inner_text()


def test_a_note_in_a_film_is_kept_by_the_browser_and_can_be_downloaded(opened: Open, tmp_path: Path) -> None:
    run = ExampleRun(LAYERS, snapshots=3)
    folder = tmp_path / "version_0" / "lib"
    run.write(folder)
    Run(folder).annotate("embed/0", "from Python")
    view = opened(Run(folder).view().read_text("utf-8"))
    panel(view, "embed/0")
    assert view.role("note").input_value() == "from Python"
    panel(view, "hidden/0")
    view.role("note").fill("in the film")
    view.role("save-note").click()
    view.page.wait_for_selector(".lib-note-buttons :text('kept by this browser')")
    view.page.reload()
    view.page.wait_for_selector(READY)
    panel(view, "hidden/0")
    assert view.role("note").input_value() == "in the film"
    with view.page.expect_download() as download:
        view.role("download-notes").click()
    assert download.value.suggested_filename == "notes.json"
    download.value.save_as(folder / "notes.json")
    assert Run(folder).notes == {"embed/0": "from Python", "hidden/0": "in the film"}
    assert view.errors == []


def test_the_tab_loads_a_page_on_demand_and_saves_a_note(watched: Watched, tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "version_0" / "lib"
    ExampleRun(LAYERS, snapshots=4).write(folder)
    with tensorboard(tmp_path / "logs", tmp_path / "site") as url:
        tab = Tab(watched, url)
        assert not [address for address in watched.requests if "/feature?" in address]
        tab.frame.locator("[data-role='find']").fill("hidden/0")
        tab.frame.locator("[data-role='find']").press("Enter")
        tab.frame.wait_for_selector(".lib-feature[data-feature='hidden/0'][data-loaded]")
        # At this step, the first and one between.
        steps = [re.findall(r"step=(\d+)", address)[0] for address in watched.requests if "/feature?" in address]
        assert sorted(steps) == ["0", "20", "30"]
        assert tab.frame.locator("[data-part='examples'] .lib-token-here").count() == 16
        tab.frame.locator("[data-role='note']").fill("in the tab")
        tab.frame.locator("[data-role='save-note']").click()
        tab.frame.wait_for_selector(".lib-note-buttons :text('saved in notes.json')")
        assert json.loads((folder / "notes.json").read_text()) == {"hidden/0": "in the tab"}
        # The tab is as dark as TensorBoard.
        assert tab.frame.locator(".lib-dark").count() == 0
        watched.page.evaluate("document.body.classList.add('dark-mode')")
        tab.frame.wait_for_selector(".lib-view.lib-dark")
        watched.page.evaluate("document.body.classList.remove('dark-mode')")
        tab.frame.wait_for_selector(".lib-view:not(.lib-dark)")
        assert tab.errors == []


# The least contrast (WCAG 2.1) of the visible texts of the view with what is behind them.
CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number); // rgb(), or rgba() with the opacity from 0 to 1
  const over = ([r, g, b, a = 1], below) => [r, g, b].map((x, i) => a * x + (1 - a) * below[i]);
  const behind = (element) => {
    if (!element) return [255, 255, 255];
    const [r, g, b, a = 1] = parse(getComputedStyle(element).backgroundColor);
    return a === 1 ? [r, g, b] : over([r, g, b, a], behind(element.parentElement));
  };
  const luminance = (color) => {
    const [r, g, b] = color.map((x) => x / 255).map((x) => (x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const walker = document.createTreeWalker(document.querySelector(".lib-feature"), NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.closest("svg, :disabled")) continue;
    const below = behind(element);
    const [a, b] = [luminance(over(parse(getComputedStyle(element).color), below)), luminance(below)];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), walker.currentNode.data]);
  }
  return found.sort((a, b) => a[0] - b[0])[0];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_is_readable_in_narrow_windows_and_on_dark_pages(opened: Open, tmp_path: Path, scheme: str) -> None:
    text = film(tmp_path, ExampleRun(LAYERS, snapshots=2))
    view = opened(text)
    view.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    view.page.wait_for_selector(".lib-dark" if scheme == "dark" else ".lib-view:not(.lib-dark)")
    panel(view, "hidden/1")
    graph, page = view.page.locator(".lib-panels"), view.role("feature")
    for width in (1000, 1400):
        view.page.set_viewport_size({"width": width, "height": 800})
        view.page.wait_for_function("w => document.querySelector('.lib-view').clientWidth <= w", arg=width)
        assert view.page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate("e => e.scrollWidth <= e.clientWidth")
        left, right = graph.bounding_box(), page.bounding_box()
        assert left
        assert right
        # Below the graph, or beside it.
        if width == 1000:
            assert right["y"] >= left["y"] + left["height"]
        else:
            assert right["x"] >= left["x"] + left["width"]
            assert right["height"] < 800
        least, of = view.page.evaluate(CONTRAST)
        assert least >= 4.5, of
    # The picture has the colour of the page around it.
    stage = Image.open(io.BytesIO(view.page.locator(".lib-stage").screenshot())).convert("RGB")
    paper = view.page.locator(".lib-view").evaluate(
        "e => getComputedStyle(e).backgroundColor.match(/\\d+/g).map(Number)"
    )
    assert stage.getpixel((2, stage.height - 2)) == pytest.approx(paper, abs=2)
    assert view.errors == []
