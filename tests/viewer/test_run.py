"""`Run`: finding it from a path, its graphs, and its film in a notebook."""

from __future__ import annotations

import base64
import html
import json
import re
from pathlib import Path

import pytest
import torch

from lib_lightning import InteractionGraph
from lib_lightning.errors import LIBError
from lib_lightning.training.cli import main
from lib_lightning.viewer import Run
from tests.viewer.browser import READY, Watched
from tests.viewer.saved_run import SavedRun, write_run


@pytest.mark.parametrize("place", [".", "version_0", "version_0/lib", "version_0/lib/snapshots"])
def test_a_run_is_found_from_its_folder_and_from_parent_folders(place: str, tmp_path: Path) -> None:
    saved = write_run(tmp_path / "version_0")
    SavedRun().write(tmp_path / "version_0" / "lib" / "validate", [3])
    run = Run(str(tmp_path / place))
    assert (run.name, run.folder) == ("version_0/lib", tmp_path / "version_0" / "lib")
    assert run.steps == saved.steps
    assert repr(run) == "Run(version_0/lib: 8 snapshots, steps 0 to 70)"
    assert run.events() == saved.events()


def test_a_run_of_another_name_is_found_beside_its_baselines(tmp_path: Path) -> None:
    for name in ("other", "other_pca", "other_neuron"):
        SavedRun().write(tmp_path / name, [0])
    assert Run(tmp_path).name == f"{tmp_path.name}/other"
    assert Run(tmp_path / "other_pca").name == f"{tmp_path.name}/other_pca"
    # The runs of two callbacks are two runs, whatever their names.
    SavedRun().write(tmp_path / "lib", [0])
    with pytest.raises(LIBError, match=r"There are 2 runs in '.*': 'lib', 'other'\. Give the folder"):
        Run(tmp_path)


def test_a_baseline_or_validation_without_its_run_is_found(tmp_path: Path) -> None:
    SavedRun().write(tmp_path / "a" / "pca", [0])
    SavedRun().write(tmp_path / "b" / "lib" / "validate", [2])
    assert Run(tmp_path / "a").name == "a/pca"
    assert Run(tmp_path / "b").name == "lib/validate"
    assert repr(Run(tmp_path / "b")) == "Run(lib/validate: 1 snapshot, step 20)"


def test_a_symbolic_link_to_a_run_is_resolved(tmp_path: Path) -> None:
    write_run(tmp_path / "version_0")
    (tmp_path / "latest").symlink_to(tmp_path / "version_0")
    assert Run(tmp_path / "latest").folder == tmp_path / "version_0" / "lib"


def test_graphs_are_loaded_by_step(tmp_path: Path) -> None:
    saved = write_run(tmp_path)
    run = Run(tmp_path)
    assert torch.equal(run.graph(20).edges["input", "hidden"], saved.graph(2).edges["input", "hidden"])
    assert run.graph().info == InteractionGraph.load(run.folder / "snapshots" / "step-00000070.safetensors").info
    assert run.graph(0).info["step"] == 0
    with pytest.raises(
        LIBError, match=r"no snapshot at step 34; the nearest are at 30 and 40\. There are 8 snapshots, steps 0 to 70"
    ):
        run.graph(34)
    with pytest.raises(LIBError, match=r"step 1,000; the nearest are at 60 and 70"):
        run.graph(1000)
    for file in (run.folder / "snapshots").iterdir():
        file.unlink()
    with pytest.raises(LIBError, match="no longer has any snapshots"):
        run.graph()


