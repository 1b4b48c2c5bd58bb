"""Process groups of `torch.distributed`."""

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
from lib_lightning.errors import ComputationStopped, LIBError, is_out_of_memory

# Attribute of an exception that the other processes already know of.
_REPORTED = "_lib_lightning_reported"
# States of a process.
_OK, _OUT_OF_MEMORY, _FAILED = range(3)
# Integers that process 0 sends along with its state: the sizes of the tensors of a basis.
_N_INTEGERS = 16


class PeerProcessError(LIBError, RuntimeError):
    """Another process has failed; the error is in its own output."""


class PeerProcessMemoryError(LIBError, MemoryError):
    """Another process has run out of memory; every process retries with less."""


class TorchProcessGroup(ProcessGroup):
    """The default group of `torch.distributed`. Each process has different samples.

    Before each exchange the processes exchange their states, so that no process waits for one that has failed.

    Raises:
        LIBError: If no process group has been initialized.
    """

    def __init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise LIBError("There is no process group: torch.distributed.init_process_group sets one up.")
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sum tensors over processes; see `ProcessGroup.sum`. Computed in float64."""
        # Allocated first, so that running out of memory is reported with the state.
        flat = self._flatten(tensors)
        self._check_states(_OK)
        dist.all_reduce(flat)
        return _unflatten(tensors, flat, [t.shape for t in tensors])

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Collect the tensors of all processes; see `ProcessGroup.gather`."""
        self._check_states(_OK)
        return [t.to(tensor.device) for t in gather_all_tensors(tensor.detach().to(self._device))]

    def broadcast(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Send the tensors of process 0 to all processes; see `ProcessGroup.broadcast`. Computed in float64."""
        flat = self._flatten(tensors if self.rank == 0 else [])
        # Shapes may differ between processes: with other rounding errors, truncation keeps another number of features.
        sizes = iter(self._check_states(_OK, [n for t in tensors for n in t.shape]))
        shapes = [list(itertools.islice(sizes, t.ndim)) for t in tensors]
        flat = flat if self.rank == 0 else flat.new_empty(sum(map(math.prod, shapes)))
        dist.broadcast(flat, 0)
        return _unflatten(tensors, flat, shapes)

    @contextmanager
    def sync_errors(self) -> Iterator[None]:
        """Run a block that fails on every process if it fails on one.

        Raises:
            PeerProcessError: If another process has failed.
            PeerProcessMemoryError: If another process has run out of memory, and none has failed otherwise.
        """
        try:
            yield
        except (Exception, ComputationStopped) as error:
            is_reported = isinstance(error, (PeerProcessError, PeerProcessMemoryError)) or hasattr(error, _REPORTED)
            if not is_reported:
                setattr(error, _REPORTED, True)  # for an enclosing block
                if is_out_of_memory(error):
                    self._check_states(_OUT_OF_MEMORY)
                else:
                    self._exchange_states(_FAILED)
            raise
        else:
            self._check_states(_OK)

    def _flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        flat = [t.detach().to(self._device, torch.float64).flatten() for t in tensors]
        return torch.cat(flat) if flat else torch.zeros(0, dtype=torch.float64, device=self._device)

    def _exchange_states(self, state: int, integers: Sequence[int] = ()) -> tuple[list[int], list[int]]:
        """States of all processes, and the integers of process 0."""
        values = torch.zeros(self.size + _N_INTEGERS, dtype=torch.int64, device="cpu")
        values[self.rank] = state
        if self.rank == 0:
            values[self.size : self.size + len(integers)] = torch.tensor(integers, dtype=torch.int64, device="cpu")
        values = values.to(self._device)
        dist.all_reduce(values)
        everything = values.tolist()
        return everything[: self.size], everything[self.size :]

    def _check_states(self, state: int, integers: Sequence[int] = ()) -> list[int]:
        """Exchange states, and raise an error if another process is worse off; the integers of process 0."""
        states, received = self._exchange_states(state, integers)
        if max(states) == _FAILED:
            raise PeerProcessError(f"Process {states.index(_FAILED)} has failed; its own message says why.")
        if max(states) > state:
            raise PeerProcessMemoryError(f"Process {states.index(_OUT_OF_MEMORY)} has run out of memory.")
        return received


class ReplicatedGroup(TorchProcessGroup):
    """Processes that compute on the same samples, because the model is sharded among them: nothing is summed.

    Broadcasts still take place: rounding errors may differ between processes, and so may the number of features that
    truncation keeps.
    """

    sum, gather = ProcessGroup.sum, ProcessGroup.gather


def _unflatten(tensors: Sequence[Tensor], flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.reshape(shape).to(t) for t, part, shape in zip(tensors, parts, shapes, strict=True)]


def broadcast_text(process_group: ProcessGroup, text: str) -> str:
    """Send the text of the first process that has one to all processes.

    Args:
        process_group: The processes.
        text: Text of this process; empty if it has none.

    Returns:
        The text, on every process; empty if no process has one.

    Example:
        >>> broadcast_text(ProcessGroup(), "output")
        'output'
    """
    gathered = process_group.gather(torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu"))
    return next((bytes(t.tolist()).decode() for t in gathered if len(t)), "")
