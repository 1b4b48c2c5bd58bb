"""Looking back from the final features: when did each one first become recognisable?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_lightning.graph import InteractionGraph
from lib_lightning.io.basis_file import BasisFileError, read_parts
from lib_lightning.io.basis_format import INFO, LAYERS, REFERENCE_FEATURES, REFERENCE_SAMPLES
from lib_lightning.lineage.matching import SAME, standardised
from lib_lightning.lineage.tracker import FIXED_ORDER


@dataclass(frozen=True)
class FeatureHistory:
    """How like each of ``r`` final features the most similar feature of each of ``T`` earlier snapshots was.

    Attributes:
        steps: Steps of the snapshots, rising, shape ``(T,)``, int64.
        similarity: Largest correlation with any feature of the snapshot, absolute value, shape ``(T, r)``, float64.

    Example:
        >>> seen = FeatureHistory(torch.tensor([0, 10, 20]), torch.tensor([[0.1], [0.9], [1.0]]).double())
        >>> seen.first()
        tensor([10])
    """

    steps: Tensor
    similarity: Tensor

    def first(self, shared: float = SAME) -> Tensor:
        """The first snapshot in which some feature had that much of its variance in common with the final one.

        Args:
            shared: Share of the variance, between 0 and 1.

        Returns:
            Steps, shape ``(r,)``, int64; -1 for features that are in no snapshot.
        """
        return self._step_of(self.similarity.square() >= shared)

    def since(self, shared: float = SAME) -> Tensor:
        """The first snapshot from which on that was so in all of them.

        Args:
            shared: Share of the variance, between 0 and 1.

        Returns:
            Steps, shape ``(r,)``, int64; -1 for features that are not in the last snapshot.
        """
        seen = (self.similarity.square() >= shared).long()
        return self._step_of(seen.flip(0).cumprod(0).flip(0).bool())

    def _step_of(self, seen: Tensor) -> Tensor:
        if not len(self.steps):
            return torch.full((seen.shape[1],), -1)
        return torch.where(seen.any(0), self.steps[seen.long().argmax(0)], -1)


def retrace(final: Tensor, steps: Sequence[int], earlier: Sequence[Tensor], in_order: bool = False) -> FeatureHistory:
    """Compare final features with those of earlier snapshots, on the same samples.

    Args:
        final: Values of the final features, shape ``(N, r)``.
        steps: Steps of the earlier snapshots, rising.
        earlier: Values of their features, each of shape ``(N, r_t)``.
        in_order: Whether features are what they are by their number, such as single neurons.

    Returns:
        The similarities.

    Raises:
        ValueError: If samples are not equally many everywhere.

    Example:
        >>> final = torch.eye(4)[:, :2]
        >>> retrace(final, [0, 10], [torch.ones(4, 1), final]).first()
        tensor([10, 10])
    """
    if wrong := {len(values) for values in earlier} - {len(final)}:
        raise ValueError(f"Features are compared on the same samples; got {len(final)} of them and {sorted(wrong)}.")
    last = standardised(final)
    found = [_likeness(standardised(values), last, in_order) for values in earlier]
    similarity = torch.stack(found) if found else last.new_zeros(0, last.shape[1])
    return FeatureHistory(torch.tensor(steps, dtype=torch.int64), similarity)


def _likeness(values: Tensor, last: Tensor, in_order: bool) -> Tensor:
    if in_order:
        return (values * last).sum(0).abs()
    products = (values.T @ last).abs()
    return products.amax(0) if len(products) else last.new_zeros(last.shape[1])


def retrace_files(final: InteractionGraph, files: Sequence[tuple[int, Path]]) -> dict[str, FeatureHistory]:
    """Look for the features of a final graph in the basis files of earlier snapshots.

    Args:
        final: The final graph, with values on probe samples.
        files: Step and basis file of each earlier snapshot, rising. Files that cannot be read, or whose values are of
            other samples, are passed over.

    Returns:
        For each node layer how like its features there have been; nothing for a graph without such values.
    """
    if set(final.reference_features) != set(final.node_layers):
        return {}
    steps: list[int] = []
    values: dict[str, list[torch.Tensor]] = {name: [] for name in final.node_layers}
    for step, path in files:
        try:
            tensors, header = read_parts(path, lambda key: key.startswith(REFERENCE_FEATURES.format("")))
        except (BasisFileError, OSError):
            continue
        there = {name: tensors.get(REFERENCE_FEATURES.format(i)) for i, name in enumerate(header.get(LAYERS, []))}
        same = header.get(INFO, {}).get(REFERENCE_SAMPLES) == final.info.get(REFERENCE_SAMPLES)
        known = {name: x for name, x in there.items() if x is not None and _comparable(final, name, x.shape)}
        if same and set(known) == set(values):
            steps.append(step)
            for name, x in known.items():
                values[name].append(torch.from_numpy(x))
    return {
        name: retrace(probes, steps, values[name], final.bases[name].kind in FIXED_ORDER)
        for name, probes in final.reference_features.items()
    }


def _comparable(final: InteractionGraph, name: str, shape: tuple[int, ...]) -> bool:
    if name not in final.reference_features:
        return False
    in_order = final.bases[name].kind in FIXED_ORDER
    return (
        shape == final.reference_features[name].shape if in_order else shape[0] == len(final.reference_features[name])
    )


def first_seen(final: InteractionGraph, retraced: dict[str, FeatureHistory]) -> dict[str, Any]:
    """Say of every final feature when it first became recognisable.

    Args:
        final: The final graph.
        retraced: What `retrace_files` has found for it.

    Returns:
        For each node layer ``first_seen``, the step since which features with most of the final importance have been
        recognisable, and ``features``: for each of them ``feature`` (its number), ``lineage``, ``label``,
        ``importance``, the step of the ``first`` snapshot in which it was recognisable, and the one ``since`` which it
        has been in all. None stands for never.
    """
    found: dict[str, Any] = {}
    for name, seen in retraced.items():
        importance = final.bases[name].importance
        first, since = ([None if step < 0 else step for step in x.tolist()] for x in (seen.first(), seen.since()))
        lineages = final.lineages[name].ids.tolist() if name in final.lineages else [None] * len(first)
        labels = final.labels.get(name, [""] * len(first))
        features = [
            {"feature": j, "lineage": lineage, "label": label, "importance": value, "first": a, "since": b}
            for j, (lineage, label, value, a, b) in enumerate(
                zip(lineages, labels, importance.tolist(), first, since, strict=True)
            )
        ]
        found[name] = {"formed": _most_since(importance, since), "features": features}
    return found


def _most_since(importance: torch.Tensor, since: Sequence[int | None]) -> int | None:
    """The step by which features with at least half of the importance are there for good."""
    reached = 0.0
    for step in sorted({step for step in since if step is not None}):
        reached = float(importance[[s is not None and s <= step for s in since]].sum())
        if reached >= importance.sum() / 2:
            return step
    return None
