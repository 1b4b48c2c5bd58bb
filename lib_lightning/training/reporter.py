"""Reports a run: scalars and figures to loggers, events to the log, to files and to the user's functions."""

from __future__ import annotations

import copy
import logging
import math
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib_lightning.algorithm.cost import size
from lib_lightning.errors import LIBError, brief, counted, log_traceback
from lib_lightning.graph import InteractionGraph
from lib_lightning.io.basis_format import CAUSAL, NOTES, STEP, WEIGHTS
from lib_lightning.io.run_layout import RunLayout
from lib_lightning.lineage.events import Event
from lib_lightning.plots.animated_layout import AnimatedLayout
from lib_lightning.plots.image import PNG
from lib_lightning.training.frameworks import rank_zero_info
from lib_lightning.training.loggers import flush, log_image, log_scalars, log_text, where_to_look
from lib_lightning.training.run_state import RunState
from lib_lightning.training.snapshot import Snapshot
from lib_lightning.training.trainer import run_folder
from lib_lightning.training.weights import TRAINED, VALIDATED
from lib_lightning.training.writer import KeepSnapshots, RunDirectory, SnapshotDirectory

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import Logger

log = logging.getLogger(__name__)

EventHook = Callable[[Event], Any]

# Figures over time show lines from snapshot to snapshot: with fewer than three there is not much to see.
_MIN_OVER_TIME = 3
# An event is logged if its step is so many times that of the last one logged: few lines, over the whole run.
_EVENTS_APART = 3


@dataclass(frozen=True)
class RunDestination:
    """Where a run is reported.

    Attributes:
        folder: The log directory; None for a run that writes nothing.
        loggers: Loggers of Lightning.
        is_global_zero: Whether this is the process that writes and logs.
        is_validation: Whether the run is a standalone validation, which has a folder of its own within the run's.
        logged: What has been logged already, before an interruption, and is not logged again: for each its name, its
            step, and whether it is NaN, as scalars are that are known later.
    """

    folder: Path | None
    loggers: Sequence[Logger] = ()
    is_global_zero: bool = True
    is_validation: bool = False
    logged: Collection[tuple[str, int, bool]] = ()

    @classmethod
    def of_trainer(cls, trainer: pl.Trainer) -> RunDestination:
        """Where a trainer logs; all processes call this at the same time."""
        return cls(run_folder(trainer), trainer.loggers, trainer.is_global_zero, trainer.state.fn != "fit")


