"""The viewer over HTTP while a run is being written."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest
from playwright.sync_api import Route

from lib_lightning.viewer.bundle import static_files
from tests.viewer.browser import READY, Watched
from tests.viewer.synthetic_run import SyntheticRun

STEPS = [10, 20, 40, 80]
PAGE = """<!DOCTYPE html><meta charset="utf-8"><body><script type="module" src="start.js"></script>"""
START = 'import {render} from "./index.js"; render();'
# The policy of TensorBoard's pages.
POLICY = "default-src 'self'; font-src 'self' data:; img-src 'self' data: blob:; object-src 'none'; style-src 'self' 'unsafe-inline' data:; connect-src 'self'; script-src 'self'"  # noqa: E501


class FakePlugin:
    """A simulated plugin whose run grows."""

    def __init__(self) -> None:
        self.count = 0
        self.broken = ""
        self.lost: set[int] = set()
        self.names = ["run/lib"]
        self.unreadable: set[str] = set()
        self.layers = ["in", "out"]
        self.asked = 0

    def saved(self, name: str) -> SyntheticRun:
        return SyntheticRun(name, STEPS, [(layer, "lib") for layer in self.layers], written=self.count)

    def answer(self, route: Route) -> None:
        address = urlparse(route.request.url)
        name = address.path.rsplit("/", 1)[1]
        query = {key: values[0] for key, values in parse_qs(address.query).items()}
        if name == "page.html":
            route.fulfill(body=PAGE, content_type="text/html", headers={"Content-Security-Policy": POLICY})
        elif name.endswith((".js", ".css")):
            kind = "text/javascript" if name.endswith("js") else "text/css"
            route.fulfill(body=START if name == "start.js" else static_files()[name], content_type=kind)
        elif self.broken:
            route.fulfill(status=500, json={"error": self.broken})
        elif name == "runs":
            route.fulfill(json=[self.entry(name) for name in self.names] if self.count else [])
        elif name == "curve_names":
            self.asked += 1
            route.fulfill(json={"metric": ["features/total"], "scalar": []})
        elif name == "curves":
            route.fulfill(
                json=[{"name": run, "steps": STEPS, "values": [1, 2, 3, 4 + k]} for k, run in enumerate(self.names)]
            )
        elif name == "shared_features":
            route.fulfill(json=[])
        elif query["run"] in self.unreadable:
            route.fulfill(status=500, json={"error": f"The run '{query['run']}' cannot be read."})
        elif name == "run":
            route.fulfill(body=self.saved(query["run"]).run())
        elif int(query["step"]) in self.lost:
            route.fulfill(status=404, json={"error": f"The run has no snapshot at step {query['step']}."})
        elif name == "feature":
            place = (int(query[key]) for key in ("step", "layer", "feature"))
            try:
                route.fulfill(body=self.saved(query["run"]).feature(*place))
            except (IndexError, ValueError):  # of a run that has been replaced meanwhile
                route.fulfill(status=404, json={"error": "The run has no such feature."})
        else:
            route.fulfill(body=self.saved(query["run"]).snapshot(int(query["step"])))

    def entry(self, name: str) -> dict[str, Any]:
        entry = self.saved(name).entry()
        return {**entry, "version": f"{entry['version']} {self.layers}"}


@pytest.fixture
def served(watched: Watched) -> FakePlugin:
    served = FakePlugin()
    watched.page.clock.install()
    watched.page.route("http://tensorboard.test/**", served.answer)
    return served


def test_snapshots_appear_as_they_are_written(watched: Watched, served: FakePlugin) -> None:
    page = watched.page
    watched.open("http://tensorboard.test/a/prefix/page.html")
    assert "No snapshots yet" in page.locator(".lib-empty").inner_text()
    served.count = 2
    page.clock.fast_forward(5100)
    page.wait_for_selector(f"{READY}[data-step='20']")
    served.count = 3
    page.clock.fast_forward(5100)
    page.wait_for_selector(f"{READY}[data-step='40']")
    # The step shown does not change if it is not the last one.
    watched.set("step", 0)
    served.count = 4
    page.clock.fast_forward(5100)
    page.wait_for_selector("[data-role='step'][max='3']")
    assert watched.state()["step"] == "10"
    assert watched.errors == []
    assert {urlparse(url).netloc for url in watched.requests} == {"tensorboard.test"}


def test_a_snapshot_that_fails_to_load_is_requested_again(watched: Watched, served: FakePlugin) -> None:
    page = watched.page
    served.count, served.lost = 4, {20}
    watched.open("http://tensorboard.test/page.html")
    watched.set("step", 1)
    assert "no snapshot at step 20" in page.locator(".lib-message").inner_text()
    assert watched.state()["step"] == "80"
    served.lost = set()
    page.clock.fast_forward(5100)
    page.wait_for_selector(f"{READY}[data-step='20']")
    assert page.locator(".lib-message").is_hidden()


def test_a_deleted_run_is_replaced_by_another(watched: Watched, served: FakePlugin) -> None:
    served.count = 2
    watched.open("http://tensorboard.test/page.html")
    assert watched.state()["runs"] == "run/lib"
    served.names = ["run/other"]
    watched.page.clock.fast_forward(5100)
    watched.page.wait_for_selector(f"{READY}[data-runs='run/other']")
    assert watched.position("run/other", "in", 5) is not None


def test_errors_are_shown_and_polling_continues(watched: Watched, served: FakePlugin) -> None:
    page = watched.page
    served.broken = "The log directory cannot be read."
    watched.open("http://tensorboard.test/page.html")
    assert "The log directory cannot be read." in page.locator(".lib-message").inner_text()
    served.broken, served.count = "", 1
    page.clock.fast_forward(5100)
    page.wait_for_selector(f"{READY}[data-step='10']")
    assert page.locator(".lib-message").is_hidden()


def test_runs_keep_their_colours_when_others_appear(watched: Watched, served: FakePlugin) -> None:
    page = watched.page
    swatches = "items => items.map(item => item.style.background)"
    served.count, served.names = 2, ["b", "c"]
    watched.open("http://tensorboard.test/page.html")
    before = page.eval_on_selector_all(".lib-run .lib-line-swatch", swatches)
    served.names = ["a", "b", "c"]
    page.clock.fast_forward(5100)
    page.wait_for_selector("[data-role='run'][value='a']")
    new, *kept = page.eval_on_selector_all(".lib-run .lib-line-swatch", swatches)
    assert kept == before
    assert new not in before
    assert page.eval_on_selector_all(".lib-panel-head .lib-line-swatch", swatches) == before[:1]
    assert page.locator("[data-track='metric'] .lib-line-swatch").first.evaluate("e => e.style.background") == before[0]


def test_an_unreadable_run_does_not_prevent_others_from_being_shown(watched: Watched, served: FakePlugin) -> None:
    page = watched.page
    message = page.locator(".lib-message")
    served.count, served.names, served.unreadable = 2, ["a", "b"], {"a"}
    watched.open("http://tensorboard.test/page.html")
    assert watched.state()["runs"] == "b"
    assert "The run 'a' cannot be read." in message.inner_text()
    page.check("[data-role='run'][value='a']")
    served.count = 3
    page.clock.fast_forward(5100)
    page.wait_for_selector(f"{READY}[data-step='40'][data-runs='b']")
    assert "The run 'a' cannot be read." in message.inner_text()
    served.unreadable = set()
    page.clock.fast_forward(5100)
    page.wait_for_selector(f"{READY}[data-runs='a b']")
    assert message.is_hidden()


def test_a_replaced_run_is_shown_while_a_feature_is_followed(watched: Watched, served: FakePlugin) -> None:
    page = watched.page
    served.count = 2
    watched.open("http://tensorboard.test/page.html")
    for layers, following in ((["start", "in", "out"], "out/5"), (["start", "in"], "")):
        watched.role("find").fill("nothing/5")
        watched.role("find").press("Enter")
        assert "No feature shown has the name or label" in page.locator(".lib-message").inner_text()
        watched.role("find").fill("out/5")
        watched.role("find").press("Enter")
        assert page.locator(".lib-message").is_hidden()
        served.layers = layers
        page.clock.fast_forward(5100)
        page.wait_for_function("n => document.querySelectorAll('.lib-head').length === n", arg=len(layers))
        assert watched.state()["following"] == following
    # The page of a feature may be requested while its run is replaced.
    assert [error for error in watched.errors if "404" not in error] == []


def test_a_version_that_failed_to_draw_is_drawn_again(watched: Watched, served: FakePlugin) -> None:
    page = watched.page
    served.count = 2
    watched.open("http://tensorboard.test/page.html")
    page.evaluate(
        """() => {
          const own = HTMLCanvasElement.prototype.getContext;
          HTMLCanvasElement.prototype.getContext = () => { throw new Error("It cannot be drawn."); };
          window.mend = () => { HTMLCanvasElement.prototype.getContext = own; };
        }"""
    )
    served.count = 3
    page.clock.fast_forward(5100)
    page.wait_for_selector(".lib-message:has-text('It cannot be drawn.')")
    page.evaluate("mend()")
    page.clock.fast_forward(5100)
    page.wait_for_selector(f"{READY}[data-step='40']")
    assert page.locator(".lib-message").is_hidden()


def test_curves_of_all_runs_are_fetched_again_when_a_run_has_changed(watched: Watched, served: FakePlugin) -> None:
    page = watched.page
    served.count, served.names = 2, ["run0/lib", "run1/lib"]
    watched.open("http://tensorboard.test/page.html")
    page.wait_for_selector(".lib-many[data-groups='lib=2']")
    assert served.asked == 1
    page.clock.fast_forward(5100)
    page.wait_for_timeout(100)
    assert served.asked == 1
    served.count, served.names = 3, ["run0/lib", "run1/lib", "run2/lib"]
    page.clock.fast_forward(5100)
    page.wait_for_selector(".lib-many[data-groups='lib=3']")
    assert served.asked == 2
    row = watched.role("many-runs").locator("tbody tr").inner_text().split("\t")
    assert [text.strip() for text in row] == ["lib", "3", "5", "1", "4", "6", "80"]
    assert watched.errors == []
