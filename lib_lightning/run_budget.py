"""The time that snapshots of a run may take: which of those due are taken, and on how much."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from lib_lightning.core.live import LiveModel
from lib_lightning.core.nested import is_empty, samples_between
from lib_lightning.core.together import Together
from lib_lightning.graph import InteractionGraph
from lib_lightning.overhead import Overhead, no_garbage_collection
from lib_lightning.samples import SampleBuffer
from lib_lightning.schedule import Schedule
from lib_lightning.trainers import wait_for_device
from lib_lightning.values import feature_values
from lib_lightning.watcher import Taken, Watcher

# The share of snapshots that come with every validation because nobody has said otherwise.
DEFAULT = 0.03
# So many due snapshots for each one taken are thinned by spacing alone. Beyond, snapshots are made cheaper, once in a
# run: down to a part of the samples, but not to so few that importances would be unsure, and to probes where the exact
# metric goes through many times as many outputs. Nobody knows what the first one will cost, so it is tried on that
# part, and goes on to all samples if these will be taken.
_THINNED = 4
_FEWER, _ENOUGH = 4, 512
# The first snapshot warms everything up. What it costs stands for what the last one will, which draws a spectrum, until
# figures of the whole run have been drawn.
_FIRST = "first"
_PROBES, _MANY = 16, 128

_Hook = TypeVar("_Hook", bound=Callable[..., Any])


def counted(hook: _Hook) -> _Hook:
    """A method of something with a `RunBudget` as its ``budget``, whose time counts as own work."""

    @functools.wraps(hook)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.budget.overhead.own():
            return hook(self, *args, **kwargs)

    return cast("_Hook", wrapper)


class RunBudget:
    """Keeps the cost of one run's snapshots within a share of its training time, and says what that takes.

    Args:
        max_overhead: The share; infinity for no limit, None for `DEFAULT` unless the user has given a schedule.
        schedule: When snapshots are due.
        watcher: What takes them.
        num_samples: Samples asked for.

    Attributes:
        overhead: What has been spent.
        part: Part of each process's samples to compute on.
        put_off: Number of snapshots that were due and have been left out.
        left_out: Number of those since the newest snapshot.

    Raises:
        ValueError: If the share is not above 0.
    """

    def __init__(self, max_overhead: float | None, schedule: Schedule, watcher: Watcher, num_samples: int) -> None:
        if max_overhead is None:
            max_overhead = math.inf if schedule.given else DEFAULT
        if not max_overhead > 0:
            raise ValueError(f"max_overhead is a share of the training time above 0, as 0.03 is; got {max_overhead}.")
        self.overhead = Overhead(float(max_overhead))
        self._schedule, self._watcher = schedule, watcher
        self._asked = [self.overhead.limit, num_samples, watcher.watched.settings.n_probes]
        self.reset()

    def reset(self) -> None:
        """Forget the run before."""
        self.overhead.reset()
        self._go_on_with(1.0, 0)
        self.put_off = self.left_out = 0
        self._put_off_at: int | None = None
        self._from: int | None = None
        self._computing, self._outputs = 0.0, 0
        self._tried = False  # whether the part is only what the first snapshot was tried on

    def _go_on_with(self, part: float, n_probes: int) -> None:
        settings = self._watcher.watched.settings
        self.part, self._n_probes = part, n_probes
        self._watcher.settings = replace(settings, n_probes=n_probes) if n_probes else settings

    @property
    def chosen(self) -> dict[str, Any]:
        """Samples and probes that were chosen in place of those asked for, for `InteractionGraph.info`; if any were."""
        if self.part == 1 and not self._n_probes:
            return {}
        chosen = {"max_overhead": self.overhead.limit, "part_of_samples": self.part}
        return {"budget": {**chosen, "n_probes": self._watcher.settings.n_probes}}

    def begin(self, step: int) -> None:
        """Training begins, or goes on, after so many optimizer steps."""
        self.overhead.begin()
        self._from = step if self._from is None else self._from

    def allows(self, step: int, samples: SampleBuffer, together: Together) -> bool:
        """Tell whether a snapshot that is due is to be taken; all processes have to ask together.

        Args:
            step: Number of optimizer steps so far.
            samples: The samples of this process.
            together: The processes, of which the first one's time counts.

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
        chooses = samples.complete and (self._tried or not affordable)
        choice = self._choice(step) if chooses else (self.part, self._n_probes)
        (answer,) = together.first([torch.tensor([affordable, *choice], dtype=torch.float64)])
        affordable, part, n_probes = bool(answer[0]), float(answer[1]), int(answer[2])
        if self._tried or (part, n_probes) != (self.part, self._n_probes):
            self._choose(part, n_probes)
        if not affordable:
            if not self.put_off:
                self._say_put_off(step)
            self.put_off, self.left_out, self._put_off_at = self.put_off + 1, self.left_out + 1, step
        return affordable

    def _kind(self, last: bool) -> str:
        if self._watcher.ablates(last):
            kind = "ablation"
        elif self.overhead.newest:
            kind = "plain"
        else:
            return _FIRST
        return f"{kind}, with figures" if self._watcher.draws(last) else kind

    def take(self, take: Callable[[], Taken], step: int, samples: SampleBuffer, together: Together) -> Taken:
        """Take a snapshot; the first one on as many samples as there is time for.

        Args:
            take: Takes it, on `part` of each process's samples.
            step: Number of optimizer steps so far.
            samples: The samples of this process.
            together: The processes, of which the first one's time counts.

        Returns:
            The snapshot.
        """
        if self.overhead.newest or self.overhead.limit == math.inf or not samples.complete:
            return take()
        n = sum(int(t) for t in together.gather(torch.tensor([samples.count])))
        part = _part(n)
        begun = self._from is not None and step > self._from and self._schedule.even is not None
        if part == 1 or not begun or self._watcher.ablates(last=False):
            return take()
        before = self.overhead.spent
        self._go_on_with(part, 0)
        try:
            taken = take()
        except BaseException:
            self._go_on_with(1.0, 0)
            raise
        # As far from the next one as from the beginning, snapshots have so much time, half of it for computing.
        affordable = _THINNED * self.overhead.limit * self.overhead.training
        (tried,) = together.first([torch.tensor(2 * taken.computing / part > affordable)])
        self._tried = bool(tried)
        if not tried:
            self._go_on_with(1.0, 0)
            self.overhead.not_again(self.overhead.spent - before)
            return take()
        rank_zero_info(
            f"{self._watcher.name}: the first snapshot, after {step:,} steps, is computed on {round(part * n):,} of "
            f"{n:,} samples, as max_overhead={self.overhead.limit:g} leaves little time for it."
        )
        return taken

    def _choice(self, step: int) -> tuple[float, int]:
        """Part of the samples and number of probes to go on with, 0 for what was asked for."""
        steps, gap, before = step - (self._from or 0), self._schedule.gap, (self.part, self._n_probes)
        if self.chosen and not self._tried:
            return before
        if gap is None or steps <= 0:
            return 1.0, 0
        computing, expected = self._on_all
        affordable = _THINNED * self.overhead.limit * self.overhead.training / steps * gap
        # Figures and files cost the same whatever they are made of.
        if expected <= affordable or computing < expected / 2:
            return 1.0, 0
        part = _part(self._n_samples)
        still_too_much = expected - computing * (1 - part) > affordable
        exact = "lib" in self._watcher.prefixes.values() and self._watcher.settings.n_probes is None
        return part, _PROBES if still_too_much and exact and self._outputs >= _MANY else 0

    @property
    def _on_all(self) -> tuple[float, float]:
        """Seconds that the graphs of all samples take, and a snapshot with them."""
        computing = self._computing / self.part
        return computing, self.overhead.expected(self._kind(False)) + computing - self._computing

    @property
    def _n_samples(self) -> int:
        return round(int(self._watcher.numbers[f"{self._watcher.name}/samples"]) / self.part)

    def _choose(self, part: float, n_probes: int) -> None:
        (computing, expected), n = self._on_all, self._n_samples
        now = expected - computing * (1 - self.part)
        self._tried = False
        self._go_on_with(part, n_probes)
        self.overhead.expect((expected - computing * (1 - part)) / now)
        on = f"{round(part * n):,} of {n:,} samples" if part < 1 else f"all {n:,} samples"
        how = f", with n_probes={n_probes} in place of all {self._outputs:,} outputs of a layer" if n_probes else ""
        limit, most = self.overhead.limit, _THINNED - 1
        why, then = f"which max_overhead={limit:g} has time for", "numbers before and after may differ by that."
        if self.chosen:
            why = f"for which max_overhead={limit:g} would leave out more than {most} of {_THINNED} that are due"
            then += (
                " A larger max_overhead keeps what was asked for, as does a schedule with fewer snapshots and "
                "max_overhead=inf."
            )
        rank_zero_info(
            f"{self._watcher.name}: snapshots cost {expected:.3g} s, {why}. From here on they are computed on "
            f"{on}{how}; {then}"
        )

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
            wait_for_device(trainer)
        with self.overhead.snapshot(self._kind(last)), no_garbage_collection():
            if self._put_off_at == trainer.global_step:  # and is taken after all, as the last one
                self.put_off, self.left_out = self.put_off - 1, self.left_out - 1
            before, draws = self._watcher.snapshots, self._watcher.draws(last)
            yield
            if self._watcher.snapshots > before:
                self.left_out = 0
                if draws:
                    self.overhead.newest.pop(_FIRST, None)

    def look(self, taken: Taken, live: LiveModel, batches: Sequence[Any], together: Together) -> None:
        """Note what a snapshot's cost is made of.

        Args:
            taken: The snapshot.
            live: The model and its node layers.
            batches: What it was computed on.
            together: The processes.
        """
        self._computing = taken.computing
        if self.overhead.limit < math.inf and not self._outputs:
            graph = taken.graphs[self._watcher.name]
            own = torch.tensor([_outputs(live, graph, [batch for batch in batches if not is_empty(batch)][:1])])
            self._outputs = max(int(t) for t in together.gather(own))

    def numbers(self, trainer: pl.Trainer, together: Together) -> dict[str, float]:
        """Share of the training time so far, of process 0, by name; nothing where there is no training.

        Args:
            trainer: The trainer.
            together: Its processes, which have to ask together.

        Returns:
            What is to be logged.
        """
        if trainer.state.fn != "fit":
            return {}
        (share,) = together.first([torch.tensor(self.overhead.share, dtype=torch.float64)])
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
            "overhead": self.overhead.state_dict(), "asked": list(self._asked), "chosen": [self.part, self._n_probes],
            "put_off": [self.put_off, self.left_out, self._put_off_at], "from": self._from,
            "computing": self._computing, "outputs": self._outputs, "tried": self._tried,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; what was chosen stays unless something else is asked for now."""
        self.overhead.load_state_dict(state["overhead"])
        self.put_off, self.left_out, self._put_off_at = state["put_off"]
        self._from, self._computing, self._outputs = state["from"], state["computing"], state["outputs"]
        if state["asked"] == self._asked:
            self._tried = state["tried"]
            self._go_on_with(*state["chosen"])


def _part(n: int) -> float:
    """Part of so many samples that will do."""
    return min(1.0, max(n // _FEWER, _ENOUGH) / max(1, n))


def _outputs(live: LiveModel, graph: InteractionGraph, batches: Sequence[Any]) -> int:
    """Positions times features of the widest node layer but the first: what an exact metric goes through."""
    try:
        (values,) = feature_values(live, graph, [samples_between(batch, 0, 2) for batch in batches])
    except Exception:  # no samples here, or the model takes no two of them: then it cannot tell
        return 0
    return max(values.features[name].shape[1:].numel() for name in graph.node_layers[1:])
