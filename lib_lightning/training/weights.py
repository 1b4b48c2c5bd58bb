"""Whether a model still has the weights that a snapshot was computed with: other callbacks may replace them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lib_lightning.model.batch import as_bytes, hash_tensors

# What ``info["weights"]`` of a snapshot says: they are those of the last optimizer step, or others that have been put
# in their place, during a validation or at the end of training.
TRAINED, VALIDATED, FINAL = "trained", "replaced for validation", "replaced after training"

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
        digest.update(f"{name}{t.dtype} {tuple(t.shape)}".encode())
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


class TrainedWeights:
    """Remembers the weights after the latest training step, to recognise those that are put in their place.

    Example:
        >>> trained, model = TrainedWeights(), nn.Linear(2, 3)
        >>> trained.note(10, model)
        >>> trained.status(10, weights_hash(model), is_last=False)
        'trained'
        >>> model.bias.data += 1
        >>> trained.status(10, weights_hash(model), is_last=True)
        'replaced after training'
    """

    def __init__(self) -> None:
        self._step: int | None = None
        self._hash = ""

    def note(self, step: int, model: nn.Module) -> None:
        """These are the weights after a number of steps."""
        self._step, self._hash = step, weights_hash(model)

    def note_if_unknown(self, step: int, model: nn.Module) -> None:
        """These are the weights after a number of steps, unless other ones have been noted."""
        if self._step != step:
            self.note(step, model)

    def are_replaced(self, step: int, model: nn.Module) -> bool:
        """Whether a model has other weights than after a step; False if those of that step are unknown."""
        return self._step == step and weights_hash(model) != self._hash

    def status(self, step: int, weights: str, is_last: bool) -> str:
        """Describe the weights of a snapshot.

        Args:
            step: Number of optimizer steps before it.
            weights: Hash of its weights.
            is_last: Whether training has ended.

        Returns:
            `TRAINED`, `VALIDATED` or `FINAL`.
        """
        # Unknown weights are those of a step that has just been made, unless training has ended.
        is_trained = weights == self._hash if self._step == step else not is_last
        return TRAINED if is_trained else FINAL if is_last else VALIDATED


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
