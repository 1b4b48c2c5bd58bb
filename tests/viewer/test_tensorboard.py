"""The tab in TensorBoard itself, started from the command line and opened in a browser."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlparse
from urllib.request import urlopen

import pytest
import torch
from playwright.sync_api import Frame
from torch import nn

from lib_lightning import compute_interaction_graph
from lib_lightning.lineage import reference_features
from lib_lightning.training.cli import main
from tests.viewer.browser import READY, Watched
from tests.viewer.saved_run import SavedRun, write_run

ROOT = Path(__file__).parents[2]
RUN = "version_0/lib"


@contextmanager
def tensorboard(logs: Path, site: Path, options: Sequence[str] = ()) -> Iterator[str]:
    """Start TensorBoard with a log directory; yields its address.

    TensorBoard finds the plugin by its entry point. Since the package may not be installed, the declaration in
    pyproject.toml is copied to metadata of an installed package.
    """
    (declared,) = re.findall(
        r"^\[project\.entry-points\.tensorboard_plugins\]\n(.*)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    info = site / "lib_lightning-0.0.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lib-lightning\nVersion: 0.0.0\n")
    (info / "entry_points.txt").write_text(f"[tensorboard_plugins]\n{declared.replace(chr(34), '')}\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--port", "0", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(site)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        output = []
        for line in process.stderr:
            output.append(line)
            if found := re.search(r"TensorBoard \S+ at (http://\S+) ", line):
                yield found[1]
                break
        else:
            pytest.fail("TensorBoard did not start:\n" + "".join(output))
    finally:
        process.terminate()
        process.communicate(timeout=60)


def get(url: str, path: str) -> Any:
    with urlopen(url + path) as response:
        return json.load(response)


@pytest.mark.parametrize("options", [[], ["--load_fast=false"], ["--path_prefix=/below"]])
def test_tensorboard_finds_the_plugin_and_serves_it(options: list[str], tmp_path: Path) -> None:
    saved = write_run(tmp_path / "logs" / "version_0")
    with tensorboard(tmp_path / "logs", tmp_path / "site", options) as url:
        plugins = get(url, "data/plugins_listing")
        assert plugins["lib"]["enabled"] is True
        assert plugins["lib"]["tab_name"] == "LIB"
        assert plugins["lib"]["loading_mechanism"]["module_path"].endswith("data/plugin/lib/index.js")
        assert len(plugins) > 5  # TensorBoard's own plugins are still listed
        assert [run["name"] for run in get(url, "data/plugin/lib/runs")] == [RUN, "version_0/pca"]
        run = get(url, f"data/plugin/lib/run?run={RUN}")
        assert [snapshot["step"] for snapshot in run["snapshots"]] == saved.steps
        assert len(run["scalars"]["loss/train"]["steps"]) == 80
        with pytest.raises(HTTPError) as caught:
            get(url, "data/plugin/lib/snapshot?run=../version_0/lib&step=10")
        assert caught.value.code == 404
        assert json.load(caught.value)["error"].startswith("There is no run '../version_0/lib'")


class Tab:
    """The tab LIB of TensorBoard in a browser."""

    def __init__(self, watched: Watched, url: str) -> None:
        self.page = watched.page
        self.errors: list[str] = []
        self.page.on(
            "console", lambda m: m.type == "error" and "plugin" in m.location["url"] and self.errors.append(m.text)
        )
        self.page.goto(url)
        self.page.get_by_role("tab", name="LIB").click()
        self.frame: Frame
        for _ in range(300):
            found = [frame for frame in self.page.frames if "plugin_entry" in frame.url]
            if found:
                self.frame = found[0]
                break
            self.page.wait_for_timeout(100)
        self.frame.wait_for_selector(READY)

    def state(self) -> dict[str, str]:
        state: dict[str, str] = self.frame.eval_on_selector(READY, "element => ({...element.dataset})")
        return state

    def set(self, role: str, value: float) -> dict[str, str]:
        self.frame.locator(f"[data-role='{role}']").evaluate(
            "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", value
        )
        self.frame.wait_for_selector(READY)
        return self.state()


def test_the_tab_in_a_browser(watched: Watched, tmp_path: Path) -> None:
    saved = SavedRun(snapshots=8, features=20)
    logs = tmp_path / "logs" / "version_0"
    write_run(logs, snapshots=8, features=20)
    last = logs / "lib" / "snapshots" / "step-00000070.safetensors"
    last.unlink()
    with tensorboard(tmp_path / "logs", tmp_path / "site") as url:
        tab = Tab(watched, url)
        assert urlparse(watched.page.url).fragment == "lib"
        state = tab.state()
        assert (state["runs"], state["step"]) == (RUN, "60")
        graph = saved.graph(6)
        assert state["featuresDrawn"] == str(sum(basis.n_features for basis in graph.bases.values()))

        # The slider changes the graph, and the threshold the number of its edges.
        graph = saved.graph(2)
        state = tab.set("step", 2)
        assert state["step"] == "20"
        assert state["featuresDrawn"] == str(sum(basis.n_features for basis in graph.bases.values()))
        for exponent in (0.0, -1.0, -3.0):
            above = sum(int((E / E.max() >= 10**exponent).sum()) for E in graph.edges.values())
            assert tab.set("threshold", exponent)["edgesDrawn"] == str(above)

        # The tooltip shows the values in the file.
        place, label = next((i, label) for i, label in enumerate(graph.labels["hidden"]) if label)
        lineage = int(graph.lineages["hidden"].ids[place])
        where = tab.frame.eval_on_selector(
            ".lib-view", "(view, place) => view.libView.positionOf(...place)", [RUN, "hidden", lineage]
        )
        rim = tab.frame.frame_element().bounding_box()
        assert rim is not None
        watched.page.mouse.move(rim["x"] + where["x"], rim["y"] + where["y"])
        text = tab.frame.locator("[data-role='tooltip']").inner_text()
        assert text.startswith(f"hidden/{lineage}\n")
        assert f" of {graph.bases['hidden'].n_features}\n" in text
        assert f"{graph.bases['hidden'].importance[place]:.4f} ± " in text
        assert label in text

        # A snapshot written while the tab is open appears in it.
        tab.frame.wait_for_selector("[data-role='step'][max='6']")
        saved.graph(7).save(last)
        tab.frame.wait_for_selector("[data-role='step'][max='7']")
        assert tab.state()["step"] == "20"  # the step shown does not change
        assert tab.set("step", 7)["step"] == "70"

        assert tab.errors == []
        assert {urlparse(address).netloc for address in watched.requests} == {urlparse(url).netloc}


def test_the_first_snapshot_activates_the_tab(watched: Watched, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    with tensorboard(logs, tmp_path / "site") as url:
        assert get(url, "data/plugins_listing")["lib"]["enabled"] is False
        SavedRun().write(logs / "version_0" / "lib", [0])
        for _ in range(100):
            if get(url, "data/plugins_listing")["lib"]["enabled"]:
                break
            time.sleep(0.1)
        tab = Tab(watched, url)
        assert tab.state()["step"] == "0"
        assert tab.errors == []


def test_compared_runs_are_side_by_side_in_the_tab(watched: Watched, tmp_path: Path) -> None:
    """Two networks that differ by the order and the scale of their hidden units, compared on the command line."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double() for _ in range(2)]
    order, scale = torch.randperm(8), torch.rand(8).double() + 0.5
    with torch.no_grad():
        models[1][0].weight.copy_(models[0][0].weight[order] * scale.unsqueeze(1))
        models[1][0].bias.copy_(models[0][0].bias[order] * scale)
        models[1][2].weight.copy_(models[0][2].weight[:, order] / scale)
        models[1][2].bias.copy_(models[0][2].bias)
    batches = [torch.randn(400, 6).double()]
    logs = tmp_path / "logs"
    for name, model in zip("ab", models, strict=True):
        graph = compute_interaction_graph(model, batches, ["input", "1", "output"])
        graph.reference_features = reference_features(graph, model, batches)
        graph.info |= {"reference_samples": "the same", "step": 10}
        graph.save(logs / name / "lib" / "snapshots" / "step-00000010.safetensors")
    main(["compare", str(logs / "a"), str(logs / "b")])
    with tensorboard(logs, tmp_path / "site") as url:
        tab = Tab(watched, url)
        tab.frame.locator("[data-role='run'][value='b/lib']").check()
        tab.frame.wait_for_selector(".lib-view[data-ready='true'][data-runs='a/lib b/lib']")
        for role in ("color", "heights"):
            assert tab.frame.locator(f"[data-role='{role}']").input_value() == "shared"
        content = json.loads((logs / "a" / "lib" / "comparison" / "comparison.json").read_text())
        pairs = [(match["a"], match["b"]) for layer in content["layers"] for match in layer["matches"]]
        looks = []
        for first, second in pairs:
            for run, feature in (("a/lib", first), ("b/lib", second)):
                layer, _, number = feature.rpartition("/")
                looks.append(
                    tab.frame.evaluate(
                        """([run, layer, number]) => {
                          const {x, y} = document.querySelector(".lib-view").libView.positionOf(run, layer, number);
                          const panel = document.querySelector(`[data-run="${run}"] .lib-base`);
                          const canvas = panel.lastElementChild, rim = panel.getBoundingClientRect();
                          const place = [x - rim.left - window.scrollX, y - rim.top - window.scrollY, 1, 1];
                          const color = canvas.getContext("2d").getImageData(...place).data;
                          return [Math.round(place[1]), [...color].slice(0, 3).join()];
                        }""",
                        [run, layer, int(number)],
                    )
                )
        assert len(pairs) >= 10
        assert looks[::2] == looks[1::2]
        assert len({str(look) for look in looks}) > 5
        # The page that the command has written opens from the tab.
        with watched.page.context.expect_page() as opened:
            tab.frame.locator("[data-role='comparison']").click()
        page = opened.value
        page.wait_for_load_state()
        assert page.locator("figure svg").count() == 2
        assert tab.errors == []
