"""Images on their way to the loggers of a trainer."""

from __future__ import annotations

import io
from collections.abc import Iterable

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
