"""Images on their way to the loggers of a trainer."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from lib_lightning.display.image import PNG


def log_image(loggers: Iterable[Logger], tag: str, png: PNG, step: int) -> None:
    """Show an image in every logger that shows images.

    Args:
        loggers: The trainer's loggers.
        tag: Name of the image.
        png: The image.
        step: Its place on the step axis.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            _to_tensorboard(logger.experiment, tag, png, step)


def _to_tensorboard(writer: object, tag: str, png: PNG, step: int) -> None:
    if isinstance(writer, SummaryWriter):
        # The writer's own add_image would decode the file and encode it again, four times as large.
        image = Summary.Image(height=png.height, width=png.width, colorspace=3, encoded_image_string=png.data)
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        writer._get_file_writer().add_summary(summary, step)
    else:  # tensorboardX, which Lightning prefers to nothing
        pixels = np.asarray(Image.open(io.BytesIO(png.data)).convert("RGB"))
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
            lines += [f"  event files   {logger.log_dir}", f"  watch         {command}"]
    return lines


def _tensorboard() -> str:
    beside = Path(sys.executable).with_name("tensorboard")
    return "tensorboard" if shutil.which("tensorboard") or not beside.exists() else str(beside)
