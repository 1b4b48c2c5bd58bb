"""Tensors in nested tuples, lists, mappings and dataclasses: batches, and the inputs and outputs of modules."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.utils.rnn import PackedSequence

from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from lib_lightning.errors import LIBError

T = TypeVar("T")


def map_tensors(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor in nested containers.

    Args:
        value: Tensors in tuples, lists, mappings and dataclasses; anything else is kept unchanged.
        fn: The function.

    Returns:
        The results, in new containers of the same types.

    Example:
        >>> import torch
        >>> map_tensors({"x": (torch.ones(1), "label")}, lambda t: t + 1)
        {'x': (tensor([2.]), 'label')}
    """
    if isinstance(value, Tensor):
        return fn(value)
    if value is None or isinstance(value, (str, bytes, int, float)):
        return value
    if isinstance(value, (tuple, list)):
        return _sequence_like(value, [map_tensors(v, fn) for v in value])
    if isinstance(value, Mapping):
        return _with_items(value, {k: map_tensors(v, fn) for k, v in value.items()})
    # Dataclasses with slots have no __dict__.
    if isinstance(value, type) or not (hasattr(value, "__dict__") or dataclasses.is_dataclass(value)):
        return value
    if hasattr(value, "edge_index") and hasattr(value, "apply"):  # of PyTorch Geometric: copies all of its stores
        return copy.copy(value).apply(fn)
    if callable(value):
        return value
    names = _tensor_attributes(value)
    return replace_items(value, {name: map_tensors(getattr(value, name), fn) for name in names}) if names else value


def replace_items(value: Any, items: Mapping[Any, Any]) -> Any:
    """Replace entries of a container or attributes of an object.

    Args:
        value: A tuple, list, mapping or object; not modified.
        items: New values by index, key or name.

    Returns:
        A new one of the same class.

    Example:
        >>> replace_items((1, 2), {1: 3}), replace_items({"x": 1}, {"x": 2})
        ((1, 3), {'x': 2})
    """
    if isinstance(value, (tuple, list)):
        return _sequence_like(value, [items.get(i, item) for i, item in enumerate(value)])
    if isinstance(value, Mapping):
        return _with_items(value, {**value, **items})
    new = copy.copy(value)
    for name, item in items.items():
        object.__setattr__(new, name, item)
    return new


def _tensor_attributes(value: Any) -> list[str]:
    """Names of an object's attributes that hold tensors, the main one of a distribution first."""
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value)]
    if isinstance(value, Distribution):
        main = [name for name in ("logits", "loc") if isinstance(getattr(value, name, None), Tensor)]
        inner = [name for name, x in vars(value).items() if isinstance(x, (Tensor, Distribution))]
        return list(dict.fromkeys([*(name for name in main if name in vars(value)), *inner]))
    if hasattr(value, "to"):  # a batch or an output, rather than something that only refers to tensors
        return [name for name, x in vars(value).items() if isinstance(x, (Tensor, tuple, list, Mapping))]
    return [name for name, x in vars(value).items() if isinstance(x, Tensor)]


def first_tensor(value: Any) -> Tensor | None:
    """Find the main tensor of a module's input or output: the first one that is not a loss.

    Args:
        value: A tensor, or tensors in tuples, lists, mappings and objects.

    Returns:
        The tensor, or None if there is no tensor. Ahead of the logits, an entry called ``"loss"``, a scalar, and a
        tensor of shape ``(1,)`` are losses. Of a distribution the logits or the location.

    Example:
        >>> import torch
        >>> first_tensor({"loss": torch.tensor(0.5), "logits": torch.ones(2, 1)}).shape
        torch.Size([2, 1])
    """
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping) and "loss" in value and len(value) > 1:
        rest = first_tensor([item for key, item in value.items() if key != "loss"])
        if rest is not None:
            return rest
    found = tensors_in(value)
    several = any(t.ndim > 0 and t.size(0) > 1 for t in found)
    axes = (t for t in found if t.ndim > 0 and not (several and t.ndim == 1 and t.size(0) == 1))
    return next(axes, found[0] if found else None)


def replace_first_tensor(value: Any, new: Tensor) -> Any:
    """Replace the tensor that `first_tensor` finds.

    Args:
        value: A tensor, or tensors in tuples, lists and mappings; not modified.
        new: The new tensor.

    Returns:
        The same structure with that tensor replaced.

    Example:
        >>> import torch
        >>> replace_first_tensor((torch.zeros(1), torch.zeros(1)), torch.ones(1))
        (tensor([1.]), tensor([0.]))
    """
    old = first_tensor(value)
    return map_tensors(value, lambda t: new if t is old else t)


def batch_size(batch: Any) -> int:
    """Number of samples in a batch: the length of its main tensor.

    Args:
        batch: Tensors in tuples, lists and mappings.

    Returns:
        The number of samples; 0 if there is no tensor.
    """
    first = first_tensor(batch)
    return 0 if first is None or first.ndim == 0 else first.size(0)


def is_empty(batch: Any) -> bool:
    """Whether a batch has tensors, but no samples.

    Args:
        batch: Tensors in tuples, lists and mappings.

    Returns:
        True if so; False for a batch without any tensor, which `check_has_tensors` rejects.
    """
    return first_tensor(batch) is not None and batch_size(batch) == 0


