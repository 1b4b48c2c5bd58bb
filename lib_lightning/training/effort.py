"""The plan of a run: how many snapshots it has, and what each of them computes, from the operations of its training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.algorithm.cost import CostEstimate, duration, file_bytes
from lib_lightning.algorithm.effort import SLOWER, EffortPlan, ModelCost, choose_effort, measure_cost
from lib_lightning.algorithm.memory_plan import MEMORY_LIMIT
from lib_lightning.api import GRAPH_OPERATIONS, estimate_cost, with_chosen_metric
from lib_lightning.dictionaries.dictionary import Dictionary
from lib_lightning.distributed.process_group import ProcessGroup, first_given
from lib_lightning.errors import counted, log_traceback
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.training.schedule import FEWEST, MOST, Schedule
from lib_lightning.training.trainer import data_rank, synchronize

if TYPE_CHECKING:
    import lightning.pytorch as pl

# Share of the operations of the training that all snapshots may take, where the user sets none.
SHARE = 0.03
# Operations that a snapshot may take in any case: a second or so.
MIN_OPERATIONS = 1e10
# What a snapshot takes beside its graphs and forward passes, for drawing and files: in operations, and about as much in
# seconds; and the part of it that each further graph, of a baseline, takes again.
_BESIDE_GRAPHS, _SECONDS_BESIDE_GRAPHS, _OF_EACH_GRAPH = 5e9, 0.8, 0.6
# What comes once, in seconds: checks before the first snapshot, and the figures of the run after the last.
_SECONDS_ONCE = 3.0
# A training step has one forward pass and two backward passes, for activations and weights.
_PASSES = 3
# `estimate_cost` takes about a tenth of a graph, but at least two seconds. It is asked where that is at most 3% of what
# all snapshots take; else the rate of operations is that of forward passes, which graphs reach within a factor of two,
# of convolutions of four.
_ESTIMATE_SHARE, _ESTIMATE_OPERATIONS, _MAX_ESTIMATE_SHARE = 0.1, 4e10, 0.03
_TIMED_PASSES = 2
# The floating-point type that is expected in files where none is set.
_FLOAT = torch.float32
# A snapshot that takes longer than this many seconds is announced with the setting that would shorten it.
_LONG = 60


@dataclass(frozen=True)
class PlanSettings:
    """The user's settings that decide how much a snapshot computes.

    Attributes:
        config: What to compute; numbers of probes and of pushed features that are given are kept.
        available: Number of samples that there are, over all processes.
        given: The settings that are given, by name: ``num_samples``, ``n_probes``, ``n_pushed``, ``effort``.
        memory_limit: Memory that a snapshot may use, in GiB.
        may_choose: As for `lib_lightning.api.graph_of`.
        counts_at_end: Whether features that matter are counted after the last snapshot.
        reference_samples: Number of samples on which the features of each graph are recognised.
        dictionaries: Dictionaries of node layers, by name.
    """

    config: LIBConfig
    available: int
    given: Mapping[str, Any]
    memory_limit: float = MEMORY_LIMIT
    may_choose: bool = False
    counts_at_end: bool = False
    reference_samples: int = 0
    dictionaries: Mapping[str, Dictionary] = field(default_factory=dict)

    def without_given(self) -> PlanSettings:
        """The same with nothing given."""
        return replace(self, config=replace(self.config, n_probes=None, n_pushed=None), given={})


@dataclass(frozen=True)
class RunPlan:
    """What every snapshot of a run computes, and how many there are; the same from the first to the last.

    Attributes:
        effort: What one graph computes.
        snapshots: Number of snapshots of the run; None if it is unknown.
        seconds: Predicted seconds of one snapshot on this machine. Only messages depend on them.
        share: Predicted operations of all snapshots, relative to those of the training; None without one. Where its
            length is unknown, of one snapshot relative to the training between two validations.
        ablations: Operations that ablations of single features may take after the last snapshot; 0 for none.
        seconds_at_end: Predicted seconds of these, and of effects on the output that only the last snapshot has.
        tracking: Operations of the forward passes on the reference samples of each graph.
    """

    effort: EffortPlan
    snapshots: int | None
    seconds: float
    share: float | None
    ablations: float = 0.0
    seconds_at_end: float = 0.0
    tracking: float = 0.0

    @property
    def of_graph(self) -> float:
        """Operations of each graph and of recognising its features."""
        return self.effort.operations + self.tracking

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> RunPlan:
        """From what `plain` returns."""
        names = [field.name for field in fields(cls) if field.name != "effort"]
        own = {name: values[name] for name in names if name in values}
        return cls(EffortPlan(**{name: value for name, value in values.items() if name not in own}), **own)

    def of_snapshot(self) -> dict[str, Any]:
        """The part about a single snapshot as plain values, for its file, which is the same on any machine."""
        return asdict(self.effort)

    def plain(self) -> dict[str, Any]:
        """As plain values, for files and checkpoints."""
        values = asdict(self)
        return {**values.pop("effort"), **values}


@dataclass(frozen=True)
class PlanResult:
    """What `RunPlanner.plan` returns.

    Attributes:
        plan: The plan.
        warnings: Sentences to log: that a snapshot takes long, or that there are few samples.
        file_bytes: About the size of a basis file, without what is kept to follow features.
        num_features: About the number of features of each node layer.
        estimate: What one graph costs; None if that has not been estimated.
    """

    plan: RunPlan
    warnings: list[str]
    file_bytes: int
    num_features: Sequence[int]
    estimate: CostEstimate | None = None


class RunPlanner:
    """Chooses the plan of a run from counts of operations, so that two machines compute the same numbers.

    Args:
        trainer: The trainer, whose data loaders have been set up.
        schedule: When snapshots are due.
        max_overhead: Share of the training that all snapshots may take; infinite for no limit.
        graphs: Number of graphs of each snapshot.
    """

    def __init__(self, trainer: pl.Trainer, schedule: Schedule, max_overhead: float, graphs: int) -> None:
        self._trainer, self._schedule, self._graphs = trainer, schedule, graphs
        self._has_limit = math.isfinite(max_overhead)
        self._share = max_overhead if self._has_limit else SHARE
        self._steps = training_steps(trainer)
        # Processes with different data, among which the samples of a training step and of a graph are divided.
        self._replicas = data_rank(trainer)[1]
        # All processes wait for the one that draws and writes.
        self._beside_graphs = _BESIDE_GRAPHS * _beside(graphs) * self._replicas

    def plan(
        self, instrumented: InstrumentedModel, batch: Any, settings: PlanSettings, estimate: bool = False
    ) -> PlanResult:
        """Choose number and size of the snapshots.

        Args:
            instrumented: The model and its node layers.
            batch: A batch, of which a few samples are run.
            settings: What the user has asked for.
            estimate: Whether to estimate the cost of a graph in any case, and to raise the error if that fails.

        Returns:
            As many snapshots as fit in the smallest size, up to `MOST` and at least `FEWEST`, and the most accurate
            ones that then fit.
        """
        rate = None
        with model_session(instrumented):
            if settings.may_choose:
                settings = replace(settings, config=with_chosen_metric(settings.config, instrumented, batch))
            cost = measure_cost(instrumented, batch, settings.dictionaries)
            training = self._training_operations(cost, instrumented.num_samples(batch))
            plan = self._choose(cost, training, settings)
            estimates = estimate or self._can_estimate(plan)
            if not estimates:
                rate = self._forward_rate(instrumented, batch, cost)
        cost_estimate = _estimate(instrumented, batch, settings, plan, estimate) if estimates else None
        if cost_estimate is not None:
            rate = plan.effort.operations / cost_estimate.seconds
        elif rate is None:  # the estimate has failed
            with model_session(instrumented):
                rate = self._forward_rate(instrumented, batch, cost)
        rate *= self._replicas
        plan = self._with_end(self._with_seconds(plan, rate), cost, training, rate, settings)
        free = plan
        if settings.given:
            free = self._with_seconds(self._choose(cost, training, settings.without_given()), rate)
        warnings = [_warning(plan, settings.given, free.seconds), _few_samples(instrumented, cost, plan)]
        texts = [text for text in warnings if text]
        if cost_estimate is not None:
            return PlanResult(plan, texts, cost_estimate.file_bytes, cost_estimate.num_features, cost_estimate)
        ranks, dtype = cost.ranks(), instrumented.spec.dtype or _FLOAT
        return PlanResult(plan, texts, file_bytes(cost, ranks, dtype.itemsize), ranks)

    def _with_seconds(self, plan: RunPlan, rate: float) -> RunPlan:
        return replace(plan, seconds=_seconds(plan, self._graphs, rate))

    def _with_end(
        self, plan: RunPlan, cost: ModelCost, training: float, rate: float, settings: PlanSettings
    ) -> RunPlan:
        """The plan with what follows the last snapshot."""
        if self._trainer.state.fn != "fit":
            return plan
        missing = 0.0
        if lacks_output_effects(plan.effort):
            missing = cost.of_effects(complete_effects(cost, plan.effort, settings.config)) * SLOWER
        # What the snapshots leave of their share of the training.
        left = self._share * training - (plan.snapshots or math.inf) * self._of_snapshot(plan.of_graph) - missing
        most = cost.of_ablations(settings.available)
        ablations = min(most, max(plan.effort.operations, left)) if settings.counts_at_end else 0.0
        return replace(plan, ablations=ablations, seconds_at_end=(ablations + missing) / rate)

    def _forward_rate(self, instrumented: InstrumentedModel, batch: Any, cost: ModelCost) -> float:
        return _forward_rate(instrumented, batch, cost, partial(synchronize, self._trainer))

    def _can_estimate(self, plan: RunPlan) -> bool:
        """Whether an estimate takes little time beside the snapshots, and no other process waits for it."""
        needed = max(_ESTIMATE_SHARE * plan.effort.operations, _ESTIMATE_OPERATIONS)
        snapshots = (plan.snapshots or 1) * self._of_snapshot(plan.of_graph)
        return needed <= _MAX_ESTIMATE_SHARE * snapshots and self._trainer.world_size == 1

    def _choose(self, cost: ModelCost, training: float, settings: PlanSettings) -> RunPlan:
        allowed, due, tracking = self._share * training, self._number_due(), _tracking(cost, settings)
        chosen_number = due is None
        if due is None:
            smallest = self._of_snapshot(_effort(cost, settings, 0.0).operations + tracking)
            fitting = int(min(MOST, allowed / smallest)) if self._has_limit else MOST
            due = min(max(FEWEST, fitting), self._steps + 1)
        # A training without an end has one snapshot in each interval between two validations.
        is_known = math.isfinite(due) and math.isfinite(self._steps)
        snapshots = max(1.0, due) if is_known else 1.0
        least = 0.0 if chosen_number and self._has_limit and snapshots > FEWEST else MIN_OPERATIONS
        each_graph = (allowed / snapshots - self._beside_graphs) / self._graphs - tracking
        effort = _effort(cost, settings, max(least, each_graph))
        plan = RunPlan(effort, round(snapshots) if is_known else None, math.nan, None, tracking=tracking)
        return replace(plan, share=snapshots * self._of_snapshot(plan.of_graph) / training if training else None)

    def _of_snapshot(self, of_graph: float) -> float:
        """Operations of a snapshot, of which each graph and recognising its features takes some."""
        return self._graphs * of_graph + self._beside_graphs

    def _number_due(self) -> float | None:
        """About how many snapshots are due in the user's schedule, infinite if unknown; None if the plan chooses."""
        if self._trainer.state.fn == "fit" and not self._schedule.is_explicit and math.isfinite(self._steps):
            return None
        return expected_snapshots(self._schedule, self._trainer)

    def _training_operations(self, cost: ModelCost, size: int) -> float:
        """Operations of the training on all processes; of one without an end, those between two validations; else 0."""
        if self._trainer.state.fn != "fit":
            return 0.0
        batches = self._trainer.num_training_batches
        steps = self._steps if math.isfinite(self._steps) else batches if math.isfinite(batches) else 0
        return _PASSES * cost.forward.of(_samples_per_step(self._trainer, size)) * steps * self._replicas

    def describe(self, plan: RunPlan, ablates: bool = False) -> str:
        """A plan in words.

        Args:
            plan: The plan.
            ablates: Whether some snapshots count the edges required, whose time is not known before.

        Returns:
            A few sentences in one line.
        """
        return self._describe(plan) + "; the edges required (AblationPlan) take more, which is not included" * ablates

    def _describe(self, plan: RunPlan) -> str:
        when, each = str(self._schedule), duration(plan.seconds)
        if self._number_due() is None:
            when = f"from step 0 to step {self._steps:,.0f}, log-spaced"
        if self._trainer.state.fn != "fit":
            return f"the snapshot uses {plan.effort.text}, and will take about {each}"
        if plan.snapshots is None:
            # In a training without an end, snapshots that would take more than their share are skipped.
            within = f", within {_percent(self._share)} of the training time" if self._has_limit else ""
            return f"snapshots {when}{within}, each with {plan.effort.text}, about {each} each"
        total = plan.seconds * plan.snapshots + plan.seconds_at_end
        at_end = f", {duration(plan.seconds_at_end)} at the end for effects of features" if plan.seconds_at_end else ""
        if plan.snapshots == 1:
            text = f"1 snapshot ({when}), with {plan.effort.text}, about {each}{at_end}"
        else:
            text = (
                f"{plan.snapshots:,} snapshots ({when}), each with {plan.effort.text}, about {each} each{at_end}"
                f"{',' if at_end else ''} and {duration(total + _SECONDS_ONCE)} in total"
            )
        if plan.share is not None and plan.share <= self._share * 1.005:
            share = plan.share * total / max(plan.seconds * plan.snapshots, 1e-9)
            return f"{text}: {share:.1%} of the training"
        if self._has_limit and self._number_due() is None:
            text += (
                f". That is more than {_percent(self._share)} of so short a training, but a film needs a few snapshots"
            )
        return text