class SnapshotReporter:
    """Writes, shows and announces the snapshots of one run; process 0 writes and shows them.

    Args:
        name: Name of the callback, and prefix of what it logs.
        hooks: The user's functions, called with every event on every process.
        state: The state of the run, which is only read.
        prefixes: Names of the folders, that of the basis itself first.
        destination: Where to report.
        follow: Whether features are tracked.
        keep: Which snapshots stay on disk.

    Attributes:
        directory: The folder of the run.
    """

    def __init__(
        self,
        name: str,
        hooks: Sequence[EventHook],
        state: RunState,
        prefixes: Sequence[str],
        destination: RunDestination,
        follow: bool,
        keep: KeepSnapshots = "all",
    ) -> None:
        self._name, self._hooks, self._state, self._follow = name, list(hooks), state, follow
        # A standalone validation leaves the files of the training run alone.
        part = RunLayout.VALIDATION if destination.is_validation else ""
        self.directory = RunDirectory(destination.folder, prefixes, part)
        self._loggers, self._is_global_zero = list(destination.loggers), destination.is_global_zero
        self._keep, self._logged = keep, frozenset(destination.logged)
        self._failures: set[str] = set()
        if destination.is_global_zero:
            for folder in self.directory.folders.values():
                folder.clean()
                if not destination.is_validation and (problem := folder.problem()):
                    log.warning(
                        "%s: snapshots cannot be written to %s (%s), and fail until they can.",
                        name, folder.layout.path, problem,
                    )  # fmt: skip
        self._has_written = False
        self._event_step = 0
        self._logged_step: int | None = None
        self._logged_notes: set[str] = set()
        self._failed_hooks: set[int] = set()

    @property
    def layout(self) -> RunLayout | None:
        """Paths in the folder of the basis itself; None for a run that writes nothing."""
        return None if self.directory.main is None else self.directory.main.layout

    def scalars(self, step: int, keys: Sequence[str], has_ablations: bool) -> dict[str, float]:
        """The latest scalars, NaN before the first snapshot, at which step they were computed, and how long ago.

        Args:
            step: Number of optimizer steps so far.
            keys: Names of all scalars of a snapshot.
            has_ablations: Whether edges required are counted.

        Returns:
            Everything that is logged, by name.
        """
        computed = {"age": self._state.step, **({"ablation_age": self._state.ablation_step} if has_ablations else {})}
        ages = {f"{self._name}/{key}": math.nan if at is None else float(step - at) for key, at in computed.items()}
        computed_at = {f"{self._name}/step": math.nan if self._state.step is None else float(self._state.step)}
        return dict.fromkeys(keys, math.nan) | self._state.scalars | computed_at | ages

    def changed_metrics(self, scalars: Mapping[str, float], keys: Collection[str]) -> dict[str, float]:
        """The scalars to log at a validation: all after a new snapshot, else those that change without one.

        Lightning keeps the values of the others, and takes 20 ms at each validation to be given a hundred scalars.

        Args:
            scalars: All scalars.
            keys: Names of those that only change with a snapshot.

        Returns:
            The scalars to log.
        """
        step = self._state.step
        unchanged = set(keys) if step is not None and step == self._logged_step else set()
        self._logged_step = step
        return {key: value for key, value in scalars.items() if key not in unchanged}

    def log_scalars(self, scalars: dict[str, float], logging_step: int) -> None:
        """Give scalars to the loggers directly: ``LightningModule.log`` would not reach them between validations.

        They are logged where it would log them, beside the scalars of the user: after 3,000 steps, at 2,999.
        """
        left = {
            name: value
            for name, value in scalars.items()
            if (name, logging_step, math.isnan(value)) not in self._logged
        }
        if left:
            log_scalars(self._loggers, left, logging_step)

    def check_space(self, snapshots: int, file_bytes: int) -> None:
        """Warn if the files of a run will be larger than the room that there is for them.

        Args:
            snapshots: Number of snapshots of the run.
            file_bytes: Size of the file of one, in bytes.
        """
        if self.layout is None:
            return
        kept = snapshots if isinstance(self._keep, str) else min(snapshots, self._keep)
        needed = kept * len(self.directory.folders) * file_bytes
        with suppress(OSError):  # a folder that cannot be written to has been reported
            free = shutil.disk_usage(self.layout.path).free
            if needed > free:
                log.warning(
                    "%s: snapshots will take about %s, and there are %s left for %s. keep_snapshots=%d keeps as many "
                    "as there is room for.",
                    self._name, size(needed), size(free), self.layout.path, max(1, int(0.8 * kept * free / needed)),
                )  # fmt: skip

    def write(self, snapshot: Snapshot) -> tuple[dict[str, PNG], dict[str, AnimatedLayout]]:
        """Write a snapshot, on the first process.

        Args:
            snapshot: The snapshot.

        Returns:
            Its figures by tag, and the layouts that include it.
        """
        if not self._is_global_zero:
            return {}, self._state.layouts
        layouts = copy.deepcopy(self._state.layouts)  # the state's own stay as they are if writing fails
        figures = self.directory.write(snapshot.graphs, snapshot.step, layouts)
        if not self._has_written and self._follow:
            for prefix, folder in self.directory.folders.items():
                folder.archive_stale({*self._state.history.steps, snapshot.step})
                self._keep_notes(prefix, folder)
        self._has_written = True
        for folder in self.directory.folders.values():
            folder.keep(self._keep)
        return figures, layouts

    def _keep_notes(self, prefix: str, folder: SnapshotDirectory) -> None:
        num_lineages = self._state.tracker.trackers[prefix].num_lineages
        roots = [Path(earlier).parents[self._name.count("/")] for earlier in self._state.folders]
        earlier_folders = [str(root / prefix) for root in roots[:-1]]
        try:
            moved = folder.keep_notes(num_lineages, earlier_folders)
        except (LIBError, OSError) as error:
            log.warning("%s: notes on features of an earlier run stay as they are. %s", self._name, brief(error))
            return
        if moved:
            stale = folder.layout.stale_file(folder.layout.notes_file)
            rank_zero_info(f"{self._name}: {counted(moved, 'note')} on features of another run moved to {stale}.")

    def write_again(self, graph: InteractionGraph, step: int) -> None:
        """Write the file of a snapshot again, after something has been added to its graph."""
        if self._is_global_zero and self.layout is not None:
            graph.save(self.layout.basis_file(step))

    def show(self, figures: Mapping[str, PNG], step: int) -> None:
        """Show figures in the loggers, at the number of optimizer steps that is in their titles and file names."""
        for tag, png in figures.items():
            if (tag, step, False) not in self._logged:
                log_image(self._loggers, tag, png, step)

    def flush(self) -> None:
        """Have everything that has been logged written to files now."""
        flush(self._loggers)

    def log_notes(self, graphs: Mapping[str, InteractionGraph]) -> None:
        """Log the notes of graphs, each of them once, whichever numbers it has in other snapshots."""
        for graph in graphs.values():
            for note in graph.info[NOTES]:
                self._log_note(note)

    def log_weights(self, metadata: Mapping[str, Any]) -> None:
        """Log once that snapshots are of other weights than those trained."""
        status, step = metadata.get(WEIGHTS, TRAINED), metadata[STEP]
        if status != TRAINED and status not in self._logged_notes:
            self._logged_notes.add(status)
            when = "for validation" if status == VALIDATED else "at the end of training"
            rank_zero_info(
                f"{self._name}: the snapshot at step {step:,} is of weights that were put in place of the trained ones "
                f"{when}; info['weights'] of its file says so."
            )

    def log_failure(self, step: int, error: Exception) -> None:
        """Log that a snapshot has failed, and why; the same reason once. How many have failed is logged at the end."""
        reason = brief(error, 400)
        if isinstance(error, OSError) and self.layout is not None and str(self.layout.path) not in reason:
            reason = f"{reason.rstrip('.')}: {self.layout.path}"
        if reason not in self._failures:
            self._failures.add(reason)
            log.warning(
                "The snapshot of '%s' at step %d failed and is skipped; training continues. %s",
                self._name, step, reason,
            )  # fmt: skip
            log_traceback(error)

    def log_limits(self, graph: InteractionGraph) -> None:
        """Log once that the output is one number, which limits the features of a graph."""
        last = graph.node_layers[-1]
        if len(graph.bases[last].mean) == 1:
            self._log_note(
                f"'{last}' is one number, so each layer of the graph has one feature for each way to change it, often "
                "a single one. A last node layer before it shows more."
            )

    def _log_note(self, note: str) -> None:
        if (wording := _without_numbers(note)) not in self._logged_notes:
            self._logged_notes.add(wording)
            log.warning("%s: %s", self._name, note)

    def notify(self, events: Sequence[Event]) -> None:
        """Report the events of a snapshot. Errors in the user's hooks are logged, and training continues.

        Args:
            events: The events.
        """
        if self._is_global_zero:
            with self._logged_errors():
                self._write_events(events)
        for k, hook in enumerate(self._hooks):
            for event in events:
                try:
                    hook(event)
                except Exception as error:
                    if k not in self._failed_hooks:
                        log.warning(
                            "on_event=%r failed and will not be reported again: '%s'. %s",
                            hook, event.text, brief(error),
                        )  # fmt: skip
                        log_traceback(error)
                    self._failed_hooks.add(k)

    def draw_run(self) -> None:
        """Draw and show the figures over the whole run. Errors are logged, and training continues."""
        if self._is_global_zero:
            with self._logged_errors():
                self._draw()

    @contextmanager
    def _logged_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            log.warning(
                "Events or figures over time of '%s' could not be written at step %d; training continues. %s",
                self._name, self._state.step or 0, brief(error),
            )  # fmt: skip
            log_traceback(error)

    def _write_events(self, events: Sequence[Event]) -> None:
        self._log_events(events)
        if events:
            text = "\n".join(f"- {event.text}" for event in events)
            log_text(self._loggers, f"{self._name}/events", text, events[0].step)
        if self.directory.main is not None:
            # All of them each time: a resumed run may have another folder, or have gone back before some of them.
            self.directory.main.write_events([event.to_json() for event in self._state.events])

    def _log_events(self, events: Sequence[Event]) -> None:
        """Log the most telling event of a step, at steps that are further and further apart: all are in a file."""
        # Births and deaths are frequent early in training and would drown these.
        emerged = [event for event in events if event.kind == "emerged"]
        telling = emerged or [event for event in events if event.metric is not None]
        if not telling or telling[0].step < _EVENTS_APART * self._event_step:
            return
        self._event_step = telling[0].step
        first = max(telling, key=lambda event: event.after or 0.0) if emerged else telling[0]
        others = len(emerged) - 1
        more = f"; so did {counted(others, 'other feature')}" if others > 0 else ""
        rank_zero_info(f"{self._name}: {first.text}{more}")

    def _draw(self) -> None:
        state, directory = self._state, self.directory.main
        if directory is None or state.step is None:
            return
        figures = {}
        if state.graphs:  # none in a resumed run before its first snapshot
            own, *baselines = state.graphs.values()
            figures["spectrum"] = directory.write_spectrum(own, baselines, own.info[STEP])
        if self._follow and len(state.history.steps) >= _MIN_OVER_TIME:
            over_time = state.history.figures()
            figures |= {name: directory.write_figure(name, figure) for name, figure in over_time.items()}
        self.show({f"{self._name}/{name}": png for name, png in figures.items()}, state.step)

    def finish(self, last_step: int) -> str:
        """Write what is only known at the end of training.

        Args:
            last_step: Number of optimizer steps of the training.

        Returns:
            What to log last: the result in a sentence, where everything is, and the command that shows it; "" where
            nothing is written.
        """
        state, directory = self._state, self.directory.main
        if directory is None or not self._is_global_zero:
            return ""
        if state.n_drawn < state.n_snapshots:
            self.draw_run()
        result = f"\n{self._name}: {counted(state.n_snapshots, 'snapshot')} of {' -> '.join(state.node_layers)}."
        details = []
        try:
            # A run that is resumed at its end has no new snapshot.
            if state.graphs and state.step is not None and state.step == last_step:
                for folder in self.directory.folders.values():
                    folder.write_final(state.step)
                earlier = [path for path in state.folders if path != str(directory.layout.path.resolve())]
                since = directory.write_first_seen(state.graphs[self._name], state.step, earlier)
                # Two points are no development.
                if state.n_snapshots >= _MIN_OVER_TIME and (steps := _by_step(since)):
                    result += f" Half of the final features, by importance, were there {steps}."
                if matter := _that_matter(state.graphs[self._name]):
                    details.append(f"  alone  {matter}")
        except Exception as error:  # training is over, and its result must not be lost
            log.warning("The last snapshot of '%s' could not be written. %s", self._name, brief(error))
            log_traceback(error)
        found = [folder.contents(len(state.events)) for folder in self.directory.folders.values()]
        details += [f"  files  {what}" for what in found if what]
        return "\n".join([result, *details, *where_to_look(self._loggers)])

    @staticmethod
    def say(text: str) -> None:
        """Log a text, unless there is none."""
        if text:
            rank_zero_info(text)