def test_folders_without_a_single_run_raise(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Folder '.*nowhere' does not exist"):
        Run(tmp_path / "nowhere")
    with pytest.raises(
        LIBError,
        match=r"No run in '.*': neither this folder nor any below it contains files snapshots/step-\*\.safetensors",
    ):
        Run(tmp_path)
    for version in range(12):
        SavedRun().write(tmp_path / f"version_{version}" / "lib", [0])
    with pytest.raises(LIBError, match=r"12 runs in .*'version_7/lib' and 4 more\. Give the folder"):
        Run(tmp_path)


def test_notebook_display_of_a_run(tmp_path: Path) -> None:
    write_run(tmp_path, snapshots=70, features=6)
    shown = Run(tmp_path)._repr_html_()
    page = html.unescape(re.fullmatch(r'<iframe srcdoc="([^"]*)" [^>]*></iframe><p>.*</p>', shown, re.DOTALL)[1])  # type: ignore[index]
    assert page.startswith("<!DOCTYPE html>")
    assert re.findall(r'class="lib-snapshot" .* data-step="(\d+)"', page) == [str(20 * k) for k in range(35)] + ["690"]
    assert "70 snapshots, steps 0 to 690). One in 2 snapshots is shown" in shown


def test_the_film_in_a_notebook_is_interactive_and_loads_nothing(watched: Watched, tmp_path: Path) -> None:
    saved = write_run(tmp_path / "version_0")
    (tmp_path / "notebook.html").write_text(Run(tmp_path)._repr_html_(), encoding="utf-8")
    watched.page.goto((tmp_path / "notebook.html").as_uri())
    frame = watched.page.frames[1]
    frame.wait_for_selector(READY)
    frame.locator("[data-role='step']").evaluate("e => { e.value = 3; e.dispatchEvent(new Event('input')); }")
    frame.wait_for_selector(f"{READY}[data-step='30']")
    state = frame.eval_on_selector(READY, "element => ({...element.dataset})")
    assert state["runs"] == "version_0/lib"
    assert state["featuresDrawn"] == str(sum(basis.n_features for basis in saved.graph(3).bases.values()))
    assert watched.errors == []
    assert {address.split(":")[0] for address in watched.requests} <= {"file", "about", "blob"}


def test_notebook_display_of_a_graph() -> None:
    graph = SavedRun(layers=("<in>", "hidden", "output")).graph(2)
    shown = graph._repr_html_()
    image = base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", shown)[1])  # type: ignore[index]
    assert image.startswith(b"\x89PNG")
    assert "<in>" not in shown
    assert "&lt;in&gt;" in shown
    assert shown.endswith("1740 samples) after 20 steps</p>")


def test_the_view_command_writes_a_film(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "version_0")
    write_run(tmp_path / "version_1", seed=5)
    main(["view", str(tmp_path / "version_0")])
    file = tmp_path / "version_0" / "lib" / "film.html"
    assert capsys.readouterr().out == f"{file}  {file.stat().st_size / 1e6:.1f} MB\n"
    both = tmp_path / "films" / "both.html"
    main(["view", *(str(tmp_path / f"version_{i}") for i in (0, 1)), "-o", str(both), "--every", "4", "--edges", "3"])
    page = both.read_text()
    assert re.findall(r'class="lib-snapshot" data-run="([^"]*)" data-step="(\d+)"', page) == [
        (f"version_{i}/lib", str(step)) for i in (0, 1) for step in (0, 40, 70)
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "Folder '.*nowhere' does not exist"),
        (["."], "No run in"),
        (["run", "--edges", "0"], "edges and every must be at least 1; got 0 and 1"),
        (["run", "--every", "-2"], "edges and every must be at least 1; got 400 and -2"),
    ],
)
def test_the_view_command_reports_errors(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if options[0] == "run":
        write_run(tmp_path / "run")
    with pytest.raises(SystemExit, match=f"^lib-lightning: {message}"):
        main(["view", *options])


def test_notes_are_written_on_features_that_a_snapshot_has(tmp_path: Path) -> None:
    saved = write_run(tmp_path)
    run = Run(tmp_path)
    ended = next(i for i, one in enumerate(saved.lineages[1]) if one.death < saved.snapshots)
    run.annotate(f"hidden/{ended}", "no longer in the last snapshot")
    run.annotate("output/3", "the class of threes")
    assert Run(tmp_path).notes == {
        f"hidden/{ended}": "no longer in the last snapshot",
        "output/3": "the class of threes",
    }
    assert json.loads((run.folder / "notes.json").read_text()) == run.notes
    for wrong in ("hiden/1", "hidden/99", "hidden", "", "../x/0", "hidden/-1", "hidden/01"):
        with pytest.raises(LIBError, match=r"No snapshot of run '.*' has a feature '.*'\. Near matches: '.*/"):
            run.annotate(wrong, "x")
    with pytest.raises(LIBError, match="Near matches: 'hidden/1'"):
        run.annotate("hiden/1", "x")
    for file in (run.folder / "snapshots").iterdir():
        if file.stem != "step-00000070":
            file.unlink()
    run.annotate(f"hidden/{ended}", "")
    assert list(run.notes) == ["output/3"]


def test_notes_need_features_that_are_tracked(tmp_path: Path) -> None:
    graph = SavedRun().graph(0)
    graph.lineages = {}
    graph.save(tmp_path / "snapshots" / "step-00000000.safetensors")
    Run(tmp_path).annotate("hidden/0", "there is no other snapshot")
    graph.save(tmp_path / "snapshots" / "step-00000001.safetensors")
    Run(tmp_path).annotate("output/1", "classes keep their places")
    with pytest.raises(LIBError, match=r"not tracked \(follow=False\), so 'hidden/1' is another feature in each"):
        Run(tmp_path).annotate("hidden/1", "x")
