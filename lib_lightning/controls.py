"""Sparsity against controls: the metrics of a graph beside those of several random rotations and initialisations."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

from torch import nn
from torchmetrics import MetricCollection

from lib_lightning.algorithm.basis_kinds import DRAWN, LATENTS, REINIT
from lib_lightning.algorithm.config import BasisKind, check_choice
from lib_lightning.api import basis_and_dictionaries, compute_interaction_graph
from lib_lightning.errors import SettingError, check_list, check_number
from lib_lightning.graph import InteractionGraph
from lib_lightning.metrics.summary import GraphMetrics
from lib_lightning.model.node_layer import NodeLayer
from lib_lightning.model.reinitialize import reinitialized

# Kinds with several draws; those of others would be equal.
_DRAWN = (*DRAWN, REINIT)


@dataclass(frozen=True)
class Draws:
    """The metrics of several draws of one control, or of the basis itself.

    Attributes:
        values: By name of the metric, as in `InteractionGraph.measure`, its value in each draw.

    Example:
        >>> draws = Draws({"edges/total": (3.0, 5.0)})
        >>> draws.mean["edges/total"], round(draws.std["edges/total"], 3)
        (4.0, 1.414)
    """

    values: Mapping[str, tuple[float, ...]]

    @cached_property
    def mean(self) -> dict[str, float]:
        """Mean over the draws, by name of the metric."""
        return {key: statistics.fmean(values) for key, values in self.values.items()}

    @cached_property
    def std(self) -> dict[str, float]:
        """Standard deviation between the draws, by name of the metric; NaN for a single one."""
        return {key: statistics.stdev(x) if len(x) > 1 else math.nan for key, x in self.values.items()}


def measure_controls(
    model: nn.Module,
    batches: Iterable[Any],
    node_layers: Sequence[str | NodeLayer] | None = None,
    controls: Sequence[str] = ("random", REINIT),
    draws: int = 5,
    metrics: MetricCollection | None = None,
    **settings: Any,
) -> dict[str, Draws]:
    """Measure the graph of a model, and its controls on the same samples, each with several seeds.

    Draw ``k`` has the seed ``k`` (``basis_seed``, or that of `reinitialized`). Bases that do not depend on a seed have
    a single one.

    Args:
        model: As for `compute_interaction_graph`; left exactly as it was found.
        batches: As for `compute_interaction_graph`.
        node_layers: As for `compute_interaction_graph`.
        controls: Bases to compare with, such as ``"random"`` or ``"pca"``; ``"reinit"`` is the same basis of
            re-initialised weights.
        draws: Number of draws of each.
        metrics: As for `InteractionGraph.measure`.
        settings: Other arguments of `compute_interaction_graph`, such as ``effort``, or another ``basis`` than the LIB,
            or ``dictionaries``, which controls do not have: the basis itself is ``"latents"`` then.

    Returns:
        Metrics by basis and control: the basis itself first.

    Raises:
        SettingError: If a control is unknown or is the basis itself, or there is no draw.
        LIBError: As for `compute_interaction_graph` and `reinitialized`.

    Example:
        >>> import torch
        >>> model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(200, 4)
        >>> found = measure_controls(model, [x], ["0:input", "2:input", "output"], ["random", "pca", "reinit"], draws=3)
        >>> {kind: len(one.values["effective_edges/total"]) for kind, one in found.items()}
        {'lib': 1, 'random': 3, 'pca': 1, 'reinit': 3}
        >>> found["lib"].mean["features/total"] == found["random"].mean["features/total"]
        True
    """
    kind_of_others, dictionaries = basis_and_dictionaries(
        settings.pop("basis", "lib"), settings.pop("dictionaries", None)
    )
    basis: str = LATENTS if dictionaries else kind_of_others
    controls = check_list("controls", controls, "bases or 'reinit'", lambda kind: isinstance(kind, str))
    for kind in controls:
        check_choice("each of controls", kind, (*get_args(BasisKind), REINIT))
    if len({basis, *controls}) <= len(controls):
        raise SettingError(f"controls are others than {basis!r}, each of them once; got {controls}.")
    check_number("draws", draws, lambda k: k >= 1, "must be at least 1", integer=True)
    batches, prepared = list(batches), GraphMetrics(metrics)

    def graph_of(network: nn.Module, kind: str, seed: int) -> InteractionGraph:
        given = dictionaries if kind == LATENTS else None
        kind = kind_of_others if kind == LATENTS else kind
        options = {"basis_seed": seed, "dictionaries": given, **settings}
        return compute_interaction_graph(network, batches, node_layers, kind, **options)  # type: ignore[arg-type]

    own = graph_of(model, basis, 0)
    found = {basis: [own.measure(prepared)]}
    node_layers = own.node_layer_specs()  # proposed once
    for kind in controls:
        found[kind] = []
        for seed in range(draws if kind in _DRAWN else 1):
            is_copy = kind == REINIT
            graph = graph_of(reinitialized(model, seed), basis, 0) if is_copy else graph_of(model, kind, seed)
            found[kind].append(graph.measure(prepared))
    return {
        kind: Draws({key: tuple(one[key] for one in of_kind) for key in of_kind[0]}) for kind, of_kind in found.items()
    }
