"""Events of features against logged scalars: how long before or after the steepest change of a scalar they come."""

from lib_lightning.alignment.alignment import AlignedRun, EventAlignment, align_events
from lib_lightning.alignment.offsets import KindOffsets
from lib_lightning.alignment.steepest import SteepestChange, steepest_change

__all__ = ["AlignedRun", "EventAlignment", "KindOffsets", "SteepestChange", "align_events", "steepest_change"]
