"""How much time snapshots may take, and which of those due are taken."""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from lib_lightning.distributed.process_group import ProcessGroup
from lib_lightning.errors import check_number, counted
from lib_lightning.training.frameworks import rank_zero_info
from lib_lightning.training.schedule import FEWEST

if TYPE_CHECKING:
    import lightning.pytorch as pl

# Limit of the overhead where the user has not given a schedule.
DEFAULT_MAX_OVERHEAD = 0.03
# Seconds of overhead that are allowed in any run, however short.
GRACE = 1.0
# Kind of the first snapshot, which is slower than later ones: these reuse what it has loaded and allocated. Its cost is
# kept, to estimate that of the last one, until figures over the whole run have been drawn once.
_FIRST = "first"

_Hook = TypeVar("_Hook", bound=Callable[..., Any])


def timed_hook(hook: _Hook) -> _Hook:
    """Decorate a hook of an object with a `TimeMeter` as its ``meter``: the hook's time counts as overhead."""

    @functools.wraps(hook)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.meter.timed():
            return hook(self, *args, **kwargs)

    return cast("_Hook", wrapper)


@dataclass
class TimeSpent:
    """Seconds spent in a run; plain values, so that a checkpoint can hold them.

    Attributes:
        overhead: Seconds of overhead so far.
        training: Seconds of training so far.
        last_cost: Seconds that the latest snapshot of each kind has cost.
        attempts: Number of snapshots that were computed, or failed.
        failures: Number of those that failed.
    """

    overhead: float = 0.0
    training: float = 0.0
    last_cost: dict[str, float] = field(default_factory=dict)
    attempts: int = 0
    failures: int = 0

    def add(self, seconds: float, is_overhead: bool) -> None:
        """Add seconds of overhead, or of training."""
        self.overhead += seconds * is_overhead
        self.training += seconds * (not is_overhead)

    def set_cost(self, kind: str, seconds: float) -> None:
        """Note what the latest snapshot of a kind has cost."""
        self.last_cost[kind] = seconds
        self.attempts += 1

    def forget_cost(self, kind: str) -> None:
        """Forget what the latest snapshot of a kind has cost."""
        self.last_cost.pop(kind, None)


@dataclass(frozen=True)
class Pace:
    """Progress of a run whose snapshots have been planned until the end of the training.

    Attributes:
        training: Share of the training that is over, above 0 after the first step.
        snapshots: Share of the planned snapshots that have been due so far.
        planned: Number of planned snapshots.
    """

    training: float
    snapshots: float
    planned: int

    def time_for_snapshots(self, training: float) -> tuple[float, float]:
        """Seconds of training of which the snapshots so far may take their share, and those of the whole training.

        Most of the planned snapshots are early in training, so each is allowed an equal part of the time for all of
        them, whenever it is due. Together they may be two snapshots ahead of that.

        Args:
            training: Seconds of training so far.

        Returns:
            The two numbers of seconds.
        """
        total = training / self.training if self.training > 0 else math.inf
        return min(1.0, self.snapshots + 2 / self.planned) * total, total


