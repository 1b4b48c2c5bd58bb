"""Images, scalars and texts for the loggers of a trainer."""

from __future__ import annotations

import inspect
import io
import logging
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from lib_lightning.plots.image import PNG
from lib_lightning.training.frameworks import is_instance

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

log = logging.getLogger(__name__)
# Internal to torch; without it, images are decoded and encoded again.
_FILE_WRITER = "_get_file_writer"
_reported: WeakSet[Logger] = WeakSet()


def log_image(loggers: Iterable[Logger], tag: str, png: PNG, step: int) -> None:
    """Log an image to every logger that supports images: TensorBoard, Weights & Biases, MLflow.

    The first failure of a logger is reported as a warning, and does not affect the others.

    Args:
        loggers: The trainer's loggers.
        tag: Name of the image.
        png: The image.
        step: Its step.
    """
    for logger in loggers:
        with _reporting(logger, f"the image '{tag}'", step):
            _show(logger, tag, png, step)


def log_scalars(loggers: Iterable[Logger], scalars: dict[str, float], step: int) -> None:
    """Log scalars to every logger.

    The first failure of a logger is reported as a warning, and does not affect the others.

    Args:
        loggers: The trainer's loggers.
        scalars: The values by name.
        step: Their step.
    """
    for logger in loggers:
        with _reporting(logger, "scalars", step):
            logger.log_metrics(scalars, step)


def log_text(loggers: Iterable[Logger], tag: str, text: str, step: int) -> None:
    """Log a text to TensorBoard, the only logger that stores texts by step.

    Args:
        loggers: The trainer's loggers.
        tag: Name of the text.
        text: Markdown.
        step: Its step.
    """
    logger: Any
    for logger in loggers:
        if is_instance(logger, "loggers.TensorBoardLogger"):
            with _reporting(logger, f"the text '{tag}'", step):
                logger.experiment.add_text(tag, text, step)


def add_summaries(logger: Logger, summaries: Iterable[Summary]) -> None:
    """Write summaries of TensorBoard's plugins, which have no method of their own, to a TensorBoard logger.

    Args:
        logger: The logger; tensorboardX, which Lightning uses where tensorboard is missing, has no such summaries.
        summaries: The summaries.
    """
    with _reporting(logger, "the layout of its tabs", 0):
        writer: Any = logger.experiment  # type: ignore[attr-defined]
        file_writer = getattr(writer, _FILE_WRITER, None)
        if isinstance(writer, SummaryWriter) and file_writer is not None:
            for summary in summaries:
                file_writer().add_summary(summary)


def flush(loggers: Iterable[Logger]) -> None:
    """Have TensorBoard loggers write to their files, which they do every two minutes else."""
    logger: Any
    for logger in loggers:
        if is_instance(logger, "loggers.TensorBoardLogger"):
            with _reporting(logger, "to its file", 0):
                logger.experiment.flush()


@contextmanager
def _reporting(logger: Logger, what: str, step: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if logger not in _reported:
            _reported.add(logger)
            log.warning(
                "%s failed to log %s at step %d. Further failures of this logger are not reported. %s: %s",
                type(logger).__name__, what, step, type(error).__name__, error,
            )  # fmt: skip


def _show(logger: Any, tag: str, png: PNG, step: int) -> None:
    if is_instance(logger, "loggers.TensorBoardLogger"):
        _to_tensorboard(logger.experiment, tag, png, step)
    elif is_instance(logger, "loggers.WandbLogger"):
        # Not run.log(step=...): W&B discards values for a step below its counter, which increases with every call. The
        # logger stores the trainer's step as a value with the image, as it does for scalars.
        logger.log_image(tag, [_decode(png)], step)
    elif is_instance(logger, "loggers.MLFlowLogger"):
        _to_mlflow(logger.experiment, logger.run_id, tag, png, step)


def _to_tensorboard(writer: object, tag: str, png: PNG, step: int) -> None:
    file_writer = getattr(writer, _FILE_WRITER, None)
    if isinstance(writer, SummaryWriter) and file_writer is not None:
        # add_image would decode the PNG and encode it again, four times as large.
        image = Summary.Image(height=png.height, width=png.width, colorspace=3, encoded_image_string=png.data)
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        file_writer().add_summary(summary, step)
    else:  # tensorboardX, which Lightning uses where tensorboard is missing, or a SummaryWriter without that method
        pixels = np.asarray(_decode(png).convert("RGB"))
        writer.add_image(tag, pixels, step, dataformats="HWC")  # type: ignore[attr-defined]


def where_to_look(loggers: Iterable[Logger]) -> list[str]:
    """The command that shows what TensorBoard loggers have written.

    Args:
        loggers: The trainer's loggers.

    Returns:
        Lines of text, none without a TensorBoard logger.
    """
    lines = []
    for logger in loggers:
        if is_instance(logger, "loggers.TensorBoardLogger"):
            # By default, TensorBoard keeps ten images of a tag.
            command = f"{_tensorboard()} --logdir {logger.log_dir} --samples_per_plugin images=1000"
            lines.append(f"  open   {command}   (tab LIB)")
    return lines


def _tensorboard() -> str:
    beside = Path(sys.executable).with_name("tensorboard")
    return "tensorboard" if shutil.which("tensorboard") or not beside.exists() else str(beside)


def _to_mlflow(client: Any, run_id: str | None, tag: str, png: PNG, step: int) -> None:
    # True colour: MLflow scales images down for a preview, which breaks thin lines in an image with a palette.
    image = _decode(png).convert("RGB")
    # MLflow before 3.11 accepts a slash in a key, but then cannot read the image.
    key = re.sub(r"[^a-zA-Z0-9_\-. ]", ".", tag)
    if "key" in inspect.signature(client.log_image).parameters:
        client.log_image(run_id, image, key=key, step=step)
    else:  # MLflow before 2.12 has no steps of images
        client.log_image(run_id, image, artifact_file=f"{key}/step-{step:08d}.png")


def _decode(png: PNG) -> Image.Image:
    return Image.open(io.BytesIO(png.data))
