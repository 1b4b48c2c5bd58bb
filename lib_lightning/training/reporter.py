"""What a run leaves behind and tells: files, figures, events, and where everything is."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info

from lib_lightning.lineage.events import Event
from lib_lightning.plots.animated_layout import AnimatedLayout
from lib_lightning.training.loggers import log_image, log_numbers, log_text, where_to_look
from lib_lightning.training.snapshot import Snapshot, SnapshotComputer
from lib_lightning.training.trainer import logging_step, run_folder
from lib_lightning.training.writer import RunDirectory, SnapshotDirectory

log = logging.getLogger(__name__)

Hook = Callable[[Event], Any]

# Snapshots that make figures over time worth their second: between two there is nothing but a straight line.
_OVER_TIME = 3


class SnapshotReporter:
    """Writes and shows the snapshots of one run.

    Args:
        watcher: What has been seen.
        hooks: Called with every event, on every process.

    Attributes:
        folder: Where files go.
    """

    def __init__(self, watcher: SnapshotComputer, hooks: Sequence[Hook]) -> None:
        self._watcher, self._hooks = watcher, hooks
        self.reset()

    def reset(self) -> None:
        """Forget the run before."""
        self.folder = RunDirectory(None, [])
        self._films = {prefix: AnimatedLayout() for prefix in self._watcher.prefixes}
        self._earlier: list[str] = []
        self._begun = False
        self._known: int | None = None
        self._said: set[str] = set()
        self._failed_hooks: set[int] = set()

    def start(self, trainer: pl.Trainer) -> None:
        """Learn where this run's files go; all processes have to ask together."""
        part = "" if trainer.state.fn == "fit" else "validate"  # a look from outside leaves the run's files alone
        self.folder = RunDirectory(run_folder(trainer), self._watcher.prefixes, part)
        if trainer.is_global_zero:
            self.folder.clean()

    def notes(self, taken: Snapshot) -> None:
        """Say, once each, where a slower way was taken."""
        for note in {note for graph in taken.graphs.values() for note in graph.info["notes"]} - self._said:
            log.warning("%s: %s", self._watcher.name, note)
            self._said.add(note)

    def failed(self, step: int, error: Exception) -> None:
        """Say that there is no snapshot after so many steps, and why."""
        log.warning(
            "The snapshot of '%s' after %d steps failed and is left out; training goes on. %s: %s",
            self._watcher.name, step, type(error).__name__, error,
        )  # fmt: skip

    def numbers(self, trainer: pl.Trainer, step: int | None) -> dict[str, float]:
        """The newest numbers, and how many steps ago they were taken.

        Args:
            trainer: The trainer.
            step: Step of the newest snapshot; None if there is none.

        Returns:
            Everything to be logged, by name.
        """
        name, steps = self._watcher.name, {"age": step}
        if self._watcher.watched.ablation is not None:
            steps["ablation_age"] = self._watcher.ablated_step
        ages = {f"{name}/{k}": math.nan if s is None else float(trainer.global_step - s) for k, s in steps.items()}
        return self._watcher.numbers | ages

    def news(self, numbers: dict[str, float], step: int | None) -> dict[str, float]:
        """Of the numbers at a validation those that Lightning does not have: it keeps the ones of a snapshot.

        To be given a hundred numbers takes it some 20 ms, at each validation, however often these are.

        Args:
            numbers: All of them.
            step: Step of the newest snapshot; None if there is none.

        Returns:
            What is to be logged.
        """
        known, self._known = step is not None and step == self._known, step
        return {key: x for key, x in numbers.items() if not (known and key in self._watcher.numbers)}

    def log(self, trainer: pl.Trainer, numbers: dict[str, float]) -> None:
        """Give numbers to the loggers at once."""
        # LightningModule.log accepts nothing between validations that would reach the loggers at this step.
        log_numbers(trainer.loggers, numbers, logging_step(trainer))

    def write(self, trainer: pl.Trainer, taken: Snapshot, step: int) -> None:
        """Write a snapshot and show its figures.

        Args:
            trainer: The trainer; only its first process writes.
            taken: The snapshot.
            step: Number of optimizer steps before it.
        """
        if not trainer.is_global_zero:
            return
        films = {prefix: film.state_dict() for prefix, film in self._films.items()}
        try:
            figures = self.folder.write(taken.graphs, step, self._films)
        except BaseException:
            # As if it had never been: the next one may give its ids to other features.
            self.folder.discard(step)
            for prefix, film in self._films.items():
                film.load_state_dict(films[prefix])
            raise
        if not self._begun and self._watcher.watched.follow:
            self.folder.set_aside({*self._watcher.history.steps, step})
        self._begun = True
        for tag, png in figures.items():
            log_image(trainer.loggers, tag, png, logging_step(trainer))

    def tell(self, trainer: pl.Trainer, events: Sequence[Event], draw: bool) -> None:
        """Tell of events since the snapshot before; mistakes in hooks cost nothing.

        Args:
            trainer: The trainer.
            events: What has happened.
            draw: Whether to draw the spectrum of this snapshot, and what there is over time.
        """
        if draw:
            self._watcher.drawn = self._watcher.snapshots
        if trainer.is_global_zero:
            with self._costs_nothing(trainer):
                self._tell(trainer, events)
                if draw:
                    self._draw(trainer)
        for k, hook in enumerate(self._hooks):
            for event in events:
                try:
                    hook(event)
                except Exception as error:
                    if k not in self._failed_hooks:
                        log.warning(
                            "The hook %r failed, and will not be reported again: '%s'. %s: %s",
                            hook, event.text, type(error).__name__, error,
                        )  # fmt: skip
                    self._failed_hooks.add(k)

    @contextmanager
    def _costs_nothing(self, trainer: pl.Trainer) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            log.warning(
                "What '%s' shows over time could not be written after %d steps; training goes on. %s: %s",
                self._watcher.name, trainer.global_step, type(error).__name__, error,
            )  # fmt: skip

    def _tell(self, trainer: pl.Trainer, events: Sequence[Event]) -> None:
        for event in events:
            # The rest would drown these in early training.
            if event.kind == "emerged" or event.metric is not None:
                rank_zero_info(f"{self._watcher.name}: {event.text}")
        if events:
            text = "\n".join(f"- {event.text}" for event in events)
            log_text(trainer.loggers, f"{self._watcher.name}/events", text, logging_step(trainer))
        if self.folder.main is not None:
            # All of them each time: a resumed run may have another folder, and have gone back behind some.
            self.folder.main.write_events([event.to_json() for event in self._watcher.events])

    def _draw(self, trainer: pl.Trainer) -> None:
        watcher, folder = self._watcher, self.folder.main
        if folder is None:
            return
        figures = {}
        if watcher.graphs:  # none yet in a run that has only just gone on
            own, *baselines = watcher.graphs.values()
            figures["spectrum"] = folder.write_spectrum(own, baselines, own.info["step"])
        if watcher.watched.follow and len(watcher.history.steps) >= _OVER_TIME:
            over_time = watcher.history.figures()
            figures |= {what: folder.write_figure(what, figure) for what, figure in over_time.items()}
        for what, png in figures.items():
            log_image(trainer.loggers, f"{watcher.name}/{what}", png, logging_step(trainer))

    def finish(self, trainer: pl.Trainer, step: int | None, node_layers: Sequence[str]) -> None:
        """Write what is known at the end only, and say where everything is.

        Args:
            trainer: The trainer.
            step: Step of the last snapshot.
            node_layers: Names of the node layers.
        """
        if self.folder.main is None or not trainer.is_global_zero:
            return
        name = self._watcher.name
        if self._watcher.drawn < self._watcher.snapshots:
            with self._costs_nothing(trainer):
                self._draw(trainer)
        lines = [f"\n{name}: {self._watcher.snapshots} snapshots of {' -> '.join(node_layers)}"]
        try:
            if step == trainer.global_step:
                self.folder.finish(step)
                earlier = [SnapshotDirectory(Path(folder)) for folder in self._earlier]
                since = self.folder.main.retrace(self._watcher.graphs[name], step, earlier)
                if since:
                    steps = ", ".join(f"{layer} {'never' if s is None else f'{s:,}'}" for layer, s in since.items())
                    lines.append(f"  formed        {steps} (steps since when most of what counts has been there)")
        except Exception as error:  # training is over, and was not in vain
            log.warning("The last snapshot of '%s' could not be written: %s: %s", name, type(error).__name__, error)
        rank_zero_info("\n".join([*lines, *self.folder.contents(), *where_to_look(trainer.loggers)]))

    def state_dict(self) -> dict[str, Any]:
        """State to go on from: where features lie in figures, and where the run has been written so far."""
        here = [] if self.folder.main is None else [str(self.folder.main.path.resolve())]
        films = {prefix: film.state_dict() for prefix, film in self._films.items()}
        return {"films": films, "folders": [*(f for f in self._earlier if f not in here), *here]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._earlier = list(state["folders"])
        for prefix, film in self._films.items():
            if prefix in state["films"]:
                film.load_state_dict(state["films"][prefix])
