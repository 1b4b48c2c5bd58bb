"""The time that snapshots of a run may take, and which of those due are taken."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from lib_lightning.distributed.process_group import ProcessGroup
from lib_lightning.training.run_extent import Extent
from lib_lightning.training.sample_buffer import SampleBuffer
from lib_lightning.training.schedule import Schedule
from lib_lightning.training.snapshot import Snapshot, SnapshotComputer
from lib_lightning.training.time_meter import TimeMeter, no_garbage_collection
from lib_lightning.training.trainer import synchronize

# The share of snapshots that come with every validation because nobody has said otherwise.
DEFAULT = 0.03
# The first snapshot warms everything up. What it costs stands for what the last one will, which draws a spectrum, until
# figures of the whole run have been drawn.
_FIRST = "first"

_Hook = TypeVar("_Hook", bound=Callable[..., Any])


def timed_hook(hook: _Hook) -> _Hook:
    """A method of something with a `SnapshotTrigger` as its ``budget``, whose time counts as own work."""

    @functools.wraps(hook)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.budget.overhead.own():
            return hook(self, *args, **kwargs)

    return cast("_Hook", wrapper)


class SnapshotTrigger:
    """Keeps the cost of one run's snapshots within a share of its training time, and says what that takes.

    Args:
        max_overhead: The share; infinity for no limit, None for `DEFAULT` unless the user has given a schedule.
        schedule: When snapshots are due.
        watcher: What takes them.
        num_samples: Samples asked for.

    Attributes:
        overhead: What has been spent.
        extent: What snapshots are computed on.
        put_off: Number of snapshots that were due and have been left out.
        left_out: Number of those since the newest snapshot.

    Raises:
        ValueError: If the share is not above 0.
    """

    def __init__(
        self, max_overhead: float | None, schedule: Schedule, watcher: SnapshotComputer, num_samples: int
    ) -> None:
        if max_overhead is None:
            max_overhead = math.inf if schedule.given else DEFAULT
        if not max_overhead > 0:
            raise ValueError(f"max_overhead is a share of the training time above 0, as 0.03 is; got {max_overhead}.")
        self.overhead = TimeMeter(float(max_overhead))
        self._watcher = watcher
        self.extent = Extent(self.overhead, schedule, watcher)
        self._asked = [self.overhead.limit, num_samples, watcher.watched.settings.n_probes]
        self.reset()

    def reset(self) -> None:
        """Forget the run before."""
        self.overhead.reset()
        self.extent.reset()
        self.put_off = self.left_out = 0
        self._put_off_at: int | None = None
        self._from: int | None = None

    def begin(self, step: int) -> None:
        """Training begins, or goes on, after so many optimizer steps."""
        self.overhead.begin()
        self._from = step if self._from is None else self._from

    def allows(self, step: int, samples: SampleBuffer, process_group: ProcessGroup) -> bool:
        """Tell whether a snapshot that is due is to be taken; all processes have to ask together.

        Args:
            step: Number of optimizer steps so far.
            samples: The samples of this process.
            process_group: The processes, of which the first one's time counts.

        Returns:
            Whether it can be afforded.
        """
        if self.overhead.limit == math.inf:
            return True
        if step == self._put_off_at:
            return False
        # Figures over time, where they come for the first time at the end, take as long as all the rest.
        figures = self._watcher.watched.follow and _FIRST in self.overhead.newest
        affordable = self.overhead.affordable(self._kind(False), at_the_end=2.0 if figures else 1.0)
        choice, cost = self.extent.choice, self.overhead.expected(self._kind(False))
        if samples.complete and (self.extent.on_trial or not affordable):
            choice = self.extent.choose(self._steps(step), cost)
        (answer,) = process_group.broadcast([torch.tensor([affordable, *choice], dtype=torch.float64)])
        affordable = bool(answer[0])
        self.extent.go_on_with(float(answer[1]), int(answer[2]), cost)
        if not affordable:
            if not self.put_off:
                self._say_put_off(step)
            self.put_off, self.left_out, self._put_off_at = self.put_off + 1, self.left_out + 1, step
        return affordable

    def take(
        self, take: Callable[[], Snapshot], step: int, samples: SampleBuffer, process_group: ProcessGroup
    ) -> Snapshot:
        """Take a snapshot; the first one on as many samples as there is time for.

        Args:
            take: Takes it, on the part of each process's samples that `extent` says.
            step: Number of optimizer steps so far.
            samples: The samples of this process.
            process_group: The processes, of which the first one's time counts.

        Returns:
            The snapshot.
        """
        if self.overhead.newest or self.overhead.limit == math.inf or not samples.complete:
            return take()
        return self.extent.try_first(take, self._steps(step), samples, process_group)

    def _steps(self, step: int) -> int:
        """Optimizer steps since training began."""
        return 0 if self._from is None else step - self._from

    def _kind(self, last: bool) -> str:
        if self._watcher.ablates(last):
            kind = "ablation"
        elif self.overhead.newest:
            kind = "plain"
        else:
            return _FIRST
        return f"{kind}, with figures" if self._watcher.draws(last) else kind

    def _say_put_off(self, step: int) -> None:
        limit, cost = self.overhead.limit, self.overhead.expected(self._kind(False))
        rank_zero_info(
            f"{self._watcher.name}: the snapshot due after {step:,} steps is put off. One costs {cost:.3g} s, and "
            f"max_overhead={limit:g} allows one in {cost / limit:.3g} s of training; {self.overhead.cost:.3g} s have "
            f"been spent in {self.overhead.training:.3g} s. Those due too early are left out from here on; "
            "max_overhead= of LIBCallback is the share of the training time that all may cost, inf for any."
        )

    @contextmanager
    def snapshot(self, trainer: pl.Trainer, last: bool) -> Iterator[None]:
        """A block in which a snapshot is taken, or fails.

        Args:
            trainer: The trainer.
            last: Whether it is the last one of the run.

        Yields:
            Nothing.
        """
        with self.overhead.waiting():
            synchronize(trainer)
        with self.overhead.snapshot(self._kind(last)), no_garbage_collection():
            if self._put_off_at == trainer.global_step:  # and is taken after all, as the last one
                self.put_off, self.left_out = self.put_off - 1, self.left_out - 1
            before, draws = self._watcher.snapshots, self._watcher.draws(last)
            yield
            if self._watcher.snapshots > before:
                self.left_out = 0
                if draws:
                    self.overhead.newest.pop(_FIRST, None)

    def numbers(self, trainer: pl.Trainer, process_group: ProcessGroup) -> dict[str, float]:
        """Share of the training time so far, of process 0, by name; nothing where there is no training.

        Args:
            trainer: The trainer.
            process_group: Its processes, which have to ask together.

        Returns:
            What is to be logged.
        """
        if trainer.state.fn != "fit":
            return {}
        (share,) = process_group.broadcast([torch.tensor(self.overhead.share, dtype=torch.float64)])
        return {f"{self._watcher.name}/overhead": float(share)}

    def finish(self) -> None:
        """Training has ended: say what the share was."""
        self.overhead.end()
        cost, training = self.overhead.cost, self.overhead.training
        limit = "" if self.overhead.limit == math.inf else f", max_overhead={self.overhead.limit:g}"
        rank_zero_info(
            f"{self._watcher.name}: overhead {self.overhead.share:.2%} of the training time ({cost:.3g} s of "
            f"{training:.3g} s{limit}); snapshots put off: {self.put_off:,}"
        )

    def state_dict(self) -> dict[str, Any]:
        """State to go on from, of plain numbers."""
        return {
            "overhead": self.overhead.state_dict(), "extent": self.extent.state_dict(), "asked": list(self._asked),
            "put_off": [self.put_off, self.left_out, self._put_off_at], "from": self._from,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; what was chosen stays unless something else is asked for now."""
        self.overhead.load_state_dict(state["overhead"])
        self.put_off, self.left_out, self._put_off_at = state["put_off"]
        self._from = state["from"]
        if state["asked"] == self._asked:
            self.extent.load_state_dict(state["extent"])
