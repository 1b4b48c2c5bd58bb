"""What figures over time are drawn from: the features and the numbers of all snapshots so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from lib_lightning.algorithm.config import BasisKind
from lib_lightning.graph import InteractionGraph
from lib_lightning.plots.lineage_series import LayerSnapshot
from lib_lightning.plots.over_time import draw_sparsity_over_time
from lib_lightning.plots.spectrum_over_time import draw_spectrum_over_time
from lib_lightning.plots.timeline import draw_timeline


class PlotHistory:
    """The snapshots of a run in one basis, as far as figures over time show them.

    Attributes:
        steps: Number of optimizer steps before each snapshot, rising.

    Example:
        >>> import torch
        >>> from lib_lightning import compute_interaction_graph
        >>> from lib_lightning.lineage import FeatureTracker
        >>> from lib_lightning.lineage.reference import reference_features
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

    def __init__(self) -> None:
        self.steps: list[int] = []
        self._moments: dict[str, list[LayerSnapshot]] = {}
        # By metric and basis, in total.
        self._numbers: dict[str, dict[str, list[float]]] = {}

    def add(self, step: int, graph: InteractionGraph, numbers: Mapping[BasisKind, Mapping[str, float]]) -> None:
        """Take in a snapshot; an earlier one of the same step, or of a later one, is forgotten.

        Args:
            step: Number of optimizer steps before it.
            graph: The snapshot, with lineages.
            numbers: For each basis its numbers, of which those in total are kept.
        """
        kept = sum(s < step for s in self.steps)
        self.steps = [*self.steps[:kept], step]
        for name, basis in graph.bases.items():
            lineages = graph.lineages[name]
            labels = graph.labels.get(name)
            moment = LayerSnapshot(lineages.ids, basis.importance, graph.modules.get(name), labels, lineages.parents)
            self._moments[name] = [*self._moments.get(name, [])[:kept], moment]
        for basis_name, of_basis in numbers.items():
            for key, value in of_basis.items():
                metric, _, part = key.rpartition("/")
                if part == "total":
                    series = self._numbers.setdefault(metric, {})
                    series[basis_name] = [*series.get(basis_name, [])[:kept], value]

    def figures(self) -> dict[str, Figure]:
        """Draw everything over time.

        Returns:
            Figures by name.
        """
        spectra = {name: [moment.importance for moment in moments] for name, moments in self._moments.items()}
        return {
            "timeline": draw_timeline(self.steps, self._moments),
            "spectrum_over_time": draw_spectrum_over_time(self.steps, spectra),
            "sparsity_over_time": draw_sparsity_over_time(self.steps, self._numbers),
        }

    def state_dict(self) -> dict[str, Any]:
        """State to go on from, of plain numbers and tensors."""
        moments = {name: [dict(vars(moment)) for moment in moments] for name, moments in self._moments.items()}
        return {
            "steps": self.steps,
            "moments": moments,
            "numbers": {k: dict(v) for k, v in self._numbers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.steps, self._numbers = state["steps"], state["numbers"]
        self._moments = {
            name: [LayerSnapshot(**moment) for moment in moments] for name, moments in state["moments"].items()
        }
