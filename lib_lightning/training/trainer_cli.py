"""LightningCLI with short error messages, of the package that the model is written for.

Not in `cli.py`, so that commands without a trainer import no Lightning.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from lib_lightning.training.frameworks import PACKAGES, member, package_of

if TYPE_CHECKING:
    from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
else:
    LightningCLI = object  # that of the package is added by `trainer_cli_for`


def trainer_cli_for(words: Sequence[str]) -> type[LightningCLI]:
    """The command line for a model of either package.

    Args:
        words: Options of fit.

    Returns:
        `LightningCLI` of the package that the model in the options is written for, with short error messages.
    """
    package = PACKAGES[0]
    for name in _model_classes(words):
        with suppress(Exception):  # a class that cannot be imported is reported when options are parsed
            module, _, cls = name.rpartition(".")
            package = package_of(getattr(importlib.import_module(module), cls))
    return type("TrainerCLI", (ShortErrors, member(package, "cli.LightningCLI")), {})


def _model_classes(words: Sequence[str]) -> Iterator[str]:
    """Names of the model's class in options and in the configuration files that they name, later ones last."""
    for word, following in zip(words, [*words, ""][1:], strict=True):
        option, has_value, value = word.partition("=")
        value = value if has_value else following
        if option in ("--model", "--model.class_path"):
            yield value
        elif option in ("--config", "-c"):
            with suppress(Exception):  # reported when options are parsed
                model: Any = OmegaConf.to_container(OmegaConf.load(value), resolve=False)["model"]  # type: ignore[call-overload, index]
                yield model if isinstance(model, str) else model["class_path"]


class ShortErrors(LightningCLI):
    """Reports wrong options of LightningCLI in one sentence.

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
