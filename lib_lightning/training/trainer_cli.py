"""LightningCLI, as the command line uses it: mistakes are told in a sentence."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from typing import Any

from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI


class TrainerCLI(LightningCLI):
    """LightningCLI with our manners.

    Args:
        kwargs: Options of LightningCLI.
    """

    def __init__(self, **kwargs: Any) -> None:
        # "omegaconf+" resolves ${...} once all files and options have been read.
        super().__init__(parser_kwargs={"parser_mode": "omegaconf+", "exit_on_error": False}, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Read options; what is wrong with them is said in a sentence."""
        try:
            super().parse_arguments(parser, args)
        except Exception as error:
            _stop(error)

    def instantiate_classes(self) -> None:
        """Make trainer, model and data; what we refuse is said in a sentence, and any other error shown whole."""
        try:
            super().instantiate_classes()
        except Exception as error:
            origin = [*_chain(error)][-1]
            last = traceback.extract_tb(origin.__traceback__)[-1]
            if not (isinstance(origin, ValueError) and "lib_lightning" in last.filename):
                raise
            _stop(error)


def _stop(error: Exception) -> None:
    # Where an option could be several things, the message tries all of them; what it is about comes last in the chain.
    messages = [str(e) for e in _chain(error)]
    about = next((m for m in messages if m.startswith("Problem with given class_path")), messages[-1])
    print(f"lib-lightning: {about}", file=sys.stderr)
    sys.exit(2)


def _chain(error: BaseException) -> Iterator[BaseException]:
    following: BaseException | None = error
    while following is not None:
        yield following
        following = following.__cause__ or following.__context__
