"""Figures and numbers on their way to loggers: real ones of Lightning, and doubles of those that talk to a service."""

from __future__ import annotations

import csv
import io
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lib_lightning import InteractionGraph, LIBCallback
from lib_lightning.lineage.events import Event
from lib_lightning.plots.image import PNG
from lib_lightning.training import loggers
from lib_lightning.training.loggers import log_image
from lib_lightning.training.reporter import RunDestination, SnapshotReporter
from lib_lightning.training.run_state import RunState
from lib_lightning.training.schedule import Schedule
from tests.tiny_training import NODE_LAYERS, Classifier, trainer_of

# Optimizer steps 6 and 12 end in validations, 12 is also the end; 2 and 9 lie between.
AT_STEPS = [0, 2, 6, 9]
STEPS = [*AT_STEPS, 12]
# A graph of each; the spectrum is one of the figures that are drawn after the fourth and the last one.
SHOWN = [(kind, step) for step in STEPS for kind in ("graph", "spectrum") if kind == "graph" or step in (9, 12)]


class Remembers(Logger):
    """A mix-in that records what a logger receives instead of sending it."""

    def __init__(self, folder: Path | None = None) -> None:
        self.metrics: list[tuple[dict[str, float], int | None]] = []
        self.images: list[tuple[dict[str, Any], Image.Image]] = []
        self.folder = folder

    name = version = property(lambda self: "double")
    save_dir = property(lambda self: self.folder)

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...

    def after_save_checkpoint(self, *_: Any) -> None: ...

    def finalize(self, status: str) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append((dict(metrics), step))

    def steps_of(self, key: str) -> list[int | None]:
        return [step for metrics, step in self.metrics if key in metrics]


class Wandb(Remembers, WandbLogger):
    experiment = property(lambda self: object())  # the run itself, with a step of its own, is not to be used

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        assert isinstance(images, list)
        assert not kwargs
        self.images += [({"key": key, "step": step}, image) for image in images]


class MLFlow(Remembers, MLFlowLogger):
    """The logger and its client in one."""

    experiment = property(lambda self: self)
    run_id = property(lambda self: "run")

    def log_image(
        self,
        run_id: str,
        image: Any,
        artifact_file: str | None = None,
        key: str | None = None,
        step: int | None = None,
        timestamp: int | None = None,
        synchronous: bool | None = None,
    ) -> None:
        assert artifact_file is timestamp is synchronous is None
        self.images.append(({"run_id": run_id, "key": key, "step": step}, image))


class OldMLFlow(MLFlow):
    def log_image(self, run_id: str, image: Any, artifact_file: str) -> None:
        self.images.append(({"run_id": run_id, "artifact_file": artifact_file}, image))


class BrokenWandb(Wandb):
    def log_image(self, *_: Any, **__: Any) -> None:
        raise ConnectionError("the service is away")


class BrokenMLFlow(MLFlow):
    def log_image(self, run_id: str, image: Any, key: str, step: int) -> None:
        raise KeyError("no such run")


def fit(folder: Path, loggers: list[Logger] | bool, **options: Any) -> LIBCallback:
    callback = LIBCallback(NODE_LAYERS, at_steps=AT_STEPS, follow=False, **options)
    trainer_of(folder, callback, logger=loggers, log_every_n_steps=1).fit(Classifier())
    assert callback.snapshots == len(STEPS)
    return callback


def pixels(file: Any) -> np.ndarray:
    return np.asarray(Image.open(file).convert("RGB"))


def figures(folder: Path, kind: str = "figures") -> list[np.ndarray]:
    return [pixels(path) for path in sorted(folder.rglob(f"lib/{kind}/*.png"))]


def assert_figures_of(folder: Path, logger: Remembers) -> None:
    """Each image has the pixels of the file of its snapshot: the graph, then the importances."""
    files = {"graph": iter(figures(folder)), "spectrum": iter(figures(folder, "spectra"))}
    expected = [next(files[kind]) for kind, _ in SHOWN]
    assert not any(list(rest) for rest in files.values())
    for (_, image), figure in zip(logger.images, expected, strict=True):
        assert isinstance(image, Image.Image)
        assert np.array_equal(np.asarray(image.convert("RGB")), figure)


def assert_numbers(logger: Remembers) -> None:
    assert logger.steps_of("lib/edges/total") == [0, 1, 5, 5, 8, 11, 11]  # directly, and once more by a validation
    assert logger.steps_of("val_loss") == [5, 11]


