"""Ablation curves, and the number of edges that a model needs for its score."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lib_lightning._deprecated import renamed_arguments
from lib_lightning.ablation.attacks import Attacked, AttackKind, EdgeAttack, worst
from lib_lightning.ablation.interventions import top_k_mask
from lib_lightning.ablation.scored_model import Score, ScoredModel, scored_model
from lib_lightning.ablation.search import Counts, ScoreCache, bisect, check_tolerance, coarse, scan, try_counts
from lib_lightning.algorithm.config import check_choice
from lib_lightning.errors import NodeLayerError, SettingError, quoted
from lib_lightning.graph import InteractionGraph
from lib_lightning.metrics.summary import EdgeCurve

# Searches that depend on the scores alone.
_SCANS = {"scan": scan, "coarse": coarse}


@dataclass(frozen=True)
class EdgesRequiredResult:
    """The number of edges of a section that the model needs for its score.

    Attributes:
        count: The number; None if all edges do not suffice, because the basis omits directions that the model needs.
        mask: True for the edges that are kept at that number, shape ``(r_out, r_in)``; all of them if ``count`` is
            None. Rows and columns are in the order of the graph's indices, as in its edges.
        score: Mean score with those edges.
        unablated: Mean score without ablation.
        curve: Mean scores by number of edges kept, for all numbers that were tried. Under attack, the worst that was
            found; an attack ends when it has found a score that is not sufficient.
        error: Standard error over samples of the difference between ``score`` and ``unablated``; NaN for one sample.
        tolerance: Accepted loss of mean score.
        bounds: The numbers that would be sufficient if each mean score were higher, or lower, by its standard error,
            among those that were tried; None if there is none, or the error is not known.
        attack: The attack that the score withstands with those edges; None for an ablation alone.
        worst: Under attack, the factors of all edges with the lowest score that was found for that number, shape
            ``(r_out, r_in)``: 1 for those that are kept, and how far each other one was put back.
    """

    count: int | None
    mask: Tensor
    score: float
    unablated: float
    curve: dict[int, float] = field(default_factory=dict, repr=False)
    error: float = math.nan
    tolerance: float = math.nan
    bounds: tuple[int | None, int | None] = (None, None)
    attack: EdgeAttack | None = None
    worst: Tensor | None = field(default=None, repr=False)

    @property
    def tolerance_in_errors(self) -> float:
        """The tolerance in units of the standard error; infinite if no sample's score has changed."""
        return self.tolerance / self.error if self.error else math.inf

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
        SettingError: If ``counts`` is unknown, or a number in it is out of range.
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
    check_tolerance(tolerance)
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
        SettingError: If ``counts`` is unknown, or a number in it is out of range.
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
    _check_section(graph, section)
    check_tolerance(tolerance)
    with scored_model(model, batches, graph, score, **options) as scored:
        E, score_of = graph.edges[section], scored.with_edges(*section)
        cache = ScoreCache(lambda k: score_of(top_k_mask(E, k)).mean, E.numel(), scored.unablated - tolerance)
        return try_counts(cache, counts, _paper_bracket(graph, section))


