"""What other tools have logged is on the slider of tab and film: in charts, over the metric, and beside the events."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from playwright.sync_api import Frame, Page
from torch.utils.tensorboard import SummaryWriter

from lib_lightning import align_events
from lib_lightning.viewer import Run
from lib_lightning.viewer.run import write_film
from tests.viewer.browser import Watched
from tests.viewer.saved_run import SavedRun
from tests.viewer.test_tensorboard import Tab, tensorboard

STEPS = range(0, 79, 2)
# Where each scalar changes most steeply.
CENTRES = {"llc/mean": 21, "llc/draws/mean": 33, "probe/accuracy": 35, "eval/loss": 45, "val_loss": 55}
BETWEEN = {0: 0, 2: 20, 5: 50, 7: 70}


def value(name: str, step: int) -> float:
    """A scalar that falls around its step."""
    return 1 + list(CENTRES).index(name) + 1 / (1 + math.exp((step - CENTRES[name]) / 2))


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run beside which tools that know nothing of it have logged: to event files, CSV files and a Trainer's state."""
    logs = tmp_path_factory.mktemp("logs").resolve() / "version_0"
    SavedRun(snapshots=8).write(logs / "lib")
    with SummaryWriter(str(logs)) as writer, SummaryWriter(str(logs / "llc")) as beside:
        for step in STEPS:
            writer.add_scalar("llc/mean", value("llc/mean", step), step, new_style=True)
            beside.add_scalar("draws/mean", value("llc/draws/mean", step), step)
    rows = [f"{step},{value('probe/accuracy', step)}" for step in STEPS]
    (logs / "probe.csv").write_text("\n".join(["step,accuracy", *rows]) + "\n")
    history = [{"step": step, "eval_loss": value("eval/loss", step)} for step in STEPS]
    (logs / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    lightnings = CSVLogger(logs.parent, name="", version="version_0")
    for step in STEPS:
        lightnings.log_metrics({"val_loss": value("val_loss", step)}, step)
    lightnings.save()
    return logs


@dataclass
class Viewer:
    """The viewer in a page of its own, or in the frame of TensorBoard's tab."""

    page: Page | Frame
    errors: list[str]

    def role(self, role: str) -> Any:
        return self.page.locator(f"[data-role='{role}']")

    def go(self, k: int) -> None:
        self.role("step").evaluate("(s, k) => { s.value = k; s.dispatchEvent(new Event('input')); }", k)
        self.page.wait_for_selector(f".lib-view[data-ready='true'][data-step='{10 * k}']")

    def charts(self) -> dict[str, float]:
        """The charts of scalars, and the value that each one shows at the step of the slider."""
        tracks = self.page.locator("[data-track='scalar']").all()
        return {
            one.locator("[data-role='scalar']").input_value(): float(one.locator(".lib-track-key b").inner_text())
            for one in tracks
        }


def test_a_film_has_them(watched: Watched, logs: Path, tmp_path: Path) -> None:
    write_film([Run(logs)], tmp_path / "film.html")
    watched.open((tmp_path / "film.html").as_uri())
    check(Viewer(watched.page, watched.errors), logs)


def test_the_tab_has_them(watched: Watched, logs: Path, tmp_path: Path) -> None:
    with tensorboard(logs.parent, tmp_path / "site") as url:
        tab = Tab(watched, url)
        viewer = Viewer(tab.frame, tab.errors)
        check(viewer, logs)
        # A tool that goes on after the tab was opened.
        viewer.go(7)
        table = logs / "probe.csv"
        written = table.read_text()
        try:
            table.write_text(f"{written}70,8.25\n")
            chart = tab.frame.locator("[data-track='scalar']").filter(has=tab.frame.locator("[value='probe/accuracy']"))
            chart.locator(".lib-track-key b", has_text="8.25").first.wait_for(timeout=60_000)
        finally:
            table.write_text(written)
        assert viewer.errors == []


def check(viewer: Viewer, logs: Path) -> None:
    """All of them in charts, over the metric and beside the events; the film and the tab show the same."""
    _in_charts(viewer)
    _over_the_metric(viewer)
    _beside_events(viewer, logs)
    assert viewer.errors == []


def _in_charts(viewer: Viewer) -> None:
    (first,) = viewer.charts()
    options = viewer.role("add-scalar").locator("option").evaluate_all("all => all.map((one) => one.value)")
    assert set(options) - {""} == set(CENTRES) - {first}
    for name in set(CENTRES) - {first}:
        viewer.role("add-scalar").select_option(name)
    assert set(viewer.charts()) == set(CENTRES)
    for k, step in BETWEEN.items():
        viewer.go(k)
        assert viewer.charts() == {name: pytest.approx(value(name, step), rel=0.005) for name in CENTRES}
    # A click into a chart moves the slider; the axis goes from 0 to 78, with margins of 58 and 14 pixels.
    viewer.role("xscale").select_option("linear")
    plot = viewer.page.locator("[data-track='scalar'] svg.lib-chart").last
    box = plot.bounding_box()
    assert box is not None
    plot.click(position={"x": 58 + (box["width"] - 72) * 41 / 78, "y": 40})
    viewer.page.wait_for_selector(".lib-view[data-ready='true'][data-step='40']")


def _over_the_metric(viewer: Viewer) -> None:
    chart = viewer.page.locator("[data-track='metric'] svg.lib-chart")
    lines = chart.locator("path[fill='none']").count()
    track = viewer.page.locator("[data-track='scalar']").filter(
        has=viewer.page.locator("[data-role='scalar'] option[value='llc/mean']:checked")
    )
    track.locator("[data-role='overlay']").click()
    assert chart.locator("path[fill='none']").count() == lines + 1
    assert "llc/mean" not in viewer.charts()
    for k, step in BETWEEN.items():
        viewer.go(k)
        text = viewer.role("overlaid").inner_text()
        assert text.startswith("llc/mean")
        assert float(viewer.role("overlaid").locator("b").inner_text()) == pytest.approx(
            value("llc/mean", step), rel=0.005
        )
    viewer.role("own-chart").click()
    assert set(viewer.charts()) == set(CENTRES)
    assert viewer.role("overlaid").is_hidden()


def _beside_events(viewer: Viewer, logs: Path) -> None:
    for name, centre in CENTRES.items():
        viewer.role("aligned").select_option(name)
        found = align_events([logs], name)
        (run,) = found.runs
        assert run.change.step == pytest.approx(centre, abs=1.5)
        assert viewer.role("changes").inner_text() == f"{name} {run.change.text}"
        assert float(viewer.role("steepest").locator("line").get_attribute("data-step")) == pytest.approx(
            run.change.step
        )
        rows = {one.get_attribute("data-kind"): one.inner_text() for one in viewer.role("offsets").locator("li").all()}
        assert set(rows) == {one.kind for one in found.kinds}
        for one in found.kinds:
            steps = round(abs(one.offset))
            side = f"{steps} step{'' if steps == 1 else 's'} {'before' if one.offset < 0 else 'after'}"
            assert f"{one.kind} median {side if steps else 'at'}" in rows[one.kind]
            assert f"n = {one.num_events}" in rows[one.kind]


def test_they_are_among_the_curves_of_many_runs(watched: Watched, logs: Path, tmp_path: Path) -> None:
    other = SavedRun(snapshots=8, seed=1)
    other.write(tmp_path / "version_1" / "lib")
    (tmp_path / "version_1" / "probe.csv").write_bytes((logs / "probe.csv").read_bytes())
    write_film([Run(logs), Run(tmp_path / "version_1")], tmp_path / "film.html")
    watched.open((tmp_path / "film.html").as_uri())
    watched.page.wait_for_selector(".lib-many[data-ready='true']")
    names = watched.role("many-curve").locator("option").evaluate_all("all => all.map((one) => one.value)")
    assert {f"scalar:{name}" for name in CENTRES} <= set(names)
    watched.role("many-curve").select_option("scalar:probe/accuracy")
    watched.page.wait_for_selector(".lib-many[data-groups='lib=2']")
    assert not watched.errors
