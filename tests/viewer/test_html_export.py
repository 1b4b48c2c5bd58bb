"""The film as one file: everything in it, nothing from elsewhere, and names of any kind."""

from __future__ import annotations

import base64
import gzip
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lib_lightning.viewer.bundle import joined, static_files
from lib_lightning.viewer.cache import Cache
from lib_lightning.viewer.html_export import film_page
from lib_lightning.viewer.run_view import RunView
from tests.viewer.browser import Watched
from tests.viewer.filmed import Filmed, write_run

EVIL = '"><script>alert(1)</script>&</title>'


class Elements(HTMLParser):
    """Script elements of a page, as a browser sees them, and its title."""

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


def unpacked(text: str) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(text)))


def film_of(folder: Path, name: str = "version_0/lib") -> RunView:
    return RunView(folder, name, Cache(1 << 30))


def test_a_page_holds_what_its_films_tell(tmp_path: Path) -> None:
    filmed = write_run(tmp_path)
    films = [film_of(tmp_path / "lib"), film_of(tmp_path / "pca", "version_0/pca")]
    elements = Elements(film_page(films, "A title", edges=5))
    runs, *snapshots, script = elements.scripts
    assert runs[0] == {"type": "text/plain", "id": "lib-runs"}
    assert unpacked(runs[1]) == {
        "runs": [film.entry() for film in films],
        "run": {film.name: json.loads(film.run()) for film in films},
    }
    assert len(snapshots) == 2 * len(filmed.steps)
    expected = [(film, step) for film in films for step in filmed.steps]
    for (attributes, content), (film, step) in zip(snapshots, expected, strict=True):
        assert attributes == {
            "type": "text/plain",
            "class": "lib-snapshot",
            "data-run": film.name,
            "data-step": str(step),
        }
        assert unpacked(content) == json.loads(film.snapshot(step, edges=5))
    assert script[0] == {"type": "module"}
    assert elements.title == "A title"


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert film_page([film_of(tmp_path / "lib")], "t") == film_page([film_of(tmp_path / "lib")], "t")


def test_names_of_any_kind_stay_text(tmp_path: Path) -> None:
    Filmed(layers=(EVIL, "b", "output"), snapshots=2).write(tmp_path / "lib")
    film = film_of(tmp_path / "lib", EVIL)
    elements = Elements(film_page([film], EVIL))
    assert elements.title == EVIL
    assert len(elements.scripts) == 4
    assert {attributes.get("data-run") for attributes, _ in elements.scripts} == {EVIL, None}
    run = unpacked(elements.scripts[0][1])["run"][EVIL]
    assert run["layers"][0]["name"] == EVIL


def test_a_page_names_no_other_host(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = film_page([film_of(tmp_path / "lib")], "t")
    code = re.sub(r'(<script type="text/plain"[^>]*>)[^<]*', r"\1", page)
    # The namespace of SVG is a name, not an address.
    assert set(re.findall(r"(?:https?:)?//[\w.]+\.\w+[\w/]*", code)) <= {"http://www.w3.org/2000/svg"}
    assert "Content-Security-Policy\" content=\"default-src 'none'" in code


def test_a_film_with_names_of_any_kind_opens_in_a_browser(watched: Watched, tmp_path: Path) -> None:
    filmed = Filmed(layers=(EVIL, "b", "output"), snapshots=4)
    filmed.write(tmp_path / "lib")
    file = tmp_path / "film.html"
    file.write_text(film_page([film_of(tmp_path / "lib", EVIL)], EVIL), encoding="utf-8")
    watched.open(file.as_uri())
    for k in range(4):
        watched.set("step", k)
        assert watched.state()["featuresDrawn"] == str(sum(b.n_features for b in filmed.graph(k).bases.values()))
    assert watched.page.title() == EVIL
    assert EVIL in watched.page.locator("body").inner_text()
    assert watched.errors == []
    assert watched.requests == [file.as_uri()]


def test_modules_are_joined_without_clashes() -> None:
    modules = {
        "a.js": 'import {b, c as e} from "./b.js";\nimport {\n  d,\n} from "./d.js";\nconst x = 1;\nexport class A {}',
        "b.js": 'import {d} from "./d.js";\nconst x = 2;\nexport const b = 3, c = 4;\nexport function unused() {}',
        "d.js": "export async function d() {}",
        "alone.js": "export const no = 1;",
    }
    script = joined(modules, {"a.js": "A"})
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
        joined({"a.js": modules["a.js"], "b.js": modules["b.js"]}, {"a.js": "A"})


def test_the_views_own_modules_are_joined_whole() -> None:
    script = joined(static_files(), {"view.js": "mount", "embedded.js": "embeddedSource"})
    assert not re.search(r"^\s*(import|export)\b", script, re.MULTILINE)
    assert script.count("(() => {\n") >= len(re.findall(r"^modules\[", script, re.MULTILINE)) > 5
