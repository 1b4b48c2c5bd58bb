"""The algorithm of the Local Interaction Basis, in the order of the paper (arXiv 2405.10928).

1. *Moments.* Run all batches once; mean and covariance of every node layer.
2. *Metric and basis* of each node layer, from the last to the first. The last one is in neurons, centred neurons or
   PCA, or has a metric that measures a step by its effect on what the model predicts. Every earlier one has the
   Jacobian metric, which measures a step by its effect on the *next* layer's features, or all of them have that of the
   predictions. PCA whitens the activations; a rotation to the eigenvectors of the metric, and a scaling by its
   eigenvalues, make Jacobians orthonormal. Other bases of the same subspace, such as random ones, have another rotation
   of the whitened activations; the metrics, and with them the subspaces, remain those of the LIB. Where the user gives
   a dictionary, its latents are the features, and no metric is needed.
3. *Edges.* Squared interactions between the features of neighbouring layers.
4. *Importance for the output:* what setting a feature to its mean does to the predictions; and *effects on the
   output:* which classes or tokens it raises and lowers most.
5. *Standard errors* of importances and edges, from sums over groups of samples with one left out at a time. An
   importance is a variance times a squared length in the metric, and both have replicates, given the next layer's
   features. The rotation of the feature's own direction is a second-order effect. For an edge it is not: the standard
   error of an edge holds for these features.

Moments and features take forward passes, and Jacobians many times as much. Where ``jacobian_samples`` are fewer than
all samples, metrics, edges and importances for the output are means over these alone.

What makes this fast is behind interfaces with a plain twin each; see `lib_lightning.algorithm.shortcuts`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lib_lightning.algorithm.basis import Basis, centered_basis, neuron_basis, pca_basis
from lib_lightning.algorithm.basis_kinds import BY_IMPORTANCE, LATENTS, ROTATED, WITH_METRIC
from lib_lightning.algorithm.config import LIBConfig, final_kind
from lib_lightning.algorithm.covariance import RunningCovariance, all_reduce_covariances
from lib_lightning.algorithm.degenerate import describe_empty_layers, is_constant
from lib_lightning.algorithm.dictionary_basis import DictionaryBasis
from lib_lightning.algorithm.dictionary_edges import DictionaryEdges
from lib_lightning.algorithm.dictionary_metric import DictionaryMetric
from lib_lightning.algorithm.dominance import PositionVariance, describe_dominance, reduce_position_variances
from lib_lightning.algorithm.edges import Edges
from lib_lightning.algorithm.examples import FeatureExamples, Positions, example_collectors, merge_examples
from lib_lightning.algorithm.feature_reader import FeatureReader
from lib_lightning.algorithm.fisher_metric import LOGITS, FisherMetric
from lib_lightning.algorithm.gradient_metric import GradientMetric
from lib_lightning.algorithm.jackknife import FeatureVariances, near_degenerate, standard_error
from lib_lightning.algorithm.jacobian_metric import JacobianMetric
from lib_lightning.algorithm.latent_choice import choose_latents
from lib_lightning.algorithm.linalg import Cutoff
from lib_lightning.algorithm.memory_plan import MemoryPlan
from lib_lightning.algorithm.metric import Metric
from lib_lightning.algorithm.output_changes import (
    OUTPUT_EFFECTS,
    OutputEffects,
    chosen_samples,
    most_important,
    some_samples,
)
from lib_lightning.algorithm.output_effects import effect_notes, find_output_effects
from lib_lightning.algorithm.output_gradients import (
    EXACT_OUTPUTS,
    OUTPUT_IMPORTANCE,
    OUTPUT_METRIC,
    SAMPLED,
    OutputGradients,
    importance_vectors,
    is_output,
    measured_by_output,
    output_importances,
    output_metrics,
)
from lib_lightning.algorithm.progress import phase_done
from lib_lightning.algorithm.rotations import rotated, rotation_of
from lib_lightning.algorithm.section_cache import FEATURES, FORWARD_PASSES, MOMENTS, SectionCache
from lib_lightning.algorithm.shortcuts import FAST, Shortcuts
from lib_lightning.algorithm.wide_layers import eigenproblem
from lib_lightning.dictionaries.adapted import AdaptedDictionary
from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup, all_reduce
from lib_lightning.errors import ActivationError, NotFiniteError, quoted
from lib_lightning.jacobian.closed_form_detect import NoClosedForms
from lib_lightning.model.capture import CapturedLayer
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.output_distribution import OutputDistribution
from lib_lightning.model.validate import check_finite

_SEQUENTIAL = (
    "Between '{}' and '{}' an operation can only be differentiated for one vector at a time: slower, with the same "
    "result."
)
_NO_FORWARD_MODE = (
    "Between '{}' and '{}' an operation has no second derivative, so edges are computed in reverse mode, output by "
    "output: slower, with the same result."
)
_SAMPLED_ERRORS = "Edges to the error of the dictionary between '{}' and '{}' are estimated with random signs."
_UNREACHED = (
    "The edges of {:,} of {:,} features of '{}' are taken as zero, as none of the samples has pushed these forward: "
    "numbers of edges are too small. A larger n_pushed, or more samples, reaches more."
)
_SAMPLED_OUTPUT = (
    "The output has so many numbers that its metric is estimated from {} random vectors per sample; n_probes sets "
    "another number. The file says how large the error is."
)


@dataclass(frozen=True)
class BuildResult:
    """Result of `build_graph`.

    Attributes:
        bases: One basis for each node layer, in forward order.
        edges: One matrix ``(r_out, r_in)`` for each pair of neighbouring node layers.
        n_samples: Number of samples.
        metric_errors: Estimated relative error of the metric of each node layer that has one: 0 if it is exact, None if
            a single probe leaves it unknown.
        notes: Sentences about node layers without features, about those with one that has nearly all of the variance,
            and about slower fallbacks that were used.
        importance_replicates: Jackknife replicates of the importances of each node layer, shape ``(G, r)``; G is 0 if
            there are too few samples for groups.
        edge_replicates: Jackknife replicates of the edges between these features, ``(G, r_out, r_in)``.
        attributions: The signed interactions of each section, ``(r_out, r_in)``.
        attribution_replicates: Jackknife replicates of them, ``(G, r_out, r_in)``.
        examples: Examples of the features of each node layer.
        is_constant: Whether activations are the same for all samples at all node layers, so that there is nothing to
            compute; ``notes`` say so.
        output_effects: By node layer, the outputs that its features raise and lower most; empty if they were not
            measured.
        effect_samples: Number of samples that they were measured on.
    """

    bases: list[Basis]
    edges: list[Tensor]
    n_samples: int
    metric_errors: dict[str, float | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    importance_replicates: list[Tensor] = field(default_factory=list)
    edge_replicates: list[Tensor] = field(default_factory=list)
    attributions: list[Tensor] = field(default_factory=list)
    attribution_replicates: list[Tensor] = field(default_factory=list)
    examples: list[FeatureExamples] = field(default_factory=list)
    is_constant: bool = False
    output_effects: dict[str, OutputEffects] = field(default_factory=dict)
    effect_samples: int = 0


@dataclass(frozen=True)
class _Layer:
    """A node layer with its basis.

    Attributes:
        lib: The basis before it was rotated, which measures the layer before; mostly the basis itself.
        basis: The basis.
        features: Features of all batches at valid positions, if they were computed with the basis.
        lengths: Replicates of the squared lengths of its directions ``C^+`` in the metric, shape ``(G, r)``; None for
            a basis without a metric.
    """

    lib: Basis
    basis: Basis
    features: Tensor | None
    lengths: Tensor | None


@dataclass(frozen=True)
class _Run:
    """What all steps of one computation share.

    Attributes:
        names: Names of the node layers.
        last_taps: Taps of the last of them.
        kinds: Kind of basis of each node layer; ``"lib"`` has a metric.
        config: What to compute.
        shortcuts: How to compute it.
        process_group: The processes.
        plan: How much is computed at once.
        generator: Random signs for probes, and the choice of the features that are pushed forward.
        output: What the model's output stands for; None if it is not known.
        dictionaries: The dictionaries of node layers that have one, by index.
    """

    names: list[str]
    last_taps: Sequence[str]
    kinds: list[str]
    config: LIBConfig
    shortcuts: Shortcuts
    process_group: ProcessGroup
    plan: MemoryPlan
    generator: torch.Generator
    output: OutputDistribution | None
    dictionaries: Mapping[int, AdaptedDictionary]

    @property
    def last(self) -> int:
        """Index of the last node layer."""
        return len(self.names) - 1


def build_graph(
    instrumented: InstrumentedModel,
    batches: Sequence[Any],
    config: LIBConfig,
    plan: MemoryPlan = MemoryPlan(),  # noqa: B008
    process_group: ProcessGroup = SINGLE_PROCESS,
    shortcuts: Shortcuts = FAST,
    output: OutputDistribution | None = None,
    dictionaries: Mapping[int, AdaptedDictionary] = MappingProxyType({}),
) -> BuildResult:
    """Compute the bases and edges of a model.

    Progress is reported through `lib_lightning.algorithm.progress`.

    Args:
        instrumented: The model and its node layers.
        batches: All batches; iterated over several times.
        config: What to compute.
        plan: How much is computed at once.
        process_group: The processes whose samples are combined. Each has batches of its own; some may have none.
        shortcuts: How to compute it; `lib_lightning.algorithm.shortcuts.PLAIN` without any shortcut.
        output: What the model's output stands for, the same on every process; None for no importances for the output.
        dictionaries: Dictionaries of some node layers, by index.

    Returns:
        Bases and edges, the same on every process.

    Raises:
        ActivationError: If there are no samples, or activations or derivatives are not finite.
    """
    if dictionaries:  # their latents are pushed through the autograd graph
        shortcuts = replace(shortcuts, closed_forms=NoClosedForms)
    run = _Run(
        [layer.name for layer in instrumented.layers],
        instrumented.layers[-1].taps,
        _kinds(config, instrumented, dictionaries),
        config,
        shortcuts,
        process_group,
        _common_plan(plan, process_group, shortcuts.keep_graphs),
        torch.Generator().manual_seed(process_group.rank),
        output,
        dictionaries,
    )
    # 1. Moments.
    moments, position_variances, positions, cache = _moments(run, instrumented, batches)
    differentiated, sections = _differentiated(run, instrumented, batches, moments, cache)
    # 2. Metric and basis of each node layer, from the last to the first.
    widths = [len(layer_moments.mean) for layer_moments in moments]
    gradients = _output_gradients(run, instrumented, differentiated, sections)
    by_output = _output_metrics(run, gradients, widths)
    layers: list[_Layer] = []
    metric_errors: dict[str, float | None] = {}
    rotation_notes: dict[str, list[str]] = {}
    latent_notes: list[str] = []
    for i in reversed(range(len(run.names))):
        metric = by_output.get(i) or _metric(run, i, layers[0] if layers else None, widths[i], sections)
        if i in dictionaries:
            lib, notes = _latents(run, i, cache)
            features, latent_notes = None, [*notes, *latent_notes]
        else:
            lib, features = _basis(run, i, moments, metric, cache)
        basis, lengths = lib, None
        if metric is not None:
            if config.basis in ROTATED:
                basis, features, notes = _rotated(run, i, lib, features, metric, int(moments[i].count), cache)
                for note in notes:
                    rotation_notes.setdefault(note, []).insert(0, basis.name)
            lengths, metric_errors[basis.name] = metric.replicates(basis.from_features), metric.relative_error
        layers.insert(0, _Layer(lib, basis, features, lengths))
        phase_done(f"basis of {basis.name}")
    # 3. Edges.
    edges, variances, examples = _edges(run, layers, positions, cache, sections)
    layers = [_with_mean_squares(layer, v) for layer, v in zip(layers, variances, strict=True)]
    # 4. Importance for the output.
    bases = _output_importances(run, [layer.basis for layer in layers], gradients, _rows(moments[0], config))
    output_effects, effect_samples = _output_effects(run, instrumented, batches, bases)
    # 5. Standard errors.
    importances = [_importance_replicates(layer, v) for layer, v in zip(layers, variances, strict=True)]
    bases = [_with_errors(basis, x) for basis, x in zip(bases, importances, strict=True)]
    phase_done("standard errors")
    return BuildResult(
        bases=bases,
        edges=[e.E for e in edges],
        n_samples=moments[0].n,
        metric_errors=metric_errors,
        notes=[
            *describe_empty_layers(bases, moments, any(layer.skip_positions for layer in instrumented.layers)),
            *describe_dominance(bases, instrumented.layers, position_variances),
            *_notes(run, edges, sections, by_output),
            *(note.format(quoted(names)) for note, names in rotation_notes.items()),
            *latent_notes,
            *([] if run.output is None else effect_notes(config, bases, output_effects, effect_samples)),
        ],
        importance_replicates=importances,
        edge_replicates=[e.replicates for e in edges],
        attributions=[e.A for e in edges],
        attribution_replicates=[e.attribution_replicates for e in edges],
        examples=examples,
        is_constant=is_constant(moments),
        output_effects=output_effects,
        effect_samples=effect_samples,
    )


def phases(
    config: LIBConfig,
    instrumented: InstrumentedModel,
    n_batches: int,
    dictionaries: Mapping[int, AdaptedDictionary] = MappingProxyType({}),
    n_differentiated: int | None = None,
) -> dict[str, int]:
    """The phases of `build_graph`, in order, and how often each of them is reported.

    Args:
        config: What to compute.
        instrumented: The model and its node layers.
        n_batches: Number of batches.
        dictionaries: As for `build_graph`.
        n_differentiated: Number of batches with derivatives; None if these are all batches.

    Returns:
        Number of reports of each phase: one for each batch, and one for what is computed from all of them.
    """
    with_derivatives = n_batches if n_differentiated is None else n_differentiated
    names, kinds = [layer.name for layer in instrumented.layers], _kinds(config, instrumented, dictionaries)
    counts = {MOMENTS: n_batches + 1}
    measured = measured_by_output(config, len(names), instrumented.layers[-1].taps)
    measured = [i for i in measured if i not in dictionaries]
    counts |= {OUTPUT_METRIC: with_derivatives} if measured else {}
    for i, (name, kind) in reversed(list(enumerate(zip(names, kinds, strict=True)))):
        reports = n_batches if kind == LATENTS else with_derivatives if kind == "lib" and i not in measured else 0
        counts[f"basis of {name}"] = reports + 1
        if kind == "lib" and config.basis in ROTATED and config.basis != "random":
            counts[f"basis of {name}"] += n_batches
    counts |= {_edges_phase(before, after): with_derivatives for before, after in itertools.pairwise(names)}
    counts |= {} if n_differentiated is None else {FEATURES: n_batches}
    counts |= {} if config.output_distribution == "none" else {OUTPUT_IMPORTANCE: with_derivatives}
    counts |= {OUTPUT_EFFECTS: 1} if config.effect_samples else {}
    return counts | {"standard errors": 1}


def _moments(
    run: _Run, instrumented: InstrumentedModel, batches: Sequence[Any]
) -> tuple[list[RunningCovariance], list[PositionVariance], list[list[Positions]], SectionCache]:
    """Step 1: ``mu = E[a]`` and ``Sigma = E[(a - mu)(a - mu)^T]`` of every node layer, in the first pass.

    And how the variance is divided between positions, which notes are about; and which positions each batch has.
    """
    # With a metric, the covariance of a wide node layer can be avoided.
    moments = [RunningCovariance(always=kind != "lib" or not run.shortcuts.dual) for kind in run.kinds]

    position_variances = [PositionVariance() for _ in run.names]
    positions: list[list[Positions]] = []

    def add(captured: list[CapturedLayer]) -> None:
        positions.append([Positions.of(layer) for layer in captured])
        for layer_moments, position_variance, layer in zip(moments, position_variances, captured, strict=True):
            position_variance.update(layer)
            layer_moments.update(layer.rows, layer.a.shape[0])
            if not torch.isfinite(layer_moments.mean).all():  # cheaper than checking every activation
                check_finite(layer.layer.name, layer.rows)

    # Where few samples are differentiated, all of them are only run.
    plan = replace(run.plan, keep_graphs=run.plan.keep_graphs and run.config.jacobian_samples is None)
    cache = SectionCache.collect(
        instrumented, batches, plan, run.shortcuts.closed_forms, run.config.integration_steps, add
    )
    all_reduce_covariances(moments, run.process_group)
    if not all(layer_moments.count for layer_moments in moments):
        raise ActivationError("There are no samples to compute a basis from, or every position is masked.")
    phase_done(MOMENTS)
    position_variances = reduce_position_variances(position_variances, run.process_group)
    return moments, position_variances, positions, cache.path_from([layer_moments.mean for layer_moments in moments])


def _differentiated(
    run: _Run,
    instrumented: InstrumentedModel,
    batches: Sequence[Any],
    moments: Sequence[RunningCovariance],
    cache: SectionCache,
) -> tuple[Sequence[Any], SectionCache]:
    """The samples of this process on which Jacobians are computed, in batches, and their sections."""
    wanted = run.config.jacobian_samples
    if wanted is None:
        return batches, cache
    sizes = list(map(instrumented.num_samples, batches))
    # From as many batches as there are groups, as samples next to each other may be alike.
    chosen = chosen_samples(sizes, wanted, run.process_group, batches=run.plan.groups)
    some = [
        some_samples(instrumented, batches[index], count)
        if instrumented.layout(batches[index]).can_split(batches[index])
        else batches[index]
        for index, count in chosen
    ]
    closed_forms, steps = run.shortcuts.closed_forms, run.config.integration_steps
    found = SectionCache.collect(instrumented, some, run.plan, closed_forms, steps, lambda _: None, FORWARD_PASSES)
    return some, found.path_from([layer_moments.mean for layer_moments in moments])


def _rows(moments: RunningCovariance, config: LIBConfig) -> int:
    """Number of samples times positions of a node layer on which Jacobians are computed."""
    share = 1.0 if config.jacobian_samples is None else min(1.0, config.jacobian_samples / max(1, moments.n))
    return math.ceil(share * int(moments.count))


def _metric(run: _Run, i: int, next_layer: _Layer | None, d: int, cache: SectionCache) -> Metric | None:
    """Step 2: the metric ``M`` that measures steps in the activations of node layer ``i``, if its basis needs one."""
    if run.kinds[i] != "lib":
        return None
    groups = run.plan.groups
    metric: FisherMetric | JacobianMetric | DictionaryMetric
    if next_layer is None:
        metric = FisherMetric(d, groups, run.output or LOGITS)
    elif isinstance(next_layer.lib, DictionaryBasis):
        arguments = (next_layer.lib, run.config.n_probes, run.generator, groups, run.shortcuts.gram)
        metric = DictionaryMetric(d, *arguments)
    else:
        C_next, reuse = next_layer.lib.to_features, next_layer.lib is next_layer.basis
        metric = JacobianMetric(d, C_next, run.config.n_probes, run.generator, groups, reuse, run.shortcuts.gram)
    metric.add_batches(cache, i, f"basis of {run.names[i]}")
    metric.reduce(run.process_group)
    if not metric.is_finite():
        raise _not_finite(run, i)
    return metric


def _output_gradients(
    run: _Run, instrumented: InstrumentedModel, batches: Sequence[Any], cache: SectionCache
) -> OutputGradients | None:
    """Gradients of what the model predicts, if it is known what that is."""
    if run.output is None:
        return None
    plan, rank = run.plan, run.process_group.rank
    return OutputGradients(instrumented, batches, run.output, cache.group_slices, plan.stack_elements, rank)


def _output_metrics(
    run: _Run, gradients: OutputGradients | None, widths: Sequence[int]
) -> Mapping[int, GradientMetric]:
    """Step 2: the metrics ``M_out`` of node layers that are measured by the model's output; exact for the output."""
    measured = measured_by_output(run.config, len(run.names), run.last_taps)
    measured = [i for i in measured if i not in run.dictionaries]
    if not measured or gradients is None:
        return {}
    n_probes = _agreed(gradients.num_vectors(run.config.n_probes, EXACT_OUTPUTS, SAMPLED), run.process_group)
    groups = run.plan.groups
    metrics = output_metrics(gradients, measured, widths, n_probes, groups, run.shortcuts.gram)
    for i, metric in metrics.items():
        metric.reduce(run.process_group)
        if not metric.is_finite():
            raise _not_finite(run, i)
    return metrics


