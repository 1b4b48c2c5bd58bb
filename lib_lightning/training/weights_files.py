"""Reads the weights in a checkpoint, whichever framework has written it. No file is unpickled as anything but data."""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lib_lightning.errors import LIBError, brief, quoted, shortened

# Endings of files with weights.
ENDINGS = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")
# Files in a folder of Hugging Face that hold all weights, or say which files do; the first that is there is read.
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ".index.json"
# Files by which folders of torch.distributed.checkpoint and of DeepSpeed are recognised.
_DISTRIBUTED = ".metadata"
# The folder in a checkpoint that accelerate and the Trainer of transformers save sharded weights to.
_ACCELERATE = "pytorch_model_fsdp_0"
_DEEPSPEED, _DEEPSPEED_SHARDS = "*_model_states.pt", "zero_pp_rank_*_model_states.pt"
# The tag under which Lightning has DeepSpeed save, into a folder for each checkpoint.
_OF_LIGHTNING = "checkpoint"
# Where the weights are among other entries, and what the number of steps is called.
_WEIGHTS = ("state_dict", "model_state_dict", "model", "module", "model_state", "weights", "params", "net")
_STEPS = ("global_step", "global_steps", "step", "iteration", "iter_num")
_OPTIMIZER = ("optim", "lr_sched")


class UnreadableError(LIBError, ValueError):
    """A checkpoint that is incomplete, damaged, or of no known form."""


@dataclass(frozen=True)
class CheckpointContents:
    """What is read of a checkpoint.

    Attributes:
        weights: Parameters and buffers by name.
        step: Number of optimizer steps before it; None if it does not say.
        epoch: Number of epochs before it; None if it does not say.
        logging_step: Where Lightning logged at that moment; None if it does not say.
    """

    weights: Mapping[str, Tensor]
    step: int | None = None
    epoch: int | None = None
    logging_step: int | None = None


@dataclass
class _Parts:
    """Weights and plain entries as they are found in files."""

    weights: dict[str, Tensor]
    entries: dict[str, Any] = field(default_factory=dict)


def is_checkpoint(path: Path) -> bool:
    """Whether a path looks like a checkpoint: a file with weights, or a folder of a known form.

    Example:
        >>> is_checkpoint(Path("notes.txt"))
        False
    """
    if path.is_dir():
        return _kind_of(path) is not None
    return path.suffix in ENDINGS and path.is_file()


def read_checkpoint(path: Path, with_weights: bool = True) -> CheckpointContents:
    """Read a checkpoint of Lightning, Hugging Face, torch, torch.distributed.checkpoint or DeepSpeed.

    Args:
        path: A file (``.ckpt``, ``.safetensors``, ``.pt``, ``.pth``, ``.bin``) or a folder.
        with_weights: Whether weights are needed; if not, they are read only where they cannot be left out.

    Returns:
        Weights on the CPU, and at which step they were saved.

    Raises:
        UnreadableError: If it is incomplete, damaged, or of no known form.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "model.pt")
        ...     torch.save({"model": nn.Linear(2, 1).state_dict(), "step": 40}, file)
        ...     contents = read_checkpoint(file)
        >>> contents.step, sorted(contents.weights)
        (40, ['bias', 'weight'])
    """
    try:
        parts = _read_folder(path, with_weights) if path.is_dir() else _read_file(path, with_weights)
    except LIBError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        raise UnreadableError(f"{path} cannot be read: {brief(error)}") from error
    return _contents(parts)


def contents_of(loaded: object) -> CheckpointContents:
    """The same of something that is in memory: a state dict, a dict around one, or a module.

    Raises:
        UnreadableError: If there are no weights in it.
    """
    if isinstance(loaded, CheckpointContents):
        return loaded
    if isinstance(loaded, nn.Module):
        loaded = loaded.state_dict()
    if not isinstance(loaded, Mapping):
        raise UnreadableError(
            f"A checkpoint is loaded as a state dict or a module; got {shortened(repr(loaded), 80)} from load."
        )
    return _contents(_parts_of(loaded))


