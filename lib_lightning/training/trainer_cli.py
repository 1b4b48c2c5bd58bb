"""LightningCLI with short error messages. Not in `cli.py`, so that commands without a trainer import no Lightning."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from typing import Any

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI


class TrainerCLI(LightningCLI):
    """LightningCLI that reports wrong options in one sentence.

    Args:
        kwargs: Options of LightningCLI.
    """

    def __init__(self, **kwargs: Any) -> None:
        # "omegaconf+" resolves ${...} once all files and options have been read.
        super().__init__(parser_kwargs={"parser_mode": "omegaconf+", "exit_on_error": False}, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse options; print an error in one sentence and exit if they are wrong."""
        try:
            super().parse_arguments(parser, args)
        except Exception as error:
            _stop(error)

    def instantiate_classes(self) -> None:
        """Create trainer, model and data; exit with one sentence if an argument is rejected by this package."""
        try:
            super().instantiate_classes()
        except Exception as error:
            # Other exceptions may come from the user's classes, and keep their traceback.
            origin = [*_chain(error)][-1]
            last = traceback.extract_tb(origin.__traceback__)[-1]
            if not (isinstance(origin, ValueError) and "lib_lightning" in last.filename):
                raise
            _stop(error)


def _stop(error: Exception) -> None:
    # For an option with several possible types the message lists the errors of all; the relevant one ends the chain.
    messages = [str(e) for e in _chain(error)]
    about = next((m for m in messages if m.startswith("Problem with given class_path")), messages[-1])
    print(f"lib-lightning: {about}", file=sys.stderr)
    sys.exit(2)


def _chain(error: BaseException) -> Iterator[BaseException]:
    following: BaseException | None = error
    while following is not None:
        yield following
        following = following.__cause__ or following.__context__
