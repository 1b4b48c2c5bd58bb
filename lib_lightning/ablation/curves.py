"""Ablation curves, and the number of edges that a model needs for its score."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lib_lightning._deprecated import renamed_arguments
from lib_lightning.ablation.interventions import top_k_mask
from lib_lightning.ablation.scored_model import Score, ScoredModel, scored_model
from lib_lightning.ablation.search import Counts, ScoreCache, bisect, scan, try_counts
from lib_lightning.errors import NodeLayerError, SettingError, quoted
from lib_lightning.graph import InteractionGraph
from lib_lightning.metrics.summary import EdgeCurve


@dataclass(frozen=True)
class EdgesRequiredResult:
    """The number of edges of a section that the model needs for its score.

    Attributes:
        count: The number; None if all edges do not suffice, because the basis omits directions that the model needs.
        mask: True for the edges that are kept at that number, shape ``(r_out, r_in)``; all of them if ``count`` is
            None. Rows and columns are in the order of the graph's indices, as in its edges.
        score: Mean score with those edges.
        unablated: Mean score without ablation.
        curve: Mean scores by number of edges kept, for all numbers that were tried.
    """

    count: int | None
    mask: Tensor
    score: float
    unablated: float
    curve: dict[int, float] = field(default_factory=dict, repr=False)

    def as_curve(self) -> EdgeCurve:
        """The curve as input for metrics: counts ``(k,)``, scores ``(k,)``, and the unablated score."""
        counts, scores = (torch.tensor(list(x), device="cpu") for x in (self.curve.keys(), self.curve.values()))
        return counts, scores.double(), self.unablated


@renamed_arguments(together="process_group")
def node_ablation_curve(
    model: nn.Module,
    batches: Iterable[Any],
    graph: InteractionGraph,
    score: Score,
    node_layer: str,
    counts: Counts = "exponential",
    tolerance: float = 1e-3,
    **options: Any,
) -> dict[int, float]:
    """Score a model with only the most important features of a node layer, for several numbers of features.

    Args:
        model: The model that the graph was computed on, or one of the same shape; it is not changed.
        batches: Batches to score on. They should not be those that the graph was computed on.
        graph: An interaction graph in any basis.
        score: A function from the model's output and a batch to one score for each sample, shape ``(n,)``, higher is
            better; for example `accuracy`.
        node_layer: Name of the node layer.
        counts: Numbers of features to keep: ``"every"`` one, ``"exponential"`` for powers of the square root of 2,
            ``"bisection"`` for those of a bisection for the smallest number within the tolerance, or a list of numbers.
        tolerance: Loss of score that the bisection accepts.
        options: ``input_fn``, ``mask``, ``dtype``, ``memory_limit`` and ``process_group``, as for
            `lib_lightning.compute_interaction_graph`.

    Returns:
        Mean scores by number of features kept, ascending.

    Raises:
        NodeLayerError: If the graph has no such node layer, or belongs to a model of a different shape.
        LIBError: If the score function does not return one number for each sample.

    Note:
        Source: arXiv 2405.10928, node ablations.

    Example:
        >>> import torch
        >>> from lib_lightning import compute_interaction_graph
        >>> from lib_lightning.ablation import accuracy
        >>> model, x = nn.Linear(4, 2), torch.randn(50, 4)
        >>> batch = (x, model(x).argmax(-1))
        >>> graph = compute_interaction_graph(model, [batch], ["input", "output"])
        >>> node_ablation_curve(model, [batch], graph, accuracy, "input")[2]
        1.0
    """
    if node_layer not in graph.bases:
        raise NodeLayerError(f"The graph has no node layer '{node_layer}'; it has {quoted(graph.node_layers)}.")
    with scored_model(model, batches, graph, score, **options) as scored:
        r = graph.bases[node_layer].n_features
        cache = ScoreCache(scored.with_features(node_layer), r, scored.unablated - tolerance)
        return try_counts(cache, counts, r + 1)


@renamed_arguments(together="process_group")
def edge_ablation_curve(
    model: nn.Module,
    batches: Iterable[Any],
    graph: InteractionGraph,
    score: Score,
    section: tuple[str, str],
    counts: Counts = "exponential",
    tolerance: float = 1e-3,
    **options: Any,
) -> dict[int, float]:
    """Score a model with only the strongest edges of a section, for several numbers of edges.

    Args:
        model: As for `node_ablation_curve`.
        batches: As for `node_ablation_curve`.
        graph: As for `node_ablation_curve`.
        score: As for `node_ablation_curve`.
        section: Names of two consecutive node layers.
        counts: As for `node_ablation_curve`, for numbers of edges.
        tolerance: As for `node_ablation_curve`.
        options: As for `node_ablation_curve`.

    Returns:
        Mean scores by number of edges kept, ascending.

    Raises:
        NodeLayerError: If the graph has no such section, or belongs to a model of a different shape.
        LIBError: If the score function does not return one number for each sample.

    Note:
        Source: arXiv 2405.10928, edge ablations.

    Example:
        >>> import torch
        >>> from lib_lightning import compute_interaction_graph
        >>> from lib_lightning.ablation import accuracy
        >>> model, x = nn.Linear(4, 2), torch.randn(50, 4)
        >>> batch = (x, model(x).argmax(-1))
        >>> graph = compute_interaction_graph(model, [batch], ["input", "output"])
        >>> sorted(edge_ablation_curve(model, [batch], graph, accuracy, ("input", "output"), [1, 4]))
        [1, 4]
    """
    _check_sections(graph, [section])
    with scored_model(model, batches, graph, score, **options) as scored:
        E = graph.edges[section]
        cache = ScoreCache(scored.with_edges(*section), E.numel(), scored.unablated - tolerance)
        return try_counts(cache, counts, _paper_bracket(graph, section))


@renamed_arguments(together="process_group")
def edges_required(
    model: nn.Module,
    batches: Iterable[Any],
    graph: InteractionGraph,
    score: Score,
    tolerance: float = 1e-3,
    sections: Sequence[tuple[str, str]] | None = None,
    search: Literal["scan", "bisection"] = "scan",
    **options: Any,
) -> dict[tuple[str, str], EdgesRequiredResult]:
    """Count the edges that a model needs in each section for its score.

    The score is not a monotone function of the number of edges, so the answer depends on the numbers that are tried. By
    default, the count is the smallest number from which on every tried number suffices: powers of the square root of 2
    are tried from the largest one down to the first that fails, the interval above it is bisected, and the next numbers
    above the result are tried one by one (5% of it, between 8 and 100). ``search="bisection"`` is the search of the
    paper: a bisection of the numbers from 1 to ``(d_in + 1) (d_out + 1)``.

    Args:
        model: As for `node_ablation_curve`.
        batches: As for `node_ablation_curve`.
        graph: As for `node_ablation_curve`.
        score: As for `node_ablation_curve`.
        tolerance: Accepted loss of mean score, in units of the score.
        sections: Names of pairs of consecutive node layers; all by default.
        search: ``"scan"`` or ``"bisection"``.
        options: As for `node_ablation_curve`.

    Returns:
        The result for each section.

    Raises:
        NodeLayerError: If the graph has no such section, or belongs to a model of a different shape.
        LIBError: If the score function does not return one number for each sample.

    Note:
        Source: arXiv 2405.10928, edges required.

    Example:
        >>> import torch
        >>> from lib_lightning import compute_interaction_graph
        >>> from lib_lightning.ablation import accuracy
        >>> model, x = nn.Linear(4, 2), torch.randn(50, 4)
        >>> batch = (x, model(x).argmax(-1))
        >>> graph = compute_interaction_graph(model, [batch], ["input", "output"])
        >>> edges_required(model, [batch], graph, accuracy)["input", "output"].count <= 4
        True
    """
    if search not in ("scan", "bisection"):
        raise SettingError(f"search must be 'scan' or 'bisection'; got {search!r}.")
    sections = list(graph.edges) if sections is None else list(sections)
    _check_sections(graph, sections)
    with scored_model(model, batches, graph, score, **options) as scored:
        return {section: _required(scored, section, tolerance, search) for section in sections}


def _required(scored: ScoredModel, section: tuple[str, str], tolerance: float, search: str) -> EdgesRequiredResult:
    E = scored.graph.edges[section]
    cache = ScoreCache(scored.with_edges(*section), E.numel(), scored.unablated - tolerance)
    count = scan(cache) if search == "scan" else bisect(cache, _paper_bracket(scored.graph, section))
    kept = E.numel() if count is None else count
    score = cache(kept)
    return EdgesRequiredResult(count, top_k_mask(E, kept), score, scored.unablated, dict(sorted(cache.scores.items())))


def _paper_bracket(graph: InteractionGraph, section: tuple[str, str]) -> int:
    """``(d_in + 1) (d_out + 1)``: the paper's edge matrices include the constant function on both sides."""
    d_in, d_out = (graph.bases[name].mean.shape[0] for name in section)
    return (d_in + 1) * (d_out + 1)


def _check_sections(graph: InteractionGraph, sections: Sequence[tuple[str, str]]) -> None:
    for section in sections:
        if section not in graph.edges:
            raise NodeLayerError(
                f"The graph has no section {section!r}: a section is a pair of consecutive node layers of "
                f"{quoted(graph.node_layers)}."
            )
