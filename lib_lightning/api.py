"""Functions that work on any module, without a trainer: interaction graphs and choices of node layers."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from types import MappingProxyType
from typing import Any, get_args

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lib_lightning import __version__
from lib_lightning._deprecated import renamed_arguments
from lib_lightning.algorithm.basis_kinds import WITH_METRIC
from lib_lightning.algorithm.build import BuildResult, build_graph, phases
from lib_lightning.algorithm.config import (
    BasisKind,
    FinalBasisKind,
    FinalMetric,
    LIBConfig,
    MetricKind,
    check_choice,
    final_kind,
)
from lib_lightning.algorithm.cost import (
    CostEstimate,
    PeakMemory,
    Trial,
    file_bytes,
    kept_bytes,
    likely_ranks,
    samples_of,
    trial_size,
)
from lib_lightning.algorithm.dictionary_basis import ERROR, DictionaryBasis
from lib_lightning.algorithm.dictionary_layers import (
    LatentCounts,
    check_dictionaries,
    plan_for_dictionaries,
    try_dictionaries,
)
from lib_lightning.algorithm.effort import Effort, EffortPlan, affordable_effects, agree, choose_effort, measure_cost
from lib_lightning.algorithm.jackknife import standard_error
from lib_lightning.algorithm.memory_plan import MEMORY_LIMIT, MemoryPlan, Workload, plan_memory, split_batches
from lib_lightning.algorithm.output_effects import effects_by
from lib_lightning.algorithm.output_gradients import is_output, needs_output
from lib_lightning.algorithm.progress import phase_done
from lib_lightning.algorithm.progress_bar import ProgressDisplay, current_display, displayed_in, steps_of
from lib_lightning.dictionaries.adapted import AdaptedDictionary
from lib_lightning.dictionaries.dictionary import Dictionary
from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from lib_lightning.errors import (
    ActivationError,
    LIBError,
    SettingError,
    SettingTypeError,
    brief,
    check_number,
    is_out_of_memory,
    shortened,
)
from lib_lightning.graph import InteractionGraph, Lineages, Replicates
from lib_lightning.io import basis_format as keys
from lib_lightning.model.batch import check_has_tensors, is_empty, num_elements
from lib_lightning.model.discover import CutPoint
from lib_lightning.model.forward_errors import wrap_forward_errors
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.model_spec import InputFn, MaskFn, ModelSpec
from lib_lightning.model.module_paths import unwrapped
from lib_lightning.model.node_layer import NodeLayer, as_node_layers
from lib_lightning.model.output_distribution import OutputDistribution, OutputSetting, find_output_distribution
from lib_lightning.model.output_distribution import agree as agree_on_output
from lib_lightning.model.preserve import copied_bytes, preserve_model
from lib_lightning.model.propose import find_cuts_and_proposals, find_proposed, sizes
from lib_lightning.model.replica import num_bytes
from lib_lightning.model.safe_points import signals_at_safe_points
from lib_lightning.model.skip_positions import SkipPositions
from lib_lightning.model.validate import NOT_LOOKED, validate_node_layers
from lib_lightning.model.weights_hash import weights_hash

log = logging.getLogger(__name__)

# How often the memory plan is halved before an out-of-memory error is raised.
_MAX_HALVINGS = 6
# Operations that effort="auto" lets a graph take: a minute or so on a few cores.
GRAPH_OPERATIONS = 1.5e12
# Seconds below which an estimate is made twice, as only the second one is as fast as all that follow.
_SHORT_TRIAL = 0.5
# Samples that show what the output stands for.
_FEW = 8
_NO_OUTPUT = "The importance of features for the output is not computed: {}"
_GUESSED = "The output is taken for {} predictions, which is a guess: output_distribution says what it is."
_SAMPLED = "Exact sums would take too long here; computed are {}. effort='exact' computes exact ones."


@renamed_arguments(together="process_group")
def compute_interaction_graph(  # noqa: PLR0913 (a public entry)
    model: nn.Module,
    batches: Iterable[Any],
    node_layers: Sequence[str | NodeLayer] | None = None,
    basis: BasisKind | Mapping[str, Dictionary] = "lib",
    final_basis: FinalBasisKind = "auto",
    rtol: float = 1e-6,
    n_probes: int | None = None,
    integration_steps: int = 0,
    dtype: torch.dtype | None = None,
    input_fn: InputFn | None = None,
    mask: str | int | MaskFn | None = None,
    memory_limit: float = MEMORY_LIMIT,
    process_group: ProcessGroup = SINGLE_PROCESS,
    progress: bool = False,
    final_metric: FinalMetric | None = None,
    n_pushed: int | None = None,
    effort: Effort = "auto",
    skip_positions: SkipPositions | None = None,
    metric: MetricKind = "next",
    output_distribution: OutputSetting = "auto",
    basis_seed: int = 0,
    dictionaries: Mapping[str, Dictionary] | None = None,
) -> InteractionGraph:
    """Compute the Local Interaction Basis of a model's activations and the interactions between its features.

    The model is run in evaluation mode and left exactly as it was found.

    Args:
        model: Any module.
        batches: Batches as a data loader returns them: tensors, tuples, lists or dicts. They are used several times, so
            an iterator is read into memory first.
        node_layers: Where to cut the model, in forward order: ``"module.path"`` for a module's output,
            ``"module.path:input"`` for its input, ``"input"`` and ``"output"`` for those of the model, or a
            `NodeLayer`. None uses the ones that `list_node_layers` proposes, and logs a warning that names them.
        basis: ``"lib"``, or the baselines ``"pca"`` and ``"neuron"``. Or another rotation of the same whitened
            activations: ``"random"``; ``"ica"``, as independent as possible; ``"dictionary"``, with as few large values
            as possible; ``"varimax"``, the LIB rotated only between features of nearly equal importance, so that they
            act on few neurons. A mapping is taken for ``dictionaries``, with the LIB at the other node layers.
        final_basis: Basis of the last node layer, which has no next layer: ``"neuron"``, ``"pca"``, or ``"centered"``
            for logits less their mean over the classes. ``"auto"`` is ``"neuron"`` for ``"output"`` and ``"pca"`` for
            any other node layer.
        rtol: Directions with an eigenvalue of the metric, or an importance (for PCA: a variance), up to this share of
            the largest are dropped; 0 drops only directions that are zero up to rounding.
        n_probes: Number of random-sign probes per sample for the metric, which makes its cost independent of the
            number of output positions and features; None for the exact metric (see ``effort``).
        integration_steps: Number of Gauss-Legendre points between the mean and the activations over which gradients
            are averaged; 0 for the gradients at the activations.
        dtype: Floating-point type of the computation; None for that of the model. Sums are always float64.
        input_fn: Maps a batch to the model's input: a dict becomes keyword arguments, a tuple positional arguments.
            None finds out on the first batch: a LightningModule is called as its own ``validation_step`` (or
            ``training_step``, ``predict_step``) calls it, any other module with the entries of the batch that its
            ``forward`` takes. The log says how.
        mask: Marks valid positions if some are padding: name or index of an entry of the batch, such as
            ``"attention_mask"``, or a function from a batch to a tensor of shape ``(n, S)``, nonzero if valid.
        memory_limit: Memory to use in addition to the model and the batches, in GiB. Batches are split into chunks of
            samples that need less; after an out-of-memory error the chunks are halved.
        process_group: Processes that call this function with different batches, to get the graph of all samples:
            `lib_lightning.distributed.torch_group.TorchProcessGroup()`. By default a single process.
        progress: Whether to show a progress bar, which advances with the operations, and the remaining time.
        final_metric: ``"fisher"`` measures the last node layer by what the model's output predicts: importance then is
            the effect on the predicted distribution. None for ``final_basis``. With ``effort="auto"``, a last node
            layer before more than 512 logits is measured so too, unless ``final_basis`` is given.
        n_pushed: Number of features that are pushed forward in each sample: whose effect on the next node layer is
            computed. They are chosen at random, important ones more often, which makes the cost of edges independent of
            width and number of positions; None for exact edges (see ``effort``). The standard errors include the error
            of this choice.
        effort: ``"auto"`` chooses ``n_probes`` and ``n_pushed``, where they are None, if exact sums would take more
            than a minute or so, and says so in a note; ``"exact"`` takes None as exact in any case.
        skip_positions: Positions that the model computes as usual, but that are left out of all features, metrics,
            edges and ablations: 1 for the first one, as in language models, whose first token often has most of the
            variance; -1 for the last one; a list of indices; a slice. Counted in each sample, among the valid ones if
            there is a mask. None for none; a `NodeLayer` may have its own. Paths from other positions through these
            are not part of edges.
        metric: ``"next"`` measures a node layer by the features of the next one, as the paper does; ``"output"``
            measures all of them by what the model's output predicts.
        output_distribution: What the output is: ``"categorical"`` for logits of classes or tokens, ``"bernoulli"`` for
            logits of yes-or-no answers, ``"gaussian"`` for numbers with a squared error. ``"auto"`` finds out by the
            loss, the model's configuration or the labels in the batch, and ``graph.info`` says how; ``"none"`` leaves
            out `Basis.output_importance`.
        basis_seed: Seed of a random rotation, and of the one at which ICA and dictionary learning start.
        dictionaries: Objects with ``encode(a) -> (..., r)`` and ``decode(f) -> (..., d)``, such as sparse autoencoders,
            by node layer: their latents that are active in the samples are the features there, and what a dictionary
            leaves out, ``a - decode(encode(a))``, is one more; see `lib_lightning.dictionaries`. Derivatives are those
            of encoder and decoder at the activations. The other node layers have the given ``basis``.

    Returns:
        The interaction graph: a basis for each node layer, edges between neighbouring ones.

    Raises:
        NodeLayerError: If a node layer is unknown, never run, out of order, or does not cut the computation.
        ActivationError: If activations are integers, NaN or infinite, if there are no samples, or if all of them are
            the same.
        ValueError: If an argument is outside its range.
        SettingTypeError: If ``batches`` is a single tensor, or ``dtype`` is not a floating-point type.

    Note:
        Source: arXiv 2405.10928; see `lib_lightning.algorithm.build` for the steps.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> graph = compute_interaction_graph(model, [torch.randn(64, 4)], ["input", "1", "output"])
        >>> graph.node_layers
        ['input', '1', 'output']
        >>> graph.edges["1", "output"].shape[0]
        2
    """
    check_choice("effort", effort, get_args(Effort))
    basis, dictionaries = basis_and_dictionaries(basis, dictionaries)
    config = LIBConfig(
        basis, final_basis, rtol, n_probes, integration_steps, final_metric, n_pushed, metric, output_distribution,
        basis_seed=basis_seed,
    )  # fmt: skip
    check_number("memory_limit", memory_limit, lambda x: x > 0, "is a number of GiB above 0")
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise SettingTypeError(
            "batches must be an iterable of batches, such as a list or a DataLoader; got "
            f"{type(batches).__name__}. For a single batch, write [batch]."
        )
    spec = ModelSpec(input_fn, mask, dtype, skip_positions)
    batches = list(batches)
    if node_layers is None:
        node_layers = proposed_node_layers(model, batches, spec)
    instrumented = InstrumentedModel(model, as_node_layers(node_layers), spec)
    display = ProgressDisplay(tqdm) if progress else current_display()
    with (
        signals_at_safe_points(),
        wrap_forward_errors(instrumented.model, instrumented.spec),
        displayed_in(display),
    ):
        graph = graph_of(
            instrumented, batches, config, memory_limit, process_group, check_first=True, effort=effort,
            dictionaries=dictionaries,
        )  # fmt: skip
    graph.info[keys.WEIGHTS_HASH] = weights_hash(instrumented.model)
    log.info("%s was called as %s.", type(model).__name__, instrumented.spec.call)
    for note in graph.info[keys.NOTES]:
        log.warning(note)
    return graph


def estimate_cost(  # noqa: PLR0913 (a public entry)
    model: nn.Module,
    batch: Any,
    node_layers: Sequence[str | NodeLayer] | None = None,
    num_samples: int | None = None,
    effort: Effort = "auto",
    memory_limit: float = MEMORY_LIMIT,
    input_fn: InputFn | None = None,
    mask: str | int | MaskFn | None = None,
    dtype: torch.dtype | None = None,
    skip_positions: SkipPositions | None = None,
    **settings: Any,
) -> CostEstimate:
    """Predict time, memory and file size of a graph, without computing it.

    Operations are counted on two samples, and a plan is made from them. Then a graph of a few samples, or of all if
    they are computed at once, is begun: every step of a graph is run, but only a few products of each loop over them.

    Args:
        model: As for `compute_interaction_graph`; left exactly as it was found.
        batch: One batch, as `compute_interaction_graph` takes many.
        node_layers: As for `compute_interaction_graph`.
        num_samples: Number of samples of all batches; None for those of ``batch``.
        effort: As for `compute_interaction_graph`.
        memory_limit: As for `compute_interaction_graph`, in GiB.
        input_fn: As for `compute_interaction_graph`.
        mask: As for `compute_interaction_graph`.
        dtype: As for `compute_interaction_graph`.
        skip_positions: As for `compute_interaction_graph`.
        settings: Other arguments of `compute_interaction_graph`: ``basis``, ``final_basis``, ``rtol``, ``n_probes``,
            ``n_pushed``, ``integration_steps``, ``metric``, ``final_metric``, ``output_distribution``, ``basis_seed``,
            ``dictionaries``.

    Returns:
        The plan, predicted seconds and bytes. Printed, it is a sentence.

    Raises:
        NodeLayerError: If a node layer is unknown, never run, out of order, or does not cut the computation.
        ActivationError: If activations are integers, NaN or infinite, or there are no samples.
        ValueError: If an argument is outside its range.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> estimate = estimate_cost(model, torch.randn(64, 4), ["input", "1", "output"], num_samples=10_000)
        >>> estimate.plan.num_samples, estimate.seconds < 60, estimate.file_bytes < 100_000
        (10000, True, True)
    """
    check_choice("effort", effort, get_args(Effort))
    kind, dictionaries = basis_and_dictionaries(settings.pop("basis", "lib"), settings.pop("dictionaries", None))
    config = LIBConfig(kind, **settings)
    check_number("memory_limit", memory_limit, lambda x: x > 0, "is a number of GiB above 0")
    if num_samples is not None:
        check_number("num_samples", num_samples, lambda x: x >= 1, "is a number of samples, at least 1", integer=True)
    spec = ModelSpec(input_fn, mask, dtype, skip_positions)
    if is_empty(batch):
        raise ActivationError("There are no samples to estimate a cost with: the batch is empty.")
    started = time.perf_counter()
    if node_layers is None:
        node_layers = proposed_node_layers(model, [batch], spec)
    proposing = time.perf_counter() - started

    def once() -> CostEstimate:
        for halvings in itertools.count():
            instrumented = InstrumentedModel(model, as_node_layers(node_layers), spec)
            explained = wrap_forward_errors(instrumented.model, instrumented.spec)
            try:
                with explained, model_session(instrumented, copied_bytes(memory_limit)):
                    return _estimate(
                        instrumented, batch, config, memory_limit, num_samples, effort, halvings, dictionaries
                    )
            except Exception as error:
                if halvings == _MAX_HALVINGS or not is_out_of_memory(error):
                    raise
        raise AssertionError("unreachable")

    with signals_at_safe_points():
        started = time.perf_counter()
        first = once()
        if time.perf_counter() - started < _SHORT_TRIAL:  # it has warmed up
            again = once()
            first = replace(again, peak_bytes=max(first.peak_bytes, again.peak_bytes))
    return replace(first, seconds=first.seconds + proposing)


def _estimate(
    instrumented: InstrumentedModel,
    batch: Any,
    config: LIBConfig,
    memory_limit: float,
    num_samples: int | None,
    effort: Effort,
    halvings: int,
    dictionaries: Mapping[str, Dictionary],
) -> CostEstimate:
    """Predict what a graph costs, by its preparations and a trial; the memory plan is halved ``halvings`` times."""
    started = time.perf_counter()
    instrumented.notes = validate_node_layers(instrumented, [batch])
    size = instrumented.num_samples(batch)
    n = num_samples or size
    output, _ = _output(instrumented, [batch], config, SINGLE_PROCESS)
    if effort == "auto":
        config = _with_final_metric(config, instrumented.layers[-1], output)
    memory = _plan(instrumented, [batch], config, memory_limit, output is not None, n)
    adapted, latents = _adapted(instrumented, [batch], dictionaries, config)
    memory = plan_for_dictionaries(memory, latents)
    for _ in range(halvings):
        memory = memory.halved(size)
    cost = replace(measure_cost(instrumented, batch), latents=latents)
    plan = EffortPlan.of(cost, config, n, math.inf)
    if effort == "auto":
        plan = choose_effort(cost, config, n, GRAPH_OPERATIONS, True)
    config = plan.applied_to(config)
    preparing = time.perf_counter() - started

    # Jacobians, which take longest, are timed on chunks of as many samples as have them.
    m = min(n, config.jacobian_samples or n)
    config = replace(config, jacobian_samples=None)
    chunk, chunks = trial_size(cost, config, n, min(size, memory.samples, m))
    batches = samples_of([batch], chunk, instrumented.select, instrumented.num_samples) * chunks
    a = instrumented.activations(instrumented.select(batch, slice(0, 1)))[0]
    trial = Trial(phases(config, instrumented, Trial.MANY, adapted), a.device)
    with PeakMemory(a.device) as used, trial.measuring():
        built = build_graph(instrumented, batches, config, memory, output=output, dictionaries=adapted)
    ranks = likely_ranks(cost, [basis.n_features for basis in built.bases], chunks * chunk, n)
    itemsize = built.bases[0].to_features.element_size()
    # What all samples need beside those of the trial, by the plan.
    of_trial = _plan(instrumented, [batch], config, memory_limit, output is not None, chunks * chunk)
    more = max(0, memory.peak_bytes - of_trial.peak_bytes)
    kept = kept_bytes(cost, plan, config, memory, a.element_size())
    peak = max(used.peak, used.before + of_trial.peak_bytes * (used.peak == 0))
    return CostEstimate(
        plan,
        preparing + trial.seconds(chunks, n / chunk, m / chunk),
        peak + more + kept,
        file_bytes(cost, ranks, itemsize),
        torch.get_num_threads(),
        a.device,
        tuple(ranks),
    )


def graph_of(  # noqa: PLR0913 (a public entry without its defaults)
    instrumented: InstrumentedModel,
    batches: Sequence[Any],
    config: LIBConfig,
    memory_limit: float = MEMORY_LIMIT,
    process_group: ProcessGroup = SINGLE_PROCESS,
    check_first: bool = False,
    effort: Effort = "exact",
    may_choose: bool = False,
    dictionaries: Mapping[str, Dictionary] = MappingProxyType({}),
) -> InteractionGraph:
    """Compute the interaction graph of an instrumented model: `compute_interaction_graph` without its defaults.

    Args:
        instrumented: The model and its node layers.
        batches: All batches.
        config: What to compute.
        memory_limit: As for `compute_interaction_graph`.
        process_group: As for `compute_interaction_graph`.
        check_first: Whether to validate the node layers first, and to refuse activations that do not vary at all.
        effort: As for `compute_interaction_graph`.
        may_choose: Whether the metric of the last node layer may be chosen, as with effort="auto".
        dictionaries: As for `compute_interaction_graph`.

    Returns:
        The interaction graph, on the CPU.
    """
    check_dictionaries(dictionaries, [layer.name for layer in instrumented.layers])
    batches = [batch for batch in batches if not is_empty(batch)]
    largest, plan = 1, None
    notes: list[str] = []
    output, output_notes = None, list[str]()
    adapted, latents = dict[int, AdaptedDictionary](), dict[int, LatentCounts]()
    for attempt in itertools.count():
        try:
            with process_group.sync_errors(), model_session(instrumented, copied_bytes(memory_limit)):
                if plan is None:
                    # A check that could not look at the first batches looks again at all of them.
                    if batches and (check_first or NOT_LOOKED in instrumented.notes):
                        instrumented.notes = validate_node_layers(instrumented, batches)
                    batches = instrumented.parts(batch for batch in batches if instrumented.num_samples(batch))
                    largest = max(map(instrumented.num_samples, batches), default=1)
                    output, output_notes = _output(instrumented, batches, config, process_group)
                    if may_choose or effort == "auto":
                        config = _with_final_metric(config, instrumented.layers[-1], output)
                    plan = _plan(instrumented, batches, config, memory_limit, output is not None)
                    adapted, latents = _adapted(instrumented, batches, dictionaries, config)
                    plan = plan_for_dictionaries(plan, latents)
                    if effort == "auto":
                        config, notes = _affordable(instrumented, batches, config, process_group, latents)
                    elif output is not None and config.effect_samples is None:
                        config = _with_effects(instrumented, batches, config, process_group, latents)
                chunks = split_batches(instrumented, batches, plan.samples)
                phase_done("checks and chunks")
                with _progress(current_display(), instrumented, chunks, config, adapted, plan.groups):
                    built = build_graph(
                        instrumented, chunks, config, plan, process_group, output=output, dictionaries=adapted
                    )
                if check_first and built.is_constant:
                    raise ActivationError(built.notes[0])
                built = replace(built, notes=[*built.notes, *notes, *output_notes])
                return _as_graph(built, config, instrumented, output)
        except Exception as error:
            if attempt == _MAX_HALVINGS or not is_out_of_memory(error):
                raise
        plan = (plan or MemoryPlan()).halved(largest)
    raise AssertionError("unreachable")


@contextmanager
def _progress(
    display: ProgressDisplay | None,
    instrumented: InstrumentedModel,
    chunks: Sequence[Any],
    config: LIBConfig,
    dictionaries: Mapping[int, AdaptedDictionary],
    groups: int,
) -> Iterator[None]:
    """Show the progress of a graph."""
    if display is None:
        yield
        return
    if display.cost is None and chunks:
        # If operations cannot be counted, all steps of the bar have the same length.
        with contextlib.suppress(Exception):
            display.cost = measure_cost(instrumented, chunks[0])
    num_samples = sum(map(instrumented.num_samples, chunks))
    few = None
    if config.jacobian_samples is not None:
        # About as many batches as have samples with Jacobians.
        share = config.jacobian_samples / max(1, num_samples)
        few = min(len(chunks), max(groups, math.ceil(share * len(chunks))))
    counts = phases(config, instrumented, len(chunks), dictionaries, few)
    with display.following(steps_of(counts, display.cost, config, num_samples)):
        yield


def _affordable(
    instrumented: InstrumentedModel,
    batches: Sequence[Any],
    config: LIBConfig,
    process_group: ProcessGroup,
    latents: Mapping[int, LatentCounts],
) -> tuple[LIBConfig, list[str]]:
    """The configuration with probes and features pushed forward where exact sums take too long, and a note of that."""
    n = _total(instrumented, batches, process_group)
    own = None
    if batches:
        cost = replace(measure_cost(instrumented, batches[0]), latents=latents)
        own = choose_effort(cost, config, n, GRAPH_OPERATIONS, True)
    chosen = agree(own, process_group)
    if chosen is None:
        return config, []
    is_same = (chosen.n_probes, chosen.n_pushed) == (config.n_probes, config.n_pushed)
    return chosen.applied_to(config), [] if is_same else [_SAMPLED.format(chosen)]


def _with_effects(
    instrumented: InstrumentedModel,
    batches: Sequence[Any],
    config: LIBConfig,
    process_group: ProcessGroup,
    latents: Mapping[int, LatentCounts],
) -> LIBConfig:
    """The configuration in which samples and features that have effects on the output are chosen."""
    n, own = _total(instrumented, batches, process_group), None
    if batches:
        shapes = [a.shape[1:] for a in instrumented.activations(instrumented.select(batches[0], slice(0, 1)))]
        own = affordable_effects(instrumented.model, shapes, config, n, latents)
        cost = replace(measure_cost(instrumented, batches[0]), latents=latents) if own is None else None
        own = own if cost is None else EffortPlan.of(cost, config, n, math.inf)
    chosen = agree(own, process_group)
    return config if chosen is None else chosen.applied_to(config)


def _total(instrumented: InstrumentedModel, batches: Sequence[Any], process_group: ProcessGroup) -> int:
    """Number of samples of all processes."""
    counts = process_group.gather(torch.tensor([sum(map(instrumented.num_samples, batches))], device="cpu"))
    return sum(int(count) for count in counts)


def _output(
    instrumented: InstrumentedModel, batches: Sequence[Any], config: LIBConfig, process_group: ProcessGroup
) -> tuple[OutputDistribution | None, list[str]]:
    """What the output stands for, and notes on that; None where it is not needed, or cannot be differentiated."""
    needed = needs_output(config, instrumented.layers[-1].taps)
    problem, found = None, None
    try:
        if batches and config.output_distribution != "none":
            found = instrumented.run_on_few(partial(_find_output, instrumented, config), batches[0], _FEW)
    except LIBError as error:  # the output has no axis of samples, for example
        problem = error
    output = agree_on_output(found, process_group)
    if output is None and needed:
        raise ActivationError(
            "The model's output is no tensor of floating-point numbers by which features could be measured"
            + (f": {problem}" if problem else ".")
            + " Remove metric and final_metric, or return a tensor."
        ) from problem
    if output is None:
        return None, [_NO_OUTPUT.format(brief(problem))] if problem else []
    return output, [_GUESSED.format(output.kind)] if needed and output.is_guess else []


def _with_final_metric(config: LIBConfig, last: NodeLayer, output: OutputDistribution | None) -> LIBConfig:
    """The configuration; very many logits measure the last node layer before them, if nothing else is asked for."""
    is_free = config.final_metric is None and config.final_basis == "auto"
    if is_free and not is_output(last.taps) and output is not None and output.has_many_logits:
        return replace(config, final_metric="fisher")
    return config


def with_chosen_metric(config: LIBConfig, instrumented: InstrumentedModel, batch: Any) -> LIBConfig:
    """The configuration of a graph whose metric of the last node layer may be chosen.

    Args:
        config: What the user has asked for.
        instrumented: The model and its node layers. Call this within `model_session`.
        batch: A batch, of which a few samples are run.

    Returns:
        The configuration, with ``final_metric="fisher"`` where many logits follow, and nothing else is asked for.
    """
    output, _ = _output(instrumented, [batch], config, SINGLE_PROCESS)
    return _with_final_metric(config, instrumented.layers[-1], output)


def _find_output(instrumented: InstrumentedModel, config: LIBConfig, batch: Any) -> OutputDistribution | None:
    found = find_output_distribution(instrumented, batch, config.output_distribution)
    if found is None:
        return None
    with torch.no_grad():
        a = instrumented.capture_to_output(batch)[-1].a  # with its own axis of features, at its selected positions
    return replace(found, positions=a.shape[1], width=a.shape[2])


def _plan(
    instrumented: InstrumentedModel,
    batches: Sequence[Any],
    config: LIBConfig,
    memory_limit: float,
    has_output: bool,
    samples: int | None = None,
) -> MemoryPlan:
    if not batches:  # only other processes have samples
        return MemoryPlan()
    # Batches may have samples of different sizes (sequence lengths): plan for the largest.
    largest = max(batches, key=lambda batch: num_elements(batch) / instrumented.num_samples(batch))
    samples = samples or sum(map(instrumented.num_samples, batches))
    last = instrumented.layers[-1].taps
    workload = Workload(
        samples, config.integration_steps, config.basis in WITH_METRIC, final_kind(config, last) == "lib", has_output
    )
    weights = num_bytes(instrumented.model)
    copied = weights if weights <= copied_bytes(memory_limit) else 0
    return plan_memory(instrumented, largest, int(memory_limit * 2**30) - copied, workload)


def basis_and_dictionaries(
    basis: BasisKind | Mapping[str, Dictionary] | None, dictionaries: Mapping[str, Dictionary] | None
) -> tuple[BasisKind, dict[str, Dictionary]]:
    """The kind of basis of node layers without a dictionary, and the dictionaries of the others.

    Args:
        basis: As for `compute_interaction_graph`; None for the LIB.
        dictionaries: As for `compute_interaction_graph`.

    Returns:
        Both.

    Raises:
        SettingError: If there are dictionaries in both.
        SettingTypeError: If an object has no ``encode`` or ``decode``.

    Example:
        >>> basis_and_dictionaries("pca", None)
        ('pca', {})
    """
    if basis is None or isinstance(basis, str):
        return basis or "lib", check_dictionaries(dictionaries, ())
    if dictionaries:
        raise SettingError("Give dictionaries either as basis or as dictionaries, and not both.")
    if not isinstance(basis, Mapping):
        raise SettingTypeError(
            "basis is a kind, such as 'lib' or 'pca', or objects with encode and decode by node layer, such as "
            f"{{'blocks.3': sae}}; got {shortened(repr(basis), 80)}."
        )
    return "lib", check_dictionaries(basis, ())


def refuse_integration(dictionaries: Mapping[str, Dictionary], integration_steps: int) -> None:
    """Refuse derivatives along a path together with dictionaries.

    Args:
        dictionaries: The dictionaries.
        integration_steps: As for `compute_interaction_graph`.

    Raises:
        SettingError: If there are both.

    Example:
        >>> refuse_integration({}, 10)
    """
    if dictionaries and integration_steps:
        raise SettingError(
            "With dictionaries, derivatives are those at the activations: along a path to these, other latents are "
            "active. Remove integration_steps."
        )


def _adapted(
    instrumented: InstrumentedModel, batches: Sequence[Any], dictionaries: Mapping[str, Dictionary], config: LIBConfig
) -> tuple[dict[int, AdaptedDictionary], dict[int, LatentCounts]]:
    """The dictionaries by index of the node layer, tried with activations, and how many latents are active."""
    refuse_integration(dictionaries, config.integration_steps)
    return try_dictionaries(instrumented, batches, dictionaries)


def _as_graph(
    built: BuildResult, config: LIBConfig, instrumented: InstrumentedModel, output: OutputDistribution | None
) -> InteractionGraph:
    info = {
        keys.SETTINGS: {
            **asdict(config),
            "dtype": None if instrumented.spec.dtype is None else str(instrumented.spec.dtype).split(".")[-1],
            "call": str(instrumented.spec.call),
            **_skip_entry(instrumented.spec.skip_positions),
        },
        keys.MODEL_CALL: None if instrumented.spec.call is None else instrumented.spec.call.plain,
        keys.NODE_LAYERS: [
            {"name": x.name, "taps": list(x.taps), "positions": x.positions, "feature_dim": x.feature_dim}
            | ({} if x.join == "features" else {"join": x.join})
            | _skip_entry(x.skip_positions)
            for x in instrumented.layers
        ],
        keys.NUM_SAMPLES: built.n_samples,
        keys.METRIC_ERRORS: built.metric_errors,
        keys.OUTPUT_DISTRIBUTION: None if output is None else output.plain,
        keys.EFFECT_SAMPLES: built.effect_samples,
        keys.EFFECTS_BY: effects_by(config) if built.output_effects else None,
        keys.NOTES: [*instrumented.notes, *instrumented.axis_notes, *built.notes],
        keys.VERSIONS: {"lib_lightning": __version__, "torch": str(torch.__version__)},
    }
    latents = [basis for basis in built.bases if isinstance(basis, DictionaryBasis)]
    if latents:
        info[keys.DICTIONARIES] = {basis.name: dict(basis.reference) for basis in latents}
    names = [basis.name for basis in built.bases]
    bases = {basis.name: basis.to("cpu") for basis in built.bases}
    pairs = list(itertools.pairwise(names))
    edges = {pair: E.cpu() for pair, E in zip(pairs, built.edges, strict=True)}
    replicates = Replicates(
        {name: x.cpu() for name, x in zip(names, built.importance_replicates, strict=True)},
        {pair: x.cpu() for pair, x in zip(pairs, built.edge_replicates, strict=True)},
    )
    errors = {pair: standard_error(x) for pair, x in replicates.edges.items() if len(x) > 1}
    examples = dict(zip(names, built.examples, strict=True))
    attributions = {pair: A.cpu() for pair, A in zip(pairs, built.attributions, strict=True)}
    attribution_errors = {
        pair: standard_error(x.cpu()) for pair, x in zip(pairs, built.attribution_replicates, strict=True) if len(x) > 1
    }
    return InteractionGraph(
        bases,
        edges,
        info,
        errors,
        replicates=replicates,
        attributions=attributions,
        attribution_errors=attribution_errors,
        examples=examples,
        output_effects=built.output_effects,
        # The number of a feature is that of its latent.
        lineages={basis.name: Lineages.new(basis.numbers.cpu()) for basis in latents},
        labels={basis.name: [""] * basis.error + [ERROR] for basis in latents},
    )


def _skip_entry(skip: SkipPositions | None) -> dict[str, Any]:
    return {} if skip is None else {"skip_positions": list(skip) if isinstance(skip, tuple) else skip}


def proposed_node_layers(model: nn.Module, batches: Sequence[Any], spec: ModelSpec) -> list[str]:
    """Propose node layers, and log a warning that names them.

    Args:
        model: Any module.
        batches: Batches, of which the first ones that are not empty are run.
        spec: How the model is called.

    Returns:
        Names of the node layers.

    Raises:
        ActivationError: If there are no samples.
    """
    if all(is_empty(batch) for batch in batches):
        raise ActivationError("There are no samples to choose node layers with: every batch is empty.")
    cuts = proposed_cuts(model, [batch for batch in batches if not is_empty(batch)], spec)
    node_layers = [cut.tap for cut in cuts]
    log.warning(
        "No node layers were given; %s is cut at node_layers=%s, of %s.",
        type(model).__name__, node_layers, sizes(cuts),
    )  # fmt: skip
    return node_layers


def check_node_layers(
    model: nn.Module,
    batch: Any,
    node_layers: Sequence[str | NodeLayer],
    dtype: torch.dtype | None = None,
    input_fn: InputFn | None = None,
    mask: str | int | MaskFn | None = None,
    skip_positions: SkipPositions | None = None,
) -> None:
    """Validate a choice of node layers by running one batch.

    Args:
        model: Any module; left exactly as it was found.
        batch: One batch; a few samples are enough.
        node_layers: As for `compute_interaction_graph`.
        dtype: As for `compute_interaction_graph`.
        input_fn: As for `compute_interaction_graph`.
        mask: As for `compute_interaction_graph`.
        skip_positions: As for `compute_interaction_graph`.

    Raises:
        NodeLayerError: If a node layer is unknown, never run, out of order, or does not cut the computation.
        ActivationError: If activations are integers, NaN or infinite.

    Example:
        >>> check_node_layers(nn.Linear(2, 2), torch.ones(1, 2), ["input", "output"])
    """
    spec = ModelSpec(input_fn, mask, dtype, skip_positions)
    for note in notes_on(model, [batch], as_node_layers(node_layers), spec):
        log.warning(note)


def notes_on(model: nn.Module, batches: Sequence[Any], layers: Sequence[NodeLayer], spec: ModelSpec) -> list[str]:
    """`check_node_layers` on several batches, which returns what it could not test instead of logging it.

    Args:
        model: Any module; left exactly as it was found.
        batches: Batches; a few samples are enough.
        layers: Node layers.
        spec: How to call the model on a batch.

    Returns:
        Notes, as `lib_lightning.model.validate.validate_node_layers` returns them.
    """
    instrumented = InstrumentedModel(model, layers, spec)
    check_has_tensors(batches[0])
    with wrap_forward_errors(instrumented.model, spec), model_session(instrumented):
        return validate_node_layers(instrumented, batches)


def list_node_layers(model: nn.Module, batch: Any, input_fn: InputFn | None = None) -> list[CutPoint]:
    """List every place where a single tensor cuts the model, and which of them are proposed as node layers.

    Of several inputs that reach the output on different paths (images and time steps), only the largest is followed;
    the others are treated as constants.

    Args:
        model: Any module; left exactly as it was found.
        batch: One batch; a few samples are enough.
        input_fn: As for `compute_interaction_graph`.

    Returns:
        The places, in forward order; ``tap`` is the name to use as a node layer.

    Raises:
        NodeLayerError: If there are fewer than two.
        ActivationError: If that is because activations are NaN or infinite.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> for cut in list_node_layers(model, torch.randn(3, 4)):
        ...     print(cut.tap, cut.positions, cut.features, cut.module, cut.proposed)
        input 1 4 Sequential True
        0 1 8 Linear False
        1 1 8 ReLU True
        output 1 2 Sequential True
    """
    spec = ModelSpec(input_fn)
    model = unwrapped(model)
    with wrap_forward_errors(model, spec), preserve_model(model) as copy:
        cuts, taps = find_cuts_and_proposals(copy, [batch], spec)
    return [replace(cut, proposed=cut.tap in taps) for cut in cuts]


def propose_node_layers(
    model: nn.Module, batch: Any, input_fn: InputFn | None = None, mask: str | int | MaskFn | None = None
) -> list[str]:
    """Choose node layers for a model: the proposals of `list_node_layers`, faster.

    Args:
        model: Any module; left exactly as it was found.
        batch: One batch; a few samples are enough.
        input_fn: As for `compute_interaction_graph`.
        mask: As for `compute_interaction_graph`.

    Returns:
        Two to six node layers, in forward order.

    Raises:
        NodeLayerError: If there are not two places to cut the model.
        ActivationError: If that is because activations are NaN or infinite.

    Example:
        >>> propose_node_layers(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4))
        ['input', '1', 'output']
    """
    return [cut.tap for cut in proposed_cuts(model, [batch], ModelSpec(input_fn, mask))]


def proposed_cuts(model: nn.Module, batches: Sequence[Any], spec: ModelSpec) -> list[CutPoint]:
    """`propose_node_layers` on several batches, with the sizes of the node layers."""
    check_has_tensors(batches[0])
    model = unwrapped(model)
    with wrap_forward_errors(model, spec), preserve_model(model) as copy:
        return find_proposed(copy, batches, spec)