def assert_in_tensorboard(logger: TensorBoardLogger) -> None:
    events = EventAccumulator(logger.log_dir, {"images": 0, "scalars": 0}).Reload()
    for tag, kind in (("lib/graph", "figures"), ("lib/spectrum", "spectra")):
        images = events.Images(tag)
        assert [e.step for e in images] == [step for shown, step in SHOWN if f"lib/{shown}" == tag]
        for e, figure in zip(images, figures(Path(logger.log_dir), kind), strict=True):
            assert np.array_equal(pixels(io.BytesIO(e.encoded_image_string)), figure)
            assert (e.height, e.width) == figure.shape[:2]
    assert [e.step for e in events.Scalars("lib/edges/total")] == [0, 1, 5, 5, 8, 11, 11]


def test_without_an_internal_of_torch_tensorboard_gets_the_same_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert hasattr(SummaryWriter, loggers._FILE_WRITER), "images are encoded again, in larger files"
    monkeypatch.setattr(loggers, "_FILE_WRITER", "_missing")
    expected = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(expected).save(data, "PNG")
    logger = TensorBoardLogger(tmp_path)
    log_image([logger], "lib/graph", PNG(data.getvalue(), 5, 4), 3)
    logger.experiment.flush()
    (event,) = EventAccumulator(logger.log_dir, {"images": 0}).Reload().Images("lib/graph")
    assert event.step == 3
    assert np.array_equal(pixels(io.BytesIO(event.encoded_image_string)), expected)


def test_wandb_gets_figure_and_numbers_at_the_trainers_step(tmp_path: Path) -> None:
    logger = Wandb(tmp_path)
    fit(tmp_path, [logger])
    expected = [{"key": f"lib/{kind}", "step": step} for kind, step in SHOWN]
    assert [call for call, _ in logger.images] == expected
    assert_figures_of(tmp_path, logger)
    assert_numbers(logger)


def test_mlflow_gets_figure_and_numbers_under_a_key_that_it_can_read_back(tmp_path: Path) -> None:
    logger = MLFlow(tmp_path)
    fit(tmp_path, [logger])
    calls = [call for call, _ in logger.images]
    assert calls == [{"run_id": "run", "key": f"lib.{kind}", "step": step} for kind, step in SHOWN]
    assert_figures_of(tmp_path, logger)
    assert {image.mode for _, image in logger.images} == {"RGB"}  # its preview of a palette would be torn
    assert_numbers(logger)


def test_mlflow_accepts_any_name(tmp_path: Path) -> None:
    logger, png = MLFlow(tmp_path), PNG(blank(), 3, 2)
    log_image([logger], "lib: é/b_c-d.e f/graph", png, 7)
    ((call, image),) = logger.images
    assert call["key"] == "lib. ..b_c-d.e f.graph"
    assert image.size == (3, 2)


def test_an_mlflow_without_steps_gets_a_file_for_each(tmp_path: Path) -> None:
    logger = OldMLFlow(tmp_path)
    fit(tmp_path, [logger])
    names = [f"lib.{kind}/step-{step:08d}.png" for kind, step in SHOWN]
    assert [call for call, _ in logger.images] == [{"run_id": "run", "artifact_file": name} for name in names]
    assert_figures_of(tmp_path, logger)


def test_a_logger_without_a_folder_is_served_too(tmp_path: Path) -> None:
    logger = MLFlow(None)  # as with a tracking server
    fit(tmp_path, [logger])
    assert_figures_of(tmp_path, logger)


def test_tensorboard_alone(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(tmp_path, [logger])
    assert_in_tensorboard(logger)


def test_csv_gets_numbers_and_no_complaint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = CSVLogger(tmp_path)
    fit(tmp_path, [logger])
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        steps = {int(row["step"]) for row in csv.DictReader(file) if row["lib/edges/total"]}
    assert steps == {0, 1, 5, 8, 11}, "Lightning's own axis, which counts from 0"
    assert len(figures(Path(logger.log_dir))) == len(STEPS)
    assert not said(caplog)


def test_no_logger_leaves_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path, False)
    assert len(figures(tmp_path)) == len(STEPS)
    assert not said(caplog)


