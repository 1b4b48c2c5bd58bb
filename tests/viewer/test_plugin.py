"""The plugin's routes: responses, errors, and no access outside the log directory."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.application import TensorBoardWSGIApp
from tensorboard.plugins.base_plugin import TBContext
from torch.utils.tensorboard import SummaryWriter
from werkzeug.test import Client

from lib_lightning.viewer import plugin as module
from lib_lightning.viewer.bundle import comparison_script, script_hash, static_files
from lib_lightning.viewer.plugin import LIBPlugin
from lib_lightning.viewer.run_view import RunView
from tests.viewer.saved_run import SavedRun, write_run

DATA = "/data/plugin/lib"
Clock = Callable[[], None]


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Advances the clock by ten seconds."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def pass_ten_seconds() -> None:
        now[0] += 10

    return pass_ten_seconds


def client_of(logdir: Path | str = "", spec: str = "", prefix: str = "") -> Client:
    """A client of TensorBoard's own application with the plugin."""
    flags = Namespace(logdir=str(logdir), logdir_spec=spec, path_prefix=prefix, generic_data="true")
    flags.samples_per_plugin, flags.window_title = {}, ""
    return Client(TensorBoardWSGIApp(flags, [LIBPlugin], data_provider=object()))


def get_json(client: Client, address: str, code: int = 200, **query: Any) -> Any:
    response = client.get(f"{DATA}/{address}", query_string=query)
    assert response.status_code == code, response.text
    assert response.content_type == "application/json"
    assert response.headers["Cache-Control"] == "no-store"
    return response.get_json()


def test_responses_are_those_of_run_view(tmp_path: Path) -> None:
    saved = write_run(tmp_path / "version_0")
    client = client_of(tmp_path)
    names = ["version_0/lib", "version_0/pca"]
    views = [RunView(tmp_path / name, name, module.Cache(1 << 30)) for name in names]
    listed = get_json(client, "runs")
    assert listed == [view.entry() | {"universal": listed[0]["universal"]} for view in views]
    for view in views:
        run = get_json(client, "run", run=view.name)
        assert run == json.loads(view.run())
        assert run["scalars"]["loss/train"]["values"][:3] == [2.0, 1.98, 1.9602]
        assert set(run["scalars"]) == {"loss/train"}
        assert get_json(client, "snapshot", run=view.name, step=30) == json.loads(view.snapshot(30))
    assert [entry["snapshots"] for entry in get_json(client, "runs")] == [saved.snapshots] * 2


def test_static_files_have_their_content_types(tmp_path: Path) -> None:
    client = client_of(tmp_path)
    for name, content in static_files().items():
        response = client.get(f"{DATA}/{name}")
        assert response.text == content
        kind = "text/css" if name.endswith(".css") else "text/javascript"
        assert response.content_type == f"{kind}; charset=utf-8"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert client.get(f"{DATA}/index.js").status_code == 200


def test_responses_are_compressed_if_accepted(tmp_path: Path) -> None:
    write_run(tmp_path)
    response = client_of(tmp_path).get(f"{DATA}/runs", headers={"Accept-Encoding": "gzip"})
    assert response.headers["Content-Encoding"] == "gzip"
    assert [entry["name"] for entry in json.loads(gzip.decompress(response.data))] == ["lib", "pca"]


def test_routes_below_a_path_prefix(tmp_path: Path) -> None:
    write_run(tmp_path)
    response = client_of(tmp_path, prefix="/some/where").get(f"/some/where{DATA}/runs")
    assert len(response.get_json()) == 2


