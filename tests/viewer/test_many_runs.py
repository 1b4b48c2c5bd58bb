"""The section on all runs: its data, and what it shows in a browser."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from lib_lightning.graph import InteractionGraph
from lib_lightning.io.basis_file import read_parts
from lib_lightning.viewer.cache import Cache
from lib_lightning.viewer.html_export import film_page
from lib_lightning.viewer.many_runs import curve_names, curves, shared_features, universal_files
from lib_lightning.viewer.run_discovery import find_runs
from lib_lightning.viewer.run_view import RunView
from tests.viewer.browser import Watched
from tests.viewer.saved_run import write_run
from tests.viewer.test_plugin import Clock, client_of, get_json, later

__all__ = ["later"]
RUNS = ("narrow/seed0", "narrow/seed1", "wide/seed0", "wide/seed1")


def universal(members: list[str | None], runs: list[str]) -> dict[str, Any]:
    """A file that says that the given features of ``hidden`` are the same one."""
    n, count = len(runs), sum(member is not None for member in members)
    feature = {"members": members, "labels": ["a <b>" if member else "" for member in members], "central": 0}
    feature |= {"label": "a <b>", "importance": 0.25, "similarity": 0.9, "p_value": 0.001}
    counts = [float(k == count) for k in range(1, n + 1)]
    layer = {"layer": "hidden", "num_features": [12] * n, "features": [feature], "counts": counts}
    layer |= {"importance": [0.25 * x for x in counts], "identical": False, "num_values": 100}
    return {"format": 1, "names": runs, "runs": runs, "steps": [30] * n, "level": 0.05, "layers": [layer]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs of other lengths, with baselines, and a file on what they have in common."""
    folder = tmp_path_factory.mktemp("logs").resolve()
    for seed, name in enumerate(RUNS):
        write_run(folder / name, features=4, snapshots=4 + (seed == 3), seed=seed)
    runs = [f"{name}/lib" for name in RUNS]
    content = universal(["hidden/0", "hidden/1", None, "hidden/0"], runs)
    (folder / "universal.json").write_text(json.dumps(content))
    return folder


def views(folder: Path) -> list[RunView]:
    cache = Cache(1 << 30)
    return [RunView(path, name, cache, folder) for name, path in find_runs(folder).items()]