def plan_without_training(
    instrumented: InstrumentedModel, batch: Any, settings: PlanSettings, graphs: int = 1
) -> RunPlan:
    """What every snapshot computes where there is no training to compare with: as much as a single graph.

    Args:
        instrumented: The model and its node layers.
        batch: A batch, of which a few samples are run.
        settings: What the user has asked for.
        graphs: Number of graphs of each snapshot.

    Returns:
        The plan.
    """
    with model_session(instrumented):
        if settings.may_choose:
            settings = replace(settings, config=with_chosen_metric(settings.config, instrumented, batch))
        cost = measure_cost(instrumented, batch, settings.dictionaries)
        rate = _forward_rate(instrumented, batch, cost, lambda: _finish_kernels(instrumented))
    effort = _effort(cost, settings, GRAPH_OPERATIONS)
    plan = RunPlan(effort, None, math.nan, None, tracking=_tracking(cost, settings))
    return replace(plan, seconds=_seconds(plan, graphs, rate))


def _seconds(plan: RunPlan, graphs: int, rate: float) -> float:
    """Seconds of a snapshot with some graphs, at a rate of operations."""
    return graphs * plan.of_graph / rate + _SECONDS_BESIDE_GRAPHS * _beside(graphs)


def _beside(graphs: int) -> float:
    """What some graphs take beside their computation, relative to a single one."""
    return 1 + _OF_EACH_GRAPH * (graphs - 1)


