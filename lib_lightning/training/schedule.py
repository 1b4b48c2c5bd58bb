"""When snapshots are due."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lib_lightning.errors import SettingError, SettingTypeError, check_number, counted

# Snapshots of a run without a schedule of the user's, if there is time for them; and at least: two points are no film.
MOST, FEWEST = 20, 5
# The first of them after step 0 is at this share of the training at the earliest, and each is at most this many times
# as late as the one before.
_EARLIEST, _LARGEST_RATIO = 1 / 1000, 3.0
# After a change, snapshots are taken this many times as often, for this many snapshots.
_DENSER, _N_DENSER = 4, 8


def log_spaced_steps(snapshots: int, last: int) -> list[int]:
    """Steps of a given number of snapshots: 0, and then evenly on a logarithmic axis until the end of the training.

    Args:
        snapshots: Number of snapshots, at least 2.
        last: Step at which training ends.

    Returns:
        That many different steps, ascending, from 0 to ``last``; all steps if there are fewer.

    Example:
        >>> log_spaced_steps(5, 1000)
        [0, 37, 111, 333, 1000]
        >>> log_spaced_steps(20, 1000)
        [0, 1, 2, 3, 4, 6, 9, 13, 19, 27, 39, 56, 80, 115, 165, 237, 340, 487, 698, 1000]
        >>> log_spaced_steps(20, 3)
        [0, 1, 2, 3]
    """
    ratio = min(_LARGEST_RATIO, (1 / _EARLIEST) ** (1 / max(1, snapshots - 2)))
    steps = [0]
    for later in range(snapshots - 2, -1, -1):
        # What is left of the axis is divided anew each time, as steps at the beginning are rounded up.
        due = last / ratio**later if steps[-1] == 0 else steps[-1] * (last / steps[-1]) ** (1 / (later + 1))
        steps.append(min(last, max(steps[-1] + 1, round(due))))
    return sorted(set(steps))


class Schedule:
    """The options that say when snapshots are due.

    Args:
        every_n_validations: A snapshot at the first validation and at every n-th one after it.
        every_n_steps: A snapshot before training and after every n optimizer steps.
        at_steps: A snapshot after each of these numbers of optimizer steps; 0 is before training.
        log_spaced: A snapshot before training, then this many per tenfold increase of the step, evenly spaced on a
            logarithmic axis.

    Attributes:
        is_explicit: Whether one of the options was given. Without any, a snapshot is due before training and at every
            validation, or, once `ScheduleCursor.plan` has been called, at the steps that were planned.

    Raises:
        SettingError: If several options are given, or a number is out of range.

    Example:
        >>> cursor = Schedule(at_steps=[0, 10]).start()
        >>> [step for step in range(0, 20, 3) if cursor.due_at_step(step)]
        [0, 12]
    """

    def __init__(
        self,
        every_n_validations: int | None = None,
        every_n_steps: int | None = None,
        at_steps: Sequence[int] | None = None,
        log_spaced: int | None = None,
    ) -> None:
        for name, value in (
            ("every_n_validations", every_n_validations),
            ("every_n_steps", every_n_steps),
            ("log_spaced", log_spaced),
        ):
            if value is not None:
                check_number(name, value, lambda n: n >= 1, "must be at least 1", integer=True)
        if at_steps is not None and (isinstance(at_steps, (str, bytes)) or not isinstance(at_steps, Iterable)):
            raise SettingTypeError(f"at_steps must be a list of numbers of steps, such as [0, 100]; got {at_steps!r}.")
        for step in () if at_steps is None else at_steps:
            check_number("at_steps", step, lambda n: n >= 0, "must be at least 0", integer=True)
        # int() accepts NumPy's numbers, which a checkpoint could not be loaded with.
        at_steps = None if at_steps is None else [int(step) for step in at_steps]
        every_n_validations, every_n_steps, log_spaced = (
            None if number is None else int(number) for number in (every_n_validations, every_n_steps, log_spaced)
        )
        self.options: dict[str, Any] = {
            "every_n_validations": every_n_validations,
            "every_n_steps": every_n_steps,
            "at_steps": at_steps,
            "log_spaced": log_spaced,
        }
        given = {name: value for name, value in self.options.items() if value is not None}
        if len(given) > 1:
            raise SettingError(f"Give one schedule, not {len(given)}: {', '.join(given)}.")
        self.is_explicit = bool(given)
        self.every_n_validations = every_n_validations if given else 1
        self.every_n_steps = every_n_steps
        self.at_steps = None if at_steps is None else sorted(at_steps)
        self.log_spaced = log_spaced

    def next_step_after(self, step: int) -> int | None:
        """The first step after ``step`` at which a snapshot is due; None if none is due by steps."""
        if self.every_n_steps:
            return (step // self.every_n_steps + 1) * self.every_n_steps
        if self.at_steps is not None:
            return next((due for due in self.at_steps if due > step), None)
        if self.log_spaced is None:
            return 0 if step < 0 and not self.is_explicit else None
        if step < 1:
            return step + 1
        k = math.floor(self.log_spaced * math.log10(step))
        while (due := round(10 ** (k / self.log_spaced))) <= step:
            k += 1
        return due

    def count(self, validations: float, steps: float) -> float:
        """About how many snapshots a training has, with the one at its end.

        Args:
            validations: Number of validations of the training; may be infinite.
            steps: Number of its optimizer steps; may be infinite.

        Returns:
            The number of snapshots; infinite if unknown.

        Example:
            >>> Schedule(every_n_validations=2).count(10, 1000), Schedule(at_steps=[0, 10, 5000]).count(10, 1000)
            (5, 3)
            >>> Schedule(log_spaced=10).count(10, 1000)
            29
        """
        if self.every_n_validations:
            found = validations / self.every_n_validations + (not self.is_explicit)
        elif not math.isfinite(steps):
            found = steps if self.at_steps is None else len(set(self.at_steps))
        elif self.every_n_steps:
            found = 1 + steps / self.every_n_steps
        else:
            due, step = {steps}, self.next_step_after(-1)
            while step is not None and step <= steps:
                due.add(step)
                step = self.next_step_after(step)
            found = len(due)
        return math.ceil(found - 1e-6) if math.isfinite(found) else found

    def __str__(self) -> str:
        if self.every_n_steps:
            return f"before training and every {counted(self.every_n_steps, 'step')}"
        if self.at_steps is not None:
            return f"at the {counted(len(self.at_steps), 'step')} given and at the end"
        if self.log_spaced:
            return f"before training and {self.log_spaced:,} per tenfold increase of the step"
        n = self.every_n_validations or 1
        validation = "at every validation" if n == 1 else f"at the first of every {n:,} validations"
        return validation if self.is_explicit else f"before training and {validation}"

    def start(self, position: Mapping[str, Any] | None = None) -> ScheduleCursor:
        """Start a run, or continue one.

        Args:
            position: `ScheduleCursor.position` of the interrupted run; None at the beginning. Steps that were due
                under another schedule are dropped.

        Returns:
            A cursor that says at each step whether a snapshot is due.
        """
        if position is None:
            return ScheduleCursor(self, next_step=self.next_step_after(-1))
        fields = {name: value for name, value in position.items() if name != "options"}
        if position["options"] != self.options:
            fields |= {"next_step": self.next_step_after(fields["step"]), "planned": []}
        return ScheduleCursor(self, **fields)


@dataclass
class ScheduleCursor:
    """Says after each validation and after each optimizer step whether a snapshot is due.

    A snapshot is due *from* its step on, since steps can be passed without being asked about, such as under gradient
    accumulation.

    Attributes:
        schedule: The schedule.
        validations: Number of validations so far.
        step: Optimizer step at which the cursor was last asked; -1 before the first time.
        next_step: Step from which the next snapshot is due; None if none is due by steps.
        regular: Steps of the two latest regular snapshots that were due.
        extra: Steps of additional snapshots still to come, after a change.
        extra_interval: Steps between these.
        planned: Steps at which snapshots are due, ascending; empty as long as they have not been planned.
        dense_from: Step at which the current denser phase began.
        dense_until: Step at which it ends; -1 if there was none yet.
    """

    schedule: Schedule
    validations: int = 0
    step: int = -1
    next_step: int | None = None
    regular: list[int] = field(default_factory=list)
    extra: list[int] = field(default_factory=list)
    planned: list[int] = field(default_factory=list)
    extra_interval: int = 0
    dense_from: int = 0
    dense_until: int = -1

    @property
    def position(self) -> dict[str, Any]:
        """The state as plain values, for a checkpoint."""
        position = {k: list(v) if isinstance(v, list) else v for k, v in vars(self).items() if k != "schedule"}
        options = {k: list(v) if isinstance(v, list) else v for k, v in self.schedule.options.items()}
        return {"options": options, **position}

    def plan(self, snapshots: int, last: int) -> None:
        """Plan the steps of the snapshots, now that the length of the training is known.

        Only without a schedule of the user's. A training that goes on beyond its end has snapshots at the same ratios.

        Args:
            snapshots: Number of snapshots.
            last: Step at which training ends.

        Example:
            >>> cursor = Schedule().start()
            >>> cursor.plan(5, 100)
            >>> [step for step in range(700) if cursor.due_at_step(step)]
            [0, 4, 12, 35, 100, 286]
        """
        self.planned = log_spaced_steps(snapshots, last)
        self.next_step = self._next_step_after(self.step)

    def share_due(self, step: int) -> float | None:
        """Share of the planned snapshots that are due until a step, itself included; None without a plan."""
        return sum(due <= step for due in self.planned) / len(self.planned) if self.planned else None

    def _next_step_after(self, step: int) -> int | None:
        if not self.planned:
            return self.schedule.next_step_after(step)
        due = next((due for due in self.planned if due > step), None)
        if due is None:
            *_, before, due = [1, *self.planned]
            ratio = max(due / max(before, 1), 1.1)
            while due <= step:
                due = max(due + 1, round(due * ratio))
        return due

    def due_at_validation(self, step: int) -> bool:
        """Count a validation after ``step`` optimizer steps, and say whether a snapshot is due at it."""
        every = None if self.planned else self.schedule.every_n_validations
        due = every is not None and self.validations % every == 0
        self.validations += 1
        if due:
            self.regular = [*self.regular[-1:], step]
        return due

    def due_at_step(self, step: int) -> bool:
        """Say whether a snapshot is due after ``step`` optimizer steps; if so, move on to the next."""
        self.step = step
        if self.next_step is None and not self.extra:  # the usual case, and this runs after every training step
            return False
        due = self.next_step is not None and step >= self.next_step
        if due:
            self.next_step = self._next_step_after(step)
            self.regular = [*self.regular[-1:], step]
        remaining = [extra for extra in self.extra if extra > step]
        due = due or len(remaining) < len(self.extra)
        self.extra = remaining
        return due

    def densify(self, step: int) -> None:
        """Take snapshots four times as often for a while, in addition to the regular ones.

        Args:
            step: Number of optimizer steps so far.

        Example:
            >>> cursor = Schedule(every_n_steps=100).start()
            >>> [step for step in range(201) if cursor.due_at_step(step)]
            [0, 100, 200]
            >>> cursor.densify(200)
            >>> [step for step in range(201, 601) if cursor.due_at_step(step)]
            [225, 250, 275, 300, 325, 350, 375, 400, 500, 600]
        """
        if len(self.regular) == 2:
            self.extra_interval = max(1, (self.regular[1] - self.regular[0]) // _DENSER)
            self.dense_from = step if step > self.dense_until else self.dense_from
            self.extra = [step + self.extra_interval * k for k in range(1, _N_DENSER + 1)]
            self.dense_until = self.extra[-1]

    def relative_interval(self, before: int | None, step: int, n_skipped: int = 0) -> float:
        """How far apart two consecutive snapshots are, in units of the regular interval.

        Args:
            before: Step of the earlier snapshot; None if there is none.
            step: Step of the later one.
            n_skipped: Number of due snapshots between them that were skipped.

        Returns:
            1 for regular neighbours, less in a denser phase, more where snapshots were skipped.

        Example:
            >>> cursor = Schedule(every_n_steps=100).start()
            >>> due = [cursor.due_at_step(step) for step in (0, 100)]
            >>> cursor.densify(100)
            >>> cursor.relative_interval(0, 100), cursor.relative_interval(100, 125)
            (1.0, 0.25)
            >>> Schedule(every_n_steps=100).start().relative_interval(0, 300, n_skipped=2)
            3.0
        """
        if before is None:
            return 1.0
        longest = 1.0 + n_skipped
        if not self.dense_from <= before < self.dense_until:
            return longest
        return min(longest, (step - before) / (_DENSER * self.extra_interval))
