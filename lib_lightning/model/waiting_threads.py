"""Threads of torch that sleep instead of spin while other programs use the cores.

torch divides an operation among threads, and a thread that has finished its share spins until all have. On quiet cores
that is the fastest way: with sleeping threads a snapshot of small operations takes up to 1.7 times as long. On cores
that other programs use as well (workers of data loaders), spinning takes the time that the thread left behind needs: a
snapshot takes four times as long beside one other process on two cores, and thirty times beside several.

Only how threads wait is changed: their number and their shares stay, and so do results, to the last bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Seconds between two looks at how long threads have waited for a core.
_INTERVAL = 0.02
# Shares of the time that threads wait for a core, together, above and below which other programs use the cores.
_BUSY, _QUIET = 0.1, 0.05
_TASKS = Path("/proc/self/task")
# Held by the block that watches; blocks inside of it have nothing to do.
_WATCHING = threading.Lock()


@contextmanager
def considerate_threads() -> Iterator[None]:
    """Run a block in which threads of torch sleep while other programs use the cores.

    Does nothing where torch has one thread, or its threads are not those of GNU OpenMP on Linux.
    """
    possible = torch.get_num_threads() > 1 and gnu_openmp() is not None and seconds_waited() is not None
    if not (possible and _WATCHING.acquire(blocking=False)):
        yield
        return
    watch = Watch(SleepingThreads, seconds_waited)
    try:
        watch.start()
        yield
    finally:
        watch.stop()
        _WATCHING.release()


class Watch(threading.Thread):
    """A thread that looks at regular intervals whether threads of this process wait for a core.

    Args:
        make_sleep: Makes threads of torch sleep, until the ``stop`` of what it returns is called.
        waited: Seconds that all threads have waited for a core so far.
        interval: Seconds between two looks.

    Attributes:
        times_busy: How often other programs were found to use the cores.
    """

    def __init__(
        self,
        make_sleep: Callable[[], SleepingThreads],
        waited: Callable[[], float | None],
        interval: float = _INTERVAL,
    ) -> None:
        super().__init__(name="lib_lightning waiting threads", daemon=True)
        self.times_busy = 0
        self._make_sleep, self._waited, self._interval = make_sleep, waited, interval
        self._end = threading.Event()

    def run(self) -> None:
        """Look until `stop` is called."""
        sleeping: SleepingThreads | None = None
        before, waited = time.perf_counter(), self._waited() or 0.0
        interval = self._interval
        while not self._end.wait(interval):
            looked = time.perf_counter()
            now = self._waited() or waited
            # With hundreds of threads a look takes milliseconds.
            interval = max(self._interval, 50 * (time.perf_counter() - looked))
            share, before, waited = (now - waited) / (looked - before), looked, now
            if sleeping is None and share > _BUSY:
                self.times_busy += 1
                try:
                    sleeping = self._make_sleep()
                except RuntimeError:  # the system allows no more threads
                    return
            elif sleeping is not None and share < _QUIET:
                sleeping.stop()
                sleeping = None
        if sleeping is not None:
            sleeping.stop()

    def stop(self) -> None:
        """End the thread; threads of torch wait as before."""
        self._end.set()
        self.join()


class SleepingThreads(threading.Thread):
    """Makes threads of GNU OpenMP sleep at once when they wait, until `stop` is called.

    GNU OpenMP does so by itself while a process has more of its threads than there are cores. This thread has as many
    threads of its own as are missing, which do nothing.
    """

    def __init__(self) -> None:
        super().__init__(name="lib_lightning sleeping threads", daemon=True)
        self._missing = _missing_threads(torch.get_num_threads())
        self._begun, self._end = threading.Event(), threading.Event()
        self.start()
        self._begun.wait()

    def run(self) -> None:
        """Hold the threads until `stop` is called."""
        try:
            if (openmp := gnu_openmp()) is not None:
                # A function that only reads a number is what all of these threads run, once.
                nothing = ctypes.cast(openmp.omp_get_thread_num, ctypes.c_void_p)
                openmp.GOMP_parallel(nothing, None, ctypes.c_uint(self._missing), ctypes.c_uint(0))
        finally:
            self._begun.set()
        self._end.wait()

    def stop(self) -> None:
        """End the thread, and with it the threads of its own."""
        self._end.set()
        self.join()


def _missing_threads(num_threads: int) -> int:
    """Threads that a second team needs, its own first thread included, for more threads than cores in total."""
    openmp = gnu_openmp()
    return 2 if openmp is None else max(2, int(openmp.omp_get_num_procs()) + 2 - num_threads)


@functools.lru_cache
def gnu_openmp() -> ctypes.CDLL | None:
    """The library of GNU OpenMP that torch uses; None if it uses another one, or this is not Linux."""
    with contextlib.suppress(OSError, AttributeError, UnicodeDecodeError):
        # Each line of a mapped file ends in its path.
        paths = set(re.findall(r"(/.*/libgomp[^/\n]*)$", Path("/proc/self/maps").read_text(), re.MULTILINE))
        # Other packages bring one of their own. Torch calls the one beside itself, or the only one.
        beside_torch = {path for path in paths if Path(path).is_relative_to(Path(torch.__file__).parent)}
        paths = beside_torch or paths
        if len(paths) == 1:
            openmp = ctypes.CDLL(paths.pop())
            if openmp.GOMP_parallel and openmp.omp_get_thread_num and openmp.omp_get_num_procs:
                return openmp
    return None


def seconds_waited() -> float | None:
    """Seconds that the threads of this process have waited for a core, in total; None if the system does not say."""
    total = None
    for task in _TASKS.iterdir() if _TASKS.is_dir() else ():
        with contextlib.suppress(OSError, ValueError, IndexError):  # a thread may have ended
            total = (total or 0.0) + 1e-9 * int((task / "schedstat").read_text().split()[1])
    return total
