"""Interrupted and resumed runs: nothing is lost, nothing is written twice, and results are those of a single run."""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lib_lightning import InteractionGraph, LIBCallback
from lib_lightning.errors import LIBError
from lib_lightning.io.notes import change_notes, read_notes
from lib_lightning.training.writer import SnapshotDirectory
from lib_lightning.viewer import Run
from tests.resumable_run import EPOCHS, NODE_LAYERS, SCHEDULE, STEPS_PER_EPOCH, Steady
from tests.tiny_training import trainer_of

ROOT = Path(__file__).parents[2]
LAST = EPOCHS * STEPS_PER_EPOCH

SCHEDULES: dict[str, dict[str, Any]] = {
    "validations": {"every_n_validations": 3},
    "steps": {"every_n_steps": 7},
    "list": {"at_steps": [0, 3, 19, 20, 21, 33]},
    "log": {"log_spaced": 5, "n_probes": 2},
    "proposed": {"node_layers": None},
}


class Interruption(pl.Callback):
    """Ends a training early, which was to be longer."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or trainer.current_epoch + 1 == self.epochs


def fit(
    folder: Path, epochs: int, options: dict[str, Any], ckpt: Path | None = None, interrupted: int | None = None
) -> Path:
    """Train, if need be only the first of all epochs, and return the checkpoint at the end."""
    torch.manual_seed(0)
    loggers = [TensorBoardLogger(folder, "", "run"), CSVLogger(folder, "", "csv")]
    callback = LIBCallback(**{"node_layers": NODE_LAYERS, "num_samples": 20, **options})
    saver = ModelCheckpoint(folder / "checkpoints", filename="{epoch}")
    stopper = [] if interrupted is None else [Interruption(interrupted)]
    trainer = trainer_of(
        folder, callback, saver, *stopper, logger=loggers, enable_checkpointing=True, max_epochs=epochs,
        log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(Steady(), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return Path(saver.best_model_path)


def files(folder: Path, after: int) -> dict[str, bytes]:
    """All that was written for snapshots after a step."""
    found = {p for kind in ("snapshots", "figures") for p in (folder / "run" / "lib" / kind).iterdir()}
    return {p.name: p.read_bytes() for p in found if int(p.stem.removeprefix("step-")) > after}


def logged(folder: Path, after: int) -> list[dict[str, str]]:
    """All numbers logged after a step, but for how long it took."""
    times = {"lib/seconds", "lib/overhead"}
    with (folder / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) > after]
    return [{k: v for k, v in row.items() if k.startswith("lib/") and k not in times} for row in rows]


def drawn(folder: Path, after: int) -> list[tuple[int, bytes]]:
    events = EventAccumulator(str(folder / "run"), {"images": 0}).Reload()
    return [(e.step, e.encoded_image_string) for e in events.Images("lib/graph") if e.step > after]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_resuming_at_the_end_of_an_epoch_is_exact(schedule: str, tmp_path: Path) -> None:
    options = SCHEDULES[schedule]
    fit(tmp_path / "whole", EPOCHS, options)
    checkpoint = fit(tmp_path / "first", EPOCHS, options, interrupted=2)
    fit(tmp_path / "second", EPOCHS, options, checkpoint)
    half = 2 * STEPS_PER_EPOCH
    whole, second = files(tmp_path / "whole", half), files(tmp_path / "second", half)
    assert list(whole), "the run wrote files"
    assert second == whole
    # The axis of the loggers counts steps from 0.
    first, *later = logged(tmp_path / "second", half - 1)
    expected, *expected_later = logged(tmp_path / "whole", half - 1)
    # After a run is resumed, everything is logged once.
    assert all(first[name] == value for name, value in expected.items() if value)
    assert expected["lib/age"]
    assert later == expected_later
    assert drawn(tmp_path / "second", half) == drawn(tmp_path / "whole", half) != []
    final = [(tmp_path / run / "run" / "lib" / "final.safetensors").read_bytes() for run in ("whole", "second")]
    assert final[0] == final[1]
    # Nothing from before the interruption is repeated.
    assert files(tmp_path / "second", -1).keys() == second.keys()


def test_checkpoints_load_with_weights_only(tmp_path: Path) -> None:
    checkpoint = torch.load(fit(tmp_path, 1, SCHEDULE), weights_only=True)
    (state,) = [v for k, v in checkpoint["callbacks"].items() if k.startswith("LIBCallback")]
    assert (state["step"], state["n_snapshots"]) == (8, 3)


def test_samples_are_only_written_with_a_checkpoint(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, LIBCallback(NODE_LAYERS, every_n_validations=1), max_epochs=1)
    trainer.fit(Steady())
    assert not (tmp_path / "lib" / "samples").exists()
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    assert {path.name for path in (tmp_path / "lib" / "samples").iterdir()} == {"1-of-1.pt", "reference-1-of-1.pt"}


def test_missing_samples_are_collected_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = fit(tmp_path / "first", 2, SCHEDULE)
    samples = tmp_path / "first" / "run" / "lib" / "samples" / "1-of-1.pt"
    samples.write_bytes(samples.read_bytes()[:100])
    fit(tmp_path / "second", EPOCHS, SCHEDULE, checkpoint)
    assert "new ones are collected" in caplog.text
    final = InteractionGraph.load(tmp_path / "second" / "run" / "lib" / "final.safetensors")
    assert (final.info["step"], final.info["n_samples"]) == (LAST, 20)
    steps = sorted(
        int(p.stem.removeprefix("step-")) for p in (tmp_path / "second" / "run" / "lib" / "snapshots").iterdir()
    )
    assert steps == [24, 28, 32, 36, 40], "none is missing: the sanity check's samples do until then"


def test_another_schedule_continues_from_the_present_step(tmp_path: Path) -> None:
    checkpoint = fit(tmp_path / "first", 3, {"at_steps": [0, 10]})
    fit(tmp_path / "second", EPOCHS + 1, {"at_steps": [0, 10, 43]}, checkpoint)
    steps = sorted(
        int(p.stem.removeprefix("step-")) for p in (tmp_path / "second" / "run" / "lib" / "snapshots").iterdir()
    )
    assert steps == [43, 50]


def test_other_settings_collect_other_samples(tmp_path: Path) -> None:
    checkpoint = fit(tmp_path / "first", 2, SCHEDULE)
    fit(tmp_path / "second", EPOCHS, {**SCHEDULE, "num_samples": 30}, checkpoint)
    assert InteractionGraph.load(tmp_path / "second" / "run" / "lib" / "final.safetensors").info["n_samples"] == 30


@pytest.mark.parametrize(
    ("options", "n_probes"),
    [({"n_probes": 2}, 2), ({"n_probes": None}, None), ({"n_probes": 1, "effort": "exact"}, 1)],
)
def test_other_settings_choose_the_effort_anew(options: dict[str, Any], n_probes: int | None, tmp_path: Path) -> None:
    checkpoint = fit(tmp_path / "first", 1, {**SCHEDULE, "n_probes": 3})
    fit(tmp_path / "second", 2, {**SCHEDULE, **options}, checkpoint)
    final = InteractionGraph.load(tmp_path / "second" / "run" / "lib" / "final.safetensors")
    assert final.info["settings"]["n_probes"] == n_probes


def test_notes_stay_with_their_features(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In the folder of the run or a new one; those on features of another run are kept apart."""
    options: dict[str, Any] = {"at_steps": [0]}
    checkpoint = fit(tmp_path / "a", 1, options)
    old, new = (tmp_path / name / "run" / "lib" for name in "ab")
    Run(old).annotate("net.2:input/1", "kept")
    change_notes(old / "notes.json", lambda notes: notes | {"net.2:input/900": "born after the checkpoint"})
    fit(tmp_path / "b", 2, options, checkpoint)
    assert Run(new).notes == {"net.2:input/1": "kept"}
    Run(new).annotate("net.0:input/0", "more")
    fit(tmp_path / "b", 2, options)
    assert Run(new).notes == {}
    assert read_notes(new / "stale" / "notes.json") == {"net.2:input/1": "kept", "net.0:input/0": "more"}
    assert "2 notes on features of another run moved to" in caplog.text
    (new / "notes.json").write_text("{")
    with pytest.raises(LIBError, match="cannot be read"):
        SnapshotDirectory(new).keep_notes({}, [])
    assert (new / "notes.json").read_text() == "{"


