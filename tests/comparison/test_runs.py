"""Comparison of runs on disk, as users type it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lib_lightning import compute_interaction_graph
from lib_lightning.training.cli import main
from lib_lightning.viewer.cache import Cache
from lib_lightning.viewer.run_view import RunView

ROOT = Path(__file__).parents[2]


def fit(folder: Path, seed: int, split_seed: int = 0) -> Path:
    """Train a small network on digits, and return its log directory."""
    layers = [{"name": "pixels", "taps": ["layers.0:input"]}, {"name": "hidden", "taps": ["layers.2:input"]}, "output"]
    callback = {"node_layers": layers, "every_n_steps": 1000, "effort": "exact", "num_samples": 200}
    config = {
        "seed_everything": seed,
        "model": {"class_path": "recipes.mlp.MLP", "init_args": {"sizes": [64, 12, 10], "lr": 1e-2}},
        "data": {
            "class_path": "recipes.digits_mlp.Digits",
            "init_args": {"batch_size": 100, "test_fraction": 0.2, "split_seed": split_seed},
        },
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "default_root_dir": str(folder),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "lib_lightning.LIBCallback", "init_args": callback}],
        },
    }
    folder.mkdir()
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(folder / "run.yaml")])
    return folder / "lightning_logs" / "version_0"


def read_json(logs: Path) -> list[dict[str, Any]]:
    layers: list[dict[str, Any]] = json.loads((logs / "lib" / "comparison" / "comparison.json").read_text())["layers"]
    return layers


def test_runs_are_compared_by_their_files_or_by_their_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    a, b = fit(tmp_path / "first", seed=0), fit(tmp_path / "second", seed=1)
    other = fit(tmp_path / "other-data", seed=2, split_seed=1)
    capsys.readouterr()

    def run(*words: object) -> str:
        main(["compare", *map(str, words)])
        return capsys.readouterr().out

    hidden = a.parent / "a.ckpt"  # the files alone suffice on the same samples
    checkpoint = next((a / "checkpoints").glob("*.ckpt"))
    shutil.move(checkpoint, hidden)
    by_files = run(a, b, a / "lib" / "final.safetensors", "-o", tmp_path / "out")
    assert by_files.count("pixels ") >= 2
    read = [json.loads((tmp_path / "out" / f"comparison-{k}.json").read_text()) for k in (1, 2)]
    assert {x["kind"] for layer in read[1]["layers"] for x in layer["a"]["features"]} == {"shared"}  # it is the same
    assert (tmp_path / "out" / "comparison-1.png").stat().st_size > 10_000
    assert "other-data" not in (tmp_path / "out" / "comparison.html").read_text()
    # The tab and films of both know it by their snapshots, wherever these are now.
    run(a, b)
    shutil.copytree(b, tmp_path / "moved")
    shown = [json.loads(RunView(logs / "lib", "lib", Cache(1 << 20)).run()) for logs in (a, tmp_path / "moved")]
    (known,), steps = shown[0]["comparisons"], [run["fingerprints"] for run in shown]
    assert [of_run[one] for of_run, one in zip(steps, known["fingerprints"], strict=True)] == [15, 15]
    shared = [match for layer in known["layers"] for match in layer["matches"] if match[2] == "shared"]
    assert len(shared) == sum(m["kind"] == "shared" for x in read_json(a) for m in x["matches"]) > 0
    assert shown[1]["comparisons"] == []

    with pytest.raises(SystemExit, match=r"none of the 0 checkpoints below .* has the weights of step 15.*In Python"):
        run(a, other)
    shutil.move(hidden, checkpoint)
    by_models = run(a, other, "--layers", "pixels=pixels", "hidden=hidden")
    assert RunView(a / "lib", "lib", Cache(1 << 20)).entry()["comparison"]
    assert "Matches by 200 values" in by_models or "Matches by 359 values" in by_models
    assert "output" not in by_models


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "at least two networks"),
        (["missing"], "neither the folder of a run nor a basis file"),
        (["graph.safetensors", "--layers", "fc1"], "--layers takes pairs such as fc1=fc2; got 'fc1'"),
        (["graph.safetensors", "--layers", "inptu=input"], "Did you mean 'input'"),
        (["graph.safetensors"], "there is no config.yaml.*In Python: lib_lightning.compare"),
    ],
)
def test_errors_of_the_command(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compute_interaction_graph(nn.Linear(4, 3), [torch.randn(30, 4)], ["input", "output"]).save("graph.safetensors")
    with pytest.raises(SystemExit, match=message):
        main(["compare", "graph.safetensors", *words])