def _tracking(cost: ModelCost, settings: PlanSettings) -> float:
    """Operations of the forward passes by which the features of a graph are recognised."""
    samples = settings.reference_samples
    return (cost.inference or cost.forward).of(samples) if samples else 0.0


def _finish_kernels(instrumented: InstrumentedModel) -> None:
    device = next((p.device for p in instrumented.model.parameters()), torch.device("cpu"))
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forward_rate(
    instrumented: InstrumentedModel, batch: Any, cost: ModelCost, finish_kernels: Callable[[], None]
) -> float:
    """Operations per second of this machine in a forward pass on a batch."""
    seconds = []
    for _ in range(_TIMED_PASSES):  # the first one warms up
        finish_kernels()
        started = time.perf_counter()
        instrumented.activations(batch)
        finish_kernels()
        seconds.append(time.perf_counter() - started)
    return cost.forward.of(instrumented.num_samples(batch)) / max(min(seconds), 1e-9)


def _estimate(
    instrumented: InstrumentedModel, batch: Any, settings: PlanSettings, plan: RunPlan, must_succeed: bool
) -> CostEstimate | None:
    """What one graph costs, from a trial; None if that fails, but need not succeed."""
    config = plan.effort.applied_to(settings.config)
    try:
        return estimate_cost(
            instrumented.model, batch, instrumented.layers, plan.effort.num_samples, "exact",
            settings.memory_limit, dictionaries=settings.dictionaries, **vars(instrumented.spec), **vars(config),
        )  # fmt: skip
    except Exception as error:  # what is wrong is said by the snapshot, if it is wrong there too
        if must_succeed:
            raise
        log_traceback(error)
        return None


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _effort(cost: ModelCost, settings: PlanSettings, allowed: float) -> EffortPlan:
    config, n = settings.config, settings.available
    if settings.given.get("effort") == "exact":
        return EffortPlan.of(cost, config, n, allowed, in_run=True)
    return choose_effort(cost, config, n, allowed, "num_samples" in settings.given, in_run=True)