def test_the_page_of_a_comparison_may_run_its_own_script_only(tmp_path: Path) -> None:
    write_run(tmp_path / "version_0")
    client = client_of(tmp_path)
    assert "lib-lightning compare" in get_json(client, "comparison", 404, run="version_0/lib")["error"]
    assert [entry["comparison"] for entry in get_json(client, "runs")] == [False, False]
    page = tmp_path / "version_0" / "lib" / "comparison" / "comparison.html"
    page.parent.mkdir()
    page.write_text("<p>compared</p><script>alert(1)</script>")
    response = client.get(f"{DATA}/comparison", query_string={"run": "version_0/lib"})
    assert response.text == page.read_text()
    policy = response.headers["Content-Security-Policy"]
    assert f"'sha256-{script_hash(comparison_script())}'" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]
    assert [entry["comparison"] for entry in get_json(client, "runs")] == [True, False]
    page.unlink()
    page.symlink_to(tmp_path / "elsewhere.html")
    (tmp_path / "elsewhere.html").write_text("not here")
    get_json(client, "comparison", 404, run="version_0/lib")


def test_missing_runs_and_snapshots_are_not_found(tmp_path: Path) -> None:
    write_run(tmp_path)
    client = client_of(tmp_path)
    assert get_json(client, "run", 404, run="none") == {"error": "There is no run 'none' below the log directory."}
    assert get_json(client, "run", 404) == {"error": "There is no run '' below the log directory."}
    assert get_json(client, "snapshot", 404, run="lib", step=3) == {"error": "Run 'lib' has no snapshot at step 3."}
    for step in ("", "-1", "1e3", "ten", "٣", "9" * 5000, "../10"):
        assert "steps are whole numbers" in get_json(client, "snapshot", 404, run="lib", step=step)["error"]
    response = client.post(f"{DATA}/runs")
    assert (response.status_code, response.get_json()) == (405, {"error": "Only GET requests are allowed."})


def test_errors_are_reported_and_do_not_reach_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path)
    client = client_of(tmp_path)
    monkeypatch.setattr(RunView, "run", lambda self: {}["key"])
    assert get_json(client, "run", 500, run="lib") == {"error": "The request failed: KeyError: 'key'"}

    def broken(root: Path) -> Any:
        raise PermissionError("not for you")

    monkeypatch.setattr(module, "find_runs", broken)
    plugin = LIBPlugin(TBContext(logdir=str(tmp_path)))
    assert plugin.is_active() is False
    assert "not for you" in get_json(client_of(tmp_path), "runs", 500)["error"]


def test_the_plugin_is_active_once_there_is_a_snapshot(tmp_path: Path, later: Clock) -> None:
    plugin = LIBPlugin(TBContext(logdir=str(tmp_path)))
    assert plugin.is_active() is False
    SavedRun().write(tmp_path / "version_0" / "lib", [0])
    assert plugin.is_active() is False  # the last search is too recent
    later()
    assert plugin.is_active() is True
    metadata = plugin.frontend_metadata()
    assert (metadata.tab_name, metadata.es_module_path) == ("LIB", "/index.js")


