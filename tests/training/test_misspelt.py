"""Misspelt options, classes and commands on the command line and in YAML: near matches, as in Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lib_lightning.training.cli import main


def config(path: Path, **changes: Any) -> str:
    """A file that fits nothing, for its options are wrong."""
    callback = {"class_path": "LIBCallback", "init_args": {"node_layers": ["net.0:input", "output"]}}
    trainer = {"max_epochs": 1, "logger": False, "accelerator": "cpu", "callbacks": [callback]}
    path.write_text(
        yaml.safe_dump(
            {"model": "tests.tiny_training.Classifier", "trainer": trainer | changes.pop("trainer", {}), **changes}
        )
    )
    return str(path)


CALLBACK: dict[str, Any] = {"class_path": "LIBCallback", "init_args": {"node_layer": ["a", "b"]}}
MISTAKES: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "command": (["fti"], {}, "there is no command 'fti'. Did you mean 'fit'?"),
    "option": (["fit", "--trainer.max_epohcs=3"], {}, "Did you mean 'trainer.max_epochs'?"),
    "option of nodes": (["nodes", "--trainer.max_epohcs=3"], {}, "Did you mean 'trainer.max_epochs'?"),
    "key": (["fit"], {"trainer": {"max_epoch": 3}}, "Did you mean 'trainer.max_epochs'?"),
    "argument": (["fit"], {"trainer": {"callbacks": [CALLBACK]}}, "Did you mean 'node_layers'?"),
    "callback": (["fit"], {"trainer": {"callbacks": [CALLBACK | {"class_path": "LIBCalback"}]}}, "'LIBCallback'?"),
    "model": (["fit"], {"model": "tests.tiny_training.Clasifier"}, "Did you mean 'Classifier'?"),
    "nothing near": (["fit", "--zzzzzz=3"], {}, "zzzzzz"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_near_matches(mistake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, changes, expected = MISTAKES[mistake]
    with pytest.raises(SystemExit) as done:
        main([words[0], "--config", config(tmp_path / "config.yaml", **changes), *words[1:]])
    said = capsys.readouterr().err + str(done.value.code or "")
    assert expected in said
    assert said.count("lib-lightning:") == 1
    assert len(said.splitlines()) <= 5
    assert ("Did you mean" in said) == (mistake != "nothing near")
