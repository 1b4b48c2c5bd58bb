"""Follows features from snapshot to snapshot: each belongs to a lineage with an id of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib_lightning.errors import LIBError
from lib_lightning.graph import InteractionGraph, Lineages
from lib_lightning.lineage.events import Event
from lib_lightning.lineage.matching import Match, match_features

# Features of these kinds are what their number says, such as a class.
FIXED_ORDER = ("neuron", "centered")


@dataclass(frozen=True)
class Turnover:
    """How much of a node layer has changed since the snapshot before.

    Attributes:
        born: Number of features that continue none.
        ended: Number of features that none continues.
        overlap: How much of the spanned subspace has stayed, as `Match.overlap`.
    """

    born: int
    ended: int
    overlap: float


@dataclass(frozen=True)
class _Last:
    """What is kept of a node layer in the newest snapshot."""

    values: Tensor
    ids: Tensor
    share: Tensor
    next_id: int


class FeatureTracker:
    """Follows the features of every node layer through a series of snapshots, by what they do on probe samples.

    A feature that shares at least half of its variance with one of the snapshot before continues its lineage, whatever
    has become of the weights. So do features that have only turned among themselves, within a subspace that is the
    same; that is seen for up to an eighth as many dimensions as there are values, 128 of 1,024. What is then left over
    was born, has split from another, has merged into another, or died.

    Attributes:
        turnover: How much has changed in the newest snapshot, by node layer; empty at the first one.

    Example:
        >>> from lib_lightning import compute_interaction_graph
        >>> from lib_lightning.lineage.reference import reference_features
        >>> model, batches, tracker = torch.nn.Linear(4, 2), [torch.randn(200, 4)], FeatureTracker()
        >>> for step in range(2):
        ...     graph = compute_interaction_graph(model, batches, ["input", "output"])
        ...     graph.reference_features = reference_features(graph, model, batches)
        ...     events = tracker.update(graph, step)
        >>> graph.lineages["input"].ids, events
        (tensor([0, 1]), [])
    """

    def __init__(self) -> None:
        self.turnover: dict[str, Turnover] = {}
        self._last: dict[str, _Last] = {}
        self._samples: str | None = None

    def update(self, graph: InteractionGraph, step: int | None = None) -> list[Event]:
        """Find the lineages of a snapshot, and write them to ``graph.lineages``.

        Args:
            graph: The snapshot, with ``graph.reference_features`` on the same samples as all others. If
                ``info["reference_samples"]``, the hash of these samples, changes, all lineages start anew.
            step: Number of optimizer steps before it; ``info["step"]`` by default.

        Returns:
            What has happened since the snapshot before: births, splits, merges and deaths, with the features' shares
            of the importance of their layers.

        Raises:
            LIBError: If the graph has no such values, or no step.
        """
        if set(graph.reference_features) != set(graph.node_layers):
            raise LIBError(
                "This graph has no reference features, which features are tracked by. Set graph.reference_features to "
                "lib_lightning.lineage.reference_features(graph, model, batches), with the same batches every time."
            )
        step = graph.info.get("step") if step is None else step
        if step is None:
            raise LIBError("The graph does not say after which step it was taken: give step=.")
        samples = graph.info.get("reference_samples")
        again = samples == self._samples and set(self._last) == set(graph.node_layers)
        again = again and all(
            len(self._last[name].values) == len(probes) for name, probes in graph.reference_features.items()
        )
        events: list[Event] = []
        lineages: dict[str, Lineages] = {}
        turnover: dict[str, Turnover] = {}
        last: dict[str, _Last] = {}
        for name, basis in graph.bases.items():
            values = graph.reference_features[name]
            share = basis.importance / basis.importance.sum().clamp_min(torch.finfo(torch.float64).tiny)
            before = self._last.get(name)
            if again and before is not None and _comparable(before, values, basis.kind):
                match = match_features(before.values, values, basis.kind in FIXED_ORDER)
                lineages[name], next_id = _continued(match, before)
                ended = match.ended
                turnover[name] = Turnover(int((match.before < 0).sum()), len(ended), match.overlap)
                events += _events(name, step, match, before, lineages[name], share)
            else:
                start = 0 if before is None or basis.kind in FIXED_ORDER else before.next_id
                lineages[name] = _new(start, basis.n_features)
                next_id = start + basis.n_features
            last[name] = _Last(values, lineages[name].ids, share, next_id)
        graph.lineages, self.turnover, self._last, self._samples = lineages, turnover, last, samples
        return events

    def copy(self) -> FeatureTracker:
        """A tracker that goes on from here on its own."""
        other = FeatureTracker()
        # Nothing in these is ever changed in place.
        other.turnover, other._last, other._samples = self.turnover, self._last, self._samples
        return other

    def state_dict(self) -> dict[str, Any]:
        """State to go on from, of plain numbers and tensors."""
        return {"samples": self._samples, "last": {name: dict(vars(last)) for name, last in self._last.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self._samples, self._last = state["samples"], {name: _Last(**last) for name, last in state["last"].items()}


def _comparable(before: _Last, values: Tensor, kind: str) -> bool:
    return kind not in FIXED_ORDER or before.values.shape == values.shape


def _new(start: int, count: int) -> Lineages:
    ids = torch.arange(start, start + count)
    return Lineages(ids, torch.full((count,), torch.nan, dtype=torch.float64), torch.full_like(ids, -1))


def _continued(match: Match, before: _Last) -> tuple[Lineages, int]:
    born = match.before < 0
    ids = torch.where(born, before.next_id + born.cumsum(0) - 1, before.ids[match.before.clamp_min(0)])
    parents = torch.where(match.parents < 0, -1, before.ids[match.parents.clamp_min(0)])
    return Lineages(ids, match.similarity, parents), before.next_id + int(born.sum())


def _events(layer: str, step: int, match: Match, before: _Last, lineages: Lineages, share: Tensor) -> list[Event]:
    events = []
    for j in (match.before < 0).nonzero().flatten().tolist():
        lineage, parent, after = int(lineages.ids[j]), int(lineages.parents[j]), float(share[j])
        if parent < 0:
            events.append(Event("born", step, layer, lineage, after=after))
        else:
            events.append(Event("split", step, layer, lineage, others=(parent,), after=after))
    for i in match.ended.tolist():
        lineage, heir, was = int(before.ids[i]), int(match.heirs[i]), float(before.share[i])
        if heir < 0:
            events.append(Event("died", step, layer, lineage, before=was))
        else:
            events.append(Event("merged", step, layer, lineage, others=(int(lineages.ids[heir]),), before=was))
    return events
