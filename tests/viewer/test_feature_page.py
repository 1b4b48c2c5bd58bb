"""The page of a feature in Python: its numbers, its text in a terminal, and its display in a notebook."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from lib_lightning.errors import LIBError
from lib_lightning.graph import InteractionGraph
from lib_lightning.viewer import Run
from lib_lightning.viewer.cache import Cache
from lib_lightning.viewer.embedded_features import embed_features
from lib_lightning.viewer.run_view import RunView
from tests.viewer.browser import Watched
from tests.viewer.example_run import ExampleRun
from tests.viewer.saved_run import SavedRun
from tests.viewer.test_html_export import decompressed

LAYERS = ("embed", "hidden", "output")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs") / "version_0" / "lib"
    ExampleRun(LAYERS).write(folder)
    return folder


@pytest.mark.parametrize("rendering", ["tokens", "row"])
def test_a_page_has_the_numbers_and_a_text_of_them(tmp_path: Path, rendering: str) -> None:
    run = ExampleRun(LAYERS, snapshots=3, rendering=rendering)
    run.write(tmp_path / "lib")
    graph = run.graph(2)
    for name in graph.feature_ids("hidden"):
        feature, page = graph.feature(name), Run(tmp_path).feature(name)
        assert (page.id, page.step, page.index, page.label) == (name, 20, feature.index, feature.label)
        assert page.importance == pytest.approx(feature.importance, rel=1e-4)
        assert page.output_importance == pytest.approx(feature.output_importance, rel=1e-4)
        first = page.examples[0]
        assert first["value"] == pytest.approx(float(graph.examples["hidden"].values[feature.index, 0]), rel=1e-4)
        assert first["rendering"] == run.sample(first["sample"])
        text = repr(page)
        assert text.startswith(f"{name} at step 20")
        assert f"largest {first['value']:>8.3g}" in text
        assert f"{page.inputs[0]['id']} {100 * page.inputs[0]['share']:.0f}% " in text
        assert ("drives" in text) or ("holds against" in text)
        assert f"({first['rendering']['label']})" in text
        assert max(map(len, text.splitlines())) <= 160
        if rendering == "tokens":
            assert f"[{first['rendering']['tokens'][first['position']]}]" in text


def test_a_page_is_of_the_last_step_with_the_feature_or_of_a_given_one(folder: Path) -> None:
    run, saved = Run(folder), ExampleRun(LAYERS)
    gone = next(i for i, one in enumerate(saved.lineages[1]) if one.death < 8)
    last = 10 * (saved.lineages[1][gone].death - 1)
    assert run.feature(f"hidden/{gone}").step == last
    first = 10 * saved.lineages[1][gone].birth
    assert run.feature(f"hidden/{gone}", first).step == first
    with pytest.raises(LIBError, match=f"no snapshot at step 70 with feature 'hidden/{gone}', which is in those at"):
        run.feature(f"hidden/{gone}", 70)
    with pytest.raises(LIBError, match=r"No snapshot of run 'version_0/lib' has a feature 'hidden/99'\."):
        run.feature("hidden/99")
    for wrong in ("hidden", "hidden/x", "nowhere/3", "", 7):
        with pytest.raises(LIBError, match=r"such as 'embed/0'; got .*node layers .* are 'embed', 'hidden', 'output'"):
            run.feature(wrong)  # type: ignore[arg-type]


def test_the_notebook_shows_the_page_and_loads_nothing(watched: Watched, folder: Path, tmp_path: Path) -> None:
    saved = ExampleRun(LAYERS)
    which = next(i for i, one in enumerate(saved.lineages[1]) if one.birth == 0 and one.death == 8)
    page = Run(folder).feature(f"hidden/{which}")
    (tmp_path / "notebook.html").write_text(page._repr_html_(), encoding="utf-8")
    watched.page.goto((tmp_path / "notebook.html").as_uri())
    frame = watched.page.frames[1]
    frame.wait_for_selector(".lib-view[data-ready='true']")
    text = frame.locator(".lib-feature").inner_text()
    assert text.startswith(f"hidden/{which}\n")
    assert [f"{one['value']:.3g}".replace("-", "\u2212") in text for one in page.examples] == [True] * 16
    steps = frame.locator(".lib-compared").evaluate_all("all => all.map(e => e.dataset.step)")
    assert steps == ["0", "40", "70"]
    frame.locator("[data-part='interactions'] button").first.click()
    assert f'run.feature("{page.inputs[0]["id"]}", step=70)' in frame.locator(".lib-feature-notice").inner_text()
    assert watched.errors == []
    assert {address.split(":")[0] for address in watched.requests} <= {"file", "about", "data"}


def test_a_single_snapshot_says_nothing_about_time(watched: Watched, tmp_path: Path) -> None:
    # As of a pretrained model, whose outputs are tokens.
    ExampleRun(LAYERS, snapshots=2).write(tmp_path / "lib")
    (file, later) = sorted((tmp_path / "lib" / "snapshots").iterdir())
    later.unlink()
    graph = InteractionGraph.load(file)
    graph.info |= {"output_names": [" cat", ",", "cat", "\u21b5"], "output_distribution": {"kind": "categorical"}}
    graph.save(file)
    page = Run(tmp_path).feature("hidden/0")
    assert "since step" not in repr(page)
    watched.page.goto(page.save(tmp_path / "page.html").as_uri())
    watched.page.wait_for_selector(".lib-view[data-ready='true']")
    text = watched.page.locator(".lib-feature").inner_text().lower()
    assert [part for part in ("over training", "present from", "examples at step", "null") if part in text] == []
    assert "mean change of the log-probability where the feature is one standard deviation higher" in text
    names = watched.page.locator(".lib-output").all_inner_texts()
    assert sorted({*names}) == ["cat", "\u201c cat\u201d", "\u201c,\u201d", "\u201c\u21b5\u201d"]
    assert watched.errors == []


def test_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ExampleRun(LAYERS, snapshots=4).write(tmp_path / "lightning_logs" / "version_0" / "lib")
    text = (Path(__file__).parents[2] / "docs" / "feature_page.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    assert (tmp_path / "feature.html").read_text("utf-8").startswith("<!DOCTYPE html>")


def test_a_page_without_examples_is_one_too(tmp_path: Path) -> None:
    SavedRun(LAYERS, snapshots=2).write(tmp_path / "lib")
    page = Run(tmp_path).feature("hidden/0")
    assert (page.examples, page.raised, page.effect, page.histogram) == ([], [], None, None)
    assert "None" not in repr(page)
    assert html.unescape(page._repr_html_()).count("<!DOCTYPE html>") == 1


@pytest.mark.parametrize("max_bytes", [2_000, 60_000, 10_000_000])
def test_the_pages_in_a_film_fit_into_a_number_of_bytes(folder: Path, max_bytes: int) -> None:
    view = RunView(folder, "version_0/lib", Cache(1 << 30))
    steps = view.steps()
    found = embed_features(view, steps, max_bytes)
    assert found.size() <= max_bytes
    of_run = decompressed(found.run)
    # Whatever fits: the last, the first, the middle, then those between in turn.
    order = [70, 0, 30, 10, 50, 20, 40, 60]
    assert of_run["steps"] == list(found.snapshots) == sorted(order[: len(found.snapshots)])
    assert (len(found.snapshots) == 8) == (max_bytes == 10_000_000)
    for step, text in found.snapshots.items():
        for feature, page in decompressed(text).items():
            layer, which = feature.split("/")
            whole = json.loads(view.feature(step, LAYERS.index(layer), int(which)))
            assert page == {key: whole[key] for key in page}
            assert of_run["history"][feature] == whole["history"]
            assert {n: of_run["renderings"][""][n] for n in whole["renderings"]} == whole["renderings"]


def test_a_film_says_which_step_it_shows_instead(watched: Watched, folder: Path, tmp_path: Path) -> None:
    from lib_lightning.viewer.html_export import film_page

    file = tmp_path / "film.html"
    view = RunView(folder, "version_0/lib", Cache(1 << 30))
    page = film_page([view], "t", feature_bytes=90_000)
    file.write_text(page, encoding="utf-8")
    included = [int(step) for step in re.findall(r'class="lib-features" data-run="[^"]*" data-step="(\d+)"', page)]
    assert 1 < len(included) < 8
    watched.open(file.as_uri())
    absent = next(step for step in view.steps() if step not in included)
    saved = ExampleRun(LAYERS)
    which = next(i for i, one in enumerate(saved.lineages[1]) if one.birth == 0 and one.death == 8)
    watched.set("step", absent // 10)
    watched.role("find").fill(f"hidden/{which}")
    watched.role("find").press("Enter")
    watched.page.wait_for_selector(".lib-feature[data-loaded]")
    nearest = min(included, key=lambda step: abs(step - absent))
    text = watched.page.locator(".lib-feature-notice").inner_text()
    assert text == f"The page of this feature at step {absent} is not in this file; this is step {nearest}."
    assert watched.errors == []
