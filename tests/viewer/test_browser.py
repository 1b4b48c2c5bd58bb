"""The viewer in a browser, with the film of a synthetic run as one HTML file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from lib_lightning.plots.palette import module_color
from lib_lightning.viewer.html_export import film_page
from tests.viewer.browser import Watched
from tests.viewer.synthetic_run import SyntheticRun

STEPS = [10, 14, 20, 40, 80, 160, 320, 640]
NAMES = ["embed", "resid_mid", "resid_post", "output"]
FILM = SyntheticRun("version_0/lib", STEPS, [(name, "lib") for name in NAMES])
OTHER = SyntheticRun("version_0/pca", STEPS[3:], [(name, "pca") for name in NAMES], seed=1)
RUN = FILM.name

Open = Callable[[str], Watched]


@pytest.fixture
def view(opened: Open) -> Watched:
    return opened(film_page([FILM, OTHER], "Film"))


def snapshot(step: int) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(FILM.snapshot(step))
    return read


def drawn(step: int, threshold: float, limit: int = 40) -> list[float]:
    """Strengths of the edges that should be drawn."""
    shown = snapshot(step)
    visible = [set(sorted(range(len(i)), key=lambda k: -i[k])[:limit]) for i in map(importance_of, shown["layers"])]
    return [
        weight
        for l, section in enumerate(shown["sections"])
        for source, target, weight in zip(
            *(section["edges"][key] for key in ("source", "target", "weight")), strict=True
        )
        if weight >= threshold * section["strongest"] and source in visible[l] and target in visible[l + 1]
    ]


def importance_of(layer: dict[str, list[float]]) -> list[float]:
    return layer["importance"]


def with_error(layer: dict[str, Any], i: int) -> str:
    """Expected text of an importance: with two digits of its error."""
    digits = 1 - int(f"{layer['error'][i]:e}".split("e")[1])
    return f"{layer['importance'][i]:.{digits}f} ± {layer['error'][i]:.{digits}f}"


def hover(view: Watched, layer: str, lineage: int) -> str:
    where = view.position(RUN, layer, lineage)
    assert where is not None
    view.page.mouse.move(where["x"], where["y"])
    return str(view.role("tooltip").inner_text())


def color_at(view: Watched, layer: str, lineage: int) -> list[int]:
    """Colour at the centre of a dot."""
    where = view.position(RUN, layer, lineage)
    color: list[int] = view.page.evaluate(
        """({x, y}) => {
          const canvas = document.querySelector(".lib-base").lastElementChild, rim = canvas.getBoundingClientRect();
          return [...canvas.getContext("2d").getImageData(x - rim.left, y - rim.top, 1, 1).data].slice(0, 3);
        }""",
        where,
    )
    return color


def test_numbers_of_connected_features_are_written_over_the_edges(watched: Watched, opened: Open) -> None:
    watched.page.add_init_script(
        """window.written = [];
        for (const name of ["fillText", "stroke"]) {
          const usual = CanvasRenderingContext2D.prototype[name];
          CanvasRenderingContext2D.prototype[name] = function (...words) {
            if (this.canvas.className === "lib-overlay") window.written.push(name === "stroke" ? null : words[0]);
            return usual.apply(this, words);
          };
        }"""
    )
    view = opened(film_page([FILM], "Film"))
    layers = snapshot(640)["layers"]
    most_important = layers[2]["ids"][0]
    view.page.evaluate("window.written = []")
    hover(view, NAMES[2], most_important)
    written = view.page.evaluate("window.written")
    # After the last stroke of an edge there are numbers of the features of both neighbours.
    numbers = set(written[len(written) - written[::-1].index(None) :])
    assert {str(i) for i in layers[3]["ids"]} & numbers
    assert {str(i) for i in layers[1]["ids"]} & numbers
    assert any(text.startswith(f"{most_important} · ") for text in numbers), "its own is in its label"


def test_the_film_opens_from_a_file_without_further_requests(view: Watched) -> None:
    assert view.requests == [view.page.url]
    assert view.errors == []
    state = view.state()
    assert (state["step"], state["runs"]) == ("640", RUN)
    assert int(state["featuresDrawn"]) == sum(len(layer["ids"]) for layer in snapshot(640)["layers"])


def test_a_feature_keeps_its_height_while_it_is_shown(view: Watched) -> None:
    heights: dict[tuple[str, int], float] = {}
    for n, step in enumerate(STEPS):
        view.set("step", n)
        assert view.state()["step"] == str(step)
        now = {}
        for name, layer in zip(NAMES, snapshot(step)["layers"], strict=True):
            for lineage in layer["ids"]:
                where = view.position(RUN, name, lineage)
                assert where is not None
                now[name, lineage] = where["y"]
        assert len({(name, y) for (name, _), y in now.items()}) == len(now)
        assert {key: y for key, y in now.items() if key in heights} == {
            key: y for key, y in heights.items() if key in now
        }
        heights = now
    assert view.position(RUN, "embed", 99) is None
    assert view.errors == []


@pytest.mark.parametrize("exponent", [-4.0, -2.0, -1.0, 0.0])
def test_threshold_draws_exactly_the_edges_above_it(view: Watched, exponent: float) -> None:
    view.set("threshold", exponent)
    edges = drawn(640, 10**exponent)
    assert view.state()["edgesDrawn"] == str(len(edges))
    sections = snapshot(640)["sections"]
    share = round(100 * sum(edges) / sum(section["strength"] for section in sections))
    count = sum(section["count"] for section in sections)
    text = view.role("edge-counts").inner_text()
    expected = f"{len(edges):,} of {count:,} edges drawn, {'>99' if exponent == -4 else share}% of the strength"
    assert text.startswith(expected)


def test_only_edges_between_the_features_shown_are_drawn(view: Watched) -> None:
    view.role("features").select_option("10")
    assert view.state()["featuresDrawn"] == "40"
    edges = drawn(640, 0.01, limit=10)
    assert view.state()["edgesDrawn"] == str(len(edges))
    share = sum(edges) / sum(section["strength"] for section in snapshot(640)["sections"])
    assert f"{round(100 * share)}% of the strength; 40 of" in view.role("edge-counts").inner_text()


def test_the_tooltip_shows_the_properties_of_a_feature(view: Watched) -> None:
    newborn = next(one for one in FILM.lineages[1] if one.parent >= 0 and one.birth < one.death == len(STEPS))
    shown = snapshot(640)
    layer, section = shown["layers"][1], shown["sections"][0]
    i = layer["ids"].index(newborn.id)
    text = hover(view, "resid_mid", newborn.id)
    assert f"resid_mid/{newborn.id}\n" in text
    assert with_error(layer, i) in text
    assert f"birth\nsince step {STEPS[newborn.birth]}, split from resid_mid/{newborn.parent}" in text
    assert f"module\n{layer['modules'][i]}\n" in text
    assert re.search(r"effect on predictions\n.* nats, to second order\n", text)
    assert FILM.label(1, newborn) in text
    assert f"of {len(layer['ids'])}\n" in text
    strongest = next(k for k, target in enumerate(section["edges"]["target"]) if target == i)
    partner = shown["layers"][0]["ids"][section["edges"]["source"][strongest]]
    assert f"strongest edges from embed\nembed/{partner}" in text
    assert "present from the start" in hover(view, "resid_mid", 5)
    # The tooltip follows the step.
    view.page.keyboard.press("ArrowLeft")
    assert view.state()["step"] == "320"
    before = snapshot(320)["layers"][1]
    assert f"of {len(before['ids'])}\n" in view.role("tooltip").inner_text()
    assert with_error(before, before["ids"].index(5)) in view.role("tooltip").inner_text()
    view.page.mouse.move(5, 5)
    assert view.role("tooltip").is_hidden()


def test_signs_are_drawn_and_explained_on_request(view: Watched) -> None:
    assert "holds against" not in view.role("colors").first.inner_text()
    assert "lines: between modules" in view.role("colors").first.inner_text()
    view.role("signs").focus()
    view.page.keyboard.press("Space")
    assert view.state()
    key = view.role("colors").first.inner_text()
    for text in ("drives the next one the way it goes", "holds against it", "faint: between modules"):
        assert text in key
    assert "grey lines" not in key
    section, layers = snapshot(640)["sections"][0], snapshot(640)["layers"]
    k = section["edges"]["target"].index(layers[1]["ids"].index(5))
    value, partner = section["edges"]["attribution"][k], layers[0]["ids"][section["edges"]["source"][k]]
    said = re.search(
        rf"embed/{partner}\n.*?([+\u2212][^\n]*) ± [^\n]* (drives|holds against)", hover(view, "resid_mid", 5), re.S
    )
    assert said is not None
    assert said[2] == ("drives" if value >= 0 else "holds against")
    assert float(said[1].replace("\u2212", "-")) == pytest.approx(value, rel=0.1)


def test_a_click_follows_a_lineage_over_training(view: Watched) -> None:
    gone = next(one for one in FILM.lineages[2] if one.birth > 0 and one.death == len(STEPS))
    where = view.position(RUN, "resid_post", gone.id)
    assert where is not None
    view.page.mouse.click(where["x"], where["y"])
    track = view.page.locator("[data-track='lineage']")
    assert view.state()["following"] == f"resid_post/{gone.id}"
    assert "click to stop following" in view.role("tooltip").inner_text()
    # A dot for each snapshot with the lineage, and a ring at its birth.
    assert track.locator("circle").count() == len(STEPS) - gone.birth + 1
    text = view.role("follow-text")
    assert f"of {len(snapshot(640)['layers'][2]['ids'])}" in text.inner_text()
    view.set("step", 0)
    assert "not yet present at this step" in text.inner_text()
    view.set("step", len(STEPS) - 1)
    rank = snapshot(640)["layers"][2]["ids"].index(gone.id) + 1
    view.role("features").select_option("10")
    assert ("not among the features shown" in text.inner_text()) == (rank > 10)
    view.page.keyboard.press("Escape")
    assert view.state()["following"] == ""
    assert track.is_hidden()
    view.role("features").select_option("40")
    view.role("find").fill("embed/5")
    view.role("find").press("Enter")
    assert view.state()["following"] == "embed/5"
    where = view.position(RUN, "embed", 5)
    assert where is not None
    view.page.mouse.click(where["x"], where["y"])
    assert view.state()["following"] == ""


def test_runs_side_by_side_share_the_slider(view: Watched) -> None:
    view.page.check(f"[data-role='run'][value='{OTHER.name}']")
    view.page.wait_for_selector(f".lib-view[data-ready='true'][data-runs='{RUN} {OTHER.name}']")
    assert view.page.locator(".lib-panel").count() == 2
    for name in (RUN, OTHER.name):
        assert view.position(name, "embed", 5) is not None
    view.set("step", 1)
    assert view.state()["step"] == "14"
    assert view.position(RUN, "embed", 5) is not None
    assert view.position(OTHER.name, "embed", 5) is None
    assert (
        "has no snapshot at or before step 14" in view.page.locator(f".lib-panel[data-run='{OTHER.name}']").inner_text()
    )
    view.page.uncheck(f"[data-role='run'][value='{RUN}']")
    view.page.wait_for_selector(f".lib-view[data-ready='true'][data-runs='{OTHER.name}']")
    # The step no longer exists: the first one is shown.
    assert view.state()["step"] == "40"


def test_film_plays_to_its_end(view: Watched) -> None:
    view.role("speed").select_option("30")
    view.page.keyboard.press("Home")
    assert view.state()["step"] == "10"
    view.role("play").click()
    view.page.wait_for_selector(".lib-view[data-step='640']")
    view.page.wait_for_selector("[data-role='play'][aria-pressed='false']")
    view.page.keyboard.press("ArrowLeft")
    assert view.state()["step"] == "320"


@pytest.mark.parametrize("numbers_vary", [False, True])
def test_modules_have_the_colours_of_their_numbers_in_every_snapshot(opened: Open, numbers_vary: bool) -> None:
    run = SyntheticRun(RUN, STEPS, FILM.layers, numbers_vary=numbers_vary)
    numbers = [run.numbers_of_modules(n) for n in range(len(STEPS))]
    assert any(of_step != numbers[0] for of_step in numbers) == numbers_vary
    view = opened(film_page([run], "Film"))
    view.role("features").select_option("10")
    view.set("threshold", 0)
    for n, step in enumerate(STEPS):
        view.set("step", n)
        assert step == int(view.state()["step"])
        for layer, name in enumerate(NAMES):
            for one in run.alive(n, layer)[:10]:
                if one.id % 9 and one.id % 7 != 3:  # in a module; not hollow
                    assert color_at(view, name, one.id) == rgb(module_color(one.group))


def rgb(color: str) -> list[int]:
    return list(bytes.fromhex(color.removeprefix("#")))


def test_a_run_that_ended_earlier_shows_the_step_of_its_snapshot(opened: Open) -> None:
    ended = SyntheticRun("ended", STEPS[:3], [(name, "lib") for name in NAMES])
    view = opened(film_page([FILM, ended], "Film"))
    assert "epoch 64" in view.role("step-text").inner_text()
    view.page.check("[data-role='run'][value='ended']")
    view.page.wait_for_selector(".lib-view[data-ready='true'][data-runs$='ended']")
    assert "epoch" not in view.role("step-text").inner_text()
    own = view.page.locator(".lib-panel[data-run='ended'] [data-role='own-step']")
    assert own.inner_text() == "at step 20"
    assert view.role("own-step").first.is_hidden()
    view.set("step", 2)
    assert own.is_hidden()


def test_births_in_a_thinned_film_are_marked_as_upper_bounds(opened: Open) -> None:
    class Thinned(SyntheticRun):
        def run(self, every: int = 1) -> str:
            run = json.loads(super().run())
            for shown in run["snapshots"]:
                shown["layers"][0]["parents"] = [-1] * len(shown["layers"][0]["ids"])
            return json.dumps({**run, "every": 2})

    view = opened(film_page([Thinned(RUN, STEPS, FILM.layers)], "Film"))
    late = next(one for one in FILM.lineages[0] if 0 < one.birth < one.death == len(STEPS))
    assert f"birth\nsince step {STEPS[late.birth]} at the latest\n" in hover(view, "embed", late.id)
    split = next(one for one in FILM.lineages[1] if one.parent >= 0 and one.birth < one.death == len(STEPS))
    assert f"since step {STEPS[split.birth]}, split from" in hover(view, "resid_mid", split.id)


def test_charts_and_events_move_the_slider(view: Watched) -> None:
    assert view.role("metric").input_value() == "effective_edges/total"
    view.role("metric").select_option("modularity/total")
    view.role("xscale").select_option("linear")
    plot = view.page.locator("[data-track='metric'] svg")
    box = plot.bounding_box()
    assert box is not None
    # The axis goes from 0, where the loss begins, to 640; with margins of 58 and 14 pixels.
    view.page.mouse.click(box["x"] + 58 + (box["width"] - 72) * 330 / 640, box["y"] + 40)
    view.page.wait_for_selector(".lib-view[data-ready='true'][data-step='320']")
    assert f"{0.2 + 0.5 * 6 / 8:.3g}" in view.page.locator("[data-track='metric']").inner_text()
    events = json.loads(FILM.run())["events"]
    assert view.role("events").locator("li").count() == min(60, len(events))
    oldest = view.role("events").locator("li").last
    assert events[0]["text"] in oldest.inner_text()
    oldest.locator("button").click()
    view.page.wait_for_selector(f".lib-view[data-ready='true'][data-step='{events[0]['step']}']")
    assert view.state()["following"] == f"{events[0]['layer']}/{events[0]['lineage']}"


def test_colour_by_label_and_by_age(view: Watched) -> None:
    # Lineage 5 is present from the start.
    by_module = color_at(view, "embed", 5)
    view.role("color").select_option("age")
    assert color_at(view, "embed", 5) == [0x9A, 0x9A, 0x9A]
    assert "new at this step" in view.role("colors").inner_text()
    view.role("color").select_option("label")
    assert "k=20" in view.role("colors").inner_text()
    assert color_at(view, "embed", 5) not in ([0x9A, 0x9A, 0x9A], [255, 255, 255])
    view.role("color").select_option("module")
    assert color_at(view, "embed", 5) == by_module


def test_narrow_windows_have_no_horizontal_scrolling(view: Watched) -> None:
    for width in (320, 390, 768, 900, 1800):
        view.page.set_viewport_size({"width": width, "height": 900})
        view.page.wait_for_function("w => document.querySelector('.lib-view').clientWidth <= w", arg=width)
        assert view.page.evaluate("document.documentElement.scrollWidth") == width
        events = view.role("events")
        assert events.evaluate("list => list.scrollWidth <= list.clientWidth")