def _that_matter(graph: InteractionGraph) -> str:
    """How many features change a score when they are turned off; "" where that has not been tried."""
    counts = {
        layer: (int(effects.significant.sum()), int(effects.changes.isfinite().sum()))
        for layer, effects in graph.effects.items()
    }
    if not any(tried for _, tried in counts.values()):
        return ""
    score = str(graph.info[CAUSAL]["score"]).replace("_", " ")
    found = ", ".join(
        f"{n} of {tried} in {layer}"
        if tried == graph.bases[layer].n_features
        else f"{n} of the {tried} tried in {layer}"
        for layer, (n, tried) in counts.items()
    )
    return f"features whose absence changes the {score} beyond chance: {found}"


def _by_step(since: Mapping[str, int | None]) -> str:
    """Node layers by step, in words: ``from step 0 on in a and b, from step 40 on in c``."""
    layers = defaultdict(list)
    for layer, step in since.items():
        if step is not None:
            layers[step].append(layer)
    if len(layers) == 1 and None not in since.values():
        return f"from step {next(iter(layers)):,} on in all node layers"
    return ", ".join(f"from step {step:,} on in {_listed(names)}" for step, names in sorted(layers.items()))


def _listed(names: Sequence[str]) -> str:
    """Names in a sentence: ``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _without_numbers(note: str) -> str:
    """A note without its numbers, except for those in names.

    Example:
        >>> _without_numbers("'block.1' has 1,024 features, 98% of them 'x'.")
        "'block.1' has # features, # of them 'x'."
    """
    return re.sub(r"'[^']*'|\d[\d,.]*%?", lambda found: found[0] if found[0].startswith("'") else "#", note)