class TimeMeter:
    """Compares the callback's overhead with the training time, and says whether another snapshot is within a limit.

    Between `begin` and `end` all time is either overhead or training, but for the overhead of other meters; outside,
    only overhead is counted.

    Args:
        limit: Largest ratio of overhead to training time, above 0; infinity for no limit.
        clock: Returns the current time in seconds.
        spent: Time spent before, in a resumed run; updated in place.

    Example:
        >>> now = 0.0
        >>> meter = TimeMeter(0.1, clock=lambda: now)
        >>> meter.begin()
        >>> with meter.snapshot("plain"):
        ...     now += 5
        >>> meter.can_afford("plain")
        False
        >>> now += 150  # enough for this snapshot, the next one and the last one
        >>> meter.can_afford("plain"), round(meter.ratio, 3)
        (True, 0.033)
    """

    def __init__(
        self, limit: float, clock: Callable[[], float] = time.perf_counter, spent: TimeSpent | None = None
    ) -> None:
        self.limit, self.clock = limit, clock
        self.spent = TimeSpent() if spent is None else spent
        self._is_timed = self._is_training = False
        self._others: Sequence[TimeMeter] = ()
        self._last, self._last_of_others = clock(), 0.0

    def begin(self, others: Sequence[TimeMeter] = ()) -> None:
        """Training begins or resumes.

        Args:
            others: Meters of other callbacks of the trainer, whose overhead is no training.
        """
        self._settle()
        self._others = others
        self._last_of_others = self._overhead_of_others()
        self._is_training = True

    def end(self) -> None:
        """Training has ended."""
        self._settle()
        self._is_training = False

    def timed(self) -> AbstractContextManager[None]:
        """A block whose time is overhead."""
        return self._attributed(timed=True)

    def excluded(self) -> AbstractContextManager[None]:
        """A block inside a timed one whose time is not overhead, such as waiting for queued training kernels."""
        return self._attributed(timed=False)

    @contextmanager
    def snapshot(self, kind: str) -> Iterator[None]:
        """A block that computes a snapshot, or fails: its time is the expected cost of the next one of its kind."""
        with self.timed():
            before = self.spent.overhead
            try:
                yield
            finally:
                self._settle()
                self.spent.set_cost(kind, self.spent.overhead - before)

    @contextmanager
    def _attributed(self, timed: bool) -> Iterator[None]:
        self._settle()
        before, self._is_timed = self._is_timed, timed
        try:
            yield
        finally:
            self._settle()
            self._is_timed = before

    def _settle(self) -> None:
        """Attribute the time since the last call."""
        now, of_others = self.clock(), self._overhead_of_others()
        elapsed, since = now - self._last, of_others - self._last_of_others
        self._last, self._last_of_others = now, of_others
        if self._is_timed or self._is_training:
            self.spent.add(elapsed if self._is_timed else max(0.0, elapsed - since), self._is_timed)

    def _overhead_of_others(self) -> float:
        return sum(other.overhead_so_far for other in self._others)

    @property
    def overhead_so_far(self) -> float:
        """Seconds of overhead until now."""
        return self.spent.overhead + (self.clock() - self._last if self._is_timed else 0.0)

    def expected_cost(self, kind: str) -> float:
        """Expected seconds of the next snapshot of a kind; of an unknown kind, the most that any has cost so far."""
        costs = self.spent.last_cost
        return costs.get(kind, max(costs.values(), default=0.0))

    def can_afford(self, kind: str, last_factor: float = 1.0, pace: Pace | None = None) -> bool:
        """Whether there is time for a snapshot now and for the last one, which is always taken.

        Args:
            kind: Kind of the snapshot. Those that include more, and so cost more, are of kinds of their own.
            last_factor: Cost of the last snapshot relative to the most expensive one so far.
            pace: How far the run is, if its snapshots have been planned; None if no more than the limit may be spent at
                any time.

        Returns:
            Whether both stay within the limit. The first snapshot is always affordable.
        """
        self._settle()
        if not self.spent.last_cost or self.limit == math.inf:
            return True
        now = self.spent.overhead + self.expected_cost(kind)
        with_last = now + last_factor * max(self.spent.last_cost.values())
        if pace is None:
            return with_last <= max(GRACE, self.limit * self.spent.training)
        until_now, total = pace.time_for_snapshots(self.spent.training)
        return now <= max(GRACE, self.limit * until_now) and with_last <= max(GRACE, self.limit * total)

    @property
    def ratio(self) -> float:
        """Overhead so far divided by training time so far; NaN before any training."""
        self._settle()
        return self.spent.overhead / self.spent.training if self.spent.training > 0 else math.nan

    @property
    def text(self) -> str:
        """What has been spent, in words: ``took 3 s, beside 120 s of training (2.50%)``."""
        took = f"took {self.spent.overhead:.3g} s"
        if not self.spent.training > 0:
            return took
        # In a training of seconds, this would be a share of hundreds of percent.
        share = f" ({self.ratio:.2%})" if self.ratio < 1 else ""
        return f"{took}, beside {self.spent.training:.3g} s of training{share}"


