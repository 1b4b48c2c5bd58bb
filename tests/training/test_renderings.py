"""The samples that a run's snapshots mention are rendered into its folder: each once, and the right ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lib_lightning import InteractionGraph, LIBCallback
from lib_lightning.errors import LIBError
from lib_lightning.features import ImageRenderer, Sample, TableRenderer, TextRenderer, TokenRenderer
from lib_lightning.io.places import position_in_input
from lib_lightning.io.rendering_file import append_lines, read_lines, read_renderings
from lib_lightning.training.cli import main
from tests.rendered import check_rows
from tests.resumable_run import NODE_LAYERS, Steady
from tests.tiny_training import trainer_of


class Shuffled(Steady):
    """Validation data that come in another order each time, and cannot be read before training."""

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._data(30).dataset, batch_size=8, shuffle=True, num_workers=0)


def fit(folder: Path, model: pl.LightningModule | None = None, options: Any = None, **settings: Any) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)
    trainer = trainer_of(folder, LIBCallback(NODE_LAYERS, **settings), **{"max_epochs": 1, **(options or {})})
    trainer.fit(model or Steady())
    return trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, with a checkpoint at its end."""
    folder = tmp_path_factory.mktemp("finished")
    fit(folder, at_steps=[0], keep_snapshots=1, baselines=["pca"]).save_checkpoint(folder / "checkpoint")
    return folder


def test_renderings_are_of_the_samples_of_each_snapshot(finished: Path) -> None:
    for prefix in ("lib", "pca"):
        assert len(check_rows(finished / prefix)) == 1
        lines = read_lines(finished / prefix / "samples.jsonl")
        assert {json.loads(line)["label"] for line in lines} == {"0", "1"}


def test_samples_of_a_sanity_check_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib_lightning.training import samples
    from lib_lightning.training.first_batches import OneShotError

    def one_shot(*_: Any) -> Any:
        raise OneShotError("the data can be read once only")

    monkeypatch.setattr(samples, "batches_before_training", one_shot)
    fit(tmp_path, Shuffled(), {"max_steps": 12, "max_epochs": 2}, at_steps=[0])
    assert len(check_rows(tmp_path / "lib")) == 2, "the same numbers mean other samples in the two snapshots"


def test_another_run_in_the_same_folder_and_unfinished_lines(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "lib" / "samples.jsonl"
    before = read_lines(file)
    # A process was killed while it wrote.
    file.write_text("\n".join(before[:5]) + "\n" + before[5][:40])
    append_lines(file, before[5:])
    assert read_lines(file) == before
    fit(tmp_path, options={"max_steps": 1}, at_steps=[0], renderer=TextRenderer(str))
    assert {json.loads(line)["kind"] for line in read_lines(file)} == {"text"}


def test_a_resumed_run_goes_on(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "lib" / "samples.jsonl"
    before = read_lines(file)
    again = trainer_of(tmp_path, LIBCallback(NODE_LAYERS, at_steps=[0], baselines=["pca"]), max_epochs=3)
    again.fit(Steady(), ckpt_path=tmp_path / "checkpoint", weights_only=True)
    assert read_lines(file)[: len(before)] == before
    assert len(check_rows(tmp_path / "lib")) == 1


def test_a_renderer_that_fails_costs_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fails(sample: Sample) -> str:
        if sample.label == "1":
            raise KeyError("of the user's")
        return "zero"

    trainer = fit(tmp_path, at_steps=[0], renderer=fails)
    assert trainer.callbacks[0].snapshots == 2  # type: ignore[attr-defined]
    assert caplog.text.count("the renderer failed on sample") == 1
    assert {json.loads(line)["text"] for line in read_lines(tmp_path / "lib" / "samples.jsonl")} == {"zero"}


def test_a_file_that_cannot_be_written_costs_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "lib" / "samples.jsonl").mkdir(parents=True)
    trainer = fit(tmp_path, at_steps=[0])
    assert trainer.callbacks[0].snapshots == 2  # type: ignore[attr-defined]
    assert caplog.text.count("samples could not be rendered") == 1


@pytest.mark.parametrize("options", [{}, {"num_sanity_val_steps": 0}])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"renderer": TableRenderer(["a", "b"])}, "names for 2 columns.*a sample has 5 values"),
        ({"renderer": TokenRenderer()}, "TokenRenderer shows sequences of integers"),
        ({"renderer": ImageRenderer(shape=(2, 3))}, "shows 6 numbers, and a sample has 5"),
        ({"output_names": ["a", "b", "c"]}, "3 names, and the model has 2 outputs"),
    ],
)
def test_mistakes_stop_before_training(
    options: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    class Untrained(Steady):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise AssertionError("training has begun")

    for schedule in ({"at_steps": [0]}, {"every_n_validations": 1}):
        with pytest.raises(LIBError, match=message):
            fit(tmp_path, Untrained(), options, **settings, **schedule)
    with pytest.raises(LIBError, match="renderer is a function"):
        LIBCallback(NODE_LAYERS, renderer="tokens")  # type: ignore[arg-type]
    with pytest.raises(LIBError, match="output_names is a list"):
        LIBCallback(NODE_LAYERS, output_names=3)


class Pixels(pl.LightningModule):
    """A convolutional classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 6, 3, 2), nn.Tanh(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(36, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch["image"]), batch["label"])

    validation_step = training_step  # type: ignore[assignment]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        torch.manual_seed(0)
        return DataLoader([{"image": torch.rand(1, 12, 12), "label": i % 3} for i in range(24)], batch_size=8)

    val_dataloader = train_dataloader


def test_images_have_boxes_and_names(tmp_path: Path) -> None:
    pl.seed_everything(0, verbose=False)
    callback = LIBCallback(["net.0", "net.2", "output"], at_steps=[0], output_names=["cat", "dog", "cow"])
    trainer_of(tmp_path, callback, max_epochs=1).fit(Pixels())
    graph = InteractionGraph.load(tmp_path / "lib" / "final.safetensors")
    assert graph.info["output_names"] == ["cat", "dog", "cow"]
    renderings = read_renderings(tmp_path / "lib" / "samples.jsonl")[graph.info["samples"]]
    assert {r["label"] for r in renderings.values()} == {"cat", "dog", "cow"}
    assert {tuple(r["size"]) for r in renderings.values()} == {(12, 12)}
    # The second convolution reads 3 x 3 positions of the first one, each of 3 x 3 pixels, 2 apart.
    assert graph.examples["net.2"].shape == (3, 3)
    assert position_in_input(graph.info["places"]["net.2"], 4) == {"position_box": [2, 2, 7, 7], "token": None}
    assert "output" not in graph.info["places"]


def test_command_line(tmp_path: Path) -> None:
    config = {
        "model": {"class_path": "tests.resumable_run.Steady"},
        "trainer": {
            "max_steps": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": str(tmp_path),
            "callbacks": [{
                "class_path": "lib_lightning.LIBCallback",
                "init_args": {
                    "node_layers": NODE_LAYERS, "at_steps": [0], "output_names": ["no", "yes"],
                    "renderer": {
                        "class_path": "lib_lightning.features.TableRenderer", "init_args": {"columns": list("abcde")},
                    },
                },
            }],
        },
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    main(["fit", "--config", str(tmp_path / "config.yaml")])
    lines = [json.loads(line) for line in read_lines(tmp_path / "lib" / "samples.jsonl")]
    assert {(tuple(line["columns"]), line["label"]) for line in lines} == {(tuple("abcde"), x) for x in ("no", "yes")}
