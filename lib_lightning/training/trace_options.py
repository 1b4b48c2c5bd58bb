"""The options of ``lib-lightning trace`` beside those of fit."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_lightning.errors import LIBError, SettingError

if TYPE_CHECKING:
    from lib_lightning.training.trace import CheckpointSource


@dataclass(frozen=True)
class TraceOptions:
    """What a trace reads and writes.

    Attributes:
        checkpoints: Files, folders and patterns.
        output: The log directory; None for one beside the folder of the checkpoints.
        watch: As for `lib_lightning.trace`.
        step: Regular expression with the step of a checkpoint in its name; None for the usual names.
    """

    checkpoints: Sequence[str]
    output: Path | None
    watch: float | None
    step: str | None

    def source(self) -> CheckpointSource:
        """The checkpoints, at least one if none are waited for."""
        from lib_lightning.training.trace import CheckpointSource

        given = self.checkpoints[0] if len(self.checkpoints) == 1 else self.checkpoints
        source = CheckpointSource(given, step_of=None if self.step is None else self._step_of)
        source.require_some(self.watch)
        return source

    def _step_of(self, checkpoint: Any) -> int:
        found = re.search(self.step or "", str(checkpoint))
        if found is None:
            raise LIBError(f"--step {self.step} does not match {checkpoint}.")
        return int(found[1])

    @property
    def logs(self) -> Path:
        """The log directory."""
        from lib_lightning.training.checkpoint_files import root_of

        if self.output is not None:
            return self.output
        root = root_of(self.checkpoints)
        return root.with_name(f"{root.name}-trace") if root.name else Path("trace")


def add_trace_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a parser."""
    parser.add_argument(
        "--checkpoints", nargs="+", required=True, metavar="PATH",
        help="files, folders of checkpoints, or a pattern in quotation marks, such as 'checkpoints/*.ckpt'",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, help="log directory to write to (default: FOLDER-trace beside the checkpoints' folder)"
    )
    parser.add_argument(
        "--watch", nargs="?", type=float, const=math.inf, metavar="SECONDS",
        help="follow a training that is still writing checkpoints, until Ctrl-C or SECONDS without another one",
    )  # fmt: skip
    parser.add_argument(
        "--step",
        metavar="REGEX",
        help=r"where a name has its step, such as 'epoch_(\d+)' (default: step1000, ...)",
    )


def parse_trace_options(words: Sequence[str]) -> tuple[TraceOptions, list[str]]:
    """Take the options of a trace out of a command line.

    Args:
        words: Its words.

    Returns:
        The options, and the other words.

    Raises:
        SettingError: If an option is wrong.

    Example:
        >>> options, rest = parse_trace_options(["--config", "run.yaml", "--checkpoints", "runs/checkpoints/*.ckpt"])
        >>> options.logs.as_posix(), rest
        ('runs/checkpoints-trace', ['--config', 'run.yaml'])
    """
    parser = argparse.ArgumentParser(
        prog="lib-lightning trace", allow_abbrev=False, exit_on_error=False, add_help=False
    )
    add_trace_options(parser)
    if not any(word.partition("=")[0] == "--checkpoints" for word in words):
        raise SettingError("trace needs --checkpoints, such as --checkpoints 'checkpoints/*.ckpt'. See trace --help.")
    try:
        found, rest = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise SettingError(f"{error}. See lib-lightning trace --help.") from error
    if found.step is not None:
        try:
            groups = re.compile(found.step).groups
        except re.error as error:
            raise SettingError(f"--step {found.step} is no regular expression: {error}.") from error
        if groups != 1:
            raise SettingError(rf"--step needs one group for the number, such as 'epoch_(\d+)'; got {found.step!r}.")
    return TraceOptions(found.checkpoints, found.output, found.watch, found.step), rest
