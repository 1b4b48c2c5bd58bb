"""Basis files: safetensors with a versioned JSON header, written atomically and verified when read."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from lib_lightning.errors import LIBError, MissingFileError
from lib_lightning.io.basis_format import CONTENT_HASH, FORMAT, FORMAT_VERSION, current_header, current_tensor_key

if TYPE_CHECKING:
    # Reading parts of files, as in TensorBoard, does not import torch.
    import numpy as np
    from torch import Tensor

_FORMAT = "lib-lightning"
_VERSION = 1
# Suffix of files while they are written.
TEMPORARY = ".tmp"
_HEADER_KEY = "lib_lightning"


class BasisFileError(LIBError, ValueError):
    """A file is truncated, altered, not a basis file, or of a newer format."""


def write_file(path: str | PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a header to one file, atomically; see `write_bytes`.

    Args:
        path: The file. Missing folders are created, an existing file is replaced.
        tensors: The tensors, by key.
        header: Anything that JSON can represent.

    Raises:
        TypeError: If JSON cannot represent the header.
    """
    from safetensors.torch import save

    header = {**header, FORMAT: _FORMAT, FORMAT_VERSION: _VERSION}
    header[CONTENT_HASH] = content_hash(tensors, header)
    stored = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_bytes(path, save(stored, metadata={_HEADER_KEY: json.dumps(header, allow_nan=False)}))


def write_bytes(path: str | PathLike[str], data: bytes) -> None:
    """Write a file atomically.

    The data go to a temporary file in the same folder, which is then renamed. If the process dies, the file is complete
    or missing.

    Args:
        path: The file. Missing folders are created, an existing file is replaced.
        data: Its content.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def read_file(path: str | PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `write_file` wrote, and verify its hash. No code in it is executed.

    Args:
        path: The file.

    Returns:
        Its tensors and its header, under their present names.

    Raises:
        BasisFileError: If the file is truncated, altered, not a basis file, or of a newer format.
        MissingFileError: If the file does not exist.
    """
    with _opened(path, "pt") as (file, header):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        stored_hash = header.pop(CONTENT_HASH, None)
        altered = stored_hash != content_hash(tensors, header)
    if altered:
        raise BasisFileError(f"'{path}' was altered after it was written: its content does not match its hash.")
    return {current_tensor_key(key): tensor for key, tensor in tensors.items()}, current_header(header)


def read_parts(
    path: str | PathLike[str], wanted: Callable[[str], bool]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read the header and some tensors of a file that `write_file` wrote. The hash is not verified.

    Args:
        path: The file.
        wanted: Whether to read the tensor with a given key.

    Returns:
        These tensors, as NumPy arrays, and the header, under their present names.

    Raises:
        BasisFileError: If the file is truncated, not a basis file, or of a newer format.
        MissingFileError: If the file does not exist.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_file(f"{folder}/file", {"small": torch.ones(2), "large": torch.ones(999)}, {"step": 3})
        ...     tensors, header = read_parts(f"{folder}/file", lambda name: name == "small")
        >>> tensors, header["step"]
        ({'small': array([1., 1.], dtype=float32)}, 3)
    """
    with _opened(path, "np") as (file, header):
        stored = {current_tensor_key(name): name for name in file.keys()}  # noqa: SIM118
        return {key: file.get_tensor(name) for key, name in stored.items() if wanted(key)}, current_header(header)


@contextmanager
def _opened(path: str | PathLike[str], framework: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Open a basis file and check its header."""
    path = Path(path)
    if path.is_dir():
        raise BasisFileError(
            f"'{path}' is a folder. A run has its basis files in lib/snapshots of its log directory, and the last one "
            "is lib/final.safetensors there."
        )
    if not path.is_file():
        raise MissingFileError(f"The basis file '{path}' does not exist.")
    try:
        with safe_open(path, framework=framework) as file:
            header = json.loads((file.metadata() or {}).get(_HEADER_KEY, "null"))
            _check_header(path, header)
            yield file, header
    except BasisFileError:
        raise
    except (SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise BasisFileError(
            f"'{path}' is truncated or not a basis file ({error}). Basis files are written by InteractionGraph.save "
            "and by LIBCallback."
        ) from error


def content_hash(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """SHA-256 of header and tensors, independent of their order.

    Args:
        tensors: Tensors, by key.
        header: The header without the hash.

    Returns:
        The hash in hexadecimal.
    """
    from lib_lightning.model.batch import hash_tensors

    prefix = json.dumps(header, sort_keys=True, allow_nan=False).encode()
    return hash_tensors(((f"{name} ", tensors[name]) for name in sorted(tensors)), prefix).hex()


def _check_header(path: Path, header: Any) -> None:
    if not isinstance(header, dict) or header.get(FORMAT) != _FORMAT:
        raise BasisFileError(f"'{path}' is a safetensors file, but not a basis file of lib-lightning.")
    version = header.get(FORMAT_VERSION)
    if not isinstance(version, int) or version > _VERSION:
        raise BasisFileError(
            f"'{path}' has format version {version}; this lib-lightning reads up to {_VERSION}. "
            "Update it: pip install --upgrade lib-lightning."
        )