def test_curves_are_those_of_the_files(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = views(saved)
    names = json.loads(curve_names(runs))
    assert "loss/train" in names["scalar"]
    assert "features/total" in names["metric"]
    found = json.loads(curves(runs, "metric", "features/total"))
    assert [curve["name"] for curve in found] == [f"{name}/{basis}" for name in RUNS for basis in ("lib", "pca")]
    for curve in found:
        files = [saved / curve["name"] / "snapshots" / f"step-{step:08d}.safetensors" for step in curve["steps"]]
        graphs = [InteractionGraph.load(file) for file in files]
        assert curve["values"] == [graph.info["metrics"]["features/total"]["value"] for graph in graphs]
    # Baselines have no losses of their own.
    losses = json.loads(curves(runs, "scalar", "loss/train"))
    assert [curve["name"] for curve in losses] == [f"{name}/lib" for name in RUNS]
    assert losses[0]["values"][:2] == [2.0, 1.98]
    assert json.loads(curves(runs, "metric", "missing")) == []
    # Nothing is read twice, and never a tensor.
    monkeypatch.setattr("lib_lightning.viewer.snapshot_metrics.read_parts", None)
    assert json.loads(curves(runs, "metric", "edges/total"))
    monkeypatch.undo()
    wanted: list[str] = []
    monkeypatch.setattr(
        "lib_lightning.viewer.snapshot_metrics.read_parts",
        lambda path, want: read_parts(path, lambda name: wanted.append(name) or want(name)),
    )
    monkeypatch.setattr(
        "lib_lightning.viewer.run_view.read_outline", lambda *_: pytest.fail("importances are read, too")
    )
    fresh = views(saved)
    assert json.loads(curve_names(fresh)) == names
    assert wanted


def test_shared_features_have_the_names_of_runs_here(saved: Path, tmp_path: Path) -> None:
    runs = views(saved)
    files = universal_files([run.folder for run in runs], [saved])
    (found,) = json.loads(shared_features(runs, files))
    assert found["runs"] == [f"{name}/lib" for name in RUNS]
    assert found["newest"] == [30, 30, 30, 40]
    assert found["layers"][0]["features"][0]["members"] == ["hidden/0", "hidden/1", None, "hidden/0"]
    # Below a folder of some of the runs, with which no others are shown.
    wide = views(saved / "wide")
    assert universal_files([run.folder for run in wide], [saved / "wide"]) == []
    (found,) = json.loads(shared_features(wide, universal_files([run.folder for run in wide])))
    assert found["runs"] == [None, None, "seed0/lib", "seed1/lib"]
    only = [run for run in runs if run.name == "wide/seed0/lib"]
    assert json.loads(shared_features(only, files)) == []
    # Files that are damaged, or symbolic links, are not read.
    copy = tmp_path.resolve() / "copy"
    shutil.copytree(saved / "narrow", copy / "narrow")
    others = views(copy)
    (copy / "universal.json").write_text("{")
    files = universal_files([run.folder for run in others], [copy])
    assert json.loads(shared_features(others, files)) == []
    (copy / "universal.json").unlink()
    (copy / "universal.json").symlink_to(saved / "universal.json")
    assert universal_files([run.folder for run in others], [copy]) == []


def test_the_plugin_says_when_they_change(saved: Path, later: Clock) -> None:
    client = client_of(saved)
    runs = get_json(client, "runs")
    assert len({run["universal"] for run in runs}) == 1
    assert get_json(client, "curve_names")["scalar"] == ["loss/train"]
    assert len(get_json(client, "curves", kind="scalar", name="loss/train")) == 4
    assert len(get_json(client, "shared_features")) == 1
    assert "none of kind 'x'" in get_json(client, "curves", 404, kind="x", name="loss/train")["error"]
    path = saved / "universal.json"
    content = path.read_text()
    path.write_text(content + " ")
    later()
    try:
        assert get_json(client, "runs")[0]["universal"] != runs[0]["universal"]
    finally:
        path.write_text(content)


@pytest.fixture
def film(saved: Path, watched: Watched, tmp_path: Path) -> Watched:
    (tmp_path / "film.html").write_text(film_page(views(saved), "Film"))
    watched.open((tmp_path / "film.html").as_uri())
    watched.page.wait_for_selector(".lib-many[data-ready='true']")
    return watched


def test_a_film_shows_curves_by_group_and_follows_shared_features(film: Watched) -> None:
    page, section = film.page, film.role("many-runs")
    assert section.get_attribute("data-groups") == "narrow · lib=2 narrow · pca=2 wide · lib=2 wide · pca=2"
    rows = section.locator("table").first.locator("tbody tr").all_inner_texts()
    assert [row.split("\t")[1] for row in rows] == ["2"] * 4
    film.role("many-group").select_option("all")
    assert section.get_attribute("data-groups") == "lib=4 pca=4"
    film.role("many-curve").select_option("scalar:loss/train")
    page.wait_for_selector(".lib-many[data-groups='lib=4']")
    # The loss is the same in all runs, so there is no spread.
    assert "\t0\t" in section.locator("tbody tr").first.inner_text()
    film.role("many-spread").select_option("range")
    assert "the smallest to the largest value" in section.inner_text()
    # The line under the pointer is named.
    section.locator(".lib-chart").scroll_into_view_if_needed()
    line = section.locator(".lib-chart path[stroke]").last
    box = line.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 1, box["y"] + 1)
    assert "4 of 4 runs" in film.role("many-tip").inner_text()
    assert "seed" in film.role("many-tip").inner_text()
    # One run is shown; a second one is added, and both follow their own feature.
    page.locator("input[value='narrow/seed1/lib']").check()
    film.state()
    film.role("shared-feature").first.click()
    assert film.state()["following"] == "hidden/0"
    assert page.locator(".lib-following").count() == 2
    assert "3 of 4" in film.role("shared-features").inner_text()
    assert "snapshots by now" in film.role("shared-features").inner_text()
    film.role("shared-layer").first.click()
    assert film.role("shared-layer").first.get_attribute("aria-pressed") == "true"
    assert not film.errors


def test_many_check_boxes_can_be_filtered(film: Watched, saved: Path, tmp_path: Path) -> None:
    assert film.role("run").count() == 8
    assert film.role("run-filter").count() == 0
    for k in range(2):
        shutil.copytree(saved / "wide" / "seed0", tmp_path / "logs" / f"more{k}")
    shutil.copytree(saved, tmp_path / "logs" / "all")
    (tmp_path / "film.html").write_text(film_page(views((tmp_path / "logs").resolve()), "Film", edges=10))
    film.open((tmp_path / "film.html").as_uri())
    film.role("run-filter").fill("more pca")
    visible = [box.get_attribute("value") for box in film.role("run").all() if box.is_visible()]
    # The one that is shown stays.
    assert visible == ["all/narrow/seed0/lib", "more0/pca", "more1/pca"]
    film.role("run-filter").fill("nothing like this")
    assert "no run has these words" in film.page.locator(".lib-runs").inner_text()


def test_a_single_run_has_no_such_section(saved: Path, watched: Watched, tmp_path: Path) -> None:
    (tmp_path / "film.html").write_text(film_page(views(saved / "wide" / "seed0")[:1], "Film"))
    watched.open((tmp_path / "film.html").as_uri())
    assert not watched.role("many-runs").is_visible()