def _agreed(n_vectors: int | None, process_group: ProcessGroup) -> int | None:
    """The number of random vectors per sample that all processes use: the largest, of which None is 0."""
    return max(int(t) for t in process_group.gather(torch.tensor([n_vectors or 0], device="cpu"))) or None


def _basis(
    run: _Run, i: int, moments: Sequence[RunningCovariance], metric: Metric | None, cache: SectionCache
) -> tuple[Basis, Tensor | None]:
    """Step 2: the maps ``C`` and ``C^+`` and the importances ``Lambda`` of node layer ``i``.

    Also the features of all batches, if the eigenproblem computes them anyway.
    """
    name, kind, dtype = run.names[i], run.kinds[i], moments[-1].dtype
    assert dtype is not None, "there are samples"
    mean, features = moments[i].mean, None
    cutoff = Cutoff(run.config.rtol, len(mean), dtype)
    if kind == "neuron":
        basis = neuron_basis(name, mean, moments[i].covariance)
    elif kind == "centered":
        basis = centered_basis(name, mean, moments[i].covariance)
    elif kind == "pca":
        basis = pca_basis(name, mean, moments[i].covariance, cutoff)
    else:
        assert metric is not None
        # With several processes, features may differ from those of the broadcast basis by rounding and signs.
        keep = cache.is_cached and run.process_group.size == 1
        problem = eigenproblem(moments[i], metric.factor(cutoff.metric), run.process_group, keep)
        if problem.needs_rows:
            for rows, _ in cache.rows(f"basis of {name}", i):
                problem.update(rows)
        problem.reduce(run.process_group)
        basis, features = problem.solve(name, cutoff)
    # Equal sums give equal bases only up to rounding, and truncation turns rounding into another number of features.
    return basis.broadcast(run.process_group), features


