"""Several processes as one: sums over `torch.distributed`, in the states of torchmetrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch import distributed as dist
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lib_lightning.core.errors import LIBError
from lib_lightning.core.memory import is_out_of_memory
from lib_lightning.core.together import Together

_TOLD = "_lib_lightning_told"
_FINE, _OUT_OF_MEMORY, _FAILED = range(3)


class OtherProcessError(LIBError, RuntimeError):
    """Another process has failed; it says why itself."""


class OtherProcessMemoryError(LIBError, MemoryError):
    """Another process has run out of memory; all try again with less."""


class TensorSums(Metric):
    """Sums of tensors, over updates and over processes.

    Args:
        like: Tensors of the shapes and types to sum.

    Example:
        >>> sums = TensorSums([torch.zeros(2), torch.zeros(())])
        >>> sums.update([torch.ones(2), torch.tensor(3.0)])
        >>> sums.compute()
        [tensor([1., 1.]), tensor(3.)]
    """

    full_state_update = False

    def __init__(self, like: Sequence[Tensor]) -> None:
        super().__init__()
        self._names = [f"sum_{i}" for i in range(len(like))]
        for name, tensor in zip(self._names, like, strict=True):
            self.add_state(name, torch.zeros_like(tensor), dist_reduce_fx="sum")

    def update(self, tensors: Sequence[Tensor]) -> None:
        """Add one tensor to each sum."""
        for name, tensor in zip(self._names, tensors, strict=True):
            setattr(self, name, getattr(self, name) + tensor)

    def compute(self) -> list[Tensor]:
        """The sums, over all processes."""
        return [getattr(self, name) for name in self._names]


class Processes(Together):
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
        sums = TensorSums(tensors).to(self._device)
        sums.update([t.to(self._device) for t in tensors])
        self._exchange_states(_FINE)
        return [total.to(t.device) for t, total in zip(tensors, sums.compute(), strict=True)]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, of any sizes, but with equally many axes."""
        self._exchange_states(_FINE)
        return self._gather(tensor)

    def first(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of process 0, for all to go on with the same numbers."""
        self._exchange_states(_FINE)
        own = tensors if self.rank == 0 else [t.new_zeros((0,) * t.ndim) for t in tensors]
        return [self._gather(t)[0] for t in own]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """A block that all processes leave well, or all with an error: nobody waits for one that has failed.

        Raises:
            OtherProcessError: If another process has failed.
            OtherProcessMemoryError: If another process has run out of memory, and none has failed otherwise.
        """
        try:
            yield
        except Exception as error:
            told = isinstance(error, (OtherProcessError, OtherProcessMemoryError)) or hasattr(error, _TOLD)
            if not told:
                setattr(error, _TOLD, True)  # a block around this one need not tell it again
                if is_out_of_memory(error):
                    self._exchange_states(_OUT_OF_MEMORY)
                else:
                    self._states(_FAILED)
            raise
        else:
            self._exchange_states(_FINE)

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        return [t.to(tensor.device) for t in gather_all_tensors(tensor.detach().to(self._device))]

    def _states(self, own: int) -> list[int]:
        return [int(state) for state in self._gather(torch.tensor(own))]

    def _exchange_states(self, own: int) -> None:
        states = self._states(own)
        if max(states) == _FAILED:
            raise OtherProcessError(f"Process {states.index(_FAILED)} has failed; its own message says why.")
        if max(states) > own:
            raise OtherProcessMemoryError(f"Process {states.index(_OUT_OF_MEMORY)} has run out of memory.")


class InStep(Processes):
    """Processes that hold a model together and run it in step, all on the same samples: nothing is to be summed.

    What comes from process 0 still does: a truncation that falls out differently would take them out of step.
    """

    # As if this process were alone.
    sum, gather = Together.sum, Together.gather


def agree_on_text(together: Together, text: str) -> str:
    """A text that all processes go on with: that of the first one that has any.

    Args:
        together: The processes.
        text: That of this process; empty if it has none.

    Returns:
        The text; empty if nobody has one.
    """
    everyone = together.gather(torch.tensor(list(text.encode()), dtype=torch.uint8))
    return next((bytes(t.tolist()).decode() for t in everyone if len(t)), "")