def _warning(plan: RunPlan, given: Mapping[str, Any], seconds_if_free: float) -> str:
    """What to say before a snapshot that takes long, with the setting that would shorten it; else an empty text."""
    if plan.seconds <= _LONG:
        return ""
    text = f"each snapshot will take about {duration(plan.seconds)}"
    named = [f"{name}={value!r}" for name, value in given.items() if (name, value) != ("effort", "auto")]
    if named and seconds_if_free < 0.8 * plan.seconds:
        return f"{text}, because of {' and '.join(named)}. Without: about {duration(seconds_if_free)}."
    return f"{text}. Fewer node_layers, or num_samples={max(2, plan.effort.num_samples // 4)}, would shorten it."


def _few_samples(instrumented: InstrumentedModel, cost: ModelCost, plan: RunPlan) -> str:
    """What to say of the first node layer with more directions than the samples can show; else an empty text."""
    shapes = [section.shape_in for section in cost.sections] + [cost.sections[-1].shape_out]
    for i, (layer, (S, d)) in enumerate(zip(instrumented.layers, shapes, strict=True)):
        n = plan.effort.num_samples
        if n * S <= d and i not in cost.latents:
            positions = "" if S == 1 else f" of {counted(S, 'position')}"
            return (
                f"'{layer.name}' has {counted(d, 'direction')}, of which {counted(n, 'sample')}{positions} can show "
                f"{n * S - 1:,} at most. More samples would show more."
            )
    return ""