def test_searching_for_runs_takes_a_small_share_of_the_time(
    tmp_path: Path, later: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches = 0

    def slow(root: Path) -> dict[str, Path]:
        nonlocal searches
        searches += 1
        later()  # ten seconds each time
        return {}

    monkeypatch.setattr(module, "find_runs", slow)
    plugin = LIBPlugin(TBContext(logdir=str(tmp_path)))
    for _ in range(60):
        plugin.is_active()
        later()
    assert searches == 4  # in eleven minutes, each no sooner than 200 seconds after the one before


@pytest.mark.parametrize("context", [TBContext(), TBContext(logdir=""), TBContext(logdir="gs://bucket/logs")])
def test_without_a_local_log_directory_there_are_no_runs(context: TBContext) -> None:
    assert LIBPlugin(context).is_active() is False


def test_several_log_directories(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_run(tmp_path / name / "version_0")
    client = client_of(spec=f"first:{tmp_path / 'a'},{tmp_path / 'b'},gs://bucket/c")
    names = [entry["name"] for entry in get_json(client, "runs")]
    assert names == [f"{top}/version_0/{kind}" for top in ("first", "b") for kind in ("lib", "pca")]
    assert get_json(client, "run", run="first/version_0/pca")["name"] == "first/version_0/pca"


def test_a_new_snapshot_changes_the_version(tmp_path: Path) -> None:
    saved = SavedRun()
    saved.write(tmp_path / "lib", [0, 1])
    client = client_of(tmp_path)
    (before,) = get_json(client, "runs")
    saved.graph(2).save(tmp_path / "lib" / "snapshots" / "step-00000020.safetensors")
    (after,) = get_json(client, "runs")
    assert (before["snapshots"], after["snapshots"]) == (2, 3)
    assert get_json(client, "run", run="lib")["version"] == after["version"] != before["version"]
    saved.graph(2).save(tmp_path / "lib" / "snapshots" / "step-00000020.safetensors")
    assert get_json(client, "runs")[0]["version"] != after["version"]


def test_no_request_opens_files_outside_the_log_directory(tmp_path: Path) -> None:
    outside, logs = tmp_path / "outside", tmp_path / "logs"
    write_run(outside)
    write_run(logs / "version_0")
    (logs / "linked").symlink_to(outside)
    (logs / "version_0" / "lib" / "linked").symlink_to(outside / "lib")
    file = logs / "version_0" / "lib" / "snapshots" / "step-00000999.safetensors"
    file.symlink_to(outside / "lib" / "snapshots" / "step-00000010.safetensors")
    (logs / "version_0" / "pca" / "events.jsonl").unlink()
    (logs / "version_0" / "pca" / "events.jsonl").symlink_to(outside / "pca" / "events.jsonl")
    opened: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if active and event in ("open", "os.listdir", "os.scandir"):
            opened.append(str(arguments[0]))

    active = True
    sys.addaudithook(watch)
    client = client_of(logs)
    assert [entry["name"] for entry in get_json(client, "runs")] == ["version_0/lib", "version_0/pca"]
    assert get_json(client, "run", run="version_0/pca")["events"] == []
    get_json(client, "snapshot", 404, run="version_0/lib", step=999)
    names = [
        *("../outside/lib", "version_0/../../outside/lib", str(outside / "lib"), "linked/lib", "version_0/lib/linked"),
        *("..%2foutside%2flib", "%2e%2e/outside/lib", "version_0/lib/", "./version_0/lib", "version_0/lib\0", "."),
    ]
    for name in names:
        for address in ("run", "snapshot"):
            get_json(client, address, 404, run=name, step=10)
        # The same, percent-encoded.
        assert client.get(f"{DATA}/run?run={name}").status_code == 404
    for path in ("../../../etc/passwd", "..%2f..%2fplugin.py", "static/view.js", "%2e%2e/plugin.py", "__init__.py", ""):
        assert client.get(f"{DATA}/{path}").status_code == 404
    active = False
    assert any(str(logs) in path for path in opened)
    assert not [path for path in opened if str(outside) in path or "passwd" in path or path.endswith("plugin.py")]


def test_scalars_outside_the_log_directory_are_not_read(tmp_path: Path) -> None:
    write_run(tmp_path)
    client = client_of(tmp_path / "lib")
    assert get_json(client, "run", run="lib")["scalars"] == {}


def test_the_plugin_is_declared_and_loads_without_torch() -> None:
    declared = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.entry-points.tensorboard_plugins]\nlib = "lib_lightning.viewer.plugin:LIBPlugin"' in declared
    assert EntryPoint("lib", "lib_lightning.viewer.plugin:LIBPlugin", "tensorboard_plugins").load() is LIBPlugin
    # TensorBoard imports it at startup.
    code = (
        "import sys, lib_lightning.viewer, lib_lightning.viewer.plugin; "
        "print({'torch', 'lightning', 'matplotlib', 'networkx', 'torchmetrics'} & set(sys.modules))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "set()\n"


def test_a_run_without_event_files_is_shown(tmp_path: Path) -> None:
    """A log directory with graphs and no event files has a tab as well."""
    SavedRun(snapshots=2).write(tmp_path / "lib")
    assert get_json(client_of(tmp_path), "run", run="lib")["scalars"] == {}
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 1.0, 0)
    assert set(get_json(client_of(tmp_path), "run", run="lib")["scalars"]) == {"loss"}
