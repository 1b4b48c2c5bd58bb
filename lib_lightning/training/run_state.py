"""Everything about a run that its snapshots have produced so far, and that a checkpoint carries."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from matplotlib.figure import Figure

from lib_lightning.ablation import AblationPlan
from lib_lightning.algorithm.basis_kinds import REINIT
from lib_lightning.graph import InteractionGraph
from lib_lightning.interventions.plan import NEVER, CausalPlan
from lib_lightning.io.basis_format import METRICS, WEIGHTS_HASH
from lib_lightning.io.checkpoint_format import current_state
from lib_lightning.lineage.events import Event
from lib_lightning.lineage.snapshot_tracker import SnapshotTracker
from lib_lightning.plots.animated_layout import AnimatedLayout
from lib_lightning.plots.lineage_series import LayerSnapshot, as_array
from lib_lightning.plots.module_numbers import Members, ModuleNumbers
from lib_lightning.plots.over_time import draw_sparsity_over_time
from lib_lightning.plots.spectrum_over_time import draw_spectrum_over_time
from lib_lightning.plots.timeline import draw_timeline
from lib_lightning.training.budget import SkippedSnapshots, SnapshotKind, TimeSpent
from lib_lightning.training.effort import RunPlan
from lib_lightning.training.samples import SavedSamples
from lib_lightning.training.schedule import Schedule
from lib_lightning.training.snapshot import CAUSAL_FEATURES, NAMED, Snapshot

# Figures over the whole run are drawn at this number of snapshots, and again whenever it has doubled.
_FIRST_DRAWN = 4


@dataclass
class PlotHistory:
    """What figures over time show of the snapshots so far, in the basis itself.

    Attributes:
        steps: Number of optimizer steps before each snapshot, ascending.
        layers: For each node layer its features in each snapshot.
        totals: By metric and kind of basis, the total in each snapshot; NaN for snapshots that did not measure it.

    Example:
        >>> import torch
        >>> from lib_lightning import compute_interaction_graph
        >>> from lib_lightning.lineage import FeatureTracker, reference_features
        >>> model, batches = torch.nn.Linear(4, 2), [torch.randn(99, 4)]
        >>> tracker, history = FeatureTracker(), PlotHistory()
        >>> for step in (0, 10):
        ...     graph = compute_interaction_graph(model, batches, ["input", "output"])
        ...     graph.reference_features = reference_features(graph, model, batches)
        ...     events = tracker.update(graph, step)
        ...     history.add(step, graph, {"lib": graph.measure()})
        >>> list(history.figures())
        ['timeline', 'spectrum_over_time', 'sparsity_over_time']
    """

    steps: list[int] = field(default_factory=list)
    layers: dict[str, list[LayerSnapshot]] = field(default_factory=dict)
    totals: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, step: int, graph: InteractionGraph, scalars: Mapping[str, Mapping[str, float]]) -> None:
        """Add a snapshot, and drop earlier ones of the same or a later step.

        Args:
            step: Number of optimizer steps before it.
            graph: Its graph, with lineages.
            scalars: For each kind of basis the scalars that this snapshot has measured, of which the totals are kept.
        """
        kept = sum(s < step for s in self.steps)
        self.steps = [*self.steps[:kept], step]
        for name, basis in graph.bases.items():
            lineages = graph.lineages[name]
            labels = graph.labels.get(name)
            layer = LayerSnapshot(lineages.ids, basis.importance, graph.modules.get(name), labels, lineages.parents)
            self.layers[name] = [*self.layers.get(name, [])[:kept], layer]
        for kind, of_kind in scalars.items():
            for key in of_kind:
                metric, _, part = key.rpartition("/")
                if part == "total":
                    self.totals.setdefault(metric, {}).setdefault(kind, [])
        for metric, series in self.totals.items():
            for name, values in series.items():
                # Some metrics, such as those of ablations, are measured now and then.
                missing = [math.nan] * (kept - len(values))
                series[name] = [*values[:kept], *missing, scalars.get(name, {}).get(f"{metric}/total", math.nan)]

    def renumber_modules(self) -> ModuleNumbers:
        """Give modules the same numbers in all snapshots, for a history of version 0.1, which numbered them anew.

        Returns:
            The numbers, to continue with.
        """
        numbers = ModuleNumbers()
        for t in range(len(self.steps)):
            members = {
                name: Members(as_array(layers[t].ids), as_array(modules).astype(int), as_array(layers[t].importance))
                for name, layers in self.layers.items()
                if (modules := layers[t].modules) is not None
            }
            number_of = numbers.update(members)
            for name, of_layer in members.items():
                renumbered = torch.tensor([number_of.get(m, -1) for m in of_layer.modules.tolist()], device="cpu")
                self.layers[name][t] = replace(self.layers[name][t], modules=renumbered)
        return numbers

    def figures(self) -> dict[str, Figure]:
        """Draw all figures over time.

        Returns:
            The figures by name.
        """
        spectra = {name: [layer.importance for layer in layers] for name, layers in self.layers.items()}
        return {
            "timeline": draw_timeline(self.steps, self.layers),
            "spectrum_over_time": draw_spectrum_over_time(self.steps, spectra),
            "sparsity_over_time": draw_sparsity_over_time(self.steps, self.totals),
        }


@dataclass(frozen=True)
class Before:
    """What a snapshot takes over from those before it.

    Attributes:
        step: Step of the latest of these; None if there are none.
        scalars: Their latest scalars by name.
        tracker: Tracks features over them.
        n_snapshots: Their number.
        n_events: Number of events so far.
        ablation_step: Step of the latest of them that counted edges required.
        causal_step: Step of the latest of them that counted features that matter.
    """

    step: int | None
    scalars: dict[str, float]
    tracker: SnapshotTracker
    n_snapshots: int
    n_events: int
    ablation_step: int | None
    causal_step: int | None = None


# In names of scalars, as in `lib_lightning.training.snapshot`.
_NAMED = f"/{NAMED}/"


class RunState:
    """The state of one run: built fresh when a run begins, and replaced as a whole when one is resumed.

    Everything that outlives a snapshot is here, so that one `state_dict` is all that a checkpoint needs.

    Args:
        prefixes: The name of the basis for each prefix, the basis itself first.
        plan: When edges required are counted; None for never.
        follow: Whether features are tracked.
        schedule: When snapshots are due.
        causal: When the features that matter are counted.

    Attributes:
        node_layers: Names of the node layers; empty as long as they are not known.
        call: How the model is called, in plain values; empty as long as it is not known.
        graphs: The graphs of the latest snapshot by prefix; not part of checkpoints.
        scalars: The latest scalars by name; empty before the first snapshot.
        n_snapshots: Number of snapshots so far.
        n_drawn: Number of snapshots that the latest figures over the whole run show.
        step: Number of optimizer steps before the latest snapshot; None before the first.
        weights_hash: Hash of the weights of the latest snapshot.
        ablation_step: The same for the latest snapshot that counted edges required.
        causal_step: The same for the latest snapshot that counted features that matter.
        tracker: Tracks features over snapshots.
        history: What figures over time show.
        events: All events so far.
        layouts: Where features are drawn, by prefix.
        folders: Folders that the run has written to, the present one last.
        cursor: Position in the schedule.
        time: Seconds spent.
        skipped: Snapshots that were skipped.
        samples: Where the samples have been written.
        plan: What every snapshot computes; None before it has been chosen.
        planned_for: The user's options that it has been chosen for.
    """

    def __init__(
        self,
        prefixes: Mapping[str, str],
        plan: AblationPlan | None,
        follow: bool,
        schedule: Schedule,
        causal: CausalPlan = NEVER,
    ) -> None:
        self._prefixes, self._plan, self._follow, self._schedule = dict(prefixes), plan, follow, schedule
        self._causal = causal
        self.node_layers: list[str] = []
        self.call: dict[str, Any] = {}
        self.graphs: dict[str, InteractionGraph] = {}
        self.scalars: dict[str, float] = {}
        self.n_snapshots = self.n_drawn = 0
        self.step: int | None = None
        self.ablation_step: int | None = None
        self.causal_step: int | None = None
        self.weights_hash: str | None = None
        self._before_latest: Before | None = None
        self.tracker = SnapshotTracker(list(prefixes))
        self.history = PlotHistory()
        self.events: list[Event] = []
        self.layouts = {prefix: AnimatedLayout() for prefix in prefixes}
        self.folders: list[str] = []
        self.cursor, self.time, self.skipped = schedule.start(), TimeSpent(), SkippedSnapshots()
        self.samples = SavedSamples()
        self.plan: RunPlan | None = None
        self.planned_for: dict[str, Any] = {}

    def set_plan(self, plan: RunPlan | None, options: Mapping[str, Any]) -> None:
        """What every snapshot of the run computes has been chosen, for some options of the user."""
        self.plan, self.planned_for = plan, dict(options)

    def set_node_layers(self, names: Sequence[str]) -> None:
        """The node layers have become known."""
        self.node_layers = list(names)

    def set_call(self, call: Mapping[str, Any]) -> None:
        """It has become known how the model is called."""
        self.call = dict(call)

    def enter_folder(self, folder: str) -> None:
        """The run writes to this folder from here on."""
        self.folders = [*(f for f in self.folders if f != folder), folder]

    def forget_step(self) -> None:
        """A standalone validation has loaded the state of a training run: its snapshot is not one of that run."""
        self.step = None

    def next_kind(self, is_last: bool, is_at_end: bool = False) -> SnapshotKind:
        """What the next snapshot includes.

        Args:
            is_last: Whether it is the last one of the run, which includes everything.
            is_at_end: Whether it is after the last step; the last one may then be the same.

        Returns:
            Whether edges required are counted, figures over the whole run are drawn, and features that matter are
            counted.
        """
        is_end = is_last or is_at_end
        ablates = self._plan is not None and (is_end or self.n_snapshots % self._plan.every_n_snapshots == 0)
        draws = is_last or self.n_snapshots + 1 >= max(_FIRST_DRAWN, 2 * self.n_drawn)
        return SnapshotKind(ablates, draws, self._causal.is_due(self.n_snapshots))

    def before(self, step: int) -> Before:
        """What a snapshot at a step takes over. It replaces the latest one if that is of the same step."""
        if self.step == step and self._before_latest is not None:
            return self._before_latest
        latest = None if self.step == step else self.step
        return Before(
            latest, self.scalars, self.tracker, self.n_snapshots, len(self.events), self.ablation_step,
            self.causal_step,
        )  # fmt: skip

    def commit(self, snapshot: Snapshot, layouts: Mapping[str, AnimatedLayout]) -> None:
        """Make a snapshot part of the run.

        Args:
            snapshot: The snapshot, which has been written.
            layouts: Where its features have been drawn.
        """
        before = self._before_latest = self.before(snapshot.step)
        # A control is computed once.
        control = {prefix: graph for prefix, graph in self.graphs.items() if self._prefixes[prefix] == REINIT}
        self.graphs, self.scalars, self.step = {**snapshot.graphs, **control}, snapshot.scalars, snapshot.step
        self.weights_hash = next(iter(snapshot.graphs.values())).info.get(WEIGHTS_HASH)
        self.layouts = dict(layouts)
        self.n_snapshots = before.n_snapshots + 1
        self.ablation_step = snapshot.step if snapshot.is_ablation else before.ablation_step
        self.causal_step = snapshot.step if snapshot.is_causal else before.causal_step
        if self._follow:
            self.tracker = snapshot.tracker
            self.events = self.events[: before.n_events] + snapshot.events
            # Not `snapshot.scalars`, which include the latest values of what this snapshot did not measure.
            measured = {
                self._prefixes[prefix]: {
                    key: math.nan if metric["value"] is None else metric["value"]
                    for key, metric in graph.info[METRICS].items()
                }
                for prefix, graph in snapshot.graphs.items()
                if self._prefixes[prefix] != REINIT
            }
            for prefix in (prefix for prefix, kind in self._prefixes.items() if kind == REINIT):
                of_control = [key for key in snapshot.scalars if key.startswith(f"{prefix}/")]
                measured[REINIT] = {key.removeprefix(f"{prefix}/"): snapshot.scalars[key] for key in of_control}
            self.history.add(snapshot.step, next(iter(snapshot.graphs.values())), measured)

    def set_causal(self, scalars: Mapping[str, float]) -> None:
        """The features that matter have been counted in the latest snapshot, after it was taken."""
        self.causal_step = self.step
        self.scalars = {**self.scalars, **scalars}

    def mark_drawn(self) -> None:
        """Figures over the whole run have been drawn."""
        self.n_drawn = self.n_snapshots

    def state_dict(self) -> dict[str, Any]:
        """The state in plain values and tensors, which `torch.load` reads with ``weights_only=True``."""
        history = self.history
        return {
            "node_layers": list(self.node_layers),
            "call": dict(self.call),
            "scalars": dict(self.scalars),
            "n_snapshots": self.n_snapshots,
            "n_drawn": self.n_drawn,
            "step": self.step,
            "weights_hash": self.weights_hash,
            "ablation_step": self.ablation_step,
            "causal_step": self.causal_step,
            "tracker": self.tracker.state_dict(),
            "history": {
                "steps": list(history.steps),
                "layers": {name: [dict(vars(layer)) for layer in layers] for name, layers in history.layers.items()},
                "totals": {metric: dict(series) for metric, series in history.totals.items()},
            },
            "events": [event.to_json() for event in self.events],
            "layouts": {prefix: layout.state_dict() for prefix, layout in self.layouts.items()},
            "folders": list(self.folders),
            "schedule": self.cursor.position,
            "time": asdict(self.time),
            "skipped": asdict(self.skipped),
            "samples": asdict(self.samples),
            "plan": None if self.plan is None else self.plan.plain(),
            "planned_for": dict(self.planned_for),
        }

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        node_layers: Sequence[str] | None,
        scalar_keys: Callable[[Sequence[str]], Sequence[str]],
    ) -> None:
        """Continue an interrupted run.

        If its snapshots had other scalars, because node layers, bases or metrics are different now, snapshots start
        anew; samples and schedule continue.

        Args:
            state: What `state_dict` returned, in this version or in version 0.1.
            node_layers: Names of the node layers of this run; None to continue with the proposed ones.
            scalar_keys: Returns the names of all scalars of a snapshot with given node layers.
        """
        given, state = state, current_state(state)
        self.node_layers = list(state["node_layers"] if node_layers is None else node_layers)
        self.call = dict(state.get("call", {}))  # checkpoints before 0.2 have none
        self.cursor, self.samples = self._schedule.start(state["schedule"]), SavedSamples(**state["samples"])
        self.folders = list(state["folders"])
        self.plan = RunPlan.from_plain(plan) if (plan := state.get("plan")) else None
        self.planned_for = dict(state.get("planned_for", {}))
        for prefix, layout in self.layouts.items():
            if prefix in state["layouts"]:
                layout.load_state_dict(state["layouts"][prefix])
        expected = scalar_keys(self.node_layers) if self.node_layers else []
        scalars = dict(state["scalars"])
        if scalars:  # earlier versions have not measured everything
            later = ("/nats/", _NAMED, f"/{CAUSAL_FEATURES}/")
            scalars = {key: math.nan for key in expected if any(part in key for part in later)} | scalars
            # With or without a labeller, the run is the same.
            scalars = {key: value for key, value in scalars.items() if key in expected or _NAMED not in key}
        if scalars and set(scalars) != set(expected):
            return
        self.scalars, self.step, self.ablation_step = scalars, state["step"], state["ablation_step"]
        self.weights_hash, self.causal_step = state.get("weights_hash"), state.get("causal_step")
        self.n_snapshots, self.n_drawn = state["n_snapshots"], state["n_drawn"]
        self.tracker.load_state_dict(state["tracker"])
        history = state["history"]
        layers = {name: [LayerSnapshot(**layer) for layer in layers] for name, layers in history["layers"].items()}
        self.history = PlotHistory(list(history["steps"]), layers, history["totals"])
        if state is not given:  # converted from version 0.1
            self.tracker.modules[next(iter(self._prefixes))] = self.history.renumber_modules()
        self.events = [Event.from_json(event) for event in state["events"]]
        self.time, self.skipped = TimeSpent(**state["time"]), SkippedSnapshots(**state["skipped"])
