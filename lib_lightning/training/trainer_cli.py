"""LightningCLI with short error messages, of the package that the model is written for.

Not in `cli.py`, so that commands without a trainer import no Lightning.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from lib_lightning.errors import LIBError, MissingFileError, did_you_mean, shows_tracebacks
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


def hide_advertisements() -> None:
    """Let a training print what the user asked for: not what else could be installed, nor what Lightning could mend."""
    for package in PACKAGES:
        logging.getLogger(f"{package}.utilities.rank_zero").addFilter(_is_no_advertisement)
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "try installing [lit" not in record.getMessage()


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
            known = {name for one in self._parsers(parser) for name in _options_of(one)}
            _stop(error, known)
        if (checkpoint := self._checkpoint()) and not Path(checkpoint).exists():
            _stop(MissingFileError(f"There is no checkpoint '{checkpoint}'."))

    def _checkpoint(self) -> str | None:
        """Path of the checkpoint to read; None for none, and for one that the trainer looks for."""
        with suppress(AttributeError, KeyError, TypeError):
            path = self.config[self.config["subcommand"]]["ckpt_path"]
            if isinstance(path, (str, Path)) and not re.match(r"best$|last$|hpc$|registry|\w+://", str(path)):
                return str(path)
        return None

    def _parsers(self, parser: LightningArgumentParser) -> list[LightningArgumentParser]:
        return [parser, *getattr(self, "_subcommand_parsers", {}).values()]

    def instantiate_classes(self) -> None:
        """Create trainer, model and data; exit with one sentence if an argument is rejected by this package."""
        try:
            super().instantiate_classes()
        except Exception as error:
            # Other exceptions may come from the user's classes, and keep their traceback.
            ours = [one for one in _chain(error) if isinstance(one, LIBError)]
            if not ours or shows_tracebacks():
                raise
            _stop(ours[-1])


def _options_of(parser: LightningArgumentParser) -> list[str]:
    """Names of the options of a parser, such as ``trainer.max_epochs``."""
    try:
        return [str(name) for name in parser.get_defaults(skip_validation=True).keys(branches=True)]
    except Exception:  # what is similar is of use, but not needed
        return []


# Lines of a message of the parser that are printed.
_MOST_LINES = 4
# Messages of the parser about a name that is not known, by what it is the name of.
_UNKNOWN_OPTION = re.compile(r"unrecognized arguments: --([\w.]+)|does not accept option '([\w.]+)'")
_UNKNOWN_ARGUMENT = re.compile(r"given class_path '([\w.]+)':\s+Option '(\w+)' is not accepted")
_UNKNOWN_CLASS = re.compile(r"dot import path string: (\w+)")
_UNKNOWN_NAME = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")


def _similar(message: str, options: Collection[str]) -> str:
    """A question whether a similar name is meant; empty if there is none."""
    with suppress(Exception):  # such as a module that cannot be imported
        if found := _UNKNOWN_OPTION.search(message):
            return did_you_mean(found[1] or found[2], options)
        if found := _UNKNOWN_ARGUMENT.search(message):
            module, _, cls = found[1].rpartition(".")
            return did_you_mean(found[2], inspect.signature(getattr(importlib.import_module(module), cls)).parameters)
        if found := _UNKNOWN_CLASS.search(message):
            return did_you_mean(found[1], _callback_names())
        if found := _UNKNOWN_NAME.search(message):
            return did_you_mean(found[2], dir(importlib.import_module(found[1])))
    return ""


def _callback_names() -> set[str]:
    """Names of the classes of callbacks that have been imported."""
    bases = [member(package, "Callback") for package in PACKAGES if package in sys.modules]
    found, names = list(bases), set()
    while found:
        cls = found.pop()
        names.add(cls.__name__)
        found += cls.__subclasses__()
    return names


def _stop(error: Exception, options: Collection[str] = ()) -> None:
    # For an option with several possible types the message lists the errors of all; the relevant one ends the chain.
    messages = [str(e) for e in _chain(error)]
    about = next((m for m in messages if m.startswith("Problem with given class_path")), messages[-1])
    if shows_tracebacks():
        raise error
    said = " ".join(line.strip() for line in about.splitlines()[:_MOST_LINES])
    similar = _similar(about, options)
    print(f"lib-lightning: {said.rstrip('.')}.{similar}" if similar else f"lib-lightning: {said}", file=sys.stderr)
    sys.exit(2)


def _chain(error: BaseException) -> Iterator[BaseException]:
    following: BaseException | None = error
    while following is not None:
        yield following
        following = following.__cause__ or following.__context__
