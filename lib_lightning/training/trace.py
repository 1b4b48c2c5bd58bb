"""The snapshots that a callback would have taken, from the checkpoints of a training that had none."""

from __future__ import annotations

import inspect
import io
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lib_lightning.algorithm.cost import duration
from lib_lightning.distributed.process_group import SINGLE_PROCESS
from lib_lightning.errors import (
    LIBError,
    SettingError,
    brief,
    check_number,
    did_you_mean,
    log_traceback,
    quoted,
    shortened,
)
from lib_lightning.graph import InteractionGraph
from lib_lightning.io.basis_file import write_bytes
from lib_lightning.io.basis_format import CAUSAL, EPOCH, LOGGING_STEP, STEP, WEIGHTS, WEIGHTS_HASH
from lib_lightning.io.run_layout import RunLayout
from lib_lightning.model.batch import is_empty, map_tensors
from lib_lightning.model.module_paths import unwrapped
from lib_lightning.model.node_layer import NodeLayer
from lib_lightning.model.preserve import copied_bytes, preserve_rng
from lib_lightning.model.weights_hash import weights_hash
from lib_lightning.training.callback import LIBCallback
from lib_lightning.training.checkpoint_files import (
    Checkpoints,
    StepOf,
    UnknownStepError,
    checked_step,
    find_checkpoints,
    size_and_time,
    step_in_name,
)
from lib_lightning.training.effort import plan_without_training
from lib_lightning.training.frameworks import PACKAGES, imported_packages, member, rank_zero_info
from lib_lightning.training.reporter import RunDestination
from lib_lightning.training.samples import NUM_REFERENCE_SAMPLES, SampleBuffer
from lib_lightning.training.snapshot import SnapshotData
from lib_lightning.training.weights import TRAINED
from lib_lightning.training.weights_files import (
    CheckpointContents,
    UnreadableError,
    contents_of,
    is_checkpoint,
    read_checkpoint,
)
from lib_lightning.training.weights_names import load_weights
from lib_lightning.viewer.run import Run
from lib_lightning.viewer.scalars import logged_points

log = logging.getLogger(__name__)

Load = Callable[[Any], Any]

# Seconds between two looks at a folder that is being written.
POLL = 2.0
# A checkpoint has been written if its files stay as they are from one look to the next, or are older than this.
_OLD = 60.0
# One that cannot be read although it has not changed for so many seconds will never be complete.
_GIVE_UP = 60.0
# Settings of the callback that say when a training is interrupted for a snapshot.
_NOT_OF_A_TRACE = ("every_n_validations", "every_n_steps", "at_steps", "log_spaced", "adaptive", "max_overhead")


