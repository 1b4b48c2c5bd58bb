"""Writing a note from the tab: from a browser on this machine alone, into the run's own file alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lib_lightning.io.notes import read_notes, write_note
from tests.viewer.saved_run import SavedRun
from tests.viewer.test_plugin import DATA, client_of, get_json

LOCAL = {"REMOTE_ADDR": "127.0.0.1"}
HEADERS = {"Origin": "http://localhost:6006", "X-LIB-Note": "1", "Host": "localhost:6006"}
NOTE = {"run": "version_0/lib", "feature": "hidden/0", "text": "edges"}


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    SavedRun(snapshots=2).write(tmp_path / "logs" / "version_0" / "lib")
    return tmp_path / "logs"


def send(logs: Path, content: Any = NOTE, headers: dict[str, str | None] | None = None, **options: Any) -> Any:
    sent = {key: value for key, value in {**HEADERS, **(headers or {})}.items() if value is not None}
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    options = {"content_type": "application/json", "environ_base": LOCAL} | options
    return client_of(logs).post(f"{DATA}/note", data=data, headers=sent, base_url=f"http://{sent['Host']}", **options)


def test_a_note_is_written_and_shown(logs: Path) -> None:
    path = logs / "version_0" / "lib" / "notes.json"
    assert send(logs).get_json() == {"note": "edges"}
    assert read_notes(path) == {"hidden/0": "edges"}
    assert get_json(client_of(logs), "feature", run="version_0/lib", step=10, layer=1, feature=0)["note"] == "edges"
    assert send(logs, NOTE | {"text": ""}).get_json() == {"note": ""}
    assert not path.exists()


@pytest.mark.parametrize(
    ("headers", "options", "code"),
    [
        ({"Origin": None}, {}, 403),
        ({"Origin": "null"}, {}, 403),
        ({"Origin": "http://evil.test"}, {}, 403),
        ({"Origin": "https://localhost:6006"}, {}, 403),
        ({"Origin": "http://localhost:6007"}, {}, 403),
        ({"X-LIB-Note": None}, {}, 403),
        # A name of the attacker's that stands for this machine (DNS rebinding).
        ({"Host": "evil.test:6006", "Origin": "http://evil.test:6006"}, {}, 403),
        ({"Host": "127.0.0.1.evil.test", "Origin": "http://127.0.0.1.evil.test"}, {}, 403),
        ({"X-Forwarded-For": "10.0.0.7"}, {}, 403),
        ({"Forwarded": "for=10.0.0.7"}, {}, 403),
        ({"Via": "1.1 proxy"}, {}, 403),
        ({}, {"environ_base": {"REMOTE_ADDR": "10.0.0.7"}}, 403),
        ({}, {"environ_base": {"REMOTE_ADDR": ""}}, 403),
        ({}, {"content_type": "text/plain"}, 415),
        ({}, {"content_type": "application/x-www-form-urlencoded"}, 415),
    ],
)
def test_requests_of_others_are_refused(logs: Path, headers: Any, options: Any, code: int) -> None:
    response = send(logs, headers=headers, **options)
    assert (response.status_code, set(response.get_json())) == (code, {"error"})
    assert not (logs / "version_0" / "lib" / "notes.json").exists()


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.0.1", "::1", "::ffff:127.0.0.1"])
def test_any_address_of_this_machine_is_local(logs: Path, address: str) -> None:
    assert send(logs, environ_base={"REMOTE_ADDR": address}).status_code == 200


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (b"no JSON", 400, "JSON object"),
        (b"[" * 40_000, 400, "JSON object"),
        ([1], 400, "JSON object"),
        (NOTE | {"path": "/etc/passwd"}, 400, "JSON object"),
        (NOTE | {"text": 3}, 400, "JSON object"),
        (NOTE | {"text": "x" * 70_000}, 413, "bytes at most"),
        (NOTE | {"text": "x" * 20_000}, 409, "10,000 characters at most"),
        (NOTE | {"run": "../version_0/lib"}, 404, "no run '../version_0/lib'"),
        (NOTE | {"feature": "hidden/99"}, 409, "has a feature 'hidden/99'"),
        (NOTE | {"feature": "../../hidden/0"}, 409, "has a feature"),
    ],
)
def test_only_a_note_on_a_feature_of_a_run_is_written(logs: Path, content: Any, code: int, message: str) -> None:
    response = send(logs, content)
    assert response.status_code == code
    assert message in response.get_json()["error"]
    assert not (logs / "version_0" / "lib" / "notes.json").exists()


def test_a_link_is_replaced_and_not_followed(logs: Path, tmp_path: Path) -> None:
    outside, path = tmp_path / "outside.json", logs / "version_0" / "lib" / "notes.json"
    write_note(outside, "hidden/1", "outside")
    path.symlink_to(outside)
    assert get_json(client_of(logs), "feature", run="version_0/lib", step=10, layer=1, feature=1)["note"] == ""
    assert send(logs).status_code == 200
    assert (path.is_symlink(), read_notes(path)) == (False, {"hidden/0": "edges"})
    assert read_notes(outside) == {"hidden/1": "outside"}


def test_a_page_can_be_edited_where_notes_can_be_written(logs: Path) -> None:
    query = {"run": "version_0/lib", "step": "10", "layer": "1", "feature": "0"}
    for address, host, editable in (
        ("127.0.0.1", "localhost:6006", True),
        ("127.0.0.1", "[::1]:6006", True),
        ("10.0.0.7", "localhost", False),
        ("127.0.0.1", "name.test", False),
    ):
        found = client_of(logs).get(
            f"{DATA}/feature", query_string=query, base_url=f"http://{host}", environ_base={"REMOTE_ADDR": address}
        )
        assert found.get_json()["editable"] is editable
    assert client_of(logs).get(f"{DATA}/note").status_code == 405
    client = client_of(logs)
    for wrong in ({"step": "x"}, {"layer": "-1"}, {"feature": "9" * 30}, {"feature": "99"}, {"run": "none"}):
        assert "error" in get_json(client, "feature", 404, **{**query, **wrong})
