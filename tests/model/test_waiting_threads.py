"""Threads of torch sleep while other programs use the cores, and results stay the same."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib_lightning.model import waiting_threads
from lib_lightning.model.waiting_threads import (
    SleepingThreads,
    Watch,
    considerate_threads,
    gnu_openmp,
    seconds_waited,
)

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="GNU OpenMP and its threads are those of Linux")


class Recorder:
    """Stands for threads that sleep, and notes when."""

    def __init__(self) -> None:
        self.log: list[bool] = []

    def __call__(self) -> Recorder:
        self.log.append(True)
        return self

    def stop(self) -> None:
        self.log.append(False)


def watched(shares: list[float]) -> Recorder:
    """What happens if threads wait for a core for these shares of the time between two looks."""
    interval, recorder, done = 1e-4, Recorder(), threading.Event()
    remaining: Iterator[float] = iter(shares)
    total, last = 0.0, time.perf_counter()

    def waited() -> float:
        nonlocal total, last
        now = time.perf_counter()
        share = next(remaining, None)
        if share is None:
            done.set()
            share = 0.07  # between the two limits: nothing changes
        total, last = total + share * (now - last), now
        return total

    watch = Watch(recorder, waited, interval)  # type: ignore[arg-type]
    watch.start()
    assert done.wait(10)
    watch.stop()
    return recorder


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.9]), max_size=8))
def test_threads_sleep_while_cores_are_busy_and_never_after_the_end(shares: list[float]) -> None:
    log = watched([0.0, *shares]).log
    changes = [one for one, before in zip(shares, [0.0, *shares], strict=False) if one != before]
    expected = [share > 0.5 for share in changes]
    # Each begin has its end, also when the block ends while cores are busy.
    assert log == expected + [False] * (len(expected) % 2)


@linux
def test_waiting_and_the_library_are_found() -> None:
    assert gnu_openmp() is not None
    first = seconds_waited()
    assert first is not None
    assert seconds_waited() >= first >= 0


@linux
def test_no_thread_is_left_and_torch_keeps_its_settings() -> None:
    before, tasks = torch.get_num_threads(), tasks_now()
    sleeping = SleepingThreads()
    assert tasks_now() >= tasks + 2
    sleeping.stop()
    assert torch.get_num_threads() == before
    wait_until(lambda: tasks_now() <= tasks)


def tasks_now() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.perf_counter() + 10
    while not condition():
        assert time.perf_counter() < end
        time.sleep(0.01)


def test_nothing_happens_with_one_thread_or_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting_threads, "Watch", None)
    with considerate_threads():
        pass
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(waiting_threads, "gnu_openmp", lambda: None)
    with considerate_threads():
        pass


BESIDE_OTHERS = """
import os, subprocess, sys, time
import torch
from torch import nn
from lib_lightning import compute_interaction_graph
from lib_lightning.model import waiting_threads
from lib_lightning.model.waiting_threads import Watch, considerate_threads

torch.set_num_threads(2)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 64), nn.Softmax(-1), nn.Linear(64, 64), nn.Softmax(-1), nn.Linear(64, 8))
x, layers = torch.randn(2000, 64), ["0", "2", "output"]

def snapshot():
    return compute_interaction_graph(model, [x], layers, effort="exact")

watches = []
class Noted(Watch):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        watches.append(self)
waiting_threads.Watch = Noted
os.environ["OMP_NUM_THREADS"] = "1"
others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
try:
    busy, end = snapshot(), time.time() + 60
    while not any(watch.times_busy for watch in watches) and time.time() < end:
        busy = snapshot()
finally:
    for other in others:
        other.kill()
assert any(watch.times_busy for watch in watches)
waiting_threads.gnu_openmp = lambda: None  # threads spin in any case
count = len(watches)
spinning = snapshot()
assert len(watches) == count
for name in layers:
    assert torch.equal(busy.bases[name].to_features, spinning.bases[name].to_features)
for pair in busy.edges:
    assert torch.equal(busy.edges[pair], spinning.edges[pair])
"""


@linux
def test_beside_other_programs_threads_sleep_and_results_are_the_same_to_the_last_bit() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    subprocess.run([sys.executable, "-c", BESIDE_OTHERS], env=environment, check=True, timeout=300)