def _latents(run: _Run, i: int, cache: SectionCache) -> tuple[Basis, list[str]]:
    """Step 2: the latents of the dictionary of node layer ``i`` that are active, and notes."""
    # Two matrices, of edges and attributions, in float64.
    most = max(1, math.isqrt(run.plan.edge_bytes // 16) - 1)
    rows = cache.rows(f"basis of {run.names[i]}", i)
    return choose_latents(run.dictionaries[i], rows, most, run.process_group)


def _with_mean_squares(layer: _Layer, variances: FeatureVariances) -> _Layer:
    """Step 3: a layer of latents with the importances of all of them, and of the error."""
    if not isinstance(layer.basis, DictionaryBasis):
        return layer
    basis = replace(layer.basis, importance=variances.mean_square().to(layer.basis.importance))
    return replace(layer, lib=basis, basis=basis)


def _rotated(
    run: _Run, i: int, lib: Basis, features: Tensor | None, metric: Metric, num_rows: int, cache: SectionCache
) -> tuple[Basis, Tensor | None, list[str]]:
    """Step 2: the basis with the same whitened activations as the LIB of node layer ``i``, rotated; and notes."""
    kind, seed = run.config.basis, run.config.basis_seed * len(run.names) + i
    rotation = rotation_of(kind, lib, metric, num_rows, run.plan.groups, seed)
    if rotation.needs_rows:
        for rows, group in cache.rows(f"basis of {lib.name}", i):
            rotation.update(rows, group)
    rotation.reduce(run.process_group)
    R, notes = rotation.solve()
    basis, features = rotated(lib, kind, R, features)
    return basis.broadcast(run.process_group), features, notes


class _FeatureStatistics:
    """What needs all values of all features: their variances, for standard errors, and their examples.

    Args:
        bases: Basis of each node layer.
        positions: Of each batch, and each node layer.
        cache: All batches.
        process_group: The processes.
        groups: Number of jackknife groups.
    """

    def __init__(
        self,
        bases: Sequence[Basis],
        positions: Sequence[Sequence[Positions]],
        cache: SectionCache,
        process_group: ProcessGroup,
        groups: int,
    ) -> None:
        self.variances = [FeatureVariances(basis, groups) for basis in bases]
        self._examples = example_collectors(bases, positions, cache.num_samples, process_group)
        self._positions, self._group_slices = positions, cache.group_slices

    def add(self, batch: int, i: int, fhat: Tensor, mask: Tensor | None) -> None:
        """Add the features of a node layer on a batch."""
        self.variances[i].update(fhat, mask, self._group_slices[batch])
        self._examples[i].update(fhat, mask, self._positions[batch][i])

    def examples(self, process_group: ProcessGroup) -> list[FeatureExamples]:
        """Examples of the features of each node layer, of all processes."""
        merge_examples(self._examples, process_group)
        return [one.result() for one in self._examples]


def _edges(
    run: _Run,
    layers: Sequence[_Layer],
    positions: Sequence[Sequence[Positions]],
    cache: SectionCache,
    sections: SectionCache,
) -> tuple[list[Edges], list[FeatureVariances], list[FeatureExamples]]:
    """Step 3: the edges ``E`` of every section; and variances and examples of the features."""
    bases = [layer.basis for layer in layers]
    edges = [_section_edges(run, before, after) for before, after in itertools.pairwise(bases)]
    statistics = _FeatureStatistics(bases, positions, cache, run.process_group, run.plan.groups)
    has_all = sections is cache
    readers = [FeatureReader(layer.basis, layer.features if has_all else None) for layer in layers]
    fhat_next = torch.empty(0, device="cpu")
    for batch, i, section in sections.sections("edges"):
        # The sections of a batch come in forward order: features after one are features before the next.
        fhat = fhat_next if i else readers[0].next(section.a, section.mask_in)
        fhat_next = readers[i + 1].next(section.a_out, section.mask_out)
        edges[i].update(section, fhat, fhat_next)
        if has_all:
            statistics.add(batch, i, fhat, section.mask_in)
            if i + 1 == run.last:
                statistics.add(batch, run.last, fhat_next, section.mask_out)
        phase_done(_edges_phase(*run.names[i : i + 2]))
    if not has_all:
        readers = [FeatureReader(layer.basis, layer.features) for layer in layers]
        for batch, captured in enumerate(cache.activations(FEATURES)):
            for i, (reader, (a, mask)) in enumerate(zip(readers, captured, strict=True)):
                statistics.add(batch, i, reader.next(a, mask), mask)
    all_reduce([*edges, *statistics.variances], run.process_group)
    examples = statistics.examples(run.process_group)
    for i, section_edges in enumerate(edges):
        if not torch.isfinite(section_edges.E).all():
            raise _not_finite(run, i)
    return edges, statistics.variances, examples


def _section_edges(run: _Run, before: Basis, after: Basis) -> Edges:
    arguments = (run.shortcuts.forward_mode, run.config.n_pushed, run.generator)
    if not (isinstance(before, DictionaryBasis) or isinstance(after, DictionaryBasis)):
        return Edges(before, after, run.plan.groups, *arguments)
    # Sums for each group have standard errors; there may be too many features for that.
    fits = 16 * before.n_features * after.n_features * run.plan.groups <= run.plan.edge_bytes
    return DictionaryEdges(before, after, run.plan.groups if fits else 1, *arguments)


def _output_importances(run: _Run, bases: Sequence[Basis], gradients: OutputGradients | None, rows: int) -> list[Basis]:
    """Step 4: the bases with the importances ``o`` of their features for the output."""
    if gradients is None:
        return list(bases)
    n_vectors = _agreed(gradients.num_vectors(importance_vectors(run.config, rows), 0, SAMPLED), run.process_group)
    found = output_importances(gradients, bases, n_vectors, run.plan.groups)
    all_reduce(found, run.process_group)
    return [
        # The directions of decoders that are not affine are different at each sample.
        basis
        if isinstance(basis, DictionaryBasis) and not basis.known.is_affine
        else replace(basis, output_importance=one.value, output_importance_error=one.error)
        for basis, one in zip(bases, found, strict=True)
    ]


def _output_effects(
    run: _Run, instrumented: InstrumentedModel, batches: Sequence[Any], bases: Sequence[Basis]
) -> tuple[dict[str, OutputEffects], int]:
    """Step 4: which outputs features raise and lower most, by node layer; and the number of samples that show it."""
    config = run.config
    count = config.effect_features or 0
    # Of features of the output itself, that is known.
    numbers = [0 if i == run.last and is_output(run.last_taps) else count for i in range(len(bases))]
    if run.output is None or not config.effect_samples or not any(numbers):
        return {}, 0
    features = [most_important(basis, number) for basis, number in zip(bases, numbers, strict=True)]
    return find_output_effects(
        instrumented, batches, bases, features, run.output, config, run.plan.stack_elements, run.process_group
    )


def _importance_replicates(layer: _Layer, variances: FeatureVariances) -> Tensor:
    """Step 5: replicates of ``Lambda = (variance of a feature) (squared length of its C^+ in the metric)``."""
    if isinstance(layer.basis, DictionaryBasis):
        return variances.mean_square_replicates()
    replicates = variances.replicates()
    # In a LIB the squared length is 1 for all samples, but not for each replicate. Very few samples with Jacobians may
    # leave groups empty; then the error is that of the variance alone.
    if layer.lengths is None or len(layer.lengths) != len(replicates):
        return replicates
    return replicates * layer.lengths


def _with_errors(basis: Basis, replicates: Tensor) -> Basis:
    """Step 5: the basis with standard errors."""
    if len(replicates) < 2:
        return basis
    # Of other bases, the importances do not determine the directions.
    degenerate = near_degenerate(basis.importance, replicates) if basis.kind in BY_IMPORTANCE else None
    return replace(basis, importance_error=standard_error(replicates), degenerate=degenerate)


def _kinds(
    config: LIBConfig, instrumented: InstrumentedModel, dictionaries: Mapping[int, AdaptedDictionary]
) -> list[str]:
    """Kind of basis of each node layer, before rotation."""
    *others, last = instrumented.layers
    kind = "lib" if config.basis in WITH_METRIC else config.basis
    kinds = [kind for _ in others] + [final_kind(config, last.taps)]
    return [LATENTS if i in dictionaries else kind for i, kind in enumerate(kinds)]


def _common_plan(plan: MemoryPlan, process_group: ProcessGroup, keep_graphs: bool) -> MemoryPlan:
    """The plan with as many jackknife groups as every process has memory for."""
    groups = min(int(t) for t in process_group.gather(torch.tensor([plan.groups], device="cpu")))
    return replace(plan, groups=groups, keep_graphs=plan.keep_graphs and keep_graphs)


def _edges_phase(before: str, after: str) -> str:
    return f"edges from {before} to {after}"


def _not_finite(run: _Run, i: int) -> NotFiniteError:
    before, after = run.names[i], run.names[min(i + 1, run.last)]
    return NotFiniteError(
        f"Derivatives of '{after}' with respect to '{before}' are NaN or infinite (a square root at zero, a "
        "division by zero, an overflow in half precision?). No basis can be computed from them."
    )


def _notes(
    run: _Run, edges: Sequence[Edges], cache: SectionCache, output_metrics: Mapping[int, GradientMetric]
) -> list[str]:
    notes = [_SEQUENTIAL.format(*run.names[i : i + 2]) for i in cache.sequential_sections]
    if run.config.n_probes is None and any(metric.n_probes is not None for metric in output_metrics.values()):
        notes.append(_SAMPLED_OUTPUT.format(SAMPLED))
    notes += [_NO_FORWARD_MODE.format(*run.names[i : i + 2]) for i, e in enumerate(edges) if e.fell_back]
    sampled = [i for i, e in enumerate(edges) if isinstance(e, DictionaryEdges) and e.samples_errors]
    notes += [_SAMPLED_ERRORS.format(*run.names[i : i + 2]) for i in sampled]
    return notes if run.config.n_pushed is None else notes + _unreached(run, edges)


def _unreached(run: _Run, edges: Sequence[Edges]) -> list[str]:
    """Notes on sections in which fewer than half of the features have been chosen in any sample."""
    notes = []
    for i, one in enumerate(edges):
        # Without forward mode, features of the next node layer are chosen.
        side, dim = (i + 1, 1) if one.fell_back else (i, 0)
        is_reached = (one.E > 0).any(dim)
        missing, total = int((~is_reached).sum()), len(is_reached)
        if 2 * missing > total:
            notes.append(_UNREACHED.format(missing, total, run.names[side]))
    return notes
