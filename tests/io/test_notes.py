"""The file of notes: never lost, never half written, and safe from programs that write at the same time."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lib_lightning.errors import LIBError
from lib_lightning.io import notes as module
from lib_lightning.io.notes import read_notes, write_note


def test_notes_are_readable_json(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    assert read_notes(path) == {}
    write_note(path, "resid/mid/2", '  “quotes”, <b> & "\n two lines ')
    write_note(path, "a/0", "x")
    assert json.loads(path.read_text("utf-8")) == {"a/0": "x", "resid/mid/2": '“quotes”, <b> & "\n two lines'}
    assert read_notes(path) == json.loads(path.read_text("utf-8"))
    write_note(path, "a/0", " ")
    write_note(path, "a/1", "")
    assert list(read_notes(path)) == ["resid/mid/2"]
    write_note(path, "resid/mid/2", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"a/0": 3}', "", "\xff", "[" * 100_000])
def test_a_damaged_file_is_neither_read_nor_overwritten(content: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_bytes(content.encode("latin-1"))
    for action in (lambda: read_notes(path), lambda: write_note(path, "a/0", "new")):
        with pytest.raises(LIBError, match=r"notes\.json.*Correct the file, or move it away"):
            action()
    assert path.read_bytes() == content.encode("latin-1")


def test_invalid_texts(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="A note is a text"):
        write_note(tmp_path / "notes.json", "a/0", None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="10,000 characters at most; got 10,001"):
        write_note(tmp_path / "notes.json", "a/0", "x" * 10_001)


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    script = """
import sys
from lib_lightning.io.notes import write_note
for i in range(15):
    write_note(sys.argv[1], f"{sys.argv[2]}/{i}", "x")
"""
    others = [subprocess.Popen([sys.executable, "-c", script, str(path), f"process{k}"]) for k in range(2)]
    threads = [
        threading.Thread(target=lambda k=k: [write_note(path, f"thread{k}/{i}", "x") for i in range(15)])
        for k in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait() for process in others] == [0, 0]
    assert len(read_notes(path)) == 60
    assert [file.name for file in tmp_path.iterdir()] == ["notes.json"]


@pytest.mark.skipif(module.fcntl is None, reason="folders can be locked by other systems only")
def test_a_writer_that_does_not_stop_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    with module._locked(tmp_path):
        failed: list[Exception] = []

        def write() -> None:
            monkeypatch.setattr(module, "_threads", threading.Lock())
            try:
                write_note(tmp_path / "notes.json", "a/0", "x")
            except LIBError as error:
                failed.append(error)

        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    assert "Another program has been writing notes" in str(failed[0])
    write_note(tmp_path / "notes.json", "a/0", "x")
    monkeypatch.setattr(module, "fcntl", None)
    write_note(tmp_path / "notes.json", "a/0", "y")
    assert read_notes(tmp_path / "notes.json") == {"a/0": "y"}