def test_two_callbacks_share_loggers_under_their_names(tmp_path: Path) -> None:
    logger = Wandb(tmp_path)
    callbacks = [
        LIBCallback(NODE_LAYERS, follow=False, every_n_validations=1),
        LIBCallback(NODE_LAYERS, basis="pca", name="pca", follow=False, every_n_validations=1),
    ]
    trainer_of(tmp_path, *callbacks, logger=[logger]).fit(Classifier())
    expected = [(f"{name}/graph", step) for step in (6, 12) for name in ("lib", "pca")]
    # The last snapshot is that of the last validation: the spectra follow at the end of training.
    expected += [(f"{name}/spectrum", 12) for name in ("lib", "pca")]
    assert [(c["key"], c["step"]) for c, _ in logger.images] == expected


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (BrokenWandb, "BrokenWandb failed to log .* ConnectionError: the service is away"),
        (BrokenMLFlow, "BrokenMLFlow failed to log .* KeyError: 'no such run'"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_failing_logger_costs_the_others_nothing(
    kind: type[Remembers], reason: str, place: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensorboard, wandb, mlflow = TensorBoardLogger(tmp_path, version="."), Wandb(tmp_path), MLFlow(tmp_path)
    folder = Path(tensorboard.log_dir)
    broken = kind(folder)
    loggers: list[Logger] = [tensorboard, wandb, mlflow]
    loggers.insert(place, broken)
    fit(tmp_path, loggers)
    assert_in_tensorboard(tensorboard)
    for logger in (wandb, mlflow):
        assert_figures_of(folder, logger)
        assert_numbers(logger)
    assert_numbers(broken)
    (message,) = said(caplog)  # once, not at every snapshot
    assert re.match(reason, message)


def test_every_failing_logger_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path, [BrokenWandb(tmp_path), BrokenWandb(tmp_path), BrokenMLFlow(tmp_path)])
    kinds = [message.split()[0] for message in said(caplog)]
    assert kinds == ["BrokenWandb", "BrokenWandb", "BrokenMLFlow"]
    assert all("'lib/graph' at step 0" in message for message in said(caplog))


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    return [record.getMessage() for record in warnings if record.name.startswith("lib_lightning")]


def blank() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2)).save(file, "PNG")
    return file.getvalue()


def test_a_note_is_logged_once_whichever_numbers_it_has(caplog: pytest.LogCaptureFixture) -> None:
    state = RunState({"lib": "lib"}, None, False, Schedule())
    reporter = SnapshotReporter("lib", [], state, ["lib"], RunDestination(None), follow=False)
    notes = ["9 of 1,024 features of 'block.1' are missing.", "8 of 1,020 features of 'block.1' are missing.",
             "8 of 1,020 features of 'block.2' are missing."]  # fmt: skip
    for note in notes:
        reporter.log_notes({"lib": InteractionGraph({}, {}, {"notes": [note, "always the same"]})})
    assert caplog.messages == [f"lib: {notes[0]}", "lib: always the same", f"lib: {notes[2]}"]


def test_few_events_are_logged_and_the_most_telling_of_each_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = RunState({"lib": "lib"}, None, False, Schedule())
    reporter = SnapshotReporter("lib", [], state, ["lib"], RunDestination(tmp_path), follow=False)
    caplog.set_level(logging.INFO)

    def emerged(step: int, lineage: int, after: float) -> Event:
        return Event("emerged", step, "mlp", lineage, before=0.0, after=after)

    reporter._write_events([emerged(10, 1, 0.1), emerged(10, 2, 0.3), Event("born", 10, "mlp", 3)])
    reporter._write_events([emerged(20, 4, 0.9)])  # soon after
    reporter._write_events([Event("fell", 30, metric="lib/edges/total", before=9.0, after=2.0)])
    reporter._write_events([Event("born", 200, "mlp", 5)])
    assert caplog.messages == [
        "lib: feature mlp/2 emerged at step 10: its share of the layer's importance rose from nothing to 30%; so did 1 "
        "other feature",
        "lib: lib/edges/total fell at step 30 from 9 to 2",
    ]


def test_a_run_ends_with_a_sentence_its_files_and_a_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    callback = LIBCallback(NODE_LAYERS, at_steps=[1, 2], effort="exact")
    trainer_of(tmp_path, callback, logger=logger, max_steps=4).fit(Classifier())
    (summary,) = [message for message in caplog.messages if message.startswith("\nlib: ")]
    assert caplog.messages[-1] == summary, "the command is the last thing that is said"
    sentence, alone, files, command = summary.strip().splitlines()
    assert re.fullmatch(
        r"lib: \d snapshots of .+\. Half of the final features, by importance, were there (from step \d on in .+)+\.",
        sentence,
    )
    assert re.fullmatch(r"  alone  features whose absence changes the .+ beyond chance: \d+ of \d+ in .+", alone)
    assert files.startswith(f"  files  {tmp_path / 'lib'}: final.safetensors, snapshots/, figures/")
    for name in files.split(": ")[1].split(", "):
        assert (tmp_path / "lib" / name.split(" with ")[0]).exists(), name
    assert re.fullmatch(
        rf"  open   .*tensorboard --logdir {tmp_path}\S* --samples_per_plugin .*   \(tab LIB\)", command
    )
