"""Two threads in place of two processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from lib_lightning.distributed.process_group import ProcessGroup

T = TypeVar("T")


def in_two(work: Callable[[ProcessGroup], T], timeout: float = 120) -> list[T]:
    """Run a function as each of two processes, at the same time.

    Args:
        work: The function; its argument is the process group of one process.
        timeout: Seconds to wait.

    Returns:
        The results of both.
    """
    board: list[list[Tensor]] = [[], []]
    barrier = threading.Barrier(2)
    found: dict[int, T] = {}
    failed: list[BaseException] = []

    def one(rank: int) -> None:
        try:
            found[rank] = work(_OneOfTwo(rank, board, barrier))
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)
    if failed:
        raise failed[0]
    return [found[0], found[1]]


class _OneOfTwo(ProcessGroup):
    size = 2

    def __init__(self, rank: int, board: list[list[Tensor]], barrier: threading.Barrier) -> None:
        self.rank, self.board, self.barrier = rank, board, barrier

    def exchange(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        self.board[self.rank] = list(tensors)
        self.barrier.wait(60)
        both = list(self.board)
        self.barrier.wait(60)
        return both

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [x + y for x, y in zip(*self.exchange(tensors), strict=True)]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensors[0] for tensors in self.exchange([tensor])]

    def broadcast(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.exchange(tensors)[0]
