"""The film without a mouse, links to a place in it, and what is found in it: lists, search, address and picture."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lib_lightning.viewer.html_export import film_page
from tests.viewer.browser import READY, Watched
from tests.viewer.node import evaluate, write_modules
from tests.viewer.synthetic_run import SyntheticRun

STEPS = [10, 20, 40, 80]
NAMES = ["embed", "middle", "output"]
FILM = SyntheticRun("version_0/lib", STEPS, [(name, "lib") for name in NAMES])
OTHER = SyntheticRun("version_0/pca", STEPS, [(name, "pca") for name in NAMES], seed=1)

Open = Callable[[str], Watched]


@pytest.fixture
def view(opened: Open) -> Watched:
    return opened(film_page([FILM, OTHER], "Film"))


def focused(view: Watched, what: str = "dataset.feature") -> Any:
    return view.page.evaluate(f"document.activeElement.{what}")


def shown(step: int, layer: int) -> list[int]:
    """Features of a layer, the most important first."""
    of_layer = json.loads(FILM.snapshot(step))["layers"][layer]
    return [of_layer["ids"][i] for i in sorted(range(len(of_layer["ids"])), key=lambda i: -of_layer["importance"][i])]


def test_every_dot_is_reached_with_the_keyboard(view: Watched) -> None:
    view.page.locator("[data-role='feature-list'] summary").focus()
    view.page.keyboard.press("Enter")
    view.page.wait_for_selector("[data-role='feature-list'] button")
    view.page.keyboard.press("Tab")
    columns = [shown(80, layer) for layer in range(3)]
    assert focused(view) == f"embed/{columns[0][0]}"
    reached = []
    for layer, column in enumerate(columns):
        for n in range(len(column)):
            reached.append(focused(view))
            # The dot is emphasized, and its tooltip says what a pointer would find.
            assert view.role("tooltip").inner_text().startswith(f"{NAMES[layer]}/{column[n]}\n")
            view.page.keyboard.press("ArrowDown")
        view.page.keyboard.press("Home")
        view.page.keyboard.press("ArrowRight")
    assert reached == [f"{name}/{i}" for name, column in zip(NAMES, columns, strict=True) for i in column]
    assert len(reached) == int(view.state()["featuresDrawn"])
    assert view.state()["step"] == "80"  # the keys that move the slider have not
    here = focused(view)
    view.page.keyboard.press("Enter")
    assert view.state()["following"] == here == focused(view)
    assert view.page.locator(f"[data-feature='{here}'][aria-pressed='true']").count() == 1
    # The whole list is one stop.
    view.page.keyboard.press("Shift+Tab")
    assert focused(view, "tagName") == "SUMMARY"
    # At another step, the focus stays with the feature while it is there.
    view.page.keyboard.press("Tab")
    view.set("step", 2)
    assert focused(view) in {f"output/{i}" for i in shown(40, 2)}
    assert view.errors == []


def test_events_are_one_stop_and_those_of_the_followed_feature(view: Watched) -> None:
    events = json.loads(FILM.run())["events"]
    button = view.role("events").locator("button")
    button.first.focus()
    view.page.keyboard.press("ArrowDown")
    assert focused(view, "textContent").endswith(events[-2]["text"])
    assert button.evaluate_all("all => all.filter((one) => one.tabIndex === 0).length") == 1
    view.page.keyboard.press("Enter")
    state = view.state()
    followed = f"{events[-2]['layer']}/{events[-2]['lineage']}"
    assert (state["step"], state["following"]) == (str(events[-2]["step"]), followed)
    own = [event["text"] for event in events if f"{event['layer']}/{event['lineage']}" == followed]
    assert [text.splitlines()[-1] for text in view.role("events").locator("li").all_inner_texts()] == own[::-1]
    assert f"Events of {followed}" in view.page.locator(".lib-events").inner_text()
    view.role("all-events").click()
    assert view.role("events").locator("li").count() == min(60, len(events))
    view.page.keyboard.press("Escape")
    assert view.role("all-events").is_hidden()


def test_features_are_found_by_parts_of_name_and_label(view: Watched) -> None:
    labels = json.loads(FILM.run())["labels"]
    view.role("find").fill("a+b k=5")
    options = view.page.locator("[role='option']")
    expected = {f"output/{i}" for i, label in labels[2].items() if "a+b" in label and "k=5" in label}
    assert {text.split()[0] for text in options.all_inner_texts()} == expected
    assert view.page.locator(".lib-matches-count").inner_text() == f"{len(expected)} features"
    view.page.keyboard.press("ArrowDown")
    first = options.first.inner_text().split()[0]
    view.page.keyboard.press("Enter")
    assert view.state()["following"] == first
    # Without a choice in the list, Enter takes the first one.
    view.role("find").fill("middl")
    view.page.keyboard.press("Enter")
    assert view.state()["following"].startswith("middle/")
    view.role("find").fill("nothing of this name")
    view.page.keyboard.press("Enter")
    assert "No feature shown has the name or label" in view.page.locator(".lib-message").inner_text()


def test_an_address_carries_step_feature_and_runs(view: Watched) -> None:
    bare = view.page.url
    view.set("step", 1)
    assert view.page.url == f"{bare}#step=20&run=version_0/lib"
    view.page.check(f"[data-role='run'][value='{OTHER.name}']")
    view.page.wait_for_selector(f"{READY}[data-runs='version_0/lib version_0/pca']")
    view.role("find").fill("embed/5")
    view.page.keyboard.press("Enter")
    link = f"{bare}#step=20&feature=embed/5&of=version_0/lib&run=version_0/lib&run=version_0/pca"
    assert view.page.url == link
    # The address leads there, also in a new window; changed by hand, elsewhere.
    view.page.goto("about:blank")
    view.open(link)
    view.page.wait_for_selector(f"{READY}[data-step='20'][data-following='embed/5'][data-runs$='pca']")
    assert view.page.url == link
    view.page.evaluate("location.hash = 'step=45&feature=middle/5&run=version_0/pca'")
    view.page.wait_for_selector(f"{READY}[data-step='40'][data-following='middle/5'][data-runs='version_0/pca']")
    view.page.evaluate("location.hash = 'step=-1&feature=%E0%A4%A&run=no'")
    view.page.wait_for_selector(".lib-message:has-text('No feature shown')")
    view.page.keyboard.press("Escape")
    # At the last snapshot, a link leads to the last one, whichever that is by then.
    view.page.keyboard.press("End")
    assert view.state()["step"] == "80"
    assert "step=" not in view.page.url
    assert view.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_picture_that_is_saved_is_the_one_shown(view: Watched, scheme: Any) -> None:
    view.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    view.set("step", 1)
    with view.page.expect_download() as waiting:
        view.role("save-picture").click()
    assert waiting.value.suggested_filename == "version_0-lib-step-20.png"
    saved = np.asarray(Image.open(waiting.value.path()).convert("RGB"), dtype=int)
    content = view.page.locator(".lib-base canvas").last.evaluate("canvas => canvas.toDataURL().split(',')[1]")
    screen = np.asarray(Image.open(io.BytesIO(__import__("base64").b64decode(content))).convert("RGB"), dtype=int)
    rows, columns, _ = screen.shape
    # Twice as fine, below a title and with a margin; names above the graph and counts below are in it as well.
    here = saved[2 * 26 + 12 : 2 * (26 + rows), 24 : 2 * (12 + columns)]
    halved = here[: 2 * (len(here) // 2)].reshape(-1, 2, columns, 2, 3).mean(axis=(1, 3))
    middle = slice(60, rows - 60)
    assert np.abs(halved[60 - 6 : rows - 60 - 6] - screen[middle]).mean() < 3
    assert saved[0, 0].tolist() == ([255] * 3 if scheme == "light" else [26] * 3)


FOLDED = """((run, snapshot) => {
  const history = new History(run);
  const view = {width: 900, height: 480, threshold: 0, color: "module", signs: false};
  const scene = buildScene(history, 0, snapshot, heightsByLineage(history, 40)[0], view);
  return {
    dots: scene.columns.map(({dots}) => dots.map((dot) => [dot.id, ...dot.folded])),
    names: scene.columns.map(({dots}) => dots.map((dot) => dot.label)),
    edges: scene.sections.map(({edges}) => edges.map(({from, to}) => [from.id, to.id])),
    counts: [scene.featuresDrawn, scene.edgesDrawn, scene.share],
    found: dotOfLineage(scene, 1, 3).id,
  };
})(data.run, data.snapshot)"""
FOLDED_IMPORTS = {
    "history.js": "History",
    "layout.js": "heightsByLineage",
    "scene.js": "buildScene, dotOfLineage",
}


@pytest.mark.parametrize("is_whole", [True, False])
def test_identical_neurons_are_one_dot(tmp_path: Path, is_whole: bool) -> None:
    importance = [[2.0, 1.0], [3.0, 3.0, 1.0, 3.0, 0.0, 0.0], [1.0, 1.0]]
    layers = [{"importance": own, "ids": None, "modules": None} for own in importance]
    edges: dict[str, list[Any]] = {
        "source": [0, 0, 0, 1, 0],
        "target": [0, 1, 2, 3, 3],
        "weight": [5, 5, 5, 4, 1],
    }
    after: dict[str, list[Any]] = {"source": [], "target": [], "weight": []}
    sections = [
        {"count": 5, "strength": 20, "strongest": 5, "edges": edges},
        # Of edges that are not loaded, nobody knows whether they are the same.
        {"count": 0 if is_whole else 9, "strength": 0 if is_whole else 3, "strongest": 1, "edges": after},
    ]
    run = {
        "layers": [{"name": name, "kind": "neuron"} for name in ("a", "b", "c")],
        "snapshots": [{"step": 0, "layers": layers}],
        "module_numbers": [None],
        "label_colors": [],
        "output_names": {"0": " the", "1": "1"},
    }
    data = {"run": run, "snapshot": {"step": 0, "layers": layers, "sections": sections}}
    found = evaluate(write_modules(tmp_path), FOLDED_IMPORTS, FOLDED, data)
    # 0 and 1 have the same edges, 3 has others; 4 and 5 are never active.
    assert found["dots"][:2] == [[[0], [1]], [[0, 1], [3], [2], [4, 5]]]
    assert found["dots"][2] == ([[0, 1]] if is_whole else [[0], [1]])
    assert found["edges"][0] == [[0, 0], [0, 2], [1, 3], [0, 3]]
    assert found["counts"] == [10, 5, 1.0 if is_whole else pytest.approx(20 / 23)]
    assert found["found"] == 3
    # Names of outputs, with spaces in quotes; a name that is the number itself is beside the dot already.
    assert found["names"][2][0] == "“ the”"
    assert is_whole or found["names"][2][1] == ""
