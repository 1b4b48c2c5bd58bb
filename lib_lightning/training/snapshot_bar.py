"""The progress bar of long snapshots, for trainers that show bars."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from lib_lightning.algorithm.progress_bar import ProgressDisplay

if TYPE_CHECKING:
    import lightning.pytorch as pl

# Snapshots that take fewer seconds than this have no bar.
DELAY = 5.0


class SnapshotBar:
    """Shows the progress of the snapshots of a run, below the bars of the trainer.

    Args:
        name: Name of the callback.
    """

    def __init__(self, name: str) -> None:
        self._display = ProgressDisplay(partial(_bar, desc=f"{name}: snapshot: "), f"{name}: snapshot, ")

    def of(self, trainer: pl.Trainer) -> ProgressDisplay | None:
        """Where to show a snapshot; None for nowhere, as the trainer shows no bars or this is not its first process."""
        bar: Any = trainer.progress_bar_callback
        is_shown = bar is not None and getattr(bar, "is_enabled", True) and trainer.is_global_zero
        return self._display if is_shown else None


def _bar(**options: Any) -> Any:
    # Lightning's own bars are written to the standard output; another stream would mix with them.
    return tqdm(delay=DELAY, leave=False, file=sys.stdout, **options)
