"""Curves: those of event files as TensorBoard reads them, and of metrics.csv where there are none."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lib_lightning.viewer.cache import Cache
from lib_lightning.viewer.run_view import RunView
from lib_lightning.viewer.scalars import MOST_POINTS, Scalars, ScalarSeries
from tests.viewer.filmed import Filmed


def read(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    return {tag: curve.points() for tag, curve in Scalars(folder).curves().items()}


def test_both_kinds_of_scalars_are_those_tensorboard_reads(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(40):
            writer.add_scalar("loss/train", 1.5 / (1 + step), step)
            writer.add_scalar("accuracy", step / 40, step, new_style=True)
            writer.add_scalar("hp_metric", -1, step)
        writer.add_histogram("weights", torch.randn(50), 0)
        writer.add_image("lib/graph", torch.rand(3, 700, 700), 0)
        writer.add_text("notes", "none", 0)
        writer.add_scalar("after", 7.0, 3)
    curves = read(tmp_path)
    theirs = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    assert set(curves) == {"loss/train", "accuracy", "after"}
    scalars = theirs.Scalars("loss/train")
    assert curves["loss/train"] == ([event.step for event in scalars], [event.value for event in scalars])
    tensors = theirs.Tensors("accuracy")
    assert curves["accuracy"][0] == [event.step for event in tensors]
    assert curves["accuracy"][1] == [float(event.tensor_proto.float_val[0]) for event in tensors]
    assert curves["after"] == ([3], [7.0])


def test_files_are_read_on_as_they_grow_and_records_when_they_are_whole(tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    with SummaryWriter(str(source)) as writer:
        for step in range(20):
            writer.add_scalar("loss", float(step), step)
    content = next(source.iterdir()).read_bytes()
    copy.mkdir()
    scalars, file, lengths = Scalars(copy), copy / "events.out.tfevents.1", set()
    for end in range(0, len(content), 13):
        file.write_bytes(content[:end])
        steps, values = scalars.curves()["loss"].points() if "loss" in scalars.curves() else ([], [])
        assert steps == list(range(len(steps)))
        assert values == [float(step) for step in steps]
        lengths.add(len(steps))
    file.write_bytes(content)
    assert lengths == set(range(20))
    assert scalars.curves()["loss"].points()[0] == list(range(20))
    # A file that takes its place begins anew.
    other = file.with_name("other")
    other.write_bytes(content[: len(content) // 2])
    other.rename(file)
    assert 0 < len(scalars.curves()["loss"].points()[0]) < 15
    file.unlink()
    assert scalars.curves() == {}


def test_a_resumed_run_goes_on_in_a_second_file(tmp_path: Path) -> None:
    for begin, value, suffix in ((0, 1.0, ".first"), (6, 2.0, ".second")):
        with SummaryWriter(str(tmp_path), filename_suffix=suffix) as writer:
            for step in range(begin, begin + 10):
                writer.add_scalar("loss", value, step)
    assert read(tmp_path)["loss"] == (list(range(16)), [1.0] * 6 + [2.0] * 10)


def test_curves_of_a_writer_of_several(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalars("loss", {"train": 1.0, "test": 2.0}, 5)
    assert read(tmp_path) == {"loss_train/loss": ([5], [1.0]), "loss_test/loss": ([5], [2.0])}


def test_what_is_no_event_file_is_passed_over(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 1.0, 0)
    (tmp_path / "events.out.tfevents.broken").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "events.out.tfevents.empty").write_bytes(b"")
    assert read(tmp_path) == {"loss": ([0], [1.0])}


def test_the_csv_of_a_run_without_event_files(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="version_0")
    for step in range(30):
        logger.log_metrics({"loss": 1 / (1 + step), "epoch": 0.0}, step)
        if step % 10 == 9:
            logger.log_metrics({"val_acc": step / 30, "lib/features/total": 4.0}, step)
    logger.save()
    Filmed(snapshots=2).write(tmp_path / "version_0" / "lib")
    curves = read(tmp_path / "version_0")
    assert curves["loss"] == (list(range(30)), [1 / (1 + step) for step in range(30)])
    assert curves["val_acc"] == ([9, 19, 29], [step / 30 for step in (9, 19, 29)])
    told = json.loads(RunView(tmp_path / "version_0" / "lib", "lib", Cache(1 << 20)).run())["scalars"]
    assert set(told) == {"loss", "val_acc"}
    table = tmp_path / "version_0" / "metrics.csv"
    table.write_text(table.read_text() + "0,0.25,3")  # half a line, and a column that is not there yet
    assert read(tmp_path / "version_0")["loss"][0] == list(range(30))
    # Event files are better: they say more, and are read on.
    with SummaryWriter(str(tmp_path / "version_0")) as writer:
        writer.add_scalar("other", 1.0, 0)
    assert set(read(tmp_path / "version_0")) == {"other"}


def test_long_curves_are_thinned_evenly_and_keep_their_ends() -> None:
    curve = ScalarSeries()
    for step in range(123_457):
        curve.add(step, -float(step))
    steps, values = curve.points()
    gaps = [after - before for before, after in itertools.pairwise(steps)]
    assert len(steps) == MOST_POINTS
    assert (steps[0], steps[-1]) == (0, 123_456)
    assert values == [-float(step) for step in steps]
    assert max(gaps[:-1]) <= 2 * min(gaps[:-1])
    short = ScalarSeries()
    for step in range(MOST_POINTS):
        short.add(step, 1.0)
    assert short.points()[0] == list(range(MOST_POINTS))


@pytest.mark.parametrize(("below", "there"), [("version_0", True), ("version_0/lib", False)])
def test_numbers_of_the_graphs_are_left_out_and_so_is_what_lies_outside(
    below: str, there: bool, tmp_path: Path
) -> None:
    Filmed(snapshots=2).write(tmp_path / "version_0" / "lib")
    Filmed(snapshots=2).write(tmp_path / "version_0" / "pca")
    with SummaryWriter(str(tmp_path / "version_0")) as writer:
        for tag in ("lib_over_pca/edges/total", "lib/edges/total", "pca/edges/total", "loss"):
            writer.add_scalar(tag, float("nan") if tag == "loss" else 0.123456, 4)
    film = RunView(tmp_path / "version_0" / "lib", "lib", Cache(1 << 20), tmp_path / below)
    both = {"loss": {"steps": [4], "values": [None]}, "lib_over_pca/edges/total": {"steps": [4], "values": [0.12346]}}
    scalars = json.loads(film.run())["scalars"]
    assert scalars == (both if there else {})
    assert list(scalars) == (list(both) if there else [])


def test_a_look_from_outside_has_the_curves_of_the_run(tmp_path: Path) -> None:
    Filmed(snapshots=2).write(tmp_path / "lib" / "validate")
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 1.0, 4)
    assert "loss" in json.loads(RunView(tmp_path / "lib" / "validate", "look", Cache(1 << 20)).run())["scalars"]


def test_a_link_to_an_event_file_is_not_read(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "outside")) as writer:
        writer.add_scalar("secret", 1.0, 4)
    logs = tmp_path / "logs"
    Filmed(snapshots=2).write(logs / "lib")
    (logs / "events.out.tfevents.1").symlink_to(next((tmp_path / "outside").iterdir()))
    (logs / "folder").symlink_to(tmp_path / "outside")
    assert read(logs) == {}