def trace(
    model: nn.Module,
    checkpoints: Checkpoints,
    batches: Iterable[Any],
    node_layers: Sequence[str | NodeLayer] | None = None,
    folder: str | PathLike[str] = "trace",
    load: Load | None = None,
    step_of: StepOf | None = None,
    watch: float | None = None,
    **settings: Any,
) -> Run:
    """Compute the snapshots that `LIBCallback` would have taken, from the checkpoints of a training.

    They are read in order of their steps. The folder then has what a training with the callback leaves: basis files
    and figures, lineages, events, figures over the whole run, ``final.safetensors``, and the scalars for TensorBoard.
    A trace that was interrupted goes on where it was if it is started again with the same folder.

    Args:
        model: The model, on the device to compute on. The weights of one checkpoint after the other are loaded into it;
            at the end it has its own again.
        checkpoints: A folder of checkpoints, a pattern such as ``"checkpoints/*.ckpt"``, a list of these or of files,
            or a dict with the step of each. Files of Lightning (``.ckpt``), state dicts (``.pt``, ``.pth``, ``.bin``,
            read with ``weights_only=True``), ``.safetensors``; folders of Hugging Face, of FSDP and others that use
            torch.distributed.checkpoint, of DeepSpeed. With ``load``, a list may hold anything.
        batches: Batches to compute on, the same for all snapshots: at most 2,048 samples, unless num_samples says
            otherwise. They are moved to the model's device.
        node_layers: Where to cut the model, as for `LIBCallback`; None for proposed ones.
        folder: The log directory. Snapshots go to the folder ``lib`` in it.
        load: A function from a checkpoint to a state dict, or to a module that has its weights; None for the formats
            above.
        step_of: A function from a checkpoint to its number of optimizer steps. None for the number in the checkpoint,
            or in its name, such as ``step1000`` or ``checkpoint-1000``.
        watch: Seconds to wait for another checkpoint, after each; infinity to wait until Ctrl-C. None computes on
            those that are there. Checkpoints that are still being written are left until they are complete.
        settings: Other settings of `LIBCallback`, such as ``basis``, ``baselines``, ``effort``, ``labeller`` or
            ``name``; none of those that say when snapshots are due.

    Returns:
        The run in the folder.

    Raises:
        LIBError: If there are no checkpoints, the first ones are of another model, or the folder has another run.
        SettingError: If a setting is outside its range.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for step in (0, 10):
        ...         _ = nn.init.normal_(net[0].weight)
        ...         torch.save(net.state_dict(), f"{folder}/step{step}.pt")
        ...     trace(net, folder, [torch.randn(64, 4)], ["0:input", "2:input", "output"], f"{folder}/logs")
        Run(logs/lib: 2 snapshots, steps 0 to 10)
    """
    callback = _callback(node_layers, settings)
    source = CheckpointSource(checkpoints, load, step_of)
    source.require_some(watch)
    inner = unwrapped(model)
    tracer = Tracer(callback, inner, source, Path(folder))
    # A data loader draws a random number for its seed, and so may load=.
    with preserve_rng(), own_weights_kept(inner):
        tracer.prepare(_samples(tracer, batches))
        run_tracers([tracer], watch)
    return Run(tracer.folder)


def _callback(node_layers: Sequence[str | NodeLayer] | None, settings: Mapping[str, Any]) -> LIBCallback:
    if wrong := [name for name in settings if name in _NOT_OF_A_TRACE]:
        raise SettingError(f"{quoted(wrong)} of trace: the checkpoints decide when there is a snapshot.")
    if wrong := [name for name in settings if name in ("dataloader", "val_dataloader")]:
        raise SettingError(f"{quoted(wrong)} of trace: batches are what it computes on.")
    known = inspect.signature(LIBCallback).parameters
    if wrong := [name for name in settings if name not in known]:
        raise SettingError(f"trace has no setting {quoted(wrong)}.{did_you_mean(wrong[0], known)}")
    return LIBCallback(node_layers, **settings)


