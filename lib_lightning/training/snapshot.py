"""What one snapshot computes: graphs in one or several bases, scalars, labels, lineages and events."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torchmetrics import MetricCollection

from lib_lightning.ablation import AblationPlan, edges_required
from lib_lightning.algorithm.basis_kinds import DRAWN, REINIT, WITH_METRIC, kind_and_number, numbered
from lib_lightning.algorithm.config import BasisKind, LIBConfig, check_choice
from lib_lightning.algorithm.effort import EffortPlan, measure_cost
from lib_lightning.algorithm.memory_plan import MEMORY_LIMIT
from lib_lightning.algorithm.output_changes import most_important
from lib_lightning.algorithm.output_effects import effect_notes, effects_by
from lib_lightning.algorithm.output_gradients import is_output
from lib_lightning.algorithm.progress import phase_done
from lib_lightning.api import graph_of
from lib_lightning.dictionaries.dictionary import Dictionary
from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup, first_given
from lib_lightning.errors import SettingError, SettingTypeError, brief, check_number, log_traceback, quoted, shortened
from lib_lightning.graph import InteractionGraph
from lib_lightning.interventions.effects import Effect, feature_effects, keep_effects, known_output
from lib_lightning.interventions.output_effects import effects_in_graph
from lib_lightning.interventions.plan import LEVEL, NEVER, CausalPlan
from lib_lightning.io.basis_format import (
    CONTROL,
    EFFECT_SAMPLES,
    EFFECTS_BY,
    EFFORT,
    NOTES,
    NUM_SAMPLES,
    REFERENCE_SAMPLES,
    SAMPLES,
    STEP,
)
from lib_lightning.labels.labeller import Labeller, ScoringLabeller, find_labels
from lib_lightning.lineage.events import Event
from lib_lightning.lineage.reference import reference_features
from lib_lightning.lineage.snapshot_tracker import TURNOVER, SnapshotTracker
from lib_lightning.metrics.inputs import check_metrics
from lib_lightning.metrics.modules import Modularity
from lib_lightning.metrics.summary import GraphMetrics, default_metrics, layer_keys, scalar_keys
from lib_lightning.model.batch import agreed_hash, hash_batches, hash_tensors, is_empty, tensors_in
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.known_labels import labels_of_batch
from lib_lightning.model.preserve import copied_bytes, preserve_rng
from lib_lightning.model.reinitialize import reinitialize
from lib_lightning.model.replica import discard
from lib_lightning.training.effort import RunPlan, complete_effects, lacks_output_effects

log = logging.getLogger(__name__)

# Scalars of importances for the output, of the numbers of features whose name predicts where they are active, and of
# those that matter.
NATS, NAMED, CAUSAL_FEATURES = "nats", "named_features", "causal_features"
# A labeller that scores its labels gets so many times the samples that a graph was computed on, if there are as many:
# it needs half of them to choose a name, and a forward pass for each is little beside the passes of a graph.
_LABELLED_SAMPLES = 4
_CONTROL_FAILED = "The graph of re-initialised weights failed"
_OF_CONTROL = "With re-initialised weights: {}"
# Number of parameters to name.
_NAMED = 3
_PERMUTED = (
    "Parameters without an initialisation of their own have trained values, permuted, in the control: {} ({} in all)."
)


@dataclass(frozen=True)
class SnapshotConfig:
    """What every snapshot of a run computes.

    Args:
        config: How the graph is computed.
        baselines: Other bases to compute on the same samples. Each draw of the same one has a seed of its own.
        metrics: Metrics of each graph; None for `lib_lightning.metrics.default_metrics`.
        labeller: Names features; None for no names.
        ablation: When and how edges required are counted; None for never.
        memory_limit: As for `lib_lightning.compute_interaction_graph`, in GiB.
        follow: Whether features are tracked from snapshot to snapshot.
        causal: When and how the features that matter are counted.
        may_choose: As for `lib_lightning.api.graph_of`.
        control: ``"reinit"`` for the graph of re-initialised weights as well; None for none.
        dictionaries: Dictionaries of node layers, with the weights that they have at each snapshot. Those of baselines
            are none.

    Raises:
        SettingError: If a baseline is unknown or is the basis itself, or the memory limit is not positive.
        LIBError: If a metric needs anything but what a graph provides.
    """

    config: LIBConfig
    baselines: tuple[BasisKind, ...] = ()
    metrics: MetricCollection | None = None
    labeller: Labeller | ScoringLabeller | None = None
    ablation: AblationPlan | None = None
    memory_limit: float = MEMORY_LIMIT
    follow: bool = True
    may_choose: bool = False
    causal: CausalPlan = NEVER
    control: Literal["reinit"] | None = None
    dictionaries: Mapping[str, Dictionary] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.control is not None:
            check_choice("control", self.control, (REINIT,))
        check_number("memory_limit", self.memory_limit, lambda x: x > 0, "is a number of GiB above 0")
        if self.metrics is not None and not isinstance(self.metrics, MetricCollection):
            raise SettingTypeError(
                f"metrics must be a torchmetrics.MetricCollection; got {shortened(repr(self.metrics), 80)}. "
                "MetricCollection(...) makes one of a list, or of a dict with the names to log them under."
            )
        if not (self.labeller is None or callable(self.labeller) or hasattr(self.labeller, "label")):
            raise SettingTypeError(
                "labeller must be a function, an object with a method label, or None for no labels; got "
                f"{self.labeller!r}."
            )
        if self.ablation is not None and not isinstance(self.ablation, AblationPlan):
            raise SettingTypeError(
                f"ablation must be an AblationPlan, or None for no ablations; got {shortened(repr(self.ablation), 80)}."
            )
        for kind in self.baselines:
            check_choice("each of baselines", kind, get_args(BasisKind))
            with_basis(self.config, kind)
        once = [kind for kind in self.baselines if kind not in DRAWN]
        if self.config.basis in self.baselines or len({*once}) < len(once):
            raise SettingError(
                f"baselines are bases other than {self.config.basis!r}, each of them once, or several draws of "
                f"{quoted(DRAWN)}; got {list(self.baselines)}."
            )
        if self.metrics is not None:
            check_metrics(self.metrics)
            if taken := [name for name in TURNOVER if name in self.metrics]:
                raise SettingError(f"Metrics are called {quoted(taken)}, like scalars that are logged anyway.")

    @cached_property
    def collection(self) -> MetricCollection:
        """The metrics."""
        if self.metrics is not None:
            return self.metrics
        return default_metrics() if self.ablation is None else default_metrics(self.ablation.tolerance)

    @cached_property
    def module_options(self) -> dict[str, Any]:
        """Options of the search for modules, for figures to show the modules that are measured."""
        for metric in self.collection.clone().values():
            if isinstance(metric, Modularity):
                return {name: getattr(metric, name) for name in ("weights", "resolution", "seed", "rtol")}
        return {}


@dataclass(frozen=True)
class SnapshotData:
    """The samples that a snapshot is computed on.

    Attributes:
        batches: Batches for bases and edges.
        held_out: Batches that ablations are scored on; those of bases and edges if there are no others.
        reference: Batches on which features are recognised; the same in all snapshots.
        seed: Seed of the choice of positions in these.
        digest: Hash of ``batches``, if it is known.
    """

    batches: Sequence[Any]
    held_out: Sequence[Any] = ()
    reference: Sequence[Any] = ()
    seed: int = 0
    digest: bytes = b""


def first_samples(
    batches: Sequence[Any], num_samples: int, instrumented: InstrumentedModel, process_group: ProcessGroup
) -> Sequence[Any]:
    """The first samples of some batches.

    Args:
        batches: The batches of this process.
        num_samples: Number of samples over all processes; each takes the same share of its own.
        instrumented: The model, which knows what the samples of a batch are.
        process_group: The processes.

    Returns:
        Batches of them, with at least one sample on each process that has any.
    """
    own = sum(map(instrumented.num_samples, batches))
    total = sum(int(n) for n in process_group.gather(torch.tensor([own], device="cpu")))
    if total <= num_samples:
        return batches
    remaining, found = -(-num_samples * own // total), []
    for batch in batches:
        if remaining > 0:
            found.append(instrumented.select(batch, slice(0, remaining)))
            remaining -= instrumented.num_samples(batch)
    return found


@dataclass(frozen=True)
class Previous:
    """What a snapshot takes over from the one before it.

    Attributes:
        scalars: Scalars of the latest snapshot; those of an ablation stay until the next ablation.
        tracker: Tracks features over snapshots; None for a fresh one.
        relative_interval: Distance from the latest snapshot, in regular intervals.
    """

    scalars: Mapping[str, float]
    tracker: SnapshotTracker | None = None
    relative_interval: float = 1.0


@dataclass(frozen=True)
class Snapshot:
    """One snapshot. It is not part of the run before `RunState.commit`.

    Attributes:
        step: Number of optimizer steps before it.
        graphs: One graph for each prefix; the first one is of the basis itself.
        scalars: All scalars by name.
        is_ablation: Whether edges required were counted.
        events: What has happened to features since the snapshot before.
        tracker: The tracker, updated with this snapshot.
        batches: The batches of this process that it was computed on.
        is_causal: Whether the features that matter were counted, or that has failed.
    """

    step: int
    graphs: dict[str, InteractionGraph]
    scalars: dict[str, float]
    is_ablation: bool
    events: list[Event]
    tracker: SnapshotTracker
    batches: Sequence[Any] = ()
    is_causal: bool = False


class SnapshotComputer:
    """Computes snapshots: a pure function from model, samples and the snapshot before to a `Snapshot`.

    Args:
        config: What to compute.
        name: Prefix of the scalars. Those of a baseline have ``pca`` in place of ``lib``, ``NAME_pca`` in place of
            any other name; their ratios have ``NAME_over_pca``.

    Attributes:
        prefixes: The name of the basis for each prefix, the basis itself first: its kind, with a number for each draw
            after the first.
        control: Prefix of the control; None without one.
    """

    def __init__(self, config: SnapshotConfig, name: str) -> None:
        self.config, self.name = config, name
        self._failed: set[str] = set()
        own = "" if name == "lib" else f"{name}_"
        baselines = numbered(config.baselines)
        self.prefixes = {name: config.config.basis, **{f"{own}{kind}": kind for kind in baselines}}
        self.control = None if config.control is None else f"{own}{config.control}"
        self._keys: dict[tuple[str, ...], list[str]] = {}
        others: list[str] = [*baselines, *([] if config.control is None else [config.control])]
        self._ratio_prefixes = {f"{own}{kind}": f"{name}_over_{kind}" for kind in others}

    @property
    def folders(self) -> dict[str, str]:
        """What the graphs with each prefix are: those of `prefixes`, and the control."""
        return {**self.prefixes, **({} if self.control is None else {self.control: REINIT})}

    @cached_property
    def _metrics(self) -> GraphMetrics:
        """The metrics, prepared once for all snapshots: copying them takes longer than computing most of them."""
        return GraphMetrics(
            self.config.collection, lambda name, error: self._log_once(f"Metric '{name}' failed, and is NaN", error)
        )

    @property
    def _has_scores(self) -> bool:
        return labelled_samples(self.config.labeller) > 1

    def scalar_keys(self, node_layers: Sequence[str]) -> list[str]:
        """Names of all scalars of a snapshot with these node layers."""
        key = tuple(node_layers)
        if key not in self._keys:
            self._keys[key] = self._list_scalars(node_layers)
        return self._keys[key]

    def _list_scalars(self, node_layers: Sequence[str]) -> list[str]:
        metrics = self.config.collection
        keys = scalar_keys(node_layers, metrics)
        # Without weights that have learned anything, no edges are required.
        of_control = [] if self.control is None else keys
        if self.config.ablation is not None:
            keys += scalar_keys(node_layers, metrics, causal=True)
        totals = [key for key in keys if key.endswith("/total")]
        if self.config.causal.is_wanted:
            causal = [f"{self.name}/{CAUSAL_FEATURES}/{key}" for key in (*layer_keys(node_layers), "total")]
        else:
            causal = []
        turnover = [key for prefix in self.prefixes for key in SnapshotTracker.keys(prefix, node_layers)]
        has_nats = self.config.config.output_distribution != "none"
        nats = [f"{NATS}/{key}" for key in layer_keys(node_layers)] if has_nats else []
        named = [f"{NAMED}/{key}" for key in (*layer_keys(node_layers), "total")] if self._has_scores else []
        return [
            *(f"{prefix}/{key}" for prefix in self.prefixes for key in (*keys, *nats, *named)),
            *(f"{self.control}/{key}" for key in (*of_control, *(nats if of_control else []))),
            *(
                f"{ratio}/{key}"
                for prefix, ratio in self._ratio_prefixes.items()
                for key in totals
                if prefix != self.control or key in of_control
            ),
            *causal,
            *(turnover if self.config.follow else []),
            f"{self.name}/samples",
            f"{self.name}/seconds",
        ]

    def compute(
        self,
        instrumented: InstrumentedModel,
        data: SnapshotData,
        metadata: Mapping[str, Any],
        previous: Previous,
        ablate: bool = False,
        process_group: ProcessGroup = SINGLE_PROCESS,
        plan: RunPlan | None = None,
        causal: bool = False,
    ) -> Snapshot:
        """Compute one snapshot.

        Args:
            instrumented: The model and its node layers.
            data: The samples.
            metadata: What to note in the graphs, plain values; ``step`` is the number of optimizer steps so far.
            previous: What to take over from the snapshot before; not modified.
            ablate: Whether to count edges required.
            process_group: The processes of the run.
            plan: Number of samples, probes and features pushed forward; None for those of the configuration.
            causal: Whether to count the features that matter.

        Returns:
            The snapshot.
        """
        started = time.perf_counter()
        reference_hash = hash_batches(data.reference, process_group) if self.config.follow else None
        phase_done("reference samples")
        graphs: dict[str, InteractionGraph] = {}
        scalars: dict[str, float] = {}
        has_curves = ablate
        config, batches = self.config.config, data.batches
        if plan is not None:
            config = plan.effort.applied_to(config)
            batches = first_samples(batches, plan.effort.num_samples, instrumented, process_group)
            metadata = {**metadata, EFFORT: plan.of_snapshot()}
        # Numbers of samples have a meaning among these samples only.
        digest = data.digest or hash_tensors(("", t) for batch in batches for t in tensors_in(batch))
        count = sum(map(instrumented.num_samples, batches))
        metadata = {**metadata, SAMPLES: agreed_hash(digest + count.to_bytes(8, "big"), process_group)}
        tracker = SnapshotTracker(list(self.folders)) if previous.tracker is None else previous.tracker.copy()
        # One copy of the model for all that runs it.
        with process_group.sync_errors(), instrumented.shared_copy(copied_bytes(self.config.memory_limit)):
            for prefix, kind in self.prefixes.items():
                graph = graph_of(
                    instrumented, batches, with_basis(config, kind), self.config.memory_limit,
                    process_group, may_choose=self.config.may_choose,
                    dictionaries=self.config.dictionaries if prefix == self.name else {},
                )  # fmt: skip
                graph.info |= metadata
                if reference_hash is not None:
                    graph.info[REFERENCE_SAMPLES] = reference_hash
                    # Before labels, which depend on the signs of features.
                    self._track(prefix, graph, instrumented, data, tracker, process_group)
                measured, has_own_curves = self._complete(graph, instrumented, data, ablate, process_group)
                scalars |= {f"{prefix}/{key}": value for key, value in measured.items()}
                if causal and prefix == self.name:
                    scalars |= self.count_causal(graph, instrumented, data, plan, process_group)
                has_curves &= has_own_curves
                graphs[prefix] = graph
        events = []
        if self.config.follow:
            events = tracker.follow(graphs, scalars, previous.relative_interval)
            scalars |= tracker.scalars()
            phase_done("tracking")
        control = self._control(instrumented, batches, config, metadata, previous, process_group)
        if control is not None:
            graph, measured = control
            graphs[str(self.control)] = graph
            scalars |= {f"{self.control}/{key}": value for key, value in measured.items()}
        scalars = (
            dict.fromkeys(self.scalar_keys(graphs[self.name].node_layers), math.nan) | {**previous.scalars} | scalars
        )
        scalars |= self._ratios(scalars)
        scalars[f"{self.name}/samples"] = float(graphs[self.name].info[NUM_SAMPLES])
        scalars[f"{self.name}/seconds"] = time.perf_counter() - started
        return Snapshot(metadata[STEP], graphs, scalars, has_curves, events, tracker, batches, causal)

    def _control(
        self,
        instrumented: InstrumentedModel,
        batches: Sequence[Any],
        config: LIBConfig,
        metadata: Mapping[str, Any],
        previous: Previous,
        process_group: ProcessGroup,
    ) -> tuple[InteractionGraph, dict[str, float]] | None:
        """The graph of the model with re-initialised weights, and its scalars, once in a run: it does not train."""
        is_known = any(key.startswith(f"{self.control}/") and math.isfinite(x) for key, x in previous.scalars.items())
        if self.control is None or is_known or _CONTROL_FAILED in self._failed:
            return None
        found = None
        with self._optional(_CONTROL_FAILED, process_group):
            model, permuted = reinitialize(instrumented.model, config.basis_seed)
            other = InstrumentedModel(model, instrumented.layers, instrumented.spec)
            graph = graph_of(
                other, batches, config, self.config.memory_limit, process_group, may_choose=self.config.may_choose,
                dictionaries=self.config.dictionaries,
            )  # fmt: skip
            discard(model)
            graph.info |= {**metadata, CONTROL: {"kind": REINIT, "seed": config.basis_seed, "permuted": permuted}}
            graph.info[NOTES] = [_OF_CONTROL.format(note) for note in graph.info[NOTES]]
            if permuted:
                graph.info[NOTES].append(_PERMUTED.format(quoted(permuted[:_NAMED]), len(permuted)))
            with torch.no_grad():
                partitions = graph.partitions()
                measured = graph.measure(self._metrics, None, partitions)
                graph.find_modules(partitions, **self.config.module_options)
            found = graph, measured | nats_of(graph)
        phase_done("control")
        return found

    @torch.no_grad()
    def _track(
        self,
        prefix: str,
        graph: InteractionGraph,
        instrumented: InstrumentedModel,
        data: SnapshotData,
        tracker: SnapshotTracker,
        process_group: ProcessGroup,
    ) -> None:
        """Give a graph its reference features and lineages, and its features the signs that they had before."""
        graph.reference_features = reference_features(
            graph, instrumented.model, data.reference, data.seed, process_group=process_group,
            **vars(instrumented.spec),
        )  # fmt: skip
        phase_done("reference samples")
        tracker.track(prefix, graph)
        phase_done("tracking")

    @torch.no_grad()  # for metrics and a labeller of the user's, as in a validation
    def _complete(
        self,
        graph: InteractionGraph,
        instrumented: InstrumentedModel,
        data: SnapshotData,
        ablate: bool,
        process_group: ProcessGroup,
    ) -> tuple[dict[str, float], bool]:
        """Give a graph its modules and labels; returns its scalars, and whether it was ablated."""
        curves = self._ablate(graph, instrumented, data, process_group) if ablate else None
        partitions = graph.partitions()
        measured = graph.measure(self._metrics, curves, partitions)
        graph.find_modules(partitions, **self.config.module_options)
        phase_done("metrics and modules")
        self._label(graph, instrumented, data, process_group)
        named = self._named_features(graph, process_group)
        return measured | nats_of(graph) | named, curves is not None

    @contextmanager
    def _optional(self, what: str, process_group: ProcessGroup) -> Iterator[None]:
        """A block that runs the user's code: if it fails on any process, the snapshot goes on without its result."""
        try:
            with process_group.sync_errors():
                yield
        except Exception as error:
            self._log_once(what, error)

    def _log_once(self, what: str, error: Exception) -> None:
        if what not in self._failed:
            self._failed.add(what)
            log.warning("%s: %s. The snapshot goes on; this is not said again. %s", self.name, what, brief(error))
            log_traceback(error)

    def _ablate(
        self, graph: InteractionGraph, instrumented: InstrumentedModel, data: SnapshotData, process_group: ProcessGroup
    ) -> dict[tuple[str, str], Any] | None:
        """Ablation curves of all sections; None if they failed."""
        plan, required = self.config.ablation, None
        assert plan is not None
        with self._optional("Counting the edges required failed", process_group):
            required = edges_required(
                instrumented.model, data.held_out, graph, plan.score_fn, plan.tolerance, attack=plan.attack,
                memory_limit=self.config.memory_limit, process_group=process_group, **vars(instrumented.spec),
            )  # fmt: skip
        phase_done("edges required")
        return None if required is None else {section: result.as_curve() for section, result in required.items()}

    def lacks_effects(self, graph: InteractionGraph, plan: RunPlan | None) -> bool:
        """Whether a graph has no effects on the output because they take too long for each of many."""
        is_planned = plan is not None and lacks_output_effects(plan.effort)
        return is_planned and known_output(graph) is not None and not graph.output_effects

    def complete(
        self,
        graph: InteractionGraph,
        instrumented: InstrumentedModel,
        data: SnapshotData,
        plan: RunPlan | None,
        process_group: ProcessGroup,
    ) -> bool:
        """Give the last graph the effects on the output that take too long for each of many.

        Args:
            graph: The graph of the basis itself, which is changed.
            instrumented: The model and its node layers.
            data: The samples.
            plan: What a snapshot of the run computes.
            process_group: The processes of the run.

        Returns:
            Whether the graph has changed.
        """
        output = known_output(graph)
        if plan is None or output is None or not self.lacks_effects(graph, plan):
            return False
        has_changed = False
        with self._optional("Measuring effects on the output failed", process_group):
            batches = first_samples(data.batches, plan.effort.num_samples, instrumented, process_group)
            with model_session(instrumented):
                own = instrumented.parts(batch for batch in batches if not is_empty(batch))
                numbers: list[float] = []
                if own:
                    cost = measure_cost(instrumented, own[0], self.config.dictionaries)
                    chosen = complete_effects(cost, plan.effort, self.config.config)
                    effort = EffortPlan.of(cost, chosen, plan.effort.num_samples, math.inf)
                    numbers = [instrumented.capture_to_output(own[0])[-1].a.shape[-1], *effort.numbers]
                width, *chosen_numbers = first_given(numbers, process_group)
                config = EffortPlan.from_numbers(chosen_numbers).applied_to(self.config.config)
                features = {
                    layer.name: most_important(graph.bases[layer.name], config.effect_features or 0)
                    for layer in instrumented.layers
                    if not is_output(layer.taps)
                }
                output = replace(output, width=int(width))
                graph.output_effects, graph.info[EFFECT_SAMPLES] = effects_in_graph(
                    instrumented, own, graph, features, output, config, process_group
                )
                graph.info[EFFECTS_BY] = effects_by(config) if graph.output_effects else None
                bases = list(graph.bases.values())
                notes = effect_notes(config, bases, graph.output_effects, graph.info[EFFECT_SAMPLES])
                graph.info[NOTES] = [*graph.info[NOTES], *notes]
                has_changed = True
        return has_changed

    def count_causal(
        self,
        graph: InteractionGraph,
        instrumented: InstrumentedModel,
        data: SnapshotData,
        plan: RunPlan | None,
        process_group: ProcessGroup,
    ) -> dict[str, float]:
        """Count the features that demonstrably matter, and keep their effects in the graph.

        Args:
            graph: The graph of the basis itself, which is changed.
            instrumented: The model and its node layers.
            data: The samples.
            plan: What a snapshot of the run computes.
            process_group: The processes of the run.

        Returns:
            Scalars by name; none if no labels are known, or it has failed, which is logged once.
        """
        causal = self.config.causal
        effects: dict[str, Effect] = {}
        with self._optional("Counting the features that matter failed", process_group):
            batches, features = data.held_out, None
            if causal.every is None:
                affordable = self._affordable(graph, instrumented, data, plan, process_group)
                if affordable is None:
                    return {}
                batches, features = affordable
            own = torch.tensor([sum(map(instrumented.num_samples, batches))], device="cpu")
            samples = sum(int(n) for n in process_group.gather(own))
            effects = feature_effects(
                instrumented.model, batches, graph, causal.score, features, LEVEL, process_group,
                **vars(instrumented.spec),
            )  # fmt: skip
            keep_effects(graph, effects, score=causal.score_name, level=LEVEL, samples=samples)
        phase_done("features that matter")
        return self.causal_counts(graph) if effects else {}

    def causal_counts(self, graph: InteractionGraph) -> dict[str, float]:
        """The scalars of a graph whose features that matter have been counted, by name."""
        counts = {
            key: float(graph.effects[layer].significant.sum())
            for key, layer in zip(layer_keys(graph.node_layers), graph.node_layers, strict=True)
            if layer in graph.effects
        }
        counts["total"] = sum(counts.values())
        return {f"{self.name}/{CAUSAL_FEATURES}/{key}": count for key, count in counts.items()}

    def _affordable(
        self,
        graph: InteractionGraph,
        instrumented: InstrumentedModel,
        data: SnapshotData,
        plan: RunPlan | None,
        process_group: ProcessGroup,
    ) -> tuple[Sequence[Any], list[tuple[str, int]]] | None:
        """Samples and features for which the planned operations are enough; None if no labels are known."""
        counts = process_group.gather(torch.tensor([sum(map(instrumented.num_samples, data.held_out))], device="cpu"))
        own: list[float] = []
        if data.held_out:
            with model_session(instrumented):
                batch, output = data.held_out[0], known_output(graph)
                is_known = self.config.causal.score is not None or (
                    output is not None and labels_of_batch(instrumented, batch, output) is not None
                )
                if is_known:
                    cost = measure_cost(instrumented, batch, self.config.dictionaries)
                    allowed = plan.ablations or plan.effort.operations if plan else 0.0
                    own = list(cost.features_to_ablate(allowed, sum(int(count) for count in counts)))
        found = first_given(own, process_group)
        if not found:
            return None
        n, m = map(int, found)
        features = [
            (layer, int(j)) for layer, basis in graph.bases.items() for j in most_important(basis, m, by_output=True)
        ]
        return first_samples(data.held_out, n, instrumented, process_group), features

    def _label(
        self, graph: InteractionGraph, instrumented: InstrumentedModel, data: SnapshotData, process_group: ProcessGroup
    ) -> None:
        if self.config.labeller is None:
            return
        # A labeller may draw random numbers. A process without samples has nothing to label.
        with self._optional("The labeller failed, and features have no labels", process_group), preserve_rng([]):
            batches = data.batches
            if self._has_scores:
                num_samples = labelled_samples(self.config.labeller) * graph.info[NUM_SAMPLES]
                batches = first_samples(data.batches, num_samples, instrumented, process_group)
            if not batches:
                return
            found = find_labels(graph, instrumented.model, batches, self.config.labeller, **vars(instrumented.spec))
            graph.labels = {layer: labels.names for layer, labels in found.items()}
            graph.label_scores = {layer: x.scores.float() for layer, x in found.items() if x.scores is not None}
        phase_done("labels")

    def _named_features(self, graph: InteractionGraph, process_group: ProcessGroup) -> dict[str, float]:
        """Numbers of features whose label predicts where they are active, as the first process has found them."""
        if not self._has_scores:
            return {}
        scores = [graph.label_scores.get(layer) for layer in graph.node_layers]
        counts = [math.nan if one is None else float(one.isfinite().sum()) for one in scores]
        (agreed,) = process_group.broadcast([torch.tensor(counts, dtype=torch.float64, device="cpu")])
        counts = agreed.tolist()
        found = {f"{NAMED}/{key}": n for key, n in zip(layer_keys(graph.node_layers), counts, strict=True)}
        known = [n for n in counts if math.isfinite(n)]
        return found | {f"{NAMED}/total": sum(known) if known else math.nan}

    def _ratios(self, scalars: Mapping[str, float]) -> dict[str, float]:
        """Totals of the basis divided by those of each baseline."""
        ratios = {}
        for prefix, ratio_prefix in self._ratio_prefixes.items():
            totals = [key for key in scalars if key.startswith(f"{prefix}/") and key.endswith("/total")]
            for total in totals:
                key = total.removeprefix(f"{prefix}/")
                own, other = scalars[f"{self.name}/{key}"], scalars[total]
                ratios[f"{ratio_prefix}/{key}"] = own / other if other else math.nan
        return ratios


