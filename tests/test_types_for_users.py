"""The program that mypy and pyright check (``tox -e type,pyright``) runs as well."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib_lightning import InteractionGraph
from tests.user_program import main


def test_the_typed_program_of_a_user_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(tmp_path)
    assert InteractionGraph.load(tmp_path / "graph.safetensors").node_layers == ["input", "1", "output"]
    assert "Effect(" in capsys.readouterr().out