@renamed_arguments(together="process_group")
def edges_required(
    model: nn.Module,
    batches: Iterable[Any],
    graph: InteractionGraph,
    score: Score,
    tolerance: float = 1e-3,
    sections: Sequence[tuple[str, str]] | None = None,
    search: Literal["scan", "bisection", "coarse"] = "scan",
    attack: AttackKind | EdgeAttack | None = None,
    **options: Any,
) -> dict[tuple[str, str], EdgesRequiredResult]:
    """Count the edges that a model needs in each section for its score.

    The score is not a monotone function of the number of edges, so the answer depends on the numbers that are tried. By
    default, the count is the smallest number from which on every tried number suffices: powers of the square root of 2
    are tried from the largest one down to the first that fails, the interval above it is bisected, and the next numbers
    above the result are tried one by one (5% of it, between 8 and 100). ``search="bisection"`` is the search of the
    paper: a bisection of the numbers from 1 to ``(d_in + 1) (d_out + 1)``. For large models, where each number that is
    tried takes minutes, ``search="coarse"`` tries a half, an eighth, a 128th of all edges and so on until one fails,
    then bisects ratios between that one and the one before, until the number is known to an eighth.

    Args:
        model: As for `node_ablation_curve`.
        batches: As for `node_ablation_curve`.
        graph: As for `node_ablation_curve`.
        score: As for `node_ablation_curve`.
        tolerance: Accepted loss of mean score, in units of the score.
        sections: Names of pairs of consecutive node layers; all by default.
        search: ``"scan"``, ``"bisection"`` or ``"coarse"``.
        attack: What the score has to withstand: None for an ablation of the other edges; ``"random"`` for random
            subsets of them, put back or scaled, the worst of several; ``"pgd"`` for the worst factors that projected
            gradient descent finds for them; an `EdgeAttack` for other settings.
        options: As for `node_ablation_curve`.

    Returns:
        The result for each section.

    Raises:
        NodeLayerError: If the graph has no such section, or belongs to a model of a different shape.
        SettingError: If ``search`` or ``attack`` is unknown, or the tolerance is negative or NaN.
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
    check_choice("search", search, ("scan", "bisection", "coarse"))
    check_tolerance(tolerance)
    sections = list(graph.edges) if sections is None else list(sections)
    for section in sections:
        _check_section(graph, section, ": sections is a list of them" if isinstance(section, str) else "")
    against = EdgeAttack.of(attack)
    with scored_model(model, batches, graph, score, **options) as scored:
        return {section: _required(scored, section, tolerance, search, against) for section in sections}


def _required(
    scored: ScoredModel, section: tuple[str, str], tolerance: float, search: str, attack: EdgeAttack | None
) -> EdgesRequiredResult:
    E, score_of = scored.graph.edges[section], scored.with_edges(*section)
    threshold = scored.unablated - tolerance
    found: dict[int, Attacked] = {}

    def measure(k: int) -> float:
        kept = top_k_mask(E, k)
        found[k] = Attacked(score_of(kept), kept) if attack is None else worst(score_of, kept, attack, threshold)
        return found[k].score.mean

    cache = ScoreCache(measure, E.numel(), threshold)
    count = bisect(cache, _paper_bracket(scored.graph, section)) if search == "bisection" else _SCANS[search](cache)
    kept = E.numel() if count is None else count
    score = cache(kept)
    return EdgesRequiredResult(
        count,
        top_k_mask(E, kept),
        score,
        scored.unablated,
        dict(sorted(cache.scores.items())),
        error=found[kept].score.error,
        tolerance=tolerance,
        bounds=(_sufficient(found, threshold, 1.0), _sufficient(found, threshold, -1.0)),
        attack=attack,
        worst=None if attack is None else found[kept].mask,
    )


def _sufficient(found: Mapping[int, Attacked], threshold: float, errors: float) -> int | None:
    """The smallest number from which on all tried ones are sufficient, with scores raised by some standard errors."""
    answer = None
    for count in sorted(found, reverse=True):
        mean, error = found[count].score
        if not mean + errors * error >= threshold:  # of a single sample, the error is NaN
            break
        answer = count
    return answer


@dataclass(frozen=True)
class AttackResult:
    """What an attack on the dropped edges of a section has found.

    Attributes:
        score: The lowest mean score that was found.
        error: Standard error over samples of the difference between ``score`` and ``unablated``; NaN for one sample.
        dropped: Mean score with all of these edges dropped, which is where an attack starts.
        unablated: Mean score without ablation.
        worst: Factors of all edges with the lowest score, shape ``(r_out, r_in)``: 1 for those that are kept.
    """

    score: float
    error: float
    dropped: float
    unablated: float
    worst: Tensor = field(repr=False)


def attack_edges(
    model: nn.Module,
    batches: Iterable[Any],
    graph: InteractionGraph,
    score: Score,
    section: tuple[str, str],
    kept: Tensor,
    attack: AttackKind | EdgeAttack = "pgd",
    **options: Any,
) -> AttackResult:
    """Attack a set of kept edges: look for factors of all others with which the score is lowest.

    Args:
        model: As for `node_ablation_curve`.
        batches: As for `node_ablation_curve`.
        graph: As for `node_ablation_curve`.
        score: As for `node_ablation_curve`.
        section: Names of two consecutive node layers.
        kept: True for the edges that stay, shape ``(r_out, r_in)``, such as ``mask`` of `EdgesRequiredResult`.
        attack: As for `edges_required`.
        options: As for `node_ablation_curve`.

    Returns:
        The result.

    Raises:
        NodeLayerError: If the graph has no such section, or belongs to a model of a different shape.
        SettingError: If the edges have another shape, or the attack is unknown.
        LIBError: If the score function does not return one number for each sample.

    Example:
        >>> import torch
        >>> from lib_lightning import compute_interaction_graph
        >>> from lib_lightning.ablation import log_likelihood
        >>> model, x = nn.Linear(4, 2), torch.randn(50, 4)
        >>> batch = (x, model(x).argmax(-1))
        >>> graph = compute_interaction_graph(model, [batch], ["input", "output"])
        >>> kept = graph.edges["input", "output"] > 0.1
        >>> found = attack_edges(model, [batch], graph, log_likelihood, ("input", "output"), kept)
        >>> found.score <= found.dropped
        True
    """
    _check_section(graph, section)
    E, against, kept = graph.edges[section], EdgeAttack.of(attack), torch.as_tensor(kept, device="cpu")
    if kept.shape != E.shape or kept.dtype != torch.bool or against is None:
        raise SettingError(
            f"kept is a boolean tensor of shape {tuple(E.shape)}, as the edges; got {str(kept.dtype).split('.')[-1]} "
            f"of shape {tuple(kept.shape)}."
        )
    with scored_model(model, batches, graph, score, **options) as scored:
        score_of, kept = scored.with_edges(*section), kept.cpu()
        dropped = score_of(kept)
        found = worst(score_of, kept, against, dropped=dropped)
        return AttackResult(*found.score, dropped.mean, scored.unablated, found.mask)


def _paper_bracket(graph: InteractionGraph, section: tuple[str, str]) -> int:
    """``(d_in + 1) (d_out + 1)``: the paper's edge matrices include the constant function on both sides.

    There may be more latents of a dictionary than dimensions.
    """
    d_in, d_out = (max(graph.bases[name].mean.shape[0], graph.bases[name].n_features) for name in section)
    return (d_in + 1) * (d_out + 1)


def _check_section(graph: InteractionGraph, section: tuple[str, str], hint: str = "") -> None:
    if section not in graph.edges:
        raise NodeLayerError(
            f"The graph has no section {section!r}: a section is a pair of consecutive node layers of "
            f"{quoted(graph.node_layers)}{hint}."
        )