def labelled_samples(labeller: Labeller | ScoringLabeller | None) -> int:
    """How many times the samples that a graph is computed on a labeller looks at: more if it scores its labels."""
    return _LABELLED_SAMPLES if hasattr(labeller, "label") else 1


def with_basis(config: LIBConfig, name: str) -> LIBConfig:
    """The configuration of the same graph with another basis, such as a baseline, which has no metric.

    Args:
        config: The configuration.
        name: The kind of basis, with the number of a draw after the first.

    Returns:
        The configuration, with the seed ``basis_seed + k - 1`` for draw ``k``.

    Example:
        >>> with_basis(LIBConfig(metric="output"), "pca").metric
        'next'
        >>> with_basis(LIBConfig(basis_seed=5), "random_3").basis_seed
        7
    """
    kind, number = kind_and_number(name)
    metric = config.metric if kind in WITH_METRIC else "next"
    return replace(config, basis=kind, metric=metric, basis_seed=config.basis_seed + number - 1)  # type: ignore[arg-type]


def nats_of(graph: InteractionGraph) -> dict[str, float]:
    """What all features of each node layer do to the predictions, one at a time, in nats.

    Args:
        graph: The graph.

    Returns:
        ``nats/<layer>``: the sum of their importances for the output; nothing for layers without any.
    """
    values = [basis.output_importance for basis in graph.bases.values()]
    pairs = zip(layer_keys(graph.node_layers), values, strict=True)
    return {f"{NATS}/{key}": float(value.sum()) for key, value in pairs if value is not None}
