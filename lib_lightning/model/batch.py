"""Tensors inside tuples, lists and dicts: batches, module inputs and module outputs come in all of them."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from lib_lightning.errors import LIBError


def map_tensors(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor, in new containers of the same kinds.

    Args:
        value: Tensors in tuples, lists, mappings and dataclasses, nested at will; anything else is kept as it is.
        fn: What to do with a tensor.

    Returns:
        The same structure with the new tensors.

    Example:
        >>> import torch
        >>> map_tensors({"x": (torch.ones(1), "label")}, lambda t: t + 1)
        {'x': (tensor([2.]), 'label')}
    """
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(v, fn) for v in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(v, fn) for v in value)
    if isinstance(value, Mapping):
        return _with_items(value, {k: map_tensors(v, fn) for k, v in value.items()})
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        new = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(new, field.name, map_tensors(getattr(value, field.name), fn))
        return new
    return value


def first_tensor(value: Any) -> Tensor | None:
    """Find the tensor that a module's input or output is about: the first one that is not a single number.

    Args:
        value: A tensor, or tensors in tuples, lists and mappings.

    Returns:
        That tensor, or None if there is none. (A loss ahead of the logits is a single number and is passed over.)

    Example:
        >>> import torch
        >>> first_tensor({"loss": torch.tensor(0.5), "logits": torch.ones(2, 1)}).shape
        torch.Size([2, 1])
    """
    found = tensors_in(value)
    return next((t for t in found if t.ndim > 0), found[0] if found else None)


def replace_first_tensor(value: Any, new: Tensor) -> Any:
    """Put another tensor where `first_tensor` found one.

    Args:
        value: A tensor, or tensors in tuples, lists and mappings; not modified.
        new: The tensor to put there.

    Returns:
        The same structure with that one tensor replaced.

    Example:
        >>> import torch
        >>> replace_first_tensor((torch.zeros(1), torch.zeros(1)), torch.ones(1))
        (tensor([1.]), tensor([0.]))
    """
    old = first_tensor(value)
    return map_tensors(value, lambda t: new if t is old else t)


def batch_size(batch: Any) -> int:
    """Number of samples in a batch: the length of its first tensor.

    Args:
        batch: Tensors in tuples, lists and mappings.

    Returns:
        The number; 0 if there is no tensor.
    """
    first = first_tensor(batch)
    return 0 if first is None or first.ndim == 0 else first.shape[0]


def is_empty(batch: Any) -> bool:
    """Whether a batch has tensors, but no samples in them.

    Args:
        batch: Tensors in tuples, lists and mappings.

    Returns:
        True if so; False for a batch without any tensor, which is something else.
    """
    return first_tensor(batch) is not None and batch_size(batch) == 0


def check_has_tensors(batch: Any) -> None:
    """Raise an error for a batch without tensors.

    Args:
        batch: One batch.

    Raises:
        LIBError: If there is no tensor in the batch.
    """
    if first_tensor(batch) is None:
        raise LIBError(
            f"There is no tensor in a batch of type {type(batch).__name__}: batches are tensors, or tuples, lists, "
            "dicts and dataclasses of them."
        )


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested containers, in order.

    Args:
        value: Tensors in tuples, lists, mappings and dataclasses.

    Returns:
        The tensors.

    Example:
        >>> import torch
        >>> tensors_in({"x": (torch.ones(1), "label")})
        [tensor([1.])]
    """
    found: list[Tensor] = []

    def add(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_tensors(value, add)
    return found


def num_elements(batch: Any) -> int:
    """Number of elements of all tensors in a batch."""
    return sum(t.numel() for t in tensors_in(batch))


def slice_batch(batch: Any, start: int, stop: int) -> Any:
    """Take some of the samples of a batch.

    Args:
        batch: Tensors in tuples, lists and mappings; those with one entry for each sample are cut.
        start: First sample.
        stop: Sample to stop before.

    Returns:
        The same structure, as views.

    Example:
        >>> import torch
        >>> slice_batch({"x": torch.zeros(4, 2), "scale": torch.ones(())}, 1, 3)["x"].shape
        torch.Size([2, 2])
    """
    n = batch_size(batch)
    return map_tensors(batch, lambda t: t[start:stop] if t.ndim > 0 and t.shape[0] == n else t)


def index_batch(batch: Any, index: Tensor) -> Any:
    """Take chosen samples of a batch.

    Args:
        batch: Tensors in tuples, lists and mappings; of those with one entry for each sample some are taken.
        index: Which samples, shape ``(k,)``, int64.

    Returns:
        The same structure, with copies.

    Example:
        >>> import torch
        >>> index_batch((torch.arange(4), "label"), torch.tensor([3, 1]))
        (tensor([3, 1]), 'label')
    """
    n = batch_size(batch)
    return map_tensors(batch, lambda t: t[index.to(t.device)] if t.ndim > 0 and t.shape[0] == n else t)


def default_input_fn(batch: Any) -> Any:
    """Take the model's input from a batch: the first entry of a tuple or list, anything else as it is.

    Args:
        batch: What the data loader gives.

    Returns:
        What to call the model with.

    Example:
        >>> default_input_fn(("inputs", "labels"))
        'inputs'
    """
    return batch[0] if isinstance(batch, (tuple, list)) and batch else batch


def _with_items(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(mapping) is dict:
        return items
    # Output classes (an OrderedDict with attributes) and the like: keep the class, set the items.
    new = copy.copy(mapping)
    for key, item in items.items():
        new[key] = item  # type: ignore[index]
    return new


def hash_tensors(tensors: Iterable[tuple[str, Tensor]], prefix: bytes = b"") -> bytes:
    """SHA-256 of tensors: of their labels, dtypes, shapes and values.

    Args:
        tensors: A label and a tensor each, on any device.
        prefix: Bytes that are hashed before the tensors.

    Returns:
        The hash, 32 bytes.

    Example:
        >>> import torch
        >>> hash_tensors([("", torch.zeros(2))]) == hash_tensors([("", torch.zeros(2, 1))])
        False
    """
    digest = hashlib.sha256(prefix)
    for label, t in tensors:
        digest.update(f"{label}{t.dtype} {tuple(t.shape)}".encode())
        # As bytes, because NumPy does not know every dtype.
        digest.update(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def hash_batches(batches: Iterable[Any], process_group: ProcessGroup = SINGLE_PROCESS) -> str:
    """Hash of all tensors in some batches.

    Args:
        batches: Batches of this process.
        process_group: The processes.

    Returns:
        The hash in hexadecimal, the same on every process.

    Example:
        >>> hash_batches([torch.zeros(2)]) == hash_batches([torch.zeros(2)]) != hash_batches([torch.ones(2)])
        True
    """
    digest = hash_tensors(("", t) for batch in batches for t in tensors_in(batch))
    gathered = process_group.gather(torch.tensor(list(digest), dtype=torch.uint8))
    return hashlib.sha256(b"".join(bytes(t.tolist()) for t in gathered)).hexdigest()[:16]