def other_meters(trainer: pl.Trainer, own: Any) -> list[TimeMeter]:
    """The meters of all other callbacks of a trainer that have one.

    Args:
        trainer: The trainer.
        own: The callback whose meter is left out.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    meters = (getattr(callback, "meter", None) for callback in callbacks if callback is not own)
    return [meter for meter in meters if isinstance(meter, TimeMeter)]


@dataclass
class SkippedSnapshots:
    """Snapshots that were due and were skipped; plain values, so that a checkpoint can hold them.

    Attributes:
        total: Number of them in the run.
        since_last: Number of them since the latest snapshot.
        last_step: Step of the latest one; None if there was none.
    """

    total: int = 0
    since_last: int = 0
    last_step: int | None = None

    def add(self, step: int) -> None:
        """Count the snapshot due at a step as skipped."""
        self.total, self.since_last, self.last_step = self.total + 1, self.since_last + 1, step

    def retract(self, step: int) -> None:
        """The snapshot of a step is taken after all."""
        if self.last_step == step:
            self.total, self.since_last, self.last_step = self.total - 1, self.since_last - 1, None

    def start_interval(self) -> None:
        """A snapshot has been taken: count those skipped since it."""
        self.since_last = 0


@dataclass(frozen=True)
class SnapshotKind:
    """What the next snapshot includes besides the graphs, as far as it decides its cost.

    Attributes:
        ablation: Whether edges required are counted.
        figures: Whether figures over the whole run are drawn.
        causal: Whether the features that matter are counted.
    """

    ablation: bool = False
    figures: bool = False
    causal: bool = False


class SnapshotTrigger:
    """Decides which of the due snapshots are taken, so that their cost stays within a share of the training time.

    It only ever skips snapshots: what a snapshot computes is the same from the first to the last of a run.

    Args:
        meter: Measures overhead and training time.
        skipped: What was skipped before, in a resumed run; updated in place.
        name: Name of the callback, for messages.
        draws_over_time: Whether the last snapshot draws figures over the whole run, which take as long as the rest.
        counts_at_end: Whether the last one alone counts features that matter, which takes as long as a graph.
    """

    def __init__(
        self,
        meter: TimeMeter,
        skipped: SkippedSnapshots,
        name: str,
        draws_over_time: bool,
        counts_at_end: bool = False,
    ) -> None:
        self.meter, self.skipped = meter, skipped
        self._name, self._draws_over_time, self._counts_at_end = name, draws_over_time, counts_at_end

    def can_take(
        self,
        step: int,
        kind: SnapshotKind,
        process_group: ProcessGroup,
        pace: Pace | None = None,
        has_fewest: bool = False,
    ) -> bool:
        """Decide whether a due snapshot is taken; process 0 decides for all. If not, count it as skipped.

        Args:
            step: Number of optimizer steps so far.
            kind: What the snapshot includes.
            process_group: The processes of the run.
            pace: How far the run is, if its snapshots have been planned.
            has_fewest: Whether at least `FEWEST` of the planned snapshots are taken, whatever they cost.

        Returns:
            Whether to take it.
        """
        if step == self.skipped.last_step:  # already skipped: it is due twice, as after a change and at a validation
            return False
        if pace is not None and has_fewest and self.meter.spent.attempts < 1 + int((FEWEST - 1) * pace.snapshots):
            return True
        last_factor = 2.0 if self._draws_over_time and _FIRST in self.meter.spent.last_cost else 1.0
        last_factor += self._counts_at_end
        affordable = torch.tensor(self.meter.can_afford(self._cost_key(kind), last_factor, pace), device="cpu")
        (affordable,) = process_group.broadcast([affordable])
        if not affordable:
            if not self.skipped.total:
                self._explain_skipping(step, kind, pace is not None and has_fewest)
            self.skipped.add(step)
        return bool(affordable)

    @contextmanager
    def measure(self, step: int, kind: SnapshotKind) -> Iterator[None]:
        """A block in which a snapshot is computed, or fails.

        Args:
            step: Number of optimizer steps so far.
            kind: What the snapshot includes.

        Yields:
            Nothing.
        """
        self.skipped.retract(step)  # skipped at first, but now taken as the last one of the run
        with self.meter.snapshot(self._cost_key(kind)), no_garbage_collection():
            yield

    def on_result(self, kind: SnapshotKind, succeeded: bool) -> None:
        """A snapshot was taken, and the next interval begins; or it has failed."""
        self.meter.spent.failures += not succeeded
        if succeeded:
            self.skipped.start_interval()
            if kind.figures:
                self.meter.spent.forget_cost(_FIRST)

    def _cost_key(self, kind: SnapshotKind) -> str:
        if not kind.ablation and not kind.causal and not self.meter.spent.last_cost:
            return _FIRST
        name = "ablation" if kind.ablation else "plain"
        return name + ", causal" * kind.causal + ", with figures" * kind.figures

    def _explain_skipping(self, step: int, kind: SnapshotKind, has_fewest: bool) -> None:
        limit, cost = self.meter.limit, self.meter.expected_cost(self._cost_key(kind))
        spent = self.meter.spent
        fewest = f" (but {FEWEST} at least in the whole training)" if has_fewest else ""
        rank_zero_info(
            f"{self._name}: the snapshot due at step {step:,} is skipped, as are later ones that would exceed "
            f"max_overhead={limit:g}. A snapshot takes {cost:.3g} s, so one is allowed every {cost / limit:.3g} s of "
            f"training{fewest}; so far it is {spent.overhead:.3g} s beside {spent.training:.3g} s. Raise "
            "max_overhead of LIBCallback for more snapshots (inf for all)."
        )

    def log_summary(self, snapshots: int) -> None:
        """Log what a run has cost, once training has ended.

        Args:
            snapshots: Number of its snapshots.
        """
        spent, skipped = self.meter.spent, self.skipped.total
        text = f"{counted(snapshots, 'snapshot')} and all that belongs to them {self.meter.text}"
        if skipped:
            were = "was" if skipped == 1 else "were"
            text += f"; {skipped:,} {were} skipped to stay below max_overhead={self.meter.limit:g}"
        if spent.failures:
            text += f"; {spent.failures:,} failed"
        if math.isinf(self.meter.limit) and spent.training > 0 and self.meter.ratio > DEFAULT_MAX_OVERHEAD:
            text += f"; nothing limits this here, max_overhead={DEFAULT_MAX_OVERHEAD} would"
        rank_zero_info(f"{self._name}: {text}")


def max_overhead_of(max_overhead: float | None, is_explicit: bool) -> float:
    """The limit of the overhead for the user's settings.

    Args:
        max_overhead: Ratio of overhead to training time; None for the default.
        is_explicit: Whether the user has given a schedule, which then is kept without a limit by default.

    Returns:
        The limit, infinity for none.

    Raises:
        SettingError: If it is not above 0.

    Example:
        >>> max_overhead_of(None, is_explicit=False), max_overhead_of(None, is_explicit=True)
        (0.03, inf)
    """
    if max_overhead is None:
        return math.inf if is_explicit else DEFAULT_MAX_OVERHEAD
    check_number("max_overhead", max_overhead, lambda x: x > 0, "is a share of the training time above 0, such as 0.03")
    return float(max_overhead)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A block without automatic garbage collection.

    Figures create so many objects that they would trigger a collection, which goes through all objects of torch and
    takes 0.25 s.

    Yields:
        Nothing.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
