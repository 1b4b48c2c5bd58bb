"""Tracks features from snapshot to snapshot: each belongs to a lineage with a unique id."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lib_lightning.algorithm.basis_kinds import FIXED_ORDER, LATENTS
from lib_lightning.errors import LIBError
from lib_lightning.graph import InteractionGraph, Lineages
from lib_lightning.io.basis_format import REFERENCE_SAMPLES, STEP
from lib_lightning.lineage.events import Event
from lib_lightning.lineage.matching import Match, match_by_number, match_features
from lib_lightning.lineage.signs import reverse_features


@dataclass(frozen=True)
class Turnover:
    """How much a node layer has changed since the previous snapshot.

    Attributes:
        born: Number of features that start a lineage.
        ended: Number of lineages that end.
        overlap: Overlap of the spanned subspaces, as `Match.overlap`.
    """

    born: int
    ended: int
    overlap: float


@dataclass(frozen=True)
class _Previous:
    """A node layer at the previous snapshot."""

    values: Tensor
    ids: Tensor
    share: Tensor
    next_id: int


class FeatureTracker:
    """Tracks the features of every node layer over snapshots, by their values on reference samples.

    A feature with a squared correlation of at least one half with one of the previous snapshot continues its lineage.
    Features that rotate within an unchanged subspace keep their ids as well, if the subspace has at most an eighth as
    many dimensions as there are values: 128 for 1,024. The remaining features are born or have split from another one,
    and the remaining lineages die or merge into another one.

    Attributes:
        turnover: Changes at the latest snapshot, by node layer; empty at the first one.

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
        self._previous: dict[str, _Previous] = {}
        self._samples: str | None = None

    @property
    def node_layers(self) -> list[str]:
        """Names of the node layers, in forward order; none before the first snapshot."""
        return list(self._previous)

    @property
    def num_lineages(self) -> dict[str, int]:
        """Number of lineages that each node layer has had so far: their ids are below it."""
        return {name: previous.next_id for name, previous in self._previous.items()}

    def update(self, graph: InteractionGraph, step: int | None = None) -> list[Event]:
        """Determine the lineages of a snapshot, and store them as ``graph.lineages``.

        Features keep their sign: one whose correlation with the feature that it continues, or has split from, is
        negative is reversed in the graph, with its examples and its effects on outputs. Label features afterwards.

        Args:
            graph: The snapshot, with ``graph.reference_features`` on the same samples as all others. If
                ``info["reference_samples"]``, the hash of these samples, changes, all lineages start anew.
            step: Number of optimizer steps before the snapshot; ``info["step"]`` by default.

        Returns:
            Births, splits, merges and deaths since the previous snapshot, with the features' shares of the importance
            of their layers.

        Raises:
            LIBError: If the graph has no reference features, or no step.
        """
        if set(graph.reference_features) != set(graph.node_layers):
            raise LIBError(
                "This graph has no reference features, which features are tracked by. Set graph.reference_features to "
                "lib_lightning.lineage.reference_features(graph, model, batches), with the same batches every time."
            )
        step = graph.info.get(STEP) if step is None else step
        if step is None:
            raise LIBError("The step of the graph is unknown: info has no 'step', and step= was not given.")
        samples = graph.info.get(REFERENCE_SAMPLES)
        same_samples = samples == self._samples and set(self._previous) == set(graph.node_layers)
        same_samples = same_samples and all(
            len(self._previous[name].values) == len(values) for name, values in graph.reference_features.items()
        )
        events: list[Event] = []
        lineages: dict[str, Lineages] = {}
        turnover: dict[str, Turnover] = {}
        present: dict[str, _Previous] = {}
        for name, basis in list(graph.bases.items()):
            values = graph.reference_features[name]
            share = basis.importance / basis.importance.sum().clamp_min(torch.finfo(torch.float64).tiny)
            before = self._previous.get(name)
            if basis.kind == LATENTS:
                ids = graph.lineages[name].ids  # numbers of latents, that of the error last
                lineages[name], next_id = Lineages.new(ids), int(ids[-1]) + 1
                if same_samples and before is not None:
                    match = match_by_number(before.values, values, before.ids, ids)
                    lineages[name] = replace(lineages[name], similarity=match.similarity)
                    turnover[name] = Turnover(int((match.before < 0).sum()), len(match.ended), match.overlap)
                    events += _events(name, step, match, before, lineages[name], share)
            elif same_samples and before is not None and _comparable(before, values, basis.kind):
                match = match_features(before.values, values, basis.kind in FIXED_ORDER)
                lineages[name], next_id = _continued(match, before)
                if basis.kind not in FIXED_ORDER:
                    reverse_features(graph, name, match.reversed)
                    values = graph.reference_features[name]
                turnover[name] = Turnover(int((match.before < 0).sum()), len(match.ended), match.overlap)
                events += _events(name, step, match, before, lineages[name], share)
            else:
                start = 0 if before is None or basis.kind in FIXED_ORDER else before.next_id
                lineages[name] = _new(start, basis.n_features)
                next_id = start + basis.n_features
            present[name] = _Previous(values, lineages[name].ids, share, next_id)
        graph.lineages, self.turnover, self._previous, self._samples = lineages, turnover, present, samples
        return events

    def copy(self) -> FeatureTracker:
        """Copy the tracker with its state."""
        return copy.copy(self)  # no attribute is modified in place

    def state_dict(self) -> dict[str, Any]:
        """Numbers and tensors from which `load_state_dict` restores the tracker."""
        return {"samples": self._samples, "last": {name: dict(vars(layer)) for name, layer in self._previous.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state."""
        self._samples = state["samples"]
        self._previous = {name: _Previous(**layer) for name, layer in state["last"].items()}


def _comparable(before: _Previous, values: Tensor, kind: str) -> bool:
    return kind not in FIXED_ORDER or before.values.shape == values.shape


def _new(start: int, count: int) -> Lineages:
    ids = torch.arange(start, start + count, device="cpu")
    return Lineages(ids, torch.full((count,), torch.nan, dtype=torch.float64, device="cpu"), torch.full_like(ids, -1))


def _continued(match: Match, before: _Previous) -> tuple[Lineages, int]:
    born = match.before < 0
    # Index -1 stands for no feature; a layer may also have had no features at all.
    ids_before = torch.cat([before.ids, before.ids.new_full((1,), -1)])
    ids = torch.where(born, before.next_id + born.cumsum(0) - 1, ids_before[match.before])
    return Lineages(ids, match.similarity, ids_before[match.parents]), before.next_id + int(born.sum())


def _events(layer: str, step: int, match: Match, before: _Previous, lineages: Lineages, share: Tensor) -> list[Event]:
    events = []
    for j in (match.before < 0).nonzero().flatten().tolist():
        lineage, parent, after = int(lineages.ids[j]), int(lineages.parents[j]), float(share[j])
        if parent < 0:
            events.append(Event("born", step, layer, lineage, after=after))
        else:
            events.append(Event("split", step, layer, lineage, others=(parent,), after=after))
    for i in match.ended.tolist():
        lineage, into, was = int(before.ids[i]), int(match.merged_into[i]), float(before.share[i])
        if into < 0:
            events.append(Event("died", step, layer, lineage, before=was))
        else:
            events.append(Event("merged", step, layer, lineage, others=(int(lineages.ids[into]),), before=was))
    return events
