"""What happens to features between snapshots: lineages in every basis, and what emerges in the first one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lib_lightning.graph import InteractionGraph
from lib_lightning.lineage.emergence import EmergenceDetector
from lib_lightning.lineage.events import Event
from lib_lightning.lineage.tracker import FIXED_ORDER, FeatureTracker
from lib_lightning.metrics.summary import layer_key

# Births, splits, merges and deaths of features with less of their layer's importance are counted, but not told.
MIN_REPORTED_SHARE = 0.01
_TURNOVER = ("born", "ended", "overlap")


class SnapshotTracker:
    """Follows the features of several bases, and notices what emerges.

    Args:
        prefixes: Names of the bases; what emerges is looked for in the first one.

    Attributes:
        trackers: The tracker of each basis.
        detector: Notices what emerges.
    """

    def __init__(self, prefixes: Sequence[str]) -> None:
        self.trackers = {prefix: FeatureTracker() for prefix in prefixes}
        self.detector = EmergenceDetector()
        self._main = prefixes[0]
        self._samples: list[Any] = []

    def follow(
        self, graphs: Mapping[str, InteractionGraph], numbers: Mapping[str, float], distance: float = 1.0
    ) -> list[Event]:
        """Take in a snapshot; its graphs learn their lineages.

        Args:
            graphs: The graph of each basis, with values on probe samples and ``info["step"]``.
            numbers: The numbers of the snapshot, by name; those of the first basis in total are watched.
            distance: How far the snapshot is from the one before, in regular distances.

        Returns:
            What has happened to noteworthy features of the first basis, and what has emerged.
        """
        happened = {prefix: self.trackers[prefix].update(graph) for prefix, graph in graphs.items()}
        graph = graphs[self._main]
        # On other samples or with other probes numbers are others, though nothing has happened: what they do has to
        # be learned anew.
        n_probes = graph.info.get("settings", {}).get("n_probes")
        samples = [graph.info.get("reference_samples"), graph.info.get("n_samples"), n_probes]
        if samples != self._samples:
            self._samples, self.detector = samples, EmergenceDetector()
        features = {
            name: (graph.lineages[name].ids, basis.importance)
            for name, basis in graph.bases.items()
            if basis.kind not in FIXED_ORDER  # classes are not learned
        }
        watched = {
            key: value for key, value in numbers.items() if key.startswith(f"{self._main}/") and key.endswith("/total")
        }
        labels = {
            name: dict(zip(graph.lineages[name].ids.tolist(), names, strict=True))
            for name, names in graph.labels.items()
        }
        told = [
            replace(event, label=labels.get(event.layer or "", {}).get(event.lineage, ""))
            for event in happened[self._main]
            if max(event.before or 0, event.after or 0) >= MIN_REPORTED_SHARE
        ]
        return told + self.detector.update(graph.info["step"], features, watched, graph.labels, distance)

    @staticmethod
    def keys(prefix: str, node_layers: Sequence[str]) -> list[str]:
        """Names of the numbers of a basis."""
        return [f"{prefix}/{what}/{layer_key(name)}" for what in _TURNOVER for name in node_layers]

    def numbers(self) -> dict[str, float]:
        """How much has changed since the snapshot before, by name; nothing after the first one."""
        return {
            f"{prefix}/{what}/{layer_key(name)}": float(getattr(turnover, what))
            for prefix, tracker in self.trackers.items()
            for name, turnover in tracker.turnover.items()
            for what in _TURNOVER
        }

    def copy(self) -> SnapshotTracker:
        """A follower that goes on from here on its own."""
        other = copy.copy(self)
        other.trackers = {prefix: tracker.copy() for prefix, tracker in self.trackers.items()}
        other.detector = copy.deepcopy(self.detector)
        return other

    def state_dict(self) -> dict[str, Any]:
        """State to go on from, of plain numbers and tensors."""
        trackers = {prefix: tracker.state_dict() for prefix, tracker in self.trackers.items()}
        return {"trackers": trackers, "detector": self.detector.state_dict(), "samples": self._samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same bases."""
        for prefix, tracker in self.trackers.items():
            if prefix in state["trackers"]:
                tracker.load_state_dict(state["trackers"][prefix])
        self.detector.load_state_dict(state["detector"])
        self._samples = state["samples"]
