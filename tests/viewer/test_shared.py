"""Runs that have been compared, side by side: shared features have the same height and colour in both graphs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from lib_lightning.viewer.html_export import film_page
from tests.viewer.browser import Watched
from tests.viewer.synthetic_run import SyntheticRun

STEPS = [10, 14, 20, 40, 80, 160, 320, 640]
NAMES = ["embed", "resid", "output"]
# The second run has a snapshot less, its node layers have other names, and more features.
FIRST = SyntheticRun("seed-0/lib", STEPS, [(name, "lib") for name in NAMES], features=14)
SECOND = SyntheticRun("seed-1/lib", STEPS[1:], [(f"{name}.b", "lib") for name in NAMES], features=18, seed=1)
THIRD = SyntheticRun("seed-2/lib", STEPS, [(name, "lib") for name in NAMES], seed=2)
COMPARED = (320, 640)


def compared() -> dict[str, Any]:
    """A comparison of two snapshots: in each node layer three pairs, a split and a rotated feature, the rest alone."""
    layers = []
    for l, name in enumerate(NAMES):
        ids = [
            [one.id for one in run.alive(run.all_steps.index(step), l)]
            for run, step in zip((FIRST, SECOND), COMPARED, strict=True)
        ]
        matches = [[ids[0][n], ids[1][4 - n], "shared", 0.9 - n / 10, 0.001] for n in range(3)]
        matches.append([ids[0][0], ids[1][5], "split", 0.55, 0.004])
        shared = [{row[side] for row in matches if row[2] == "shared"} for side in (0, 1)]
        kinds = [
            {i: "shared" if i in shared[side] else ("lost", "new")[side] for i in ids[side]} for side in (0, 1)
        ]  # fmt: skip
        kinds[1][ids[1][5]], kinds[0][ids[0][6]] = "split", "rotated"
        features = [[[i, kind, 0.25, 1.0, 0.1] for i, kind in kinds[side].items()] for side in (0, 1)]
        layers.append({"a": name, "b": f"{name}.b", "matches": matches, "features": features})
    return {"fingerprints": [f"{FIRST.name} 320", f"{SECOND.name} 640"], "layers": layers}


COMPARISON = compared()
FIRST.comparisons = [COMPARISON]
PAIRS = [
    (l, a, b) for l, layer in enumerate(COMPARISON["layers"]) for a, b, kind, *_ in layer["matches"] if kind == "shared"
]


@pytest.fixture
def view(opened: Callable[[str], Watched]) -> Watched:
    return opened(film_page([FIRST, SECOND, THIRD], "Film"))


def places(view: Watched, l: int, a: int, b: int) -> list[dict[str, float] | None]:
    return [view.position(FIRST.name, NAMES[l], a), view.position(SECOND.name, f"{NAMES[l]}.b", b)]


def color_at(view: Watched, run: str, where: dict[str, float]) -> str:
    found: str = view.page.evaluate(
        """([run, {x, y}]) => {
          const panel = document.querySelector(`[data-run="${run}"] .lib-base`);
          const rim = panel.getBoundingClientRect(), canvas = panel.lastElementChild;
          const place = [x - rim.left - window.scrollX, y - rim.top - window.scrollY, 1, 1];
          return [...canvas.getContext("2d").getImageData(...place).data].slice(0, 3).join();
        }""",
        [run, where],
    )
    return found


def test_shared_features_are_level_and_have_the_same_colour_over_the_whole_film(view: Watched) -> None:
    assert view.state()["runs"] == f"{FIRST.name} {SECOND.name}"  # those that were compared
    assert view.role("color").input_value() == view.role("heights").input_value() == "shared"
    seen: dict[tuple[int, int], set[tuple[float, str]]] = {}
    both = 0
    for n in range(len(STEPS)):
        view.set("step", n)
        for l, a, b in PAIRS:
            for run, where in zip((FIRST, SECOND), places(view, l, a, b), strict=True):
                if where is not None:
                    top = view.page.locator(f'[data-run="{run.name}"] .lib-stage').bounding_box()
                    assert top is not None
                    seen.setdefault((l, a), set()).add((where["y"] - top["y"], color_at(view, run.name, where)))
            both += all(places(view, l, a, b))
    assert both > 30
    assert set(seen) == {(l, a) for l, a, _ in PAIRS}
    assert all(len(found) == 1 for found in seen.values()), "one height and one colour, at all steps in both graphs"
    for l in range(3):
        heights = [y for (layer, _), found in seen.items() for y, _ in found if layer == l]
        assert len(set(heights)) == 3
    legend = view.page.locator(f'[data-run="{SECOND.name}"] [data-role="colors"]').inner_text()
    assert "in both: same height and colour" in legend
    assert "compared at step 640" in legend
    # A feature that is not shared has no colour, and its own height.
    (alone, *_) = (i for i, kind, *_ in COMPARISON["layers"][0]["features"][0] if kind == "lost")
    where = view.position(FIRST.name, "embed", alone)
    assert where is not None
    assert color_at(view, FIRST.name, where) == "255,255,255"
    assert view.errors == []


def test_tooltip_and_click_say_and_show_the_counterpart(view: Watched) -> None:
    l, a, b = PAIRS[1]
    first, second = places(view, l, a, b)
    assert first is not None
    assert second is not None
    view.page.mouse.move(first["x"], first["y"])
    assert f"in {SECOND.name}: the same feature as embed.b/{b}, similarity 0.25" in view.role("tooltip").inner_text()
    ring = """run => {
      const {width, height} = document.querySelector(`[data-run="${run}"] .lib-overlay`);
      const canvas = document.querySelector(`[data-run="${run}"] .lib-overlay`);
      return canvas.getContext("2d").getImageData(0, 0, width, height).data.some((value) => value > 0);
    }"""
    assert view.page.evaluate(ring, SECOND.name), "the counterpart is emphasized while the mouse is over a feature"
    view.page.mouse.move(5, 5)
    assert not view.page.evaluate(ring, SECOND.name)
    view.page.mouse.click(first["x"], first["y"])
    view.page.mouse.move(5, 5)
    assert view.state()["following"] == f"embed/{a}"
    assert view.page.evaluate(ring, SECOND.name), "and as long as it is followed"
    view.set("step", 3)
    assert view.page.evaluate(ring, SECOND.name) == (places(view, l, a, b)[1] is not None)
    (lost, *_) = (i for i, kind, *_ in COMPARISON["layers"][0]["features"][0] if kind == "lost")
    view.set("step", 7)
    where = view.position(FIRST.name, "embed", lost)
    assert where is not None
    view.page.mouse.move(where["x"], where["y"])
    assert f"in {SECOND.name}: not there, at most similarity 0.25" in view.role("tooltip").inner_text()
    assert view.errors == []


def test_it_is_offered_where_compared_runs_are_shown_and_what_the_user_has_chosen_stays(view: Watched) -> None:
    options = "select => [...select.options].map(({value}) => value)"
    assert "shared" in view.role("color").evaluate(options)
    box = view.page.locator(f'[data-role="run"][value="{SECOND.name}"]')
    box.uncheck()
    assert view.state()["runs"] == FIRST.name
    assert "shared" not in view.role("color").evaluate(options)
    assert (view.role("color").input_value(), view.role("heights").input_value()) == ("module", "lineage")
    box.check()
    view.page.wait_for_function("document.querySelector('[data-role=color]').value === 'shared'")
    view.role("color").select_option("age")
    box.uncheck()
    box.check()
    view.page.wait_for_function("document.querySelector('[data-role=heights]').value === 'shared'")
    assert view.role("color").input_value() == "age"
    # A run that was not compared is drawn as ever, beside those that were.
    view.role("color").select_option("shared")
    view.page.locator(f'[data-role="run"][value="{THIRD.name}"]').check()
    assert view.state()["runs"].endswith(THIRD.name)
    assert "not compared" in view.page.locator(f'[data-run="{THIRD.name}"] [data-role="colors"]').inner_text()
    assert view.errors == []


def test_what_a_comparison_does_not_know_is_no_error(opened: Callable[[str], Watched]) -> None:
    """Node layers that are gone, features that no snapshot has, and snapshots of other runs."""
    strange = json.loads(json.dumps(COMPARISON))
    strange["layers"][0]["a"] = "gone"
    strange["layers"][1]["matches"].append([9999, 9998, "shared", None, None])
    other = {"fingerprints": ["x", f"{SECOND.name} 640"], "layers": []}
    run = SyntheticRun(FIRST.name, STEPS, FIRST.layers, features=14, comparisons=[other, strange])
    view = opened(film_page([SECOND, run], "Film"))
    assert view.role("color").input_value() == "shared"
    assert view.errors == []


def test_features_of_three_runs_are_level_by_way_of_the_first(opened: Callable[[str], Watched]) -> None:
    """As `lib-lightning compare A B C` compares them; a feature of C has one counterpart in A, and so one in B."""
    with_third = json.loads(json.dumps(COMPARISON))
    with_third["fingerprints"][1] = f"{THIRD.name} 640"
    for l, layer in enumerate(with_third["layers"]):
        ids = [one.id for one in THIRD.alive(len(STEPS) - 1, l)]
        layer["b"] = NAMES[l]
        layer["matches"] = [[row[0], ids[n], *row[2:]] for n, row in enumerate(layer["matches"][:3])]
        kinds = {i: "shared" if n < 3 else "new" for n, i in enumerate(ids)}
        layer["features"][1] = [[i, kind, 0.5, 0.01, 0.1] for i, kind in kinds.items()]
    run = SyntheticRun(FIRST.name, STEPS, FIRST.layers, features=14, comparisons=[COMPARISON, with_third])
    view = opened(film_page([run, SECOND, THIRD], "Film"))
    assert view.state()["runs"] == f"{FIRST.name} {SECOND.name} {THIRD.name}"
    triples = [(l, a, b, row[1]) for l, a, b in PAIRS for row in with_third["layers"][l]["matches"] if row[0] == a]
    assert len(triples) == 9
    for l, a, b, c in triples:
        looks = []
        for name, where in (
            *zip((FIRST.name, SECOND.name), places(view, l, a, b), strict=True),
            (THIRD.name, view.position(THIRD.name, NAMES[l], c)),
        ):
            if where is not None:
                box = view.page.locator(f'[data-run="{name}"] .lib-stage').bounding_box()
                assert box is not None
                scrolled = view.page.evaluate("window.scrollY")
                looks.append((where["y"] - box["y"] - scrolled, color_at(view, name, where)))
        assert len(looks) >= 2
        assert len(set(looks)) == 1
    assert view.errors == []