def _contents(parts: _Parts) -> CheckpointContents:
    steps = [step for name in _STEPS if (step := _count(parts.entries.get(name))) is not None]
    logged = None
    with contextlib.suppress(KeyError, TypeError):
        logged = parts.entries["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
    step, epoch = steps[0] if steps else None, parts.entries.get("epoch")
    return CheckpointContents(parts.weights, step, _count(epoch), _count(logged))


def _count(value: object) -> int | None:
    """A number of steps or epochs; None for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
        value = value.item()
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _parts_of(loaded: Mapping[str, Any]) -> _Parts:
    """Find the weights among the entries of a file."""
    if loaded and all(isinstance(value, Tensor) for value in loaded.values()):
        return _Parts(dict(loaded))
    inner = {
        name: value
        for name, value in loaded.items()
        if isinstance(value, Mapping) and any(isinstance(x, Tensor) for x in value.values())
    }
    known = next((name for name in _WEIGHTS if name in inner), next(iter(inner)) if len(inner) == 1 else None)
    if known is None:
        outer = [value for value in loaded.values() if isinstance(value, Mapping)]
        if len(outer) == 1 and not inner and any(name in outer[0] for name in _WEIGHTS):
            return _parts_of(outer[0])  # the state of an application, which torch's converter keeps together
        if any(isinstance(value, Tensor) for value in loaded.values()):  # beside entries that are none
            return _Parts({name: value for name, value in loaded.items() if isinstance(value, Tensor)}, dict(loaded))
        raise UnreadableError(
            f"There are no weights in it: its entries are {quoted(map(str, loaded), limit=6)}. Give trace() a function "
            "load= that returns a state dict."
        )
    weights = {name: value for name, value in inner[known].items() if isinstance(value, Tensor)}
    return _Parts(weights, {name: value for name, value in loaded.items() if name != known})


def _read_file(path: Path, with_weights: bool = True) -> _Parts:
    if path.suffix == ".safetensors":  # has no other entries
        return _Parts(load_file(path) if with_weights else {})
    return _parts_of(_load(path))


def _load(path: Path) -> Mapping[str, Any]:
    # Of a mapped file, only what is used is read: optimizer states are not.
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        if "weights_only" in str(error).lower() and path.stat().st_size:
            what = str(error).partition("GLOBAL ")[2].split()[:1]
            raise UnreadableError(
                f"{path} holds more than tensors and plain values{f', such as {what[0]}' if what else ''}, or is "
                "damaged. Allow classes that you trust by torch.serialization.add_safe_globals, or give trace() a "
                "function load= that returns a state dict."
            ) from error
        raise
    if not isinstance(loaded, Mapping):
        raise UnreadableError(f"{path} holds no state dict but {shortened(type(loaded).__name__, 80)}.")
    return loaded


def _kind_of(folder: Path) -> str | None:
    """What has written a folder; None if that is unknown."""
    for name in _WHOLE:
        if (folder / name).exists() or (folder / f"{name}{_INDEX}").exists():
            return name
    if any((place / _DISTRIBUTED).exists() for place in (folder, folder / _ACCELERATE)):
        return _DISTRIBUTED
    return _DEEPSPEED if _deepspeed_folder(folder) is not None else None


def _read_folder(folder: Path, with_weights: bool) -> _Parts:
    kind = _kind_of(folder)
    if kind is None:
        raise UnreadableError(
            f"{folder} has no weights of a known form: {' or '.join(_WHOLE)} (also in parts with an index), a "
            "checkpoint of torch.distributed.checkpoint, or one of DeepSpeed."
        )
    if kind == _DEEPSPEED:
        return _read_deepspeed(folder, with_weights)
    if kind == _DISTRIBUTED:
        parts = _read_distributed(folder, with_weights)
    else:
        parts = _read_whole(folder, kind) if with_weights else _Parts({})
    state = folder / "trainer_state.json"  # of the Trainer of transformers
    if state.exists():
        parts.entries["global_step"] = json.loads(state.read_text()).get("global_step")
    return parts


def _read_whole(folder: Path, name: str) -> _Parts:
    if (folder / name).exists():
        return _read_file(folder / name)
    index = json.loads((folder / f"{name}{_INDEX}").read_text())["weight_map"]
    files = sorted(set(index.values()))
    if missing := [file for file in files if not (folder / file).exists()]:
        raise UnreadableError(f"{folder} lacks {quoted(missing, limit=3)}, which its index names.")
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= _read_file(folder / file).weights
    if absent := [name for name in index if name not in weights]:
        raise UnreadableError(f"{folder} lacks weights that its index names: {quoted(absent, limit=3)}.")
    return _Parts(weights)


def _read_distributed(folder: Path, with_weights: bool) -> _Parts:
    """Weights that several processes have saved, as FSDP does; their optimizer states are not read."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    entries: dict[str, Any] = {}
    if (folder / "meta.pt").exists():  # of Lightning, with its own entries
        entries = dict(_load(folder / "meta.pt"))
    if not with_weights:
        return _Parts({}, entries)
    reader = FileSystemReader(folder if (folder / _DISTRIBUTED).exists() else folder / _ACCELERATE)
    stored = reader.read_metadata().state_dict_metadata
    weights = {
        name: torch.empty(one.size, dtype=one.properties.dtype, device="cpu")
        for name, one in stored.items()
        if isinstance(one, TensorStorageMetadata) and not _is_of_optimizer(name)
    }
    try:
        with _quiet():
            load(weights, storage_reader=reader, no_dist=True)
    except CheckpointException as error:  # not an Exception
        reasons = [brief(failure) for failure, _ in error.failures.values()]
        raise UnreadableError(f"{folder} cannot be read: {'; '.join(reasons[:1])}") from error
    return _Parts(_without_common(weights), entries)


def _is_of_optimizer(name: str) -> bool:
    """Whether an entry belongs to an optimizer: ``optim.state...``, ``app.optimizer.state...``."""
    first, _, rest = name.partition(".")
    return first.startswith(_OPTIMIZER) or (first not in _WEIGHTS and rest.startswith(_OPTIMIZER))


def _without_common(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without that of the state dict which all of them are in, as in ``model.``, or that of an application."""
    application = next(iter(weights), "").partition(".")[0]
    for prefix in [part for name in _WEIGHTS for part in (f"{name}.", f"{application}.{name}.")]:
        if weights and all(key.startswith(prefix) for key in weights):
            return {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that there is one process."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _deepspeed_folder(folder: Path) -> Path | None:
    """The folder with the files of DeepSpeed: this one, or one within it, such as the one that ``latest`` names."""
    latest = folder / "latest"
    named = [folder / latest.read_text().strip()] if latest.is_file() else []
    places = [folder, *named, folder / _OF_LIGHTNING, *sorted(folder.glob("global_step*"))]
    return next((place for place in places if place.is_dir() and any(place.glob(_DEEPSPEED))), None)


def steps_of_deepspeed(folder: Path) -> list[Path]:
    """The checkpoints in a folder that DeepSpeed has saved to: one folder for each, ``global_step...`` or another tag.

    Args:
        folder: Any folder.

    Returns:
        Their folders; none for anything else, such as a single checkpoint of Lightning.

    Example:
        >>> steps_of_deepspeed(Path("missing"))
        []
    """
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if (folder / "latest").is_file() else []
    return [path for path in inside if path.name != _OF_LIGHTNING and any(path.glob(_DEEPSPEED))]


def _read_deepspeed(folder: Path, with_weights: bool) -> _Parts:
    place = _deepspeed_folder(folder)
    assert place is not None
    files = sorted(place.glob(_DEEPSPEED))
    loaded = _load(files[0])
    entries = {name: value for name, value in loaded.items() if name != "module"}
    if not with_weights:
        return _Parts({}, entries)
    if len(files) == 1 and not any(place.glob(_DEEPSPEED_SHARDS)):  # up to stage 2, each process has all weights
        return _Parts(dict(loaded["module"]), entries)
    try:
        from deepspeed.utils.zero_to_fp32 import (  # type: ignore[import-not-found]
            get_fp32_state_dict_from_zero_checkpoint,
        )
    except ImportError as error:
        raise UnreadableError(
            f"{folder} has its weights in parts, as of stage 3 of DeepSpeed. Install deepspeed, which puts them "
            "together, or run zero_to_fp32.py (DeepSpeed has put it there) to write pytorch_model.bin into the folder."
        ) from error
    weights = get_fp32_state_dict_from_zero_checkpoint(str(place.parent), place.name)
    return _Parts(dict(weights), entries)
