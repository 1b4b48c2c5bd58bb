"""The view as one HTML file: complete, self-contained, and safe for any names."""

from __future__ import annotations

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib_lightning.viewer.bundle import bundle, static_files
from lib_lightning.viewer.cache import Cache
from lib_lightning.viewer.html_export import film_page
from lib_lightning.viewer.run_view import RunView
from tests.viewer.browser import Watched
from tests.viewer.saved_run import SavedRun, write_run

EVIL = '"><script>alert(1)</script>&</title>'


class Elements(HTMLParser):
    """The script elements and title of a page, as parsed by a browser."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.title, self._tag = "", ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""

    def handle_data(self, data: str) -> None:
        if self._tag == "script":
            self.scripts[-1] = self.scripts[-1][0], self.scripts[-1][1] + data
        if self._tag == "title":
            self.title += data


def decompressed(text: str) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(text)))


def view_of(folder: Path, name: str = "version_0/lib") -> RunView:
    return RunView(folder, name, Cache(1 << 30))


def test_the_page_contains_the_runs_and_snapshots(tmp_path: Path) -> None:
    saved = write_run(tmp_path)
    views = [view_of(tmp_path / "lib"), view_of(tmp_path / "pca", "version_0/pca")]
    elements = Elements(film_page(views, "A title", edges=5))
    runs, *others, script = elements.scripts
    snapshots = [found for found in others if found[0]["class"] == "lib-snapshot"]
    assert runs[0] == {"type": "text/plain", "id": "lib-runs"}
    assert decompressed(runs[1]) == {
        "runs": [view.entry() for view in views],
        "run": {view.name: json.loads(view.run()) for view in views},
        "shared": [],
    }
    assert len(snapshots) == 2 * len(saved.steps)
    expected = [(view, step) for view in views for step in saved.steps]
    for (attributes, content), (view, step) in zip(snapshots, expected, strict=True):
        assert attributes == {
            "type": "text/plain",
            "class": "lib-snapshot",
            "data-run": view.name,
            "data-step": str(step),
        }
        assert decompressed(content) == json.loads(view.snapshot(step, edges=5))
    assert script[0] == {"type": "module"}
    assert elements.title == "A title"


def test_the_export_is_deterministic(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert film_page([view_of(tmp_path / "lib")], "t") == film_page([view_of(tmp_path / "lib")], "t")


def test_names_are_escaped(tmp_path: Path) -> None:
    SavedRun(layers=(EVIL, "b", "output"), snapshots=2).write(tmp_path / "lib")
    view = view_of(tmp_path / "lib", EVIL)
    elements = Elements(film_page([view], EVIL))
    assert elements.title == EVIL
    assert {attributes.get("data-run") for attributes, _ in elements.scripts} == {EVIL, None}
    run = decompressed(elements.scripts[0][1])["run"][EVIL]
    assert run["layers"][0]["name"] == EVIL


def test_the_page_refers_to_no_other_host(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = film_page([view_of(tmp_path / "lib")], "t")
    code = re.sub(r'(<script type="text/plain"[^>]*>)[^<]*', r"\1", page)
    # The namespace of SVG is a name, not an address.
    assert set(re.findall(r"(?:https?:)?//[\w.]+\.\w+[\w/]*", code)) <= {"http://www.w3.org/2000/svg"}
    assert "Content-Security-Policy\" content=\"default-src 'none'" in code


def test_a_film_with_special_characters_in_names_opens_in_a_browser(watched: Watched, tmp_path: Path) -> None:
    saved = SavedRun(layers=(EVIL, "b", "output"), snapshots=4)
    saved.write(tmp_path / "lib")
    file = tmp_path / "film.html"
    file.write_text(film_page([view_of(tmp_path / "lib", EVIL)], EVIL), encoding="utf-8")
    watched.open(file.as_uri())
    for k in range(4):
        watched.set("step", k)
        assert watched.state()["featuresDrawn"] == str(sum(b.n_features for b in saved.graph(k).bases.values()))
    assert watched.page.title() == EVIL
    assert EVIL in watched.page.locator("body").inner_text()
    assert watched.errors == []
    assert watched.requests == [file.as_uri()]


def test_bundled_modules_do_not_clash() -> None:
    modules = {
        "a.js": 'import {b, c as e} from "./b.js";\nimport {\n  d,\n} from "./d.js";\nconst x = 1;\nexport class A {}',
        "b.js": 'import {d} from "./d.js";\nconst x = 2;\nexport const b = 3, c = 4;\nexport function unused() {}',
        "d.js": "export async function d() {}",
        "alone.js": "export const no = 1;",
    }
    script = bundle(modules, {"a.js": "A"})
    assert [line for line in script.splitlines() if line.startswith("modules[")] == [
        f'modules["{name}.js"] = (() => {{' for name in "dba"
    ]
    assert 'const {b, c: e} = modules["b.js"];' in script
    assert 'const {d} = modules["d.js"];' in script
    assert [line for line in script.splitlines() if line.startswith("return {")] == [
        "return {d};",
        "return {b, c};",
        "return {A};",
    ]
    with pytest.raises(KeyError, match=r"d\.js"):
        bundle({"a.js": modules["a.js"], "b.js": modules["b.js"]}, {"a.js": "A"})


def test_the_viewers_modules_are_bundled_completely() -> None:
    script = bundle(static_files(), {"view.js": "mount", "embedded.js": "embeddedSource"})
    assert not re.search(r"^\s*(import|export)\b", script, re.MULTILINE)
    assert script.count("(() => {\n") >= len(re.findall(r"^modules\[", script, re.MULTILINE)) > 5


def test_large_pages_are_thinned_and_say_so(tmp_path: Path) -> None:
    write_run(tmp_path)
    whole = film_page([view_of(tmp_path / "lib")], "t")
    assert "lib-thinned" not in whole
    thinned = film_page([view_of(tmp_path / "lib")], "t", max_bytes=len(whole) // 2)
    assert 'id="lib-thinned"' in thinned
    assert "To stay below" in thinned


class LongRun:
    """As much text as a run of a transformer with many features: 13 layers, and edges with their errors."""

    name, _layers, _kinds = "long", 13, 8

    def __init__(self, snapshots: int, features: int) -> None:
        self._steps = list(range(0, 10 * snapshots, 10))
        rng = np.random.default_rng(0)
        self._outlines: list[list[dict[str, Any]]] = []
        self._edges: list[list[dict[str, Any]]] = []
        for _ in range(self._kinds):  # one after the other again and again, far enough apart not to be compressed
            values = [[float(f"{x:.5g}") for x in rng.exponential(size=features)] for _ in range(self._layers)]
            ids = [rng.permutation(features).tolist() for _ in range(self._layers)]
            self._outlines.append([{"ids": i, "importance": v, "modules": i} for i, v in zip(ids, values, strict=True)])
            weights = [[float(f"{x:.5g}") for x in rng.exponential(size=400)] for _ in range(self._layers - 1)]
            ends = [rng.integers(features, size=400).tolist() for _ in range(self._layers - 1)]
            self._edges.append(
                [{"source": e, "target": e[::-1], "weight": w} for e, w in zip(ends, weights, strict=True)]
            )

    def entry(self) -> dict[str, Any]:
        return {"name": self.name, "version": "0", "snapshots": len(self._steps)}

    def steps(self, every: int = 1) -> list[int]:
        return [*self._steps[:-1:every], self._steps[-1]]

    def run(self, every: int = 1) -> str:
        return json.dumps([self._outlines[step // 10 % self._kinds] for step in self.steps(every)])

    def feature_pages(self, step: int, limit: int) -> list[Any]:
        return []

    def notes(self) -> dict[str, str]:
        return {}

    def final_forms(self) -> dict[str, int]:
        return {}

    def snapshot(self, step: int, edges: int = 400) -> str:
        kind = step // 10 % self._kinds
        held = [{end: column[:edges] for end, column in section.items()} for section in self._edges[kind]]
        return json.dumps({"step": step, "layers": self._outlines[kind], "sections": held})


@pytest.mark.parametrize("features", [40, 128])
def test_a_page_of_500_snapshots_of_13_layers_is_smaller_than_20_megabytes(features: int) -> None:
    run = LongRun(500, features)
    page = film_page([run], "t")  # type: ignore[list-item]
    assert 5e6 < len(page) < 20e6
    assert 'id="lib-thinned"' in page
    shown = re.findall(r'class="lib-snapshot" data-run="long" data-step="(\d+)"', page)
    assert int(shown[0]) == 0
    assert int(shown[-1]) == 4990
    assert len(shown) >= 50
