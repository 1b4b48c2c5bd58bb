"""CIFAR-10 for the multi-layer perceptron of the paper (arXiv 2405.10928): read from disk, never downloaded."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from lib_lightning.errors import LIBError
from recipes.mlp import Labelled, LabelledData

FOLDER = "cifar-10-batches-py"
# The files of the official archive and their MD5 checksums.
TRAIN_FILES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
}
TEST_FILES = {"test_batch": "40351d587109b95175f43aff81a1287e"}
WHERE_FROM = (
    "Download https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz (described at "
    f"https://www.cs.toronto.edu/~kriz/cifar.html), unpack it, and pass --data.root with the folder {FOLDER} or its "
    "parent."
)

Images, Labels = NDArray[np.uint8], NDArray[np.int64]


class Cifar10(LabelledData):
    """CIFAR-10: 50,000 training and 10,000 test images of 3 x 32 x 32 pixels in 10 classes.

    Args:
        root: The folder ``cifar-10-batches-py`` of the official archive for Python, or its parent; or an
            ``.npz`` file with arrays ``x_train``, ``y_train``, ``x_test`` and ``y_test``, images as ``uint8`` of shape
            ``(n, 3, 32, 32)``.
        batch_size: Images in a training batch.
        verify: Whether to compare the official files with their MD5 checksums.
    """

    def __init__(self, root: str = "data", batch_size: int = 64, verify: bool = False) -> None:
        super().__init__(batch_size)
        self.root, self.verify = Path(root).expanduser(), verify

    def read(self) -> tuple[Labelled, Labelled]:
        """Training and test images.

        Raises:
            LIBError: If files are missing or invalid.
        """
        if self.root.suffix == ".npz":
            if self.verify:
                raise LIBError(
                    "--data.verify compares with the checksums of the official files, which an .npz does not have. "
                    "Omit it, or pass --data.root with the official folder."
                )
            splits = read_npz(self.root)
        else:
            folder = find_folder(self.root)
            splits = [read_batches(folder, files, self.verify) for files in (TRAIN_FILES, TEST_FILES)]
        train, test = (Labelled(torch.from_numpy(x), torch.from_numpy(y), 255) for x, y in splits)
        return train, test


def find_folder(root: Path) -> Path:
    """Find the folder with all batches: ``root`` or its subfolder `FOLDER`.

    Args:
        root: Where to look.

    Raises:
        LIBError: If a batch is missing in both.
    """
    needed = [*TRAIN_FILES, *TEST_FILES]
    found = {folder: [name for name in needed if (folder / name).is_file()] for folder in (root, root / FOLDER)}
    folder = max(found, key=lambda folder: len(found[folder]))
    missing = [name for name in needed if name not in found[folder]]
    if missing:
        what = "CIFAR-10" if len(missing) == len(needed) else f"A part of CIFAR-10 ({', '.join(missing)})"
        raise LIBError(f"{what} is not in {folder.resolve()}. {WHERE_FROM}")
    return folder


def read_batches(folder: Path, files: dict[str, str], verify: bool) -> tuple[Images, Labels]:
    """Read official batches one after the other.

    Args:
        folder: Where the files are.
        files: Names and MD5 checksums.
        verify: Whether to compare the checksums.

    Returns:
        Images ``(n, 3072)`` and labels ``(n,)``.

    Raises:
        LIBError: If a file is invalid.
    """
    images, labels = [], []
    for name, checksum in files.items():
        content = (folder / name).read_bytes()
        if verify and hashlib.md5(content, usedforsecurity=False).hexdigest() != checksum:
            raise LIBError(f"{folder / name} is not the official file: its MD5 checksum differs. {WHERE_FROM}")
        batch = unpickle(content, folder / name)
        entries = {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
        x, y = checked(entries.get("data"), entries.get("labels"), (3072,), folder / name)
        images.append(x)
        labels.append(y)
    return np.concatenate(images), np.concatenate(labels)


def read_npz(path: Path) -> list[tuple[Images, Labels]]:
    """Read training and test images from one NumPy archive.

    Args:
        path: The file.

    Raises:
        LIBError: If it is missing or invalid.
    """
    if not path.is_file():
        raise LIBError(f"There is no file {path.resolve()}. For the official data: {WHERE_FROM}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    except Exception as error:  # the exception for a damaged archive depends on where it is damaged
        raise LIBError(
            f"{path} is no NumPy archive with the arrays x_train, y_train, x_test and y_test: "
            f"{type(error).__name__}: {error}"
        ) from error
    return [checked(arrays[f"x_{split}"], arrays[f"y_{split}"], (3, 32, 32), path) for split in ("train", "test")]


def checked(images: Any, labels: Any, shape: tuple[int, ...], path: Path) -> tuple[Images, Labels]:
    """Check images and labels.

    Args:
        images: ``uint8`` of shape ``(n, *shape)``.
        labels: ``n`` integers from 0 to 9.
        shape: Shape of an image.
        path: The file they come from.

    Raises:
        LIBError: If they are of another type, shape or range.
    """
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != shape:
        what = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        wanted = "(n, " + ", ".join(map(str, shape)) + ")"
        raise LIBError(f"{path} does not contain CIFAR-10: images are uint8 {wanted}, not {what}. {WHERE_FROM}")
    classes = np.asarray(labels)
    if classes.shape != (len(images),) or classes.dtype.kind not in "iu" or not ((classes >= 0) & (classes < 10)).all():
        raise LIBError(
            f"{path} does not contain CIFAR-10: labels are {len(images)} integers from 0 to 9, one for each image. "
            f"{WHERE_FROM}"
        )
    return images, classes.astype(np.int64)


def unpickle(content: bytes, path: Path) -> dict[Any, Any]:
    """Read a pickled dictionary of plain objects and NumPy arrays. Anything that could run code is rejected.

    Args:
        content: The pickle.
        path: The file it comes from.

    Raises:
        LIBError: If it is damaged, refers to other classes or functions, or is not a dictionary.
    """
    try:
        batch = _PlainUnpickler(content).load()
    except LIBError as error:
        raise LIBError(f"{path} is not read: {error} {WHERE_FROM}") from error
    except Exception as error:  # the exception for a damaged pickle depends on its bytes
        raise LIBError(f"{path} is damaged or no pickle: {type(error).__name__}: {error}. {WHERE_FROM}") from error
    if not isinstance(batch, dict):
        raise LIBError(f"{path} does not contain CIFAR-10, but an object of type {type(batch).__name__}. {WHERE_FROM}")
    return batch


class _PlainUnpickler(pickle.Unpickler):
    """Unpickles only the classes and functions with which NumPy arrays and byte strings are pickled.

    A pickle can name any function and call it. Here, names are looked up in a table of functions that do not run code
    of the pickle, and are never imported.
    """

    # NumPy 2 renamed numpy.core; the official files are older.
    _allowed: ClassVar[dict[tuple[str, str], Callable[..., Any]]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        # Python 3 pickles byte strings for Python 2 with it. This method accepts text encodings only.
        ("_codecs", "encode"): str.encode,
    }
    for _core in ("numpy.core", "numpy._core"):
        _allowed[f"{_core}.multiarray", "_reconstruct"] = np.zeros(0).__reduce__()[0]
        _allowed[f"{_core}.numeric", "_frombuffer"] = np.zeros(1).__reduce_ex__(5)[0]

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")

    def find_class(self, module: str, name: str) -> Any:
        """Look up a name in the table."""
        if (module, name) not in self._allowed:
            raise LIBError(
                f"It is a pickle that refers to {module}.{name}, which could run code. The official file contains only "
                "NumPy arrays."
            )
        return self._allowed[module, name]
