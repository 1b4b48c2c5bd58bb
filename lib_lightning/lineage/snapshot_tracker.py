"""Tracks changes between the snapshots of a run: lineages and modules in every basis, and emergence in the first."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lib_lightning.algorithm.basis_kinds import FIXED_ORDER
from lib_lightning.graph import InteractionGraph
from lib_lightning.io.basis_format import MODULES_TRACKED, NUM_SAMPLES, REFERENCE_SAMPLES, SETTINGS, STEP
from lib_lightning.lineage.emergence import EmergenceDetector
from lib_lightning.lineage.events import Event
from lib_lightning.lineage.tracker import FeatureTracker
from lib_lightning.metrics.summary import layer_keys
from lib_lightning.plots.module_numbers import Members, ModuleNumbers

# Births, splits, merges and deaths of features with a smaller share of their layer's importance are counted, not
# reported.
MIN_REPORTED_SHARE = 0.01
# Scalars that are logged beside the metrics, one for each node layer.
TURNOVER = ("born", "ended", "overlap")


class SnapshotTracker:
    """Tracks the features of several bases, and detects what emerges in the first one.

    Args:
        prefixes: Names of the bases, the main one first.

    Attributes:
        trackers: The tracker of each basis.
        modules: The numbers of the modules of each basis.
        detector: Detects emergence in the main basis.
    """

    def __init__(self, prefixes: Sequence[str]) -> None:
        self.trackers = {prefix: FeatureTracker() for prefix in prefixes}
        self.modules = {prefix: ModuleNumbers() for prefix in prefixes}
        self.detector = EmergenceDetector()
        self._main = prefixes[0]
        self._computed_on: list[Any] = []
        # Events of the features of the snapshot that is being added.
        self._turnover: dict[str, list[Event]] = {}

    def track(self, prefix: str, graph: InteractionGraph) -> None:
        """Add the graph of one basis: set its lineages, and give its features the signs that they had before.

        Args:
            prefix: Prefix of the basis.
            graph: The graph, with reference features and ``info["step"]``, before its features are labelled.
        """
        self._turnover[prefix] = self.trackers[prefix].update(graph)

    def follow(
        self, graphs: Mapping[str, InteractionGraph], scalars: Mapping[str, float], relative_interval: float = 1.0
    ) -> list[Event]:
        """Complete a snapshot whose graphs have been tracked: set the numbers of their modules, and find what changed.

        Args:
            graphs: The graph of each basis.
            scalars: The scalars of the snapshot, by name. Changes are detected in the totals of the main basis.
            relative_interval: Interval from the previous snapshot, divided by the regular one.

        Returns:
            Events of important features in the main basis, and of metrics.
        """
        for prefix, graph in graphs.items():
            _renumber_modules(graph, self.modules[prefix])
        graph = graphs[self._main]
        # Metrics depend on the samples and on the number of random-sign vectors: if these change, history starts anew.
        n_probes = graph.info.get(SETTINGS, {}).get("n_probes")
        computed_on = [graph.info.get(REFERENCE_SAMPLES), graph.info.get(NUM_SAMPLES), n_probes]
        if computed_on != self._computed_on:
            self._computed_on, self.detector = computed_on, EmergenceDetector()
        importances = {
            name: (graph.lineages[name].ids, basis.importance)
            for name, basis in graph.bases.items()
            if basis.kind not in FIXED_ORDER  # such as classes, which do not emerge
        }
        totals = {
            key: value for key, value in scalars.items() if key.startswith(f"{self._main}/") and key.endswith("/total")
        }
        labels = {
            name: dict(zip(graph.lineages[name].ids.tolist(), names, strict=True))
            for name, names in graph.labels.items()
        }
        reported = [
            replace(event, label=labels.get(event.layer or "", {}).get(event.lineage, ""))
            for event in self._turnover[self._main]
            if max(event.before or 0, event.after or 0) >= MIN_REPORTED_SHARE
        ]
        return reported + self.detector.update(graph.info[STEP], importances, totals, graph.labels, relative_interval)

    @staticmethod
    def keys(prefix: str, node_layers: Sequence[str]) -> list[str]:
        """Names of the `scalars` of a basis."""
        return [f"{prefix}/{name}/{key}" for name in TURNOVER for key in layer_keys(node_layers)]

    def scalars(self) -> dict[str, float]:
        """How much has changed since the previous snapshot, by name; empty after the first one."""
        return {
            f"{prefix}/{name}/{key}": float(getattr(tracker.turnover[layer], name))
            for prefix, tracker in self.trackers.items()
            for layer, key in zip(tracker.node_layers, layer_keys(tracker.node_layers), strict=True)
            if layer in tracker.turnover
            for name in TURNOVER
        }

    def copy(self) -> SnapshotTracker:
        """Copy the tracker with its state."""
        other = copy.copy(self)
        other.trackers = {prefix: tracker.copy() for prefix, tracker in self.trackers.items()}
        other._turnover = {}
        other.modules, other.detector = copy.deepcopy((self.modules, self.detector))
        return other

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings and tensors from which `load_state_dict` restores the tracker."""
        trackers = {prefix: tracker.state_dict() for prefix, tracker in self.trackers.items()}
        modules = {prefix: numbers.state_dict() for prefix, numbers in self.modules.items()}
        return {
            "trackers": trackers,
            "modules": modules,
            "detector": self.detector.state_dict(),
            "samples": self._computed_on,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a tracker of the same bases."""
        for prefix, tracker in self.trackers.items():
            if prefix in state["trackers"]:
                tracker.load_state_dict(state["trackers"][prefix])
        for prefix, numbers in self.modules.items():
            if prefix in state.get("modules", {}):  # version 0.1 did not track modules
                numbers.load_state_dict(state["modules"][prefix])
        self.detector.load_state_dict(state["detector"])
        self._computed_on = state["samples"]


def _renumber_modules(graph: InteractionGraph, numbers: ModuleNumbers) -> None:
    """Give the modules of a snapshot the numbers that they had in the snapshots before."""
    if not graph.modules:
        return
    members = {
        name: Members(*(tensor.cpu().numpy() for tensor in (graph.lineages[name].ids, modules, basis.importance)))
        for name, basis in graph.bases.items()
        if (modules := graph.modules.get(name)) is not None
    }
    number_of = numbers.update(members)
    for name, modules in graph.modules.items():
        graph.modules[name] = modules.new_tensor([number_of.get(m, -1) for m in modules.tolist()])
    graph.info[MODULES_TRACKED] = True