def lacks_output_effects(effort: EffortPlan) -> bool:
    """Whether snapshots leave out effects on the output, which take too long for each of many."""
    return effort.effect_samples == 0


def complete_effects(cost: ModelCost, effort: EffortPlan, config: LIBConfig) -> LIBConfig:
    """How effects on the output are measured after the last snapshot, where others leave them out.

    Args:
        cost: Cost of the model.
        effort: What each graph computes.
        config: What the user has asked for.

    Returns:
        The configuration.
    """
    chosen = replace(effort.applied_to(config), effect_samples=None, effect_features=None, effect_directions=None)
    return cost.with_effects(chosen, effort.num_samples)


def training_steps(trainer: pl.Trainer) -> float:
    """Number of optimizer steps until the end of a training; infinite if that is unknown, or there is no training."""
    steps = trainer.estimated_stepping_batches if trainer.state.fn == "fit" else math.inf
    return math.inf if steps < 0 else float(steps)  # max_steps=-1 for data without a length


def expected_snapshots(schedule: Schedule, trainer: pl.Trainer) -> float:
    """About how many snapshots a schedule has until the end of the training; infinite if that is unknown.

    A standalone validation has one.
    """
    if trainer.state.fn != "fit":
        return 1.0
    return schedule.count(_validations(trainer), training_steps(trainer))


def agree(plan: RunPlan | None, process_group: ProcessGroup) -> RunPlan | None:
    """The plan of the first process that has one, on all processes; None if no process has one."""
    own: list[float] = []
    if plan is not None:
        of_run = [plan.snapshots or 0, plan.seconds, plan.share or 0, plan.ablations, plan.seconds_at_end]
        own = [*plan.effort.numbers, *of_run, plan.tracking]
    found = first_given(own, process_group)
    if not found:
        return None
    *effort, snapshots, seconds, share, ablations, at_end, tracking = found
    of_effort = EffortPlan.from_numbers(effort)
    return RunPlan(of_effort, int(snapshots) or None, seconds, share or None, ablations, at_end, tracking)


def _validations(trainer: pl.Trainer) -> float:
    epochs = math.inf if trainer.max_epochs in (None, -1) else float(trainer.max_epochs or 0)
    batches = trainer.num_training_batches
    if trainer.max_steps not in (None, -1) and math.isfinite(batches):
        epochs = min(epochs, trainer.max_steps * trainer.accumulate_grad_batches / max(1, batches))
    interval = trainer.val_check_batch if trainer.val_check_batch not in (None, math.inf) else batches
    every = (trainer.check_val_every_n_epoch or 1) * max(1, interval) / max(1, batches)
    return epochs / every if math.isfinite(batches) else epochs


def validation_samples(trainer: pl.Trainer, size: int) -> float:
    """About how many samples a validation has, with batches of a size; infinite as long as that is unknown."""
    batches = max(trainer.num_val_batches, default=0) if trainer.val_dataloaders is not None else 0
    return batches * size * data_rank(trainer)[1] if batches else math.inf


def _samples_per_step(trainer: pl.Trainer, size: int) -> int:
    """Samples of one process in an optimizer step, by the batch size of the training data loader, or else ``size``."""
    return int(getattr(trainer.train_dataloader, "batch_size", None) or size) * max(1, trainer.accumulate_grad_batches)