@contextmanager
def own_weights_kept(model: nn.Module) -> Iterator[None]:
    """A block after which a model has its weights again.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    own = {name: t.detach().clone() if isinstance(t, torch.Tensor) else t for name, t in model.state_dict().items()}
    try:
        yield
    finally:
        model.load_state_dict(own)


class CheckpointSource:
    """The checkpoints of a training, some of which may still be to come.

    Args:
        given: As for `trace`.
        load: As for `trace`.
        step_of: As for `trace`.
    """

    def __init__(self, given: Checkpoints, load: Load | None = None, step_of: StepOf | None = None) -> None:
        for name, function in (("load", load), ("step_of", step_of)):
            if function is not None and not callable(function):
                raise SettingError(f"{name} is a function of a checkpoint, or None; got {function!r}.")
        self._given, self._load, self._step_of = given, load, step_of
        self._steps = {str(one): step for step, one in given.items()} if isinstance(given, Mapping) else {}

    def __str__(self) -> str:
        return shortened(str(self._given), 100)

    def require_some(self, watch: float | None) -> None:
        """Stop if there are none, and none are waited for.

        Args:
            watch: As for `trace`.

        Raises:
            LIBError: If so.
        """
        if watch is not None:
            check_number("watch", watch, lambda x: x >= 0, "is a number of seconds, or infinity")
            if isinstance(self._given, (str, PathLike)):
                return
        if not self.find():
            raise LIBError(
                f"There are no checkpoints in {self}: no files that end in .ckpt, "
                ".safetensors, .pt, .pth or .bin, and no folders of Hugging Face, torch.distributed or DeepSpeed."
            )

    def find(self, is_watched: bool = False) -> list[Any]:
        """The checkpoints that are there now.

        Args:
            is_watched: Whether more are waited for, so that the folder need not exist yet.
        """
        given = self._given
        if is_watched and isinstance(given, (str, PathLike)) and not Path(given).exists():
            parent = Path(given).parent
            return find_checkpoints(given, self._load is not None) if "*" in str(given) or not parent.exists() else []
        return find_checkpoints(given, self._load is not None)

    def step(self, checkpoint: Any) -> int:
        """Number of optimizer steps before a checkpoint.

        Args:
            checkpoint: The checkpoint.

        Returns:
            What the caller says, else what is in it, else what is in its name.

        Raises:
            LIBError: If that is unknown, or it cannot be read.
        """
        if self._step_of is not None:
            return checked_step(self._step_of(checkpoint), checkpoint)
        if str(checkpoint) in self._steps:
            return checked_step(self._steps[str(checkpoint)], checkpoint)
        step = None
        if self._load is None:
            step = read_checkpoint(Path(checkpoint), with_weights=False).step
        return checked_step(step_in_name(checkpoint) if step is None else step, checkpoint)

    def read(self, checkpoint: Any) -> CheckpointContents:
        """Weights of a checkpoint."""
        if self._load is None:
            return read_checkpoint(Path(checkpoint))
        contents = contents_of(self._load(checkpoint))
        if contents.epoch is None and isinstance(checkpoint, (str, PathLike)) and is_checkpoint(Path(checkpoint)):
            try:
                told = read_checkpoint(Path(checkpoint), with_weights=False)
            except LIBError:  # only the caller can read it
                return contents
            return CheckpointContents(contents.weights, told.step, told.epoch, told.logging_step)
        return contents


@dataclass
class _Waiting:
    """A checkpoint that may still be being written.

    Attributes:
        seen: Sizes and times of its files.
        since: When they were first found to be so, in seconds of ``time.monotonic``.
    """

    seen: tuple[tuple[str, int, int], ...]
    since: float


class _NotYetReadableError(Exception):
    """A checkpoint that may become complete."""


@dataclass
class TracedSamples:
    """What snapshots are computed on, and the choice of what they compute.

    Attributes:
        data: The samples.
        choose_plan: Called when the run has no plan yet; chooses what every snapshot computes.
    """

    data: SnapshotData
    choose_plan: Callable[[], Any] = field(default=lambda: None)


class Tracer:
    """Takes a snapshot of each checkpoint, in order of their steps, and can go on after it was killed.

    After each snapshot, all that a later one needs is in one file of the run's folder, which is replaced atomically.

    Args:
        callback: The settings; its state becomes that of the run.
        model: The model.
        source: The checkpoints.
        logs: The log directory.
        precision: Returns a context manager within which the model is run, such as ``torch.autocast``.

    Attributes:
        folder: The folder of the run.

    Raises:
        LIBError: If the folder has another run, or one of other settings.
    """

    def __init__(
        self,
        callback: LIBCallback,
        model: nn.Module,
        source: CheckpointSource,
        logs: Path,
        precision: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.callback, self.model, self._source = callback, model, source
        self.folder = logs / callback.name
        self.layout = RunLayout(self.folder)
        self._left_out: set[str] = set()
        self._waiting: dict[str, _Waiting] = {}
        self._error: Exception | None = None
        self._finished_at: int | None = None
        has_begun = self.layout.trace_file.exists()
        self.is_resumed = self._restore()
        # Of a snapshot that was interrupted, what has been logged is not logged again. Loggers could drop all after a
        # step (purge_step), but that would hide what others have logged into this folder, such as the training.
        logged = logged_points(logs.resolve()) if has_begun else set()
        destination = RunDestination(logs, [_tensorboard(logs)], logged=logged)
        self.callback.start(destination, SINGLE_PROCESS, precision)

    def _settings(self) -> dict[str, str]:
        """What must be the same for all snapshots of a run, as text."""
        callback = self.callback
        given = callback.spec
        return {
            "settings": repr(asdict(callback.config.config)),
            "bases": repr(callback.computer.folders),
            "node_layers": repr([] if callback.node_layers is None else [x.name for x in callback.node_layers]),
            "positions": repr((given.skip_positions, given.dtype)),
            "samples": repr(callback.sample_config.plain),
        }

    def _restore(self) -> bool:
        """Continue from the file of an interrupted trace; whether there is one."""
        self._asked = self._settings()
        file = self.layout.trace_file
        if not file.exists():
            if self.layout.basis_files():
                raise LIBError(
                    f"{self.folder} has the snapshots of a training, or of something else that was no trace. Choose "
                    "another folder."
                )
            return False
        saved = torch.load(file, map_location="cpu", weights_only=True)
        if saved["state"]["step"] is None:  # it ended before its first snapshot, perhaps because of its settings
            return False
        if other := [name for name, value in self._asked.items() if saved["asked"].get(name) != value]:
            raise LIBError(
                f"{self.folder} has a trace with other {' and '.join(other)}. Choose another folder, or remove it."
            )
        state, callback = saved["state"], self.callback
        given = None if callback.node_layers is None else [layer.name for layer in callback.node_layers]
        callback.state.load_state_dict(state, given, callback.computer.scalar_keys)
        self._finished_at = saved["finished_at"]
        return True

    def _save(self) -> None:
        data = io.BytesIO()
        state = self.callback.state.state_dict()
        torch.save({"asked": self._asked, "state": state, "finished_at": self._finished_at}, data)
        write_bytes(self.layout.trace_file, data.getvalue())

    def prepare(self, samples: TracedSamples) -> None:
        """Say what to compute on, before the first checkpoint.

        Args:
            samples: The samples.
        """
        self._data = samples.data
        state = self.callback.state
        if state.plan is None:
            state.set_plan(samples.choose_plan(), {})
        if self.is_resumed and state.step is not None:
            self._require_same_training(state.step)
            rank_zero_info(f"{self.callback.name}: the trace in {self.folder} goes on after step {state.step:,}")
        else:
            self._save()  # from here on, the folder is that of a trace

    def _require_same_training(self, latest: int) -> None:
        """Stop if a checkpoint has other weights than the snapshot that is there of its step.

        Args:
            latest: Step of the latest snapshot.

        Raises:
            LIBError: If so.
        """
        done = {step for step in self.layout.basis_files() if step <= latest}
        by_step: dict[int, Any] = {}  # each is opened once, for its step
        for checkpoint in self._source.find(is_watched=True):
            with suppress(LIBError):  # which is said when its turn comes
                by_step.setdefault(self._source.step(checkpoint), checkpoint)
        for step in sorted(done & by_step.keys(), reverse=True):
            try:
                found = self._load(step, by_step[step])[WEIGHTS_HASH]
            except LIBError:
                continue
            if found != InteractionGraph.load(self.layout.basis_file(step)).info.get(WEIGHTS_HASH):
                raise LIBError(
                    f"{self.folder} has the trace of another training: its snapshot at step {step:,} is of other "
                    f"weights than {shortened(str(by_step[step]), 120)}. Choose another folder."
                )
            return
        log.warning(
            "%s: none of the checkpoints is of a step that %s has a snapshot of, so it is not sure that they are of "
            "the same training.", self.callback.name, self.folder,
        )  # fmt: skip

    def take_due(self, is_watched: bool) -> bool:
        """Take a snapshot of each checkpoint that is there, complete, and later than those before.

        Args:
            is_watched: Whether more of them are to come.

        Returns:
            Whether there was any.
        """
        due = self._due(self._source.find(is_watched), is_watched)
        for k, (step, checkpoint) in enumerate(due):
            try:
                self._take(step, checkpoint, None if is_watched else len(due) - k - 1)
            except _NotYetReadableError:
                return k > 0  # later ones wait for it
        return bool(due)

    def _due(self, found: Iterable[Any], is_watched: bool) -> list[tuple[int, Any]]:
        """Checkpoints to take a snapshot of now, in order of their steps, one for each step."""
        by_step: dict[int, Any] = {}
        pending: list[int] = []
        without_step: list[tuple[Any, UnknownStepError]] = []
        for checkpoint in found:
            if str(checkpoint) in self._left_out:
                continue
            is_complete = not is_watched or self._is_unchanged(checkpoint)
            try:
                step = self._source.step(checkpoint)
            except UnreadableError as error:
                if not is_watched or (is_complete and self._is_given_up(checkpoint)):
                    self._leave_out(checkpoint, error)
                elif (named := step_in_name(checkpoint)) is not None:
                    pending.append(named)
                continue
            except UnknownStepError as error:
                without_step.append((checkpoint, error))
                continue
            if not is_complete:
                pending.append(step)
            elif self._is_new(step, checkpoint):
                by_step.setdefault(step, checkpoint)
        for checkpoint, unknown in without_step:  # a tokenizer's file, a data set, the weights of the end once more
            if not by_step and self.callback.state.step is None:
                raise unknown
            self._leave_out(checkpoint, unknown)
        # Later ones wait for those before them.
        first_pending = min(pending, default=math.inf)
        return sorted((step, one) for step, one in by_step.items() if step < first_pending)

    def _is_new(self, step: int, checkpoint: Any) -> bool:
        state = self.callback.state
        if state.step is None or step > state.step:
            return True
        if step not in self._steps_done():
            self._leave_out(checkpoint, LIBError(f"It is of step {step:,}, before the latest snapshot"))
        return False

    def _steps_done(self) -> Collection[int]:
        return self.callback.state.history.steps if self.callback.config.follow else self.layout.basis_files()

    def _is_unchanged(self, checkpoint: Any) -> bool:
        now, seen = time.monotonic(), size_and_time(checkpoint)
        before = self._waiting.get(str(checkpoint))
        if before is None or before.seen != seen:
            self._waiting[str(checkpoint)] = _Waiting(seen, now)
            newest = max((written for _, _, written in seen), default=0) / 1e9
            return bool(seen) and time.time() - newest > _OLD
        return True

    def _is_given_up(self, checkpoint: Any) -> bool:
        return time.monotonic() - self._waiting[str(checkpoint)].since > _GIVE_UP

    def _leave_out(self, checkpoint: Any, error: Exception) -> None:
        """Go on without a checkpoint, and say why once."""
        self._left_out.add(str(checkpoint))
        self._error = error
        shown = shortened(str(checkpoint), 120)
        log.warning("%s: the checkpoint %s is left out. %s", self.callback.name, shown, _message(error))
        log_traceback(error)

    def _take(self, step: int, checkpoint: Any, remaining: int | None) -> None:
        """Take the snapshot of a checkpoint, write it and make it part of the run; or log why that failed."""
        started, callback = time.perf_counter(), self.callback
        reporter, state, recorder = callback.reporter, callback.state, callback.recorder
        try:
            metadata = self._load_if_complete(step, checkpoint, is_watched=remaining is None)
            kind = state.next_kind(remaining == 0 and not self._is_due(step), is_at_end=remaining == 0)
            with callback.resolver.precision():
                instrumented = callback.resolver.instrument(self.model, SINGLE_PROCESS)
                snapshot = recorder.compute(instrumented, self._data, metadata, kind)
            figures, layouts = reporter.write(snapshot)
        except _NotYetReadableError:
            raise
        except Exception as error:
            if state.n_snapshots == 0 and isinstance(error, LIBError) and not isinstance(error, UnreadableError):
                raise  # wrong from the beginning
            self._leave_out(checkpoint, error)
            return
        recorder.commit(snapshot, figures, layouts, kind.figures)
        keys = callback.computer.scalar_keys(callback.resolver.names)
        scalars = reporter.scalars(step, keys, callback.config.ablation is not None)
        reporter.log_scalars(scalars, metadata[LOGGING_STEP])
        reporter.flush()
        self._save()
        seconds = time.perf_counter() - started
        more = f"; {remaining:,} more, about {duration(remaining * seconds)}" if remaining else ""
        rank_zero_info(f"{callback.name}: step {step:,} of {shortened(str(checkpoint), 80)}{more}")

    def _load_if_complete(self, step: int, checkpoint: Any, is_watched: bool) -> dict[str, Any]:
        """Load a checkpoint whose files have not changed lately, which may lack a part all the same."""
        try:
            return self._load(step, checkpoint)
        except Exception as error:
            is_damaged = isinstance(error, UnreadableError) or not isinstance(error, LIBError)
            if is_watched and is_damaged and not self._is_given_up(checkpoint):
                raise _NotYetReadableError from error
            raise

    def _is_due(self, step: int) -> bool:
        """Whether the schedule has a snapshot at this step, so that it is not one for the end of the training."""
        schedule, planned = self.callback.schedule, self.callback.state.cursor.planned
        if not schedule.is_explicit:
            return step in planned
        return bool(schedule.every_n_validations) or schedule.next_step_after(step - 1) == step

    def _load(self, step: int, checkpoint: Any) -> dict[str, Any]:
        """Put the weights of a checkpoint into the model; returns what its snapshot notes."""
        contents = self._source.read(checkpoint)
        load_weights(self.model, contents.weights)
        logged = math.inf if contents.logging_step is None else contents.logging_step
        return {
            STEP: step,
            LOGGING_STEP: int(min(logged, max(step - 1, 0))),
            **({} if contents.epoch is None else {EPOCH: contents.epoch}),
            WEIGHTS_HASH: weights_hash(self.model),
            WEIGHTS: TRAINED,
        }

    def finish(self) -> None:
        """Write what is only known at the end.

        Raises:
            LIBError: If no checkpoint could be used.
        """
        callback, state = self.callback, self.callback.state
        if state.step is None:
            if self._error is not None:
                raise LIBError(f"No checkpoint could be used. {_message(self._error)}") from self._error
            raise LIBError(f"There was no checkpoint in {self._source} to take a snapshot of.")
        if self._finished_at == state.step:
            return
        if not state.graphs:  # the trace was interrupted after its last snapshot
            folders = callback.reporter.directory.folders
            state.graphs = {
                prefix: InteractionGraph.load(folder.layout.basis_file(state.step))
                for prefix, folder in folders.items()
                if folder.layout.basis_file(state.step).exists()  # a control has that of one step alone
            }
        self._complete(state.graphs[callback.name], state.step)
        callback.reporter.say(callback.reporter.finish(state.step))
        state.mark_drawn()
        callback.reporter.flush()
        self._finished_at = state.step
        self._save()

    def _complete(self, graph: InteractionGraph, step: int) -> None:
        """Add to the last snapshot what would take too long in each of them."""
        recorder, counts = self.callback.recorder, self.callback.config.causal.is_wanted
        if recorder.is_complete(graph, counts):
            if (
                CAUSAL in graph.info and self.callback.state.causal_step != step
            ):  # interrupted after the file was written
                found = self.callback.computer.causal_counts(graph)
                self.callback.state.set_causal(found)
                self.callback.reporter.log_scalars(found, graph.info[LOGGING_STEP])
            return
        try:
            if weights_hash(self.model) != graph.info.get(WEIGHTS_HASH):
                last = next(one for one in self._source.find() if self._source.step(one) == step)
                self._load(step, last)
            with self.callback.resolver.precision():
                instrumented = self.callback.resolver.instrument(self.model, SINGLE_PROCESS)
                with instrumented.shared_copy(copied_bytes(self.callback.config.memory_limit)):
                    found = recorder.complete(graph, instrumented, self._data, counts)
        except Exception as error:
            log.warning("%s: the last snapshot could not be completed. %s", self.callback.name, brief(error, 400))
            log_traceback(error)
            return
        if found:
            self.callback.reporter.log_scalars(found, graph.info[LOGGING_STEP])


def run_tracers(tracers: Sequence[Tracer], watch: float | None) -> None:
    """Take the snapshots of several runs along the same checkpoints, and finish the runs.

    Args:
        tracers: The runs.
        watch: As for `trace`.

    Raises:
        LIBError: If no checkpoint could be used.
    """
    try:
        latest = time.monotonic()
        if watch is not None:
            until = "Ctrl-C" if watch == math.inf else f"there was none for {duration(watch)}"
            rank_zero_info(f"Waiting for checkpoints until {until}.")
        while True:
            # All of them, whether or not those before have found any.
            if any([tracer.take_due(watch is not None) for tracer in tracers]):  # noqa: C419
                latest = time.monotonic()
            left = 0.0 if watch is None else latest + watch - time.monotonic()
            if left <= 0:
                break
            time.sleep(min(POLL, left))
    except KeyboardInterrupt:
        if watch is None:
            raise
        rank_zero_info("Interrupted. Started again, the trace goes on.")
    for tracer in tracers:
        tracer.finish()


def _message(error: Exception) -> str:
    return shortened(str(error), 400) if isinstance(error, LIBError) else brief(error, 400)


def _tensorboard(logs: Path) -> Any:
    """A logger that writes into a folder."""
    package = (imported_packages() or PACKAGES)[0]
    return member(package, "loggers.TensorBoardLogger")(str(logs), name="", version="")


def _samples(tracer: Tracer, batches: Iterable[Any]) -> TracedSamples:
    """Read the samples, or those of the interrupted trace, and check the settings on them."""
    callback, model, layout = tracer.callback, tracer.model, tracer.layout
    config = callback.sample_config
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    buffers = {"": SampleBuffer(config.num_samples)}
    if config.hold_out:
        buffers["held-out"] = SampleBuffer(config.num_samples)
    callback.resolver.check_names(model)
    restored = _restored(tracer, device)
    if restored is not None:
        buffers = restored
        for batch in buffers[""].batches[:1]:
            found = callback.check(model, batch)
            for buffer in buffers.values():
                buffer.use(found)
    else:
        for given in batches:
            batch = map_tensors(given, lambda t: t.to(device))
            found = callback.check(model, batch)
            rest = buffers[""].add(batch, None, found)
            if config.hold_out and rest is not None:
                buffers["held-out"].add(rest, None, found)
            if all(buffer.is_full for buffer in buffers.values()):
                break
        buffers["reference"] = buffers[""].subsample(NUM_REFERENCE_SAMPLES, callback.state.samples.seed)
    own = buffers[""]
    if all(is_empty(batch) for batch in own.batches):
        raise LIBError("There are no samples to compute on: batches is empty, or an iterator that is exhausted.")
    if restored is None:
        kept = [buffer.save(layout.samples_file(0, 1, kind)) for kind, buffer in buffers.items()]
        callback.state.samples.update(str(layout.path.resolve()) if all(kept) else None, True, config.plain)
    held_out = buffers["held-out"] if config.hold_out and buffers["held-out"].count else own
    data = SnapshotData(
        own.batches, held_out.batches, buffers["reference"].batches, callback.state.samples.seed, own.digest
    )  # fmt: skip

    def choose_plan() -> Any:
        instrumented = callback.resolver.instrument(model, SINGLE_PROCESS)
        graphs = len(callback.computer.prefixes)
        plan = plan_without_training(instrumented, own.batches[0], callback.plan_settings(own.count), graphs)
        takes = duration(plan.seconds)
        rank_zero_info(f"{callback.name}: each snapshot uses {plan.effort.text}, and will take about {takes}")
        return plan

    return TracedSamples(data, choose_plan)


def _restored(tracer: Tracer, device: torch.device) -> dict[str, SampleBuffer] | None:
    """The samples of an interrupted trace; None if there are none."""
    callback = tracer.callback
    saved, config = callback.state.samples, callback.sample_config
    if saved.written_to is None or saved.settings != config.plain:
        return None
    kinds = ["", "reference", *(["held-out"] if config.hold_out else [])]
    found = {
        kind: SampleBuffer.load(tracer.layout.existing_samples_file(0, 1, kind), config.num_samples, device)
        for kind in kinds
    }
    return {kind: buffer for kind, buffer in found.items() if buffer is not None} if all(found.values()) else None
