"""What is looked at in each snapshot: graphs in several bases, their numbers, and what has become of whom."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torchmetrics import MetricCollection

from lib_lightning.ablation import AblationPlan, edges_required
from lib_lightning.algorithm.config import BasisKind, LIBConfig
from lib_lightning.algorithm.memory_plan import MEMORY_LIMIT
from lib_lightning.algorithm.progress import phase_done
from lib_lightning.api import graph_of
from lib_lightning.distributed.process_group import ProcessGroup
from lib_lightning.graph import InteractionGraph
from lib_lightning.labels.labeller import Labeller, label_features
from lib_lightning.lineage.events import Event
from lib_lightning.lineage.reference import reference_features
from lib_lightning.lineage.snapshot_tracker import SnapshotTracker
from lib_lightning.metrics.inputs import check_metrics
from lib_lightning.metrics.modules import Modularity
from lib_lightning.metrics.summary import GraphMetrics, default_metrics, scalar_keys
from lib_lightning.model.batch import hash_batches
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.preserve import preserve_rng
from lib_lightning.training.plot_history import PlotHistory

# Figures of the whole run so far are drawn when there are so many snapshots, and again whenever these have doubled.
_FIRST_DRAWN = 4


@dataclass(frozen=True)
class SnapshotConfig:
    """What is computed in each snapshot.

    Args:
        settings: How the graph is computed.
        baselines: Other bases to compute on the same samples.
        metrics: Numbers to compute of each graph; None for `lib_lightning.metrics.default_metrics`.
        labeller: Names features; None for no names.
        ablation: When and how edges required are counted; None for never.
        memory_limit: As for `lib_lightning.compute_interaction_graph`.
        follow: Whether features are followed from snapshot to snapshot.

    Raises:
        ValueError: If a baseline is unknown, or the basis itself; if there is to be no memory.
        LIBError: If a metric takes what is not of a graph.
    """

    settings: LIBConfig
    baselines: tuple[BasisKind, ...] = ()
    metrics: MetricCollection | None = None
    labeller: Labeller | None = None
    ablation: AblationPlan | None = None
    memory_limit: float = MEMORY_LIMIT
    follow: bool = True

    def __post_init__(self) -> None:
        if self.memory_limit <= 0:
            raise ValueError(f"memory_limit is a number of GiB above 0; got {self.memory_limit}.")
        for kind in self.baselines:
            replace(self.settings, basis=kind)
        if len({self.settings.basis, *self.baselines}) <= len(self.baselines):
            raise ValueError(
                f"baselines are bases other than {self.settings.basis!r}, each once; got {self.baselines}."
            )
        if self.metrics is not None:
            check_metrics(self.metrics)

    @cached_property
    def collection(self) -> MetricCollection:
        """The metrics."""
        if self.metrics is not None:
            return self.metrics
        return default_metrics() if self.ablation is None else default_metrics(self.ablation.tolerance)

    @cached_property
    def ready(self) -> GraphMetrics:
        """The metrics, made ready for all snapshots: to copy them each time takes longer than most numbers."""
        return GraphMetrics(self.collection)

    @cached_property
    def module_options(self) -> dict[str, Any]:
        """How modules are measured, and drawn."""
        for metric in self.collection.clone().values():
            if isinstance(metric, Modularity):
                return {name: getattr(metric, name) for name in ("weights", "resolution", "seed", "rtol")}
        return {}


@dataclass(frozen=True)
class SnapshotData:
    """What a snapshot is computed on.

    Attributes:
        batches: SnapshotData to compute on.
        held_out: SnapshotData to score on, where there are ablations.
        probes: SnapshotData to follow features on, the same ones in all snapshots.
        seed: Chooses positions in these.
    """

    batches: Sequence[Any]
    held_out: Sequence[Any] = ()
    probes: Sequence[Any] = ()
    seed: int = 0


@dataclass(frozen=True)
class Snapshot:
    """A snapshot, not yet accepted.

    Attributes:
        graphs: A graph for each prefix, the first one of the basis itself.
        numbers: All numbers, by name.
        ablated_step: Step of the newest ablation.
        events: What has happened to features since the snapshot before.
        follower: What features are followed by from here on.
        computing: Seconds that the graphs alone took, which depend on samples and probes.
    """

    graphs: dict[str, InteractionGraph]
    numbers: dict[str, float]
    ablated_step: int | None
    events: list[Event]
    follower: SnapshotTracker
    computing: float = 0.0


class SnapshotComputer:
    """Takes snapshots, and holds the newest graphs and numbers.

    Args:
        watched: What is computed.
        name: Prefix of the numbers. Those of a baseline have ``pca`` in place of ``lib``, ``NAME_pca`` of any other
            name; their ratios ``NAME_over_pca``.

    Attributes:
        settings: How graphs are computed from here on.
        graphs: The newest graph, by prefix; the first one is of the basis itself.
        numbers: The newest numbers, by name.
        snapshots: Number of snapshots taken.
        drawn: Number of those that the figures of the whole run show.
        ablated_step: Step of the newest ablation.
        follower: Follows features from snapshot to snapshot.
        history: All snapshots in the first basis, as far as figures show them.
        events: All that has happened, in order.
    """

    def __init__(self, watched: SnapshotConfig, name: str) -> None:
        self.watched, self.name, self.settings = watched, name, watched.settings
        own = "" if name == "lib" else f"{name}_"
        self.prefixes = {name: watched.settings.basis, **{f"{own}{kind}": kind for kind in watched.baselines}}
        self._over = {f"{own}{kind}": f"{name}_over_{kind}" for kind in watched.baselines}
        self.reset([])

    def reset(self, node_layers: Sequence[str]) -> None:
        """Start afresh, with node layers of these names; none if they are not known yet."""
        self.graphs: dict[str, InteractionGraph] = {}
        self.snapshots = self.drawn = 0
        self.ablated_step: int | None = None
        self.follower, self.history = SnapshotTracker(list(self.prefixes)), PlotHistory()
        self.events: list[Event] = []
        self.numbers = dict.fromkeys(self._keys(node_layers) if node_layers else [], math.nan)

    def _keys(self, node_layers: Sequence[str]) -> list[str]:
        metrics = self.watched.collection
        keys = scalar_keys(node_layers, metrics)
        if self.watched.ablation is not None:
            keys += scalar_keys(node_layers, metrics, causal=True)
        totals = [key for key in keys if key.endswith("/total")]
        turnover = [key for prefix in self.prefixes for key in SnapshotTracker.keys(prefix, node_layers)]
        return [
            *(f"{prefix}/{key}" for prefix in self.prefixes for key in keys),
            *(f"{over}/{key}" for over in self._over.values() for key in totals),
            *(turnover if self.watched.follow else []),
            f"{self.name}/samples",
            f"{self.name}/seconds",
        ]

    def ablates(self, last: bool) -> bool:
        """Whether the next snapshot counts edges required; the last one of a run does."""
        plan = self.watched.ablation
        return plan is not None and (last or self.snapshots % plan.every_n_snapshots == 0)

    def draws(self, last: bool) -> bool:
        """Whether the figures of the whole run are worth drawing after the next snapshot; the last one's are."""
        return last or self.snapshots + 1 >= max(_FIRST_DRAWN, 2 * self.drawn)

    def take(
        self,
        instrumented: InstrumentedModel,
        samples: SnapshotData,
        process_group: ProcessGroup,
        when: dict[str, Any],
        last: bool,
        distance: float = 1.0,
    ) -> Snapshot:
        """Take a snapshot; everything stays as it was until it is accepted.

        Args:
            instrumented: The model and its node layers.
            samples: What to compute on.
            process_group: The processes.
            when: What to note in the graphs, plain data: ``step`` is the number of optimizer steps before it.
            last: Whether it is the last one of the run.
            distance: How far it is from the snapshot before, in regular distances.

        Returns:
            The snapshot.
        """
        started = time.perf_counter()
        plan = self.watched.ablation
        ablates, computing = self.ablates(last), 0.0
        options: dict[str, Any] = vars(instrumented.spec)
        probe_samples = hash_batches(samples.probes, process_group) if self.watched.follow else None
        phase_done("probes")
        graphs: dict[str, InteractionGraph] = {}
        found: dict[str, float] = {}
        for prefix, kind in self.prefixes.items():
            settings, begun = replace(self.settings, basis=kind), time.perf_counter()
            graph = graph_of(instrumented, samples.batches, settings, self.watched.memory_limit, process_group)
            computing += time.perf_counter() - begun
            graph.info |= when
            curves = None
            if plan is not None and ablates:
                required = edges_required(
                    instrumented.model, samples.held_out, graph, plan.score_fn, plan.tolerance,
                    memory_limit=self.watched.memory_limit, process_group=process_group, **options,
                )  # fmt: skip
                curves = {section: answer.as_curve() for section, answer in required.items()}
                phase_done("edges required")
            partitions = graph.partitions()
            numbers_here = graph.measure(self.watched.ready, curves, partitions)
            found |= {f"{prefix}/{key}": value for key, value in numbers_here.items()}
            graph.find_modules(partitions, **self.watched.module_options)
            phase_done("metrics and modules")
            if self.watched.labeller is not None and samples.batches:
                with preserve_rng([]):  # a labeller may draw some
                    graph.labels = label_features(
                        graph, instrumented.model, samples.batches, self.watched.labeller, **options
                    )
                phase_done("labels")
            if self.watched.follow:
                graph.reference_features = reference_features(
                    graph, instrumented.model, samples.probes, samples.seed, process_group=process_group, **options
                )
                graph.info["reference_samples"] = probe_samples
                phase_done("probes")
            graphs[prefix] = graph
        follower, events = self.follower.copy(), []
        if self.watched.follow:
            events = follower.follow(graphs, found, distance)
            found |= follower.scalars()
            phase_done("following")
        numbers = self.numbers | found  # an ablation's numbers stay until the next one
        numbers |= self._ratios(numbers)
        numbers[f"{self.name}/samples"] = float(graphs[self.name].info["n_samples"])
        numbers[f"{self.name}/seconds"] = time.perf_counter() - started
        ablated_step = when["step"] if ablates else self.ablated_step
        return Snapshot(graphs, numbers, ablated_step, events, follower, computing)

    def accept(self, taken: Snapshot) -> None:
        """Make a snapshot the newest one."""
        self.graphs, self.numbers, self.ablated_step = taken.graphs, taken.numbers, taken.ablated_step
        self.snapshots += 1
        if self.watched.follow:
            self.follower = taken.follower
            self.events += taken.events
            numbers = {
                kind: {
                    key.removeprefix(f"{prefix}/"): x
                    for key, x in taken.numbers.items()
                    if key.startswith(f"{prefix}/")
                }
                for prefix, kind in self.prefixes.items()
            }
            graph = taken.graphs[self.name]
            self.history.add(graph.info["step"], graph, numbers)

    def state_dict(self) -> dict[str, Any]:
        """State to go on from, of plain numbers."""
        return {
            "numbers": dict(self.numbers), "snapshots": self.snapshots, "drawn": self.drawn,
            "ablated_step": self.ablated_step,
            "follower": self.follower.state_dict(), "history": self.history.state_dict(),
            "events": [event.to_json() for event in self.events],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Go on from a state, if it is of the same numbers; tell whether it was."""
        if set(state["numbers"]) != set(self.numbers):
            return False
        self.numbers, self.ablated_step = state["numbers"], state["ablated_step"]
        self.snapshots, self.drawn = state["snapshots"], state["drawn"]
        self.follower.load_state_dict(state["follower"])
        self.history.load_state_dict(state["history"])
        self.events = [Event.from_json(event) for event in state["events"]]
        return True

    def _ratios(self, numbers: dict[str, float]) -> dict[str, float]:
        ratios = {}
        for prefix, over in self._over.items():
            totals = [key for key in numbers if key.startswith(f"{prefix}/") and key.endswith("/total")]
            for total in totals:
                key = total.removeprefix(f"{prefix}/")
                own, other = numbers[f"{self.name}/{key}"], numbers[total]
                ratios[f"{over}/{key}"] = own / other if other else math.nan
        return ratios