def why_not_dense(value: Any) -> str | None:
    """What is wrong with the main tensor of a module's input or output, if its rows are not those of the samples.

    Args:
        value: Tensors in tuples, lists, mappings and objects.

    Returns:
        What it is, for a message; None for an ordinary tensor, or none.

    Example:
        >>> import torch
        >>> why_not_dense(torch.eye(2).to_sparse()), why_not_dense((torch.eye(2), "label"))
        ('a sparse tensor', None)
    """
    t = first_tensor(value)
    if any(item.data is t for item in (value, *_flat(value)) if isinstance(item, PackedSequence)):
        return "a PackedSequence"
    if t is None or (t.layout == torch.strided and not t.is_nested):
        return None
    return "a nested tensor" if t.is_nested else "a sparse tensor"


def _flat(value: Any) -> Iterator[Any]:
    for item in value if isinstance(value, (tuple, list)) and not isinstance(value, PackedSequence) else ():
        yield item
        yield from _flat(item)


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


def _sequence_like(value: Any, items: list[Any]) -> Any:
    """A tuple or list of the same class, with other entries."""
    kind = type(value)
    if kind in (tuple, list):
        return kind(items)
    if hasattr(value, "_fields"):
        return kind(*items)
    if hasattr(value, "n_sequence_fields"):  # what torch.max() returns, for example
        return kind(items)
    if isinstance(value, list):
        new = copy.copy(value)
        new[:] = items
        return new
    if all(a is b for a, b in zip(items, value, strict=True)):
        return value
    # Without the class's own __new__, which may take other arguments.
    new = tuple.__new__(kind, items)
    if hasattr(value, "__dict__"):
        vars(new).update(vars(value))
    return new


def _with_items(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if type(mapping) is dict:
        return items
    # Keeps the class of an output class, such as an OrderedDict with attributes.
    new = copy.copy(mapping)
    for key, item in items.items():
        new[key] = item  # type: ignore[index]
    return new


def as_bytes(t: Tensor) -> Tensor:
    """The values of a tensor of any type as ``uint8``, shape ``(number of bytes,)``.

    Args:
        t: Any strided tensor.

    Returns:
        A view of its memory if that is contiguous.

    Example:
        >>> import torch
        >>> as_bytes(torch.zeros(3, 2)[::2, :1]).shape
        torch.Size([8])
    """
    flat = t.contiguous().flatten()
    # A tensor of one element is contiguous with any stride.
    return (flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)).view(torch.uint8)


def strided_parts(t: Tensor) -> tuple[Tensor, ...]:
    """Ordinary tensors that a tensor consists of.

    Args:
        t: A tensor of any layout or subclass.

    Returns:
        Indices and values of a sparse tensor, integers of a quantized one, what a subclass such as a nested tensor is
        made of; the tensor itself if it is an ordinary one.

    Example:
        >>> import torch
        >>> [part.tolist() for part in strided_parts(torch.eye(2).to_sparse())]
        [[[0, 1], [0, 1]], [1.0, 1.0]]
    """
    if t.layout == torch.sparse_coo:
        t = t.coalesce()
        return t.indices(), t.values()
    if t.layout in (torch.sparse_csr, torch.sparse_bsr):
        return t.crow_indices(), t.col_indices(), t.values()
    if t.layout in (torch.sparse_csc, torch.sparse_bsc):
        return t.ccol_indices(), t.row_indices(), t.values()
    if flatten := getattr(t, "__tensor_flatten__", None):
        names, _ = flatten()
        return tuple(part for name in names for part in strided_parts(getattr(t, name)))
    if t.is_nested:
        return tuple(t.unbind())
    if t.is_quantized:
        return (t.int_repr(),)
    return (t if t.layout == torch.strided else t.to_dense(),)


def type_and_shape(t: Tensor) -> str:
    """The dtype and the shape of a tensor in one word, for hashes.

    Args:
        t: Any tensor.

    Returns:
        Both; of a nested tensor, which has no shape that two equal ones share, the dtype.

    Example:
        >>> import torch
        >>> type_and_shape(torch.zeros(2, 1))
        'torch.float32 (2, 1)'
    """
    return str(t.dtype) if t.is_nested else f"{t.dtype} {tuple(t.shape)}"


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
        digest.update(f"{label}{type_and_shape(t)}".encode())
        for part in strided_parts(t.detach()):
            if t.is_nested or part.shape != t.shape:
                digest.update(type_and_shape(part).encode())
            digest.update(as_bytes(part.cpu()).numpy().tobytes())
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
    return agreed_hash(hash_tensors(("", t) for batch in batches for t in tensors_in(batch)), process_group)


def agreed_hash(digest: bytes, process_group: ProcessGroup) -> str:
    """Hash of the hashes of all processes.

    Args:
        digest: The hash of this process, such as that of `hash_tensors`.
        process_group: The processes.

    Returns:
        The hash in hexadecimal, the same on every process.
    """
    gathered = process_group.gather(torch.tensor(list(digest), dtype=torch.uint8, device="cpu"))
    return hashlib.sha256(b"".join(bytes(t.tolist()) for t in gathered)).hexdigest()[:16]
