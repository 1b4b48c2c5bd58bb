"""What own work costs beside the training that it watches, and whether more of it can be afforded."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Seconds of own work that any run can afford: so short a run is not held to account.
GRACE = 1.0


class TimeMeter:
    """Measures own work against training, and keeps its share below a limit over the whole run.

    All time from `begin` to `end` is either own work or training; before and after, only own work counts.

    Args:
        limit: Largest ratio of the time of own work to that of training, above 0; infinity for any.
        clock: Tells the time, in seconds.

    Attributes:
        cost: Seconds of own work so far, when last asked.
        training: Seconds of training so far, when last asked.
        newest: Seconds that the newest snapshot of each kind has cost.

    Example:
        >>> now = 0.0
        >>> overhead = TimeMeter(0.1, clock=lambda: now)
        >>> overhead.begin()
        >>> with overhead.snapshot("plain"):
        ...     now += 5
        >>> overhead.affordable("plain")
        False
        >>> now += 150  # for it, the next one, and the last one
        >>> overhead.affordable("plain"), round(overhead.share, 3)
        (True, 0.033)
    """

    def __init__(self, limit: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self.limit, self.clock = limit, clock
        self.reset()

    def reset(self) -> None:
        """Start from nothing, before training."""
        self.cost = self.training = 0.0
        self.newest: dict[str, float] = {}
        self._own = self._running = False
        self._once = 0.0
        self._seen = self.clock()

    def begin(self) -> None:
        """Training begins, or goes on."""
        self._settle()
        self._running = True

    def end(self) -> None:
        """Training has ended."""
        self._settle()
        self._running = False

    @contextmanager
    def own(self) -> Iterator[None]:
        """A block of own work."""
        with self._charged_to(own=True):
            yield

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block, within own work, that only waits for what training has begun."""
        with self._charged_to(own=False):
            yield

    @contextmanager
    def snapshot(self, kind: str) -> Iterator[None]:
        """A block of own work that is a snapshot, for better or worse: what it costs, the next one of its kind will."""
        with self.own():
            before, self._once = self.cost, 0.0
            try:
                yield
            finally:
                self._settle()
                self.newest[kind] = self.cost - before - self._once

    @property
    def spent(self) -> float:
        """Seconds of own work so far."""
        self._settle()
        return self.cost

    def not_again(self, seconds: float) -> None:
        """Of the snapshot under way, so many seconds of own work are not what the next one will cost."""
        self._once += seconds

    @contextmanager
    def _charged_to(self, own: bool) -> Iterator[None]:
        self._settle()
        before, self._own = self._own, own
        try:
            yield
        finally:
            self._settle()
            self._own = before

    def _settle(self) -> None:
        """Charge the time since the last call to whom it belongs."""
        now = self.clock()
        passed, self._seen = now - self._seen, now
        if self._own:
            self.cost += passed
        elif self._running:
            self.training += passed

    def expected(self, kind: str) -> float:
        """Seconds that the next snapshot of a kind will cost, by the newest one; of an unknown kind, the dearest."""
        return self.newest.get(kind, max(self.newest.values(), default=0.0))

    def expect(self, factor: float) -> None:
        """From here on snapshots will cost so many times what they did."""
        self.newest = {kind: factor * seconds for kind, seconds in self.newest.items()}

    def affordable(self, kind: str, at_the_end: float = 1.0) -> bool:
        """Tell whether there is time for a snapshot now, and will be for the last one, which comes without asking.

        Args:
            kind: Its kind. One that costs more now and then, and at the end, is a kind of its own.
            at_the_end: What the last one costs beside the dearest so far.

        Returns:
            Whether both are within the limit; the first snapshot of all is always affordable.
        """
        self._settle()
        if not self.newest or self.limit == math.inf:
            return True
        wanted = self.expected(kind) + at_the_end * max(self.newest.values())
        return self.cost + wanted <= max(GRACE, self.limit * self.training)

    @property
    def share(self) -> float:
        """Time of own work so far over that of training; NaN before any training."""
        self._settle()
        return self.cost / self.training if self.training > 0 else math.nan

    def state_dict(self) -> dict[str, Any]:
        """State to go on from, of plain numbers."""
        self._settle()
        return {"cost": self.cost, "training": self.training, "newest": dict(self.newest)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; the time until then has not passed."""
        self._settle()
        self.cost, self.training, self.newest = state["cost"], state["training"], dict(state["newest"])


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """A block in which Python does not look for garbage.

    Figures make so many objects that it would go through all of torch's for it: a quarter of a second.

    Yields:
        Nothing.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
