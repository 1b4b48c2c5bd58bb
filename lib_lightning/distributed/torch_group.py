"""Several processes as one, by `torch.distributed`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch import distributed as dist
from torchmetrics.utilities.distributed import gather_all_tensors

from lib_lightning.distributed.process_group import ProcessGroup
from lib_lightning.errors import LIBError, is_out_of_memory

_TOLD = "_lib_lightning_told"
_FINE, _OUT_OF_MEMORY, _FAILED = range(3)
# Numbers that process 0 can tell along with how it is: the sizes of a basis's tensors.
_NUMBERS = 16


class PeerProcessError(LIBError, RuntimeError):
    """Another process has failed; it says why itself."""


class PeerProcessMemoryError(LIBError, MemoryError):
    """Another process has run out of memory; all try again with less."""


class TorchProcessGroup(ProcessGroup):
    """All processes of the default group of ``torch.distributed``, each with samples of its own.

    Every process has to take part in every step. Before each exchange they tell each other whether all is well, so
    that one that fails does not leave the others waiting.

    Raises:
        LIBError: If no process group has been set up.
    """

    def __init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise LIBError("There is no process group: torch.distributed.init_process_group sets one up.")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sum over processes, entry by entry; the shapes are the same everywhere."""
        # What takes memory comes before all say that they are well.
        flat = self._flat(tensors)
        self._exchange_states(_FINE)
        dist.all_reduce(flat)
        return _unflatten(tensors, flat, [t.shape for t in tensors])

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, of any sizes, but with equally many axes."""
        self._exchange_states(_FINE)
        return [t.to(tensor.device) for t in gather_all_tensors(tensor.detach().to(self._device))]

    def broadcast(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of process 0, for all to go on with the same numbers."""
        flat = self._flat(tensors if self.rank == 0 else [])
        # They need not have the same shapes here: truncation is all or nothing.
        numbers = iter(self._exchange_states(_FINE, [n for t in tensors for n in t.shape]))
        shapes = [list(itertools.islice(numbers, t.ndim)) for t in tensors]
        flat = flat if self.rank == 0 else flat.new_empty(sum(map(math.prod, shapes)))
        dist.broadcast(flat, 0)
        return _unflatten(tensors, flat, shapes)

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """A block that all processes leave well, or all with an error: nobody waits for one that has failed.

        Raises:
            PeerProcessError: If another process has failed.
            PeerProcessMemoryError: If another process has run out of memory, and none has failed otherwise.
        """
        try:
            yield
        except Exception as error:
            told = isinstance(error, (PeerProcessError, PeerProcessMemoryError)) or hasattr(error, _TOLD)
            if not told:
                setattr(error, _TOLD, True)  # a block around this one need not tell it again
                if is_out_of_memory(error):
                    self._exchange_states(_OUT_OF_MEMORY)
                else:
                    self._states(_FAILED)
            raise
        else:
            self._exchange_states(_FINE)

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        flat = [t.detach().to(self._device, torch.float64).flatten() for t in tensors]
        return torch.cat(flat) if flat else torch.zeros(0, dtype=torch.float64, device=self._device)

    def _states(self, own: int, numbers: Sequence[int] = ()) -> tuple[list[int], list[int]]:
        """How all processes are, and a few numbers of process 0."""
        states = torch.zeros(self.size + _NUMBERS, dtype=torch.int64)
        states[self.rank] = own
        if self.rank == 0:
            states[self.size : self.size + len(numbers)] = torch.tensor(numbers, dtype=torch.int64)
        states = states.to(self._device)
        dist.all_reduce(states)
        everyone = states.tolist()
        return everyone[: self.size], everyone[self.size :]

    def _exchange_states(self, own: int, numbers: Sequence[int] = ()) -> list[int]:
        states, told = self._states(own, numbers)
        if max(states) == _FAILED:
            raise PeerProcessError(f"Process {states.index(_FAILED)} has failed; its own message says why.")
        if max(states) > own:
            raise PeerProcessMemoryError(f"Process {states.index(_OUT_OF_MEMORY)} has run out of memory.")
        return told


class ReplicatedGroup(TorchProcessGroup):
    """Processes that hold a model together and run it in step, all on the same samples: nothing is to be summed.

    What comes from process 0 still does: a truncation that falls out differently would take them out of step.
    """

    # As if this process were alone.
    sum, gather = ProcessGroup.sum, ProcessGroup.gather


def _unflatten(tensors: Sequence[Tensor], flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.reshape(shape).to(t) for t, part, shape in zip(tensors, parts, shapes, strict=True)]


def broadcast_text(process_group: ProcessGroup, text: str) -> str:
    """A text that all processes go on with: that of the first one that has any.

    Args:
        process_group: The processes.
        text: That of this process; empty if it has none.

    Returns:
        The text; empty if nobody has one.
    """
    everyone = process_group.gather(torch.tensor(list(text.encode()), dtype=torch.uint8))
    return next((bytes(t.tolist()).decode() for t in everyone if len(t)), "")
