"""When each final feature first became recognisable, from the basis files of earlier snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib_lightning.algorithm.basis_kinds import FIXED_ORDER
from lib_lightning.errors import SettingError
from lib_lightning.graph import InteractionGraph
from lib_lightning.io.basis_file import BasisFileError, read_parts
from lib_lightning.io.basis_format import INFO, LAYERS, REFERENCE_FEATURES, REFERENCE_SAMPLES
from lib_lightning.lineage.matching import SAME, standardised


@dataclass(frozen=True)
class FeatureHistory:
    """Similarity of ``r`` final features to the most similar feature of each of ``T`` earlier snapshots.

    Features are in the order of the final graph's indices.

    Attributes:
        steps: Steps of the snapshots, ascending, shape ``(T,)``, int64.
        similarity: Largest absolute correlation with any feature of the snapshot, shape ``(T, r)``, float64.

    Example:
        >>> history = FeatureHistory(torch.tensor([0, 10, 20]), torch.tensor([[0.1], [0.9], [1.0]]).double())
        >>> history.first()
        tensor([10])
    """

    steps: Tensor
    similarity: Tensor

    def first(self, shared: float = SAME) -> Tensor:
        """First snapshot with a feature that shares a given part of its variance with the final one.

        Args:
            shared: Squared correlation, between 0 and 1.

        Returns:
            Steps, shape ``(r,)``, int64; -1 for features that are in no snapshot.
        """
        return self._step_of(self.similarity.square() >= shared)

    def since(self, shared: float = SAME) -> Tensor:
        """First snapshot from which on every snapshot has such a feature.

        Args:
            shared: Squared correlation, between 0 and 1.

        Returns:
            Steps, shape ``(r,)``, int64; -1 for features that are not in the last snapshot.
        """
        seen = (self.similarity.square() >= shared).long()
        return self._step_of(seen.flip(0).cumprod(0).flip(0).bool())

    def _step_of(self, seen: Tensor) -> Tensor:
        if not len(self.steps):
            return torch.full((seen.shape[1],), -1, device="cpu")
        return torch.where(seen.any(0), self.steps[seen.long().argmax(0)], -1)


def retrace(final: Tensor, steps: Sequence[int], earlier: Sequence[Tensor], in_order: bool = False) -> FeatureHistory:
    """Compute the similarity of final features to those of earlier snapshots.

    Args:
        final: Values of the final features, shape ``(N, r)``.
        steps: Steps of the earlier snapshots, ascending.
        earlier: Values of their features on the same samples, each of shape ``(N, r_t)``.
        in_order: Whether features are identified by their index, as single neurons are.

    Returns:
        The history of the final features.

    Raises:
        SettingError: If the numbers of samples differ.

    Example:
        >>> final = torch.eye(4)[:, :2]
        >>> retrace(final, [0, 10], [torch.ones(4, 1), final]).first()
        tensor([10, 10])
    """
    if wrong := {len(values) for values in earlier} - {len(final)}:
        raise SettingError(
            f"Features must be compared on the same samples; got {len(final)} and {sorted(wrong)} of them."
        )
    last = standardised(final)
    rows = [_similarity(standardised(values), last, in_order) for values in earlier]
    similarity = torch.stack(rows) if rows else last.new_zeros(0, last.shape[1])
    return FeatureHistory(torch.tensor(steps, dtype=torch.int64, device="cpu"), similarity)


def _similarity(values: Tensor, last: Tensor, in_order: bool) -> Tensor:
    if in_order:
        return (values * last).sum(0).abs()
    products = (values.T @ last).abs()
    return products.amax(0) if len(products) else last.new_zeros(last.shape[1])


def retrace_files(final: InteractionGraph, files: Sequence[tuple[int, Path]]) -> dict[str, FeatureHistory]:
    """Compute the similarity of the features of a final graph to those in the basis files of earlier snapshots.

    Args:
        final: The final graph, with reference features.
        files: Step and basis file of each earlier snapshot, ascending. Unreadable files and files with different
            reference samples are skipped.

    Returns:
        The history of the features of each node layer; empty for a graph without reference features.
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
        stored = {name: tensors.get(REFERENCE_FEATURES.format(i)) for i, name in enumerate(header.get(LAYERS, []))}
        same_samples = header.get(INFO, {}).get(REFERENCE_SAMPLES) == final.info.get(REFERENCE_SAMPLES)
        comparable = {name: x for name, x in stored.items() if x is not None and _comparable(final, name, x.shape)}
        if same_samples and set(comparable) == set(values):
            steps.append(step)
            for name, x in comparable.items():
                values[name].append(torch.from_numpy(x))
    return {
        name: retrace(reference, steps, values[name], final.bases[name].kind in FIXED_ORDER)
        for name, reference in final.reference_features.items()
    }


def _comparable(final: InteractionGraph, name: str, shape: tuple[int, ...]) -> bool:
    if name not in final.reference_features:
        return False
    in_order = final.bases[name].kind in FIXED_ORDER
    return (
        shape == final.reference_features[name].shape if in_order else shape[0] == len(final.reference_features[name])
    )


def first_seen(final: InteractionGraph, histories: dict[str, FeatureHistory]) -> dict[str, Any]:
    """Summarize when every final feature became recognisable, for ``retraced.json``.

    Args:
        final: The final graph.
        histories: Result of `retrace_files` for this graph.

    Returns:
        For each node layer, ``formed``: the step from which features with at least half of the final importance are
        recognisable, and ``features``, each with ``feature`` (its index), ``lineage``, ``label``, ``importance``,
        ``first`` (step of the first snapshot in which it is recognisable) and ``since`` (step from which it is
        recognisable in all snapshots). Steps are None for never.
    """
    found: dict[str, Any] = {}
    for name, history in histories.items():
        importance = final.bases[name].importance
        steps = history.first().tolist(), history.since().tolist()
        first, since = ([None if step < 0 else step for step in of_feature] for of_feature in steps)
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
    """The step from which features with at least half of the importance are in all snapshots."""
    reached = 0.0
    for step in sorted({step for step in since if step is not None}):
        reached = float(importance[[s is not None and s <= step for s in since]].sum())
        if reached >= importance.sum() / 2:
            return step
    return None
