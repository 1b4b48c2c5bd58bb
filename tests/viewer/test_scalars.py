"""Scalars of a run: from event files, compared with TensorBoard's reader, and from metrics.csv."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lib_lightning.viewer.cache import Cache
from lib_lightning.viewer.run_view import RunView
from lib_lightning.viewer.scalars import MAX_POINTS, ScalarReader, ScalarSeries, _event_decoder
from tests.viewer.saved_run import SavedRun


def read(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    return {tag: scalar.points() for tag, scalar in ScalarReader(folder).read().items()}


def test_scalars_of_both_formats_match_tensorboards_reader(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(40):
            writer.add_scalar("loss/train", 1.5 / (1 + step), step)
            writer.add_scalar("accuracy", step / 40, step, new_style=True)
            writer.add_scalar("hp_metric", -1, step)
        writer.add_histogram("weights", torch.randn(50), 0)
        writer.add_image("lib/graph", torch.rand(3, 700, 700), 0)
        writer.add_text("notes", "none", 0)
        writer.add_scalar("after", 7.0, 3)
    series = read(tmp_path)
    accumulator = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    assert set(series) == {"loss/train", "accuracy", "after"}
    scalars = accumulator.Scalars("loss/train")
    assert series["loss/train"] == ([event.step for event in scalars], [event.value for event in scalars])
    tensors = accumulator.Tensors("accuracy")
    assert series["accuracy"][0] == [event.step for event in tensors]
    assert series["accuracy"][1] == [float(event.tensor_proto.float_val[0]) for event in tensors]
    assert series["after"] == ([3], [7.0])


def test_growing_files_are_read_up_to_the_last_complete_record(tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    with SummaryWriter(str(source)) as writer:
        for step in range(20):
            writer.add_scalar("loss", float(step), step)
    content = next(source.iterdir()).read_bytes()
    copy.mkdir()
    scalars, file, lengths = ScalarReader(copy), copy / "events.out.tfevents.1", set()
    for end in range(0, len(content), 13):
        file.write_bytes(content[:end])
        steps, values = scalars.read()["loss"].points() if "loss" in scalars.read() else ([], [])
        assert steps == list(range(len(steps)))
        assert values == [float(step) for step in steps]
        lengths.add(len(steps))
    file.write_bytes(content)
    assert lengths == set(range(20))
    assert scalars.read()["loss"].points()[0] == list(range(20))
    # A file that replaces it is read from the beginning.
    other = file.with_name("other")
    other.write_bytes(content[: len(content) // 2])
    other.rename(file)
    assert 0 < len(scalars.read()["loss"].points()[0]) < 15
    file.unlink()
    assert scalars.read() == {}


def test_a_resumed_run_continues_in_a_second_file(tmp_path: Path) -> None:
    for begin, value, suffix in ((0, 1.0, ".first"), (6, 2.0, ".second")):
        with SummaryWriter(str(tmp_path), filename_suffix=suffix) as writer:
            for step in range(begin, begin + 10):
                writer.add_scalar("loss", value, step)
    assert read(tmp_path)["loss"] == (list(range(16)), [1.0] * 6 + [2.0] * 10)


def test_scalars_written_by_add_scalars(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalars("loss", {"train": 1.0, "test": 2.0}, 5)
    assert read(tmp_path) == {"loss_train/loss": ([5], [1.0]), "loss_test/loss": ([5], [2.0])}


def test_invalid_event_files_are_skipped(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 1.0, 0)
    (tmp_path / "events.out.tfevents.broken").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "events.out.tfevents.empty").write_bytes(b"")
    assert read(tmp_path) == {"loss": ([0], [1.0])}


def test_metrics_csv_is_read_beside_event_files(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="version_0")
    for step in range(30):
        logger.log_metrics({"loss": 1 / (1 + step), "epoch": 0.0}, step)
        if step % 10 == 9:
            logger.log_metrics({"val_acc": step / 30, "lib/features/total": 4.0}, step)
    logger.save()
    SavedRun(snapshots=2).write(tmp_path / "version_0" / "lib")
    series = read(tmp_path / "version_0")
    assert series["loss"] == (list(range(30)), [1 / (1 + step) for step in range(30)])
    assert series["val_acc"] == ([9, 19, 29], [step / 30 for step in (9, 19, 29)])
    scalars = json.loads(RunView(tmp_path / "version_0" / "lib", "lib", Cache(1 << 20)).run())["scalars"]
    assert set(scalars) == {"loss", "val_acc"}
    table = tmp_path / "version_0" / "metrics.csv"
    table.write_text(table.read_text() + "0,0.25,3")  # an incomplete line, and a missing column
    assert read(tmp_path / "version_0")["loss"][0] == list(range(30))
    # Of a scalar in both, event files are more complete.
    with SummaryWriter(str(tmp_path / "version_0")) as writer:
        writer.add_scalar("other", 1.0, 0)
        writer.add_scalar("val_acc", 0.5, 7)
    series = read(tmp_path / "version_0")
    assert set(series) == {"other", "val_acc", "loss", "lib/features/total"}
    assert series["val_acc"] == ([7], [0.5])
    assert series["loss"][0] == list(range(30))


def test_tables_of_other_tools_count_optimizer_steps(tmp_path: Path) -> None:
    """Lightning logs at the index of a step: what is at 9 there is at step 10."""
    saved = SavedRun(snapshots=2)
    for k, logged_at in ((0, 0), (1, 9)):
        graph = saved.graph(k)
        graph.info["logging_step"] = logged_at
        graph.save(tmp_path / "lib" / "snapshots" / f"step-{10 * k:08d}.safetensors")
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 1.0, 9)
    (tmp_path / "llc.csv").write_text(
        "\ufeffstep,epoch,mean,note\n0,0,1.5,first\n10,1,nan,\n20,1,2.5,last\n30,1", "utf-8"
    )
    (tmp_path / "unrelated.csv").write_text("a,b\n1,2\n")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    (tmp_path / "empty.csv").write_bytes(b"")
    (tmp_path / "lib" / "inside.csv").write_text("step,x\n0,1\n")
    scalars = json.loads(RunView(tmp_path / "lib", "lib", Cache(1 << 20)).run())["scalars"]
    assert scalars == {
        "loss": {"steps": [10], "values": [1.0]},
        "llc/mean": {"steps": [0, 10, 20], "values": [1.5, None, 2.5]},
    }


def test_what_hugging_faces_trainer_logged_is_called_as_in_its_event_files(tmp_path: Path) -> None:
    SavedRun(snapshots=2).write(tmp_path / "lib")
    history: list[object] = [
        {"loss": 2.0, "learning_rate": 0.1, "grad_norm": float("nan"), "epoch": 0.5, "step": 5},
        {"eval_loss": 3.0, "eval_accuracy": 0.5, "epoch": 0.5, "step": 5},
        {"test_loss": 4.0, "best": True, "text": "x", "step": 10},
        {"train_runtime": 12.0, "train_loss": 1.0, "step": 10},
        {"loss": 1.0},
        "damaged",
    ]
    file = tmp_path / "trainer_state.json"
    file.write_text(json.dumps({"log_history": history}))
    view = RunView(tmp_path / "lib", "lib", Cache(1 << 20))
    expected = {"train/loss": 2.0, "train/learning_rate": 0.1, "train/grad_norm": None}
    expected |= {"eval/loss": 3.0, "eval/accuracy": 0.5}
    scalars = json.loads(view.run())["scalars"]
    assert scalars.pop("test/loss") == {"steps": [10], "values": [4.0]}
    assert scalars == {name: {"steps": [5], "values": [value]} for name, value in expected.items()}
    # Its content is part of the version of the run.
    version = view.entry()["version"]
    file.write_text(json.dumps({"log_history": history[:1]}))
    assert view.entry()["version"] != version
    assert set(json.loads(view.run())["scalars"]) == {"train/loss", "train/learning_rate", "train/grad_norm"}
    for damaged in ("[", "[1]", '{"log_history": 3}', "[" * 100_000):
        file.write_text(damaged)
        assert json.loads(view.run())["scalars"] == {}


def test_long_series_are_thinned_evenly_and_keep_their_ends() -> None:
    scalar = ScalarSeries()
    for step in range(123_457):
        scalar.add(step, -float(step))
    steps, values = scalar.points()
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    assert len(steps) == MAX_POINTS
    assert (steps[0], steps[-1]) == (0, 123_456)
    assert values == [-float(step) for step in steps]
    assert max(gaps[:-1]) <= 2 * min(gaps[:-1])
    short = ScalarSeries()
    for step in range(MAX_POINTS):
        short.add(step, 1.0)
    assert short.points()[0] == list(range(MAX_POINTS))


@pytest.mark.parametrize(("root", "readable"), [("version_0", True), ("version_0/lib", False)])
def test_metrics_of_graphs_and_scalars_outside_the_root_are_excluded(root: str, readable: bool, tmp_path: Path) -> None:
    SavedRun(snapshots=2).write(tmp_path / "version_0" / "lib")
    SavedRun(snapshots=2).write(tmp_path / "version_0" / "pca")
    with SummaryWriter(str(tmp_path / "version_0")) as writer:
        for tag in ("lib_over_pca/edges/total", "lib/edges/total", "pca/edges/total", "loss"):
            writer.add_scalar(tag, float("nan") if tag == "loss" else 0.123456, 4)
    view = RunView(tmp_path / "version_0" / "lib", "lib", Cache(1 << 20), tmp_path / root)
    both = {"loss": {"steps": [4], "values": [None]}, "lib_over_pca/edges/total": {"steps": [4], "values": [0.12346]}}
    scalars = json.loads(view.run())["scalars"]
    assert scalars == (both if readable else {})
    assert list(scalars) == (list(both) if readable else [])


def test_a_standalone_validation_has_the_scalars_of_its_run(tmp_path: Path) -> None:
    SavedRun(snapshots=2).write(tmp_path / "lib" / "validate")
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 1.0, 4)
    assert "loss" in json.loads(RunView(tmp_path / "lib" / "validate", "look", Cache(1 << 20)).run())["scalars"]


def test_symbolic_links_to_event_files_are_not_read(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "outside")) as writer:
        writer.add_scalar("secret", 1.0, 4)
    logs = tmp_path / "logs"
    SavedRun(snapshots=2).write(logs / "lib")
    (logs / "events.out.tfevents.1").symlink_to(next((tmp_path / "outside").iterdir()))
    (logs / "folder").symlink_to(tmp_path / "outside")
    (tmp_path / "outside" / "secret.csv").write_text("step,value\n1,2\n")
    (tmp_path / "outside" / "state.json").write_text('{"log_history": [{"step": 1, "loss": 2}]}')
    (logs / "secret.csv").symlink_to(tmp_path / "outside" / "secret.csv")
    (logs / "metrics.csv").symlink_to(tmp_path / "outside" / "secret.csv")
    (logs / "trainer_state.json").symlink_to(tmp_path / "outside" / "state.json")
    assert read(logs) == {}


def test_a_tensorboard_without_its_event_class_costs_the_scalars_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SavedRun(snapshots=2).write(tmp_path / "lib")
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 1.0, 0)
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    run = json.loads(RunView(tmp_path / "lib", "lib", Cache(1 << 20)).run())
    assert (len(run["snapshots"]), run["scalars"]) == (2, {})


def test_tensorboards_event_classes_are_where_they_were() -> None:
    assert _event_decoder() is not None, (
        "TensorBoard has moved its class of events or its function to decode tensors: update _event_decoder in "
        "lib_lightning/viewer/scalars.py. Until then, the tab shows no scalars."
    )
