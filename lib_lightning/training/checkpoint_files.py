"""Finds the checkpoints of a training, and the step of each."""

from __future__ import annotations

import glob
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from lib_lightning.errors import LIBError, MissingFileError, SettingError, SettingTypeError, shortened
from lib_lightning.training.weights_files import ENDINGS, is_checkpoint, steps_of_deepspeed

# What the caller may give: a path, a pattern, several, or anything that the caller's own function loads, by step.
Checkpoints = str | PathLike[str] | Sequence[Any] | Mapping[int, Any]
StepOf = Callable[[Any], int]

# How a name gives its step, most certain first: step=1000, global_step1000, checkpoint-500, iter_20, ckpt-7.
_STEP_NAMES = (r"step[-_=]?(\d+)", r"checkpoint[-_=]?(\d+)", r"iter(?:ation)?[-_=]?(\d+)", r"ckpt[-_=]?(\d+)")
# Folders that the Trainer of Hugging Face writes beside the final weights.
_OF_TRAINER = re.compile(r"checkpoint-\d+")
_EPOCH = re.compile(r"epoch", re.IGNORECASE)
_NUMBER = re.compile(r"\d+")


class UnknownStepError(LIBError):
    """A checkpoint whose number of steps nobody says."""


def find_checkpoints(given: Checkpoints, has_loader: bool = False) -> list[Any]:
    """The checkpoints that are there now.

    Args:
        given: A checkpoint, a folder of checkpoints, a pattern such as ``checkpoints/*.ckpt``, or several of these.
            Of a folder with weights and with folders ``checkpoint-N``, as Hugging Face's Trainer leaves it, the latter.
        has_loader: Whether the caller loads them, so that they may be anything.

    Returns:
        Paths, each once, in order of their names; with a loader, what is in the list.

    Raises:
        SettingTypeError: If it is anything else.
        MissingFileError: If a path does not exist.
    """
    if isinstance(given, Mapping):
        return list(given.values())
    if isinstance(given, (str, PathLike)):
        return _expanded(given)
    if not isinstance(given, Iterable):
        raise SettingTypeError(
            "checkpoints is a path, a pattern such as 'checkpoints/*.ckpt', a list of these, or a dict by step; got "
            f"{shortened(repr(given), 80)}."
        )
    if has_loader:
        return list(given)
    found: dict[Path, None] = {}
    for one in given:
        if not isinstance(one, (str, PathLike)):
            raise SettingTypeError(
                f"A checkpoint is a path; got {shortened(repr(one), 80)}. A function load= may take anything else."
            )
        found |= dict.fromkeys(_expanded(one))
    return list(found)


def _expanded(given: str | PathLike[str]) -> list[Path]:
    text = str(given)
    path = Path(text)
    if path.exists():
        if path.is_file():
            return [path]
        if steps := steps_of_deepspeed(path):
            return sorted(steps, key=_natural)
        inside = sorted(filter(is_checkpoint, path.iterdir()), key=_natural)
        if not is_checkpoint(path):
            return inside
        # The weights beside the folders are those of the end, or of the best one: nothing says of which step.
        return [one for one in inside if one.is_dir() and _OF_TRAINER.fullmatch(one.name)] or [path]
    if glob.has_magic(text):
        found = map(Path, glob.glob(text, recursive=True))  # noqa: PTH207 (of an absolute pattern, too)
        return sorted(filter(is_checkpoint, found), key=_natural)
    raise MissingFileError(f"There is no checkpoint '{path}', and no folder of that name.")


def _natural(path: Path) -> tuple[bool, list[int], str]:
    """In order of the numbers in names; ``last.ckpt``, often a second copy of another one, at the end."""
    return path.stem.startswith("last"), [int(n) for n in _NUMBER.findall(path.name)], str(path)


def root_of(given: Checkpoints) -> Path:
    """The folder that the checkpoints are in.

    Args:
        given: As for `find_checkpoints`.

    Returns:
        Its path, without a pattern.

    Example:
        >>> root_of("runs/7/checkpoints/*.ckpt").as_posix()
        'runs/7/checkpoints'
    """
    first = given
    while not isinstance(first, (str, PathLike)):
        items = list(first.values()) if isinstance(first, Mapping) else list(first)
        if not items:
            return Path()
        first = items[0]
    parts = Path(first).parts
    whole = next((k for k, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    path = Path(*parts[:whole])
    return path.parent if path.suffix in ENDINGS or (path.is_dir() and is_checkpoint(path)) else path


def step_in_name(checkpoint: object) -> int | None:
    """Step that the name of a checkpoint gives.

    Args:
        checkpoint: A path, or anything else whose text is its name.

    Returns:
        The step; None if the name has no number, several, or that of an epoch.

    Example:
        >>> [step_in_name(name) for name in ("epoch=1-step=40.ckpt", "checkpoint-500", "step1000-tokens2B", "net_7.pt")]
        [40, 500, 1000, 7]
        >>> step_in_name("epoch_3.pt") is None
        True
    """
    name = checkpoint.name if isinstance(checkpoint, Path) else str(checkpoint)
    name = name.removesuffix(Path(name).suffix) if Path(name).suffix in ENDINGS else name
    for pattern in _STEP_NAMES:
        if found := re.findall(pattern, name, re.IGNORECASE):
            return int(found[-1])
    numbers = _NUMBER.findall(name)
    return int(numbers[0]) if len(numbers) == 1 and not _EPOCH.search(name) else None


def checked_step(step: object, checkpoint: object) -> int:
    """The step of a checkpoint, which somebody has said.

    Args:
        step: The step; None if nobody has.
        checkpoint: The checkpoint, for messages.

    Returns:
        The step.

    Raises:
        UnknownStepError: If it is unknown.
        SettingError: If it is no number of steps.
    """
    shown = shortened(str(checkpoint), 100)
    if step is None:
        raise UnknownStepError(
            f"The step of {shown} is unknown: neither the checkpoint nor its name says it, as 'step=1000' or "
            "'checkpoint-1000' would. Give trace() step_of=, a function from a path to its step (on the command line "
            "--step 'epoch_(\\d+)')."
        )
    try:
        value = -1 if isinstance(step, bool) else operator.index(step)  # type: ignore[arg-type]
    except TypeError:
        value = -1
    if value < 0:
        raise SettingError(f"The step of a checkpoint is a whole number from 0; that of {shown} is {step!r}.")
    return value


def size_and_time(checkpoint: object) -> tuple[tuple[str, int, int], ...]:
    """What changes while a checkpoint is still being written: sizes and times of its files; empty if it is no path."""
    if not isinstance(checkpoint, (str, PathLike)):
        return ()
    path = Path(checkpoint)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    found = []
    for file in files:
        try:
            stat = file.stat()
        except OSError:  # renamed or removed meanwhile
            continue
        found.append((str(file), stat.st_size, stat.st_mtime_ns))
    return tuple(found)
