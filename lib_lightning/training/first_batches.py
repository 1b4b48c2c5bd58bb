"""The first batches of a trainer's data loaders before it goes through them, without leaving a trace."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lib_lightning.errors import LIBError
from lib_lightning.model.preserve import preserve_rng
from lib_lightning.model.saved_value import Saver
from lib_lightning.model.static_state import save_static_state

# Arrays of more bytes, and containers of more entries, are data: what changes while they are read is smaller.
_DATA_BYTES, _DATA_ENTRIES = 2**20, 10_000
# No more than this is copied in all.
_MAX_BYTES = 2**28
# Methods of data sets, samplers and transforms that data loaders call.
_ENTRIES = ("__getitem__", "__getitems__", "__iter__", "__next__", "__len__", "__call__")
# Keeps the workers of a data loader between two passes.
_KEPT_ITERATOR = "_iterator"


class OneShotError(LIBError):
    """Data that cannot be read twice, or not without changing what is read later."""


class _ReadingState(Saver):
    """Saves what reading a data set changes: counters, random generators, positions in files; not the data themselves.

    Raises:
        OneShotError: On an iterator, or anything else whose position cannot be restored.
    """

    def __init__(self) -> None:
        super().__init__()
        self._bytes = 0

    def save(self, value: Any) -> Callable[[], object] | None:
        """As for any `Saver`."""
        numpy: Any = sys.modules.get("numpy")
        if isinstance(value, Tensor) or (numpy and isinstance(value, numpy.ndarray)):
            self._bytes += value.nbytes
            if value.nbytes > _DATA_BYTES or self._bytes > _MAX_BYTES:
                return None
        if isinstance(value, (list, tuple, dict, set)) and len(value) > _DATA_ENTRIES:
            return None
        if isinstance(value, io.IOBase):
            return _save_position(value)
        if isinstance(value, Iterator):
            raise OneShotError(f"a {type(value).__name__} can be gone through only once")
        # No state of a model, but what this is about.
        if isinstance(value, (Dataset, Sampler, DataLoader)) and id(value) not in self._seen:
            self._seen[id(value)] = value
            self.kinds.add(type(value))
            return self.save(vars(value))
        return super().save(value)


def _save_position(file: io.IOBase) -> Callable[[], object] | None:
    if file.closed or not (file.readable() and file.seekable()):
        return None
    try:
        position = file.tell()
    except OSError as error:  # in the middle of going through the lines of a text
        raise OneShotError("a file is being gone through line by line") from error
    return lambda: None if file.closed else file.seek(position)


@contextmanager
def batches_without_trace(loader: Any) -> Iterator[Iterable[Any]]:
    """A block that goes through the batches of a data loader, and leaves the loader as if it had not.

    Random states, samplers, and a data set that is read in this process are as before afterwards. Workers are started
    for this pass alone, also where the loader keeps its own.

    Args:
        loader: A data loader, or any other iterable of batches.

    Yields:
        The batches.

    Raises:
        OneShotError: If the batches can be gone through only once.

    Example:
        >>> import torch
        >>> loader = DataLoader(list(range(6)), batch_size=2, shuffle=True)
        >>> state = torch.get_rng_state()
        >>> with batches_without_trace(loader) as batches:
        ...     print(len(list(batches)))
        3
        >>> torch.equal(torch.get_rng_state(), state)
        True
    """
    with ExitStack() as stack:
        stack.enter_context(preserve_rng())
        state = _ReadingState()
        if isinstance(loader, DataLoader):
            # What a data set changes in workers is gone with them.
            in_workers = ("dataset", "collate_fn", "worker_init_fn") if loader.num_workers else ()
            parts = [x for name, x in vars(loader).items() if name not in (*in_workers, _KEPT_ITERATOR)]
        else:
            parts = [loader]
        for restore in [state.save(part) for part in parts]:
            if restore is not None:
                stack.callback(restore)
        stack.callback(save_static_state(state.kinds, state.functions, state, _ENTRIES))
        yield _separate(loader)


def _separate(loader: Any) -> Iterable[Any]:
    """A copy of a data loader that has workers of its own, over the same data."""
    if not isinstance(loader, DataLoader):
        return loader  # type: ignore[no-any-return]
    own = copy.copy(loader)
    if _KEPT_ITERATOR in vars(own):
        vars(own)[_KEPT_ITERATOR] = None
    return own
