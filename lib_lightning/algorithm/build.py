"""The paper's algorithm, read top to bottom (arXiv 2405.10928, transformation into the Local Interaction Basis).

1. *RunningCovariance.* Run all batches once; mean and covariance of every node layer.
2. *Bases*, from the last node layer to the first. The last one keeps its neurons, less their mean if wished, takes PCA,
   or is measured by the distribution that its logits stand for. Every earlier one needs the Jacobian metric, which
   measures a step by what it does to the *next* layer's features; then PCA-whitening of the activations, and a
   rotation and scaling that make the Jacobian orthonormal.
3. *Edges.* Run all batches once more; the squared interactions between neighbouring layers' features.
4. *Standard errors* of importances and edges, from sums over groups of samples with one left out at a time. An
   importance is a variance times a squared length in the metric; given the next layer's features, it moves with both.
   That its own direction turns is of second order. For an edge it is not: its error holds for these features.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lib_lightning.algorithm.basis import Basis, centered_basis, lib_basis, neuron_basis, pca_basis
from lib_lightning.algorithm.config import LIBConfig, final_kind
from lib_lightning.algorithm.covariance import RunningCovariance, all_reduce_covariances
from lib_lightning.algorithm.edges import Edges
from lib_lightning.algorithm.feature_reader import FeatureReader
from lib_lightning.algorithm.fisher_metric import FisherMetric
from lib_lightning.algorithm.jackknife import FeatureVariances, near_degenerate, standard_error
from lib_lightning.algorithm.jacobian_metric import JacobianMetric
from lib_lightning.algorithm.linalg import Cutoff
from lib_lightning.algorithm.memory_plan import MemoryPlan
from lib_lightning.algorithm.progress import phase_done
from lib_lightning.algorithm.section_cache import SectionCache
from lib_lightning.algorithm.wide_layers import DualEigenproblem, DualFewSamples
from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup, all_reduce
from lib_lightning.errors import ActivationError, NotFiniteError
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.validate import check_finite

_ONE_BY_ONE = (
    "Between '{}' and '{}' an operation cannot be differentiated for several vectors at once: they go one by one, with "
    "the same result, more slowly."
)
_BACKWARDS = (
    "Between '{}' and '{}' an operation has no second derivative: edges are computed backwards, output by output, with "
    "the same result, more slowly."
)


@dataclass(frozen=True)
class BuildResult:
    """What `build_graph` found.

    Attributes:
        bases: One basis for each node layer, in forward order.
        edges: One matrix ``(r_out, r_in)`` for each pair of neighbouring node layers.
        n_samples: Number of samples used.
        metric_errors: Estimated relative error of the metric of each node layer that has one: 0 where it is exact,
            None where a single probe leaves it unknown.
        notes: What had to be done in a slower way than usual, in sentences.
        importance_replicates: For each node layer its importances with one group of samples left out at a time, shape
            ``(G, r)``; G is 0 where the samples were not enough for groups.
        edge_replicates: The same of the edges between these features, ``(G, r_out, r_in)``.
    """

    bases: list[Basis]
    edges: list[Tensor]
    n_samples: int
    metric_errors: dict[str, float | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    importance_replicates: list[Tensor] = field(default_factory=list)
    edge_replicates: list[Tensor] = field(default_factory=list)


def build_graph(
    instrumented: InstrumentedModel,
    batches: Sequence[Any],
    settings: LIBConfig,
    tick: Callable[[str], None] = lambda step: None,
    chunks: MemoryPlan = MemoryPlan(),  # noqa: B008
    process_group: ProcessGroup = SINGLE_PROCESS,
    closed_forms: bool = True,
) -> BuildResult:
    """Compute bases and edges of a live model.

    Args:
        instrumented: The model and its node layers.
        batches: All batches; gone through several times.
        settings: What to compute.
        tick: Called after each batch of each step with the name of the step.
        chunks: How much fits into memory.
        process_group: The processes whose samples are to be taken as one; each has batches of its own, or none.
        closed_forms: Whether sections that have a closed form are computed by it.

    Returns:
        Bases and edges, the same on every process.

    Raises:
        ActivationError: If there are no samples, or activations or derivatives are not finite.
    """
    names = [layer.name for layer in instrumented.layers]
    last = len(names) - 1
    kinds: list[str] = [settings.basis] * last
    kinds.append("lib" if settings.final_metric else final_kind(settings, instrumented.layers[-1].taps))
    groups = min(int(t) for t in process_group.gather(torch.tensor([chunks.groups])))
    passes = SectionCache(
        instrumented, batches, replace(chunks, groups=groups), settings.integration_steps, closed_forms, tick
    )

    # 1. RunningCovariance.
    moments = [RunningCovariance(wide=kind != "lib") for kind in kinds]
    for cuts in passes.first():
        for layer_moments, cut in zip(moments, cuts, strict=True):
            layer_moments.update(cut.rows, cut.a.shape[0])
            if not torch.isfinite(layer_moments.mean).all():  # a sum shows it, and costs less than a look at each
                check_finite(cut.layer.name, cut.rows)
    all_reduce_covariances(moments, process_group)
    dtype = moments[-1].dtype
    if dtype is None or not all(layer_moments.count for layer_moments in moments):
        raise ActivationError("There are no samples to compute a basis from, or a mask leaves out all of them.")
    means = [m.mean for m in moments]
    phase_done("moments")

    # 2. Bases, from the last node layer to the first.
    generator = torch.Generator().manual_seed(process_group.rank)
    bases: list[Basis] = []
    errors: dict[str, float | None] = {}
    # What an importance is beside a variance: the length of the feature's direction in the metric, for each replicate.
    lengths: list[Tensor | None] = []
    known: dict[int, Tensor | None] = {}
    for i in reversed(range(len(names))):
        name, kind, step = names[i], kinds[i], f"basis of {names[i]}"
        cutoff = Cutoff(settings.rtol, len(means[i]), dtype)
        metric: FisherMetric | JacobianMetric | None = None
        if kind == "neuron":
            basis = neuron_basis(name, means[i], moments[i].covariance)
        elif kind == "centered":
            basis = centered_basis(name, means[i], moments[i].covariance)
        elif kind == "pca":
            basis = pca_basis(name, means[i], moments[i].covariance, cutoff)
        else:
            if i == last:
                metric = FisherMetric(len(means[i]), groups)
                for rows, group in passes.rows(step, i):
                    metric.update(rows, group)
                all_reduce([metric], process_group)
            else:
                metric = JacobianMetric(len(means[i]), bases[0].to_features, settings.n_probes, generator, groups)
                if settings.n_probes is None:
                    passes.keep_jacobian(i, bases[0].n_features)
                for _, section in passes.sections(step, means, i):
                    metric.update(section)
                metric.reduce(process_group)
                _check_derivatives(instrumented, i, metric.gram.N)
            B = metric.factor(cutoff.metric)
            if moments[i].has_covariance:
                basis = lib_basis(name, means[i], moments[i].covariance, B, cutoff)
            else:
                (B,) = process_group.broadcast([B])  # a factor is one of many, and sums need the same
                keeps = passes.kept and process_group.size == 1  # other processes' features may differ by rounding
                dual = (DualFewSamples if moments[i].count <= len(means[i]) else DualEigenproblem)(means[i], B, keeps)
                for rows, _ in passes.rows(step, i):
                    dual.update(rows)
                dual.reduce(process_group)
                basis, known[i] = dual.solve(name, cutoff)
            errors[name] = metric.relative_error
        # The same sums give the same basis only up to rounding, and truncation is all or nothing.
        bases.insert(0, basis.shared(process_group))
        lengths.insert(0, None if metric is None else metric.replicates(bases[0].from_features))
        phase_done(f"basis of {name}")

    # 3. Edges.
    edges = [Edges(before, after, groups) for before, after in itertools.pairwise(bases)]
    variances = [FeatureVariances(basis, groups) for basis in bases]
    features = [FeatureReader(basis, known.get(i)) for i, basis in enumerate(bases)]
    for i, section in passes.sections("edges", means):
        fhat = features[i].of(section.a, section.mask_in)
        edges[i].update(section, fhat)
        variances[i].update(fhat, section.mask_in, section.spans)
        if i + 1 == last:
            fhat = features[last].of(section.a_out, section.mask_out)
            variances[last].update(fhat, section.mask_out, section.spans)
        phase_done(f"edges from {names[i]} to {names[i + 1]}")
    all_reduce([*edges, *variances], process_group)
    for i, section_edges in enumerate(edges):
        _check_derivatives(instrumented, i, section_edges.E)

    # 4. Standard errors.
    importances: list[Tensor] = []
    for i, (feature_variances, length) in enumerate(zip(variances, lengths, strict=True)):
        found = feature_variances.replicates()
        importances.append(found if length is None else found * length)
        bases[i] = _with_errors(bases[i], importances[i])
    phase_done("standard errors")

    notes = [_ONE_BY_ONE.format(*names[i : i + 2]) for i in sorted(passes.unstackable)]
    notes += [_BACKWARDS.format(*names[i : i + 2]) for i in range(last) if edges[i].fell_back]
    return BuildResult(
        bases, [e.E for e in edges], moments[0].n, errors, notes, importances, [e.replicates for e in edges]
    )


def _with_errors(basis: Basis, replicates: Tensor) -> Basis:
    if len(replicates) < 2:
        return basis
    fixed = basis.kind in ("neuron", "centered")  # their directions are given
    unsure = None if fixed else near_degenerate(basis.importance, replicates)
    return replace(basis, importance_error=standard_error(replicates), unsure=unsure)


def _check_derivatives(instrumented: InstrumentedModel, index: int, result: Tensor) -> None:
    if not torch.isfinite(result).all():
        before, after = instrumented.layers[index].name, instrumented.layers[index + 1].name
        raise NotFiniteError(
            f"Derivatives of '{after}' with respect to '{before}' are NaN or infinite (a square root at zero, a "
            "division by zero, an overflow in half precision?). No basis can be computed from them."
        )
