"""Images, numbers and texts on their way to the loggers of a trainer."""

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
from typing import Any
from weakref import WeakSet

import numpy as np
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from lib_lightning.plots.image import PNG

log = logging.getLogger(__name__)
_reported: WeakSet[Logger] = WeakSet()


def log_image(loggers: Iterable[Logger], tag: str, png: PNG, step: int) -> None:
    """Show an image in every logger that shows images: TensorBoard, Weights & Biases, MLflow.

    A logger that fails is reported the first time, and the others get the image all the same.

    Args:
        loggers: The trainer's loggers.
        tag: Name of the image.
        png: The image.
        step: Its place on the step axis.
    """
    for logger in loggers:
        with _reporting(logger, f"the image '{tag}'", step):
            _show(logger, tag, png, step)


def log_numbers(loggers: Iterable[Logger], numbers: dict[str, float], step: int) -> None:
    """Give numbers to every logger.

    A logger that fails is reported the first time, and the others get the numbers all the same.

    Args:
        loggers: The trainer's loggers.
        numbers: The numbers by name.
        step: Their place on the step axis.
    """
    for logger in loggers:
        with _reporting(logger, "numbers", step):
            logger.log_metrics(numbers, step)


def log_text(loggers: Iterable[Logger], tag: str, text: str, step: int) -> None:
    """Show a text in TensorBoard, the one logger that keeps texts by step.

    Args:
        loggers: The trainer's loggers.
        tag: Name of the text.
        text: Markdown.
        step: Its place on the step axis.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            with _reporting(logger, f"the text '{tag}'", step):
                logger.experiment.add_text(tag, text, step)


@contextmanager
def _reporting(logger: Logger, what: str, step: int) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if logger not in _reported:
            _reported.add(logger)
            log.warning(
                "%s did not take %s at step %d, and will not be reported again. %s: %s",
                type(logger).__name__, what, step, type(error).__name__, error,
            )  # fmt: skip


def _show(logger: Logger, tag: str, png: PNG, step: int) -> None:
    if isinstance(logger, TensorBoardLogger):
        _to_tensorboard(logger.experiment, tag, png, step)
    elif isinstance(logger, WandbLogger):
        # Not the run's own log(step=...): W&B drops what comes for a step behind its counter, which moves with every
        # call. The logger writes the trainer's step beside the image instead, as it does for scalars.
        logger.log_image(tag, [_decode(png)], step)
    elif isinstance(logger, MLFlowLogger):
        _to_mlflow(logger.experiment, logger.run_id, tag, png, step)


def _to_tensorboard(writer: object, tag: str, png: PNG, step: int) -> None:
    if isinstance(writer, SummaryWriter):
        # The writer's own add_image would decode the file and encode it again, four times as large.
        image = Summary.Image(height=png.height, width=png.width, colorspace=3, encoded_image_string=png.data)
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        writer._get_file_writer().add_summary(summary, step)
    else:  # tensorboardX, which Lightning prefers to nothing
        pixels = np.asarray(_decode(png).convert("RGB"))
        writer.add_image(tag, pixels, step, dataformats="HWC")  # type: ignore[attr-defined]


def where_to_look(loggers: Iterable[Logger]) -> list[str]:
    """Say where loggers have written, and what command shows it.

    Args:
        loggers: The trainer's loggers.

    Returns:
        Lines of text, for those who have run a TensorBoard logger.
    """
    lines = []
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            # TensorBoard keeps ten of the images of a tag unless told otherwise.
            command = f"{_tensorboard()} --logdir {logger.log_dir} --samples_per_plugin images=1000"
            lines += [f"  event files   {logger.log_dir}", f"  watch         {command}   (tab LIB)"]
    return lines


def _tensorboard() -> str:
    beside = Path(sys.executable).with_name("tensorboard")
    return "tensorboard" if shutil.which("tensorboard") or not beside.exists() else str(beside)


def _to_mlflow(client: Any, run_id: str | None, tag: str, png: PNG, step: int) -> None:
    # True colour: MLflow makes a preview of 256 pixels, in which the lines of an image with a palette would be torn.
    image = _decode(png).convert("RGB")
    # MLflow before 3.11 takes a slash, but cannot read the image back, neither from Python nor for its pages.
    key = re.sub(r"[^a-zA-Z0-9_\-. ]", ".", tag)
    if "key" in inspect.signature(client.log_image).parameters:
        client.log_image(run_id, image, key=key, step=step)
    else:  # MLflow before 2.12 knows no steps of an image
        client.log_image(run_id, image, artifact_file=f"{key}/step-{step:08d}.png")


def _decode(png: PNG) -> Image.Image:
    return Image.open(io.BytesIO(png.data))
