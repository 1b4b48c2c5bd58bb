"""The progress bar of long snapshots, for trainers that show bars."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import MutableMapping
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from lib_lightning.algorithm.progress_bar import ProgressDisplay

if TYPE_CHECKING:
    import lightning.pytorch as pl

# Snapshots that take fewer seconds than this have no bar.
DELAY = 5.0
# Rich's bars count whole numbers.
_PERCENT = 100


class SnapshotBar:
    """Shows the progress of the snapshots of a run, below the bars of the trainer.

    Args:
        name: Name of the callback.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        # The task among the bars of a RichProgressBar. It is hidden between snapshots and not removed: Lightning finds
        # its own tasks by their place in the list.
        self._task_of: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def of(self, trainer: pl.Trainer) -> ProgressDisplay | None:
        """Where to show a snapshot; None for nowhere, as the trainer shows no bars or this is not its first process."""
        bar: Any = trainer.progress_bar_callback
        if bar is None or not getattr(bar, "is_enabled", True) or not trainer.is_global_zero:
            return None
        prefix = f"{self._name}: snapshot, "
        progress = getattr(bar, "progress", None)
        if progress is not None and progress.live.is_started:  # of a RichProgressBar
            return ProgressDisplay(partial(_RichBar, progress, self._task_of), prefix)
        return ProgressDisplay(partial(_tqdm, desc=f"{self._name}: snapshot: "), prefix)


def _tqdm(**options: Any) -> Any:
    # Lightning's own bars are written to the standard output; another stream would mix with them.
    return tqdm(delay=DELAY, leave=False, file=sys.stdout, **options)


class _RichBar:
    """A bar among those of a RichProgressBar, as far as a `ProgressDisplay` needs one.

    Args:
        progress: The trainer's bars, of class `rich.progress.Progress`.
        task_of: The task of earlier snapshots, by bars; updated.
        total: Where the bar ends.
        options: Other options of tqdm, which have no meaning here.

    Attributes:
        n: How far the bar is.
    """

    def __init__(self, progress: Any, task_of: MutableMapping[Any, Any], total: float, **options: Any) -> None:
        self._progress, self._task_of, self._total = progress, task_of, total
        self._started = time.monotonic()
        self._description = ""
        self._task: Any = None  # as long as the delay lasts
        self.n = 0.0

    def __enter__(self) -> _RichBar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._progress.update(self._task, visible=False, refresh=True)

    def set_description(self, description: str, refresh: bool = True) -> None:
        """Set the text beside the bar."""
        self._description = description

    def update(self, n: float) -> None:
        """Move the bar on."""
        self.n += n
        if self._task is None:
            waiting = time.monotonic() - self._started
            if waiting < DELAY:
                return
            self._task = self._task_of.get(self._progress)
            if self._task is None:
                self._task = self._task_of[self._progress] = self._progress.add_task(self._description, total=_PERCENT)
            self._progress.reset(self._task, total=_PERCENT, visible=True)
            # For the rate, and so for the remaining time.
            (task,) = (one for one in self._progress.tasks if one.id == self._task)
            task.start_time -= waiting
        self._progress.update(
            self._task, completed=round(_PERCENT * self.n / self._total), description=self._description
        )
