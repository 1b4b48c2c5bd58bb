"""A hash of a model's weights, by which a graph says which weights it was computed with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lib_lightning.model.batch import as_bytes, hash_tensors, type_and_shape

# Sums over rows and columns of this width: two passes over the memory, without a copy.
_WIDTH = 4096
# Tensors of fewer bytes are hashed as one.
_SMALL = 1 << 20
# An odd number with random bits, so that the sums of different places do not cancel.
_MULTIPLIER = 0x1F58_6CA5_9E37_79B1


def weights_hash(module: nn.Module) -> str:
    """Hash of a model's parameters and floating-point buffers, computed on their device.

    It costs about as much as copying them once, and sees any change, except of weights that are made to collide.

    Args:
        module: The model; of weights that are sharded over processes, those of this process are hashed.

    Returns:
        16 hexadecimal digits, equal for equal weights on any device.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> before = weights_hash(layer)
        >>> with torch.no_grad():
        ...     layer.weight.data[0, 0] += 1  # the version counter of the parameter does not see this
        >>> weights_hash(layer) == before
        False
    """
    digest = hashlib.sha256()
    sums: list[Tensor] = []
    small: dict[torch.device, list[Tensor]] = {}
    for name, t in _tensors(module):
        digest.update(f"{name}{type_and_shape(t)}".encode())
        try:
            data = _bytes(t)
            if len(data) < _SMALL:
                small.setdefault(data.device, []).append(data)
            else:
                sums += _sums(data)
        except (RuntimeError, NotImplementedError):  # a type of tensor or a device without these operations
            digest.update(hash_tensors([("", t)]))
    # Each operation takes longer than the sums over a small tensor.
    sums += [s for parts in small.values() for s in _sums(torch.cat(parts))]
    for device in dict.fromkeys(s.device for s in sums):
        digest.update(repr(torch.stack([s for s in sums if s.device == device]).tolist()).encode())
    return digest.hexdigest()[:16]


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from ((name, t) for name, t in module.named_buffers() if t.is_floating_point())


def _bytes(t: Tensor) -> Tensor:
    if hasattr(t, "to_local"):  # sharded over processes
        t = t.to_local()
    return as_bytes(t.detach())


def _sums(data: Tensor) -> list[Tensor]:
    """Weighted sums of all bytes, each in one 64-bit integer."""
    n_words = len(data) // 8
    rest, whole = data[n_words * 8 :].to(torch.int64), data[: n_words * 8]
    words = (whole.clone() if whole.data_ptr() % 8 else whole).view(torch.int64)
    n_rows = len(words) // _WIDTH
    rows = words[: n_rows * _WIDTH].view(n_rows, _WIDTH)
    parts = [words[n_rows * _WIDTH :], rest, *((rows.sum(1), rows.sum(0)) if n_rows else ())]
    return [(part * _multipliers(len(part), part.device)).sum() for part in parts if len(part)]


def _multipliers(n: int, device: torch.device) -> Tensor:
    # Products and sums of 64-bit integers wrap around.
    odd = 2 * torch.arange(n, device=device) + 1
    return (odd * _MULTIPLIER) ^ (odd << 32)