@pytest.mark.parametrize("same_folder", [True, False])
def test_notes_on_features_of_an_interrupted_run(same_folder: bool, tmp_path: Path) -> None:
    earlier = [tmp_path / "0", tmp_path / "1"]
    folder = SnapshotDirectory(earlier[1] if same_folder else tmp_path / "2")
    for at, text in zip(earlier, ("old", "new"), strict=True):
        at.mkdir()
        change_notes(at / "notes.json", lambda _, text=text: {"a/b/4": text, "a/b/5": text, "gone/0": text})
    (tmp_path / "2").mkdir()
    moved = folder.keep_notes({"a/b": 5, "c": 9}, list(map(str, earlier)))
    assert moved == (2 if same_folder else 0), "of another folder, the file stays as it is"
    assert read_notes(folder.layout.notes_file) == {"a/b/4": "new"}
    stale = read_notes(folder.layout.stale_file(folder.layout.notes_file))
    assert stale == ({"a/b/5": "new", "gone/0": "new"} if same_folder else {})
    assert folder.keep_notes({"a/b": 5}, list(map(str, earlier))) == 0
    assert read_notes(folder.layout.notes_file) == {"a/b/4": "new"}


def start(folder: Path, *die_at: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.resumable_run", str(folder), *map(str, die_at)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def whole_snapshots(folder: Path) -> dict[int, InteractionGraph]:
    """All snapshots, each verified against its hash."""
    found = map(InteractionGraph.load, (folder / "run" / "lib" / "snapshots").glob("*.safetensors"))
    return {graph.info["step"]: graph for graph in found}


def assert_complete(folder: Path) -> None:
    steps = [*range(0, LAST + 1, 4)]
    assert sorted(whole_snapshots(folder)) == steps, "those of an uninterrupted run"
    names = sorted(p.stem for p in (folder / "run" / "lib" / "figures").iterdir())
    assert names == [f"step-{step:08d}" for step in steps]
    assert InteractionGraph.load(folder / "run" / "lib" / "final.safetensors").info["step"] == LAST
    assert not [p for p in folder.rglob("*") if p.name.endswith(".tmp")]


def test_killed_at_random_moments(tmp_path: Path) -> None:
    moments = random.Random(int(time.time()))
    written: set[int] = set()
    for kill in range(12):
        with start(tmp_path) as process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("from"), "it got to the start of training"
            try:
                # The run takes 1.5 s or more in all; the last tries are left to finish.
                process.wait(moments.uniform(0.2, 1.2) if kill < 3 else 120)
            except subprocess.TimeoutExpired:
                process.kill()
        if process.returncode == 0:
            break
        snapshots = set(whole_snapshots(tmp_path))
        assert snapshots >= written
        written = snapshots
    assert process.returncode == 0
    assert kill >= 1, "it was killed at least once"
    assert_complete(tmp_path)


@pytest.mark.parametrize("number", [2, 7])
def test_killed_while_writing(number: int, tmp_path: Path) -> None:
    # Files: samples and, for each snapshot, basis and figure.
    with start(tmp_path, number) as process:
        assert process.wait(120) == -9
    assert [p for p in tmp_path.rglob("*") if p.name.endswith(".tmp")], "a half file was left behind"
    whole_snapshots(tmp_path)
    with start(tmp_path) as process:
        assert process.wait(120) == 0
    assert_complete(tmp_path)
