"""When the next snapshot is due."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# After an event snapshots come so many times as often, for so many snapshots.
_DENSER, _FOR = 4, 8


class Schedule:
    """Decides after each validation and after each training step whether a snapshot is due.

    A step counts as due from its number on, not only exactly there, because steps can be passed over unseen.

    Args:
        every_n_validations: A snapshot at the first validation and every so many after it.
        every_n_steps: A snapshot before training and every so many optimizer steps.
        at_steps: A snapshot after each of these numbers of optimizer steps; 0 is before training.
        per_decade: A snapshot before training and so many for each tenfold of the number of steps, evenly spaced on a
            logarithmic axis.

    Attributes:
        given: Whether one of them was given; without any, a snapshot is due at every validation.

    Raises:
        ValueError: If several are given, or a number is out of range.

    Example:
        >>> schedule = Schedule(at_steps=[0, 10])
        >>> [step for step in range(0, 20, 3) if schedule.due_at_step(step)]
        [0, 12]
    """

    def __init__(
        self,
        every_n_validations: int | None = None,
        every_n_steps: int | None = None,
        at_steps: Sequence[int] | None = None,
        per_decade: int | None = None,
    ) -> None:
        # Numbers of any kind, NumPy's too; they end up in checkpoints.
        at_steps = None if at_steps is None else [int(step) for step in at_steps]
        every_n_validations, every_n_steps, per_decade = (
            None if number is None else int(number) for number in (every_n_validations, every_n_steps, per_decade)
        )
        options = {
            "every_n_validations": every_n_validations,
            "every_n_steps": every_n_steps,
            "at_steps": at_steps,
            "log_spaced": per_decade,
        }
        self._options = {name: list(v) if isinstance(v, Sequence) else v for name, v in options.items()}
        given = {name: value for name, value in options.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"Give one schedule, not {len(given)}: {', '.join(given)}.")
        for name, value in given.items():
            if not isinstance(value, Sequence) and value < 1:
                raise ValueError(f"{name} is a number from 1 on; got {value}.")
        self.given = bool(given)
        self.every_n_validations = 1 if not given else every_n_validations
        self.every_n_steps = every_n_steps
        self.at_steps = sorted(at_steps) if at_steps is not None else None
        self.per_decade = per_decade
        self.reset()

    def reset(self) -> None:
        """Start from the beginning."""
        self._validations, self._step = 0, -1
        self._regular: list[int] = []  # steps of the two newest snapshots that were due anyway
        self._extra: list[int] = []
        self._extra_gap, self._dense_from, self._dense_until = 0, 0, -1
        self._next_step = None if self.every_n_validations else self._first_after(-1)

    def due_at_validation(self, step: int) -> bool:
        """Count a validation after ``step`` optimizer steps, and say whether a snapshot is due at it."""
        count, self._validations = self._validations, self._validations + 1
        due = self.every_n_validations is not None and count % self.every_n_validations == 0
        if due:
            self._regular = [*self._regular[-1:], step]
        return due

    def due_at_step(self, step: int) -> bool:
        """Say whether a snapshot is due after ``step`` optimizer steps; if so, move on to the next."""
        self._step = step
        if self._next_step is None and not self._extra:  # asked after each step, mostly in vain
            return False
        due = self._next_step is not None and step >= self._next_step
        if due:
            self._next_step = self._first_after(step)
            self._regular = [*self._regular[-1:], step]
        waiting = [extra for extra in self._extra if extra > step]
        due = due or len(waiting) < len(self._extra)
        self._extra = waiting
        return due

    @property
    def gap(self) -> int | None:
        """Steps between the two newest snapshots that were due anyway; None if unknown, or not the same throughout."""
        return self._regular[1] - self._regular[0] if self.even and len(self._regular) == 2 else None

    @property
    def even(self) -> int | None:
        """Validations, or steps, between two that are due anyway; None if not the same throughout."""
        return self.every_n_validations or self.every_n_steps

    def densify(self, step: int) -> None:
        """Ask for snapshots four times as often for a while, beside those that are due anyway.

        Args:
            step: Number of optimizer steps so far.

        Example:
            >>> schedule = Schedule(every_n_steps=100)
            >>> [step for step in range(201) if schedule.due_at_step(step)]
            [0, 100, 200]
            >>> schedule.densify(200)
            >>> [step for step in range(201, 601) if schedule.due_at_step(step)]
            [225, 250, 275, 300, 325, 350, 375, 400, 500, 600]
        """
        if len(self._regular) == 2:
            self._extra_gap = max(1, (self._regular[1] - self._regular[0]) // _DENSER)
            self._dense_from = step if step > self._dense_until else self._dense_from
            self._extra = [step + self._extra_gap * k for k in range(1, _FOR + 1)]
            self._dense_until = self._extra[-1]

    def distance(self, before: int | None, step: int, left_out: int = 0) -> float:
        """How far apart two snapshots in a row are, in regular distances: 1, or less where they are denser.

        Args:
            before: Step of the one before; None if there is none.
            step: Step of the later one.
            left_out: Number of those due between them that were not taken.

        Returns:
            The distance.

        Example:
            >>> schedule = Schedule(every_n_steps=100)
            >>> due = [schedule.due_at_step(step) for step in (0, 100)]
            >>> schedule.densify(100)
            >>> schedule.distance(0, 100), schedule.distance(100, 125)
            (1.0, 0.25)
            >>> Schedule(every_n_steps=100).distance(0, 300, left_out=2)
            3.0
        """
        if before is None:
            return 1.0
        denser = self._dense_from <= before < self._dense_until
        most = 1.0 + left_out
        return min(most, (step - before) / (_DENSER * self._extra_gap)) if denser else most

    def state_dict(self) -> dict[str, Any]:
        """State to go on from, of plain numbers."""
        return {"schedule": self._options, "validations": self._validations, "step": self._step,
            "next_step": self._next_step, "extra": list(self._extra), "extra_gap": self._extra_gap,
            "dense": [self._dense_from, self._dense_until], "regular": list(self._regular),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; steps of another schedule than this one do not count."""
        self._validations = state["validations"]
        self._extra, self._extra_gap, self._regular = state["extra"], state["extra_gap"], state["regular"]
        self._dense_from, self._dense_until = state["dense"]
        if state["schedule"] == self._options:
            self._next_step = state["next_step"]
        elif not self.every_n_validations:
            self._next_step = self._first_after(state["step"])

    def _first_after(self, step: int) -> int | None:
        if self.every_n_steps:
            return (step // self.every_n_steps + 1) * self.every_n_steps
        if self.at_steps is not None:
            return next((due for due in self.at_steps if due > step), None)
        assert self.per_decade
        if step < 1:
            return step + 1
        k = math.floor(self.per_decade * math.log10(step))
        while (due := round(10 ** (k / self.per_decade))) <= step:
            k += 1
        return due
