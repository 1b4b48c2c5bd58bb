"""What each feature alone does to a score of the model, and which of these effects are not chance."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lib_lightning.ablation.interventions import check_width
from lib_lightning.ablation.model_part import ROUNDING, ModelPart, same_scores
from lib_lightning.ablation.scored_model import Score, sample_scores
from lib_lightning.algorithm.basis import Basis
from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from lib_lightning.errors import LIBError, NotFiniteError, check_number, counted, is_out_of_memory
from lib_lightning.graph import FeatureEffects, InteractionGraph
from lib_lightning.interventions.names import FeatureName, Place, find_features
from lib_lightning.interventions.significance import benjamini_hochberg, samples_needed, sign_flip_p_values
from lib_lightning.io.basis_format import CAUSAL, OUTPUT_DISTRIBUTION
from lib_lightning.model.batch import is_empty, tensors_in
from lib_lightning.model.capture import CapturedLayer
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.known_labels import labels_of_batch
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.output_distribution import OutputDistribution
from lib_lightning.model.precision import product_dtype
from lib_lightning.model.vjp import apply_mask

log = logging.getLogger(__name__)

# Bytes of the largest tensor when several features are ablated in one forward pass: on CPUs, whose caches are small,
# and on other devices.
_BYTES_CPU, _BYTES = 2**20, 2**26
# With fewer features, recording the rest of the model takes longer than it saves; and the memory that it may take.
_FEWEST_RECORDED, _RECORDED_BYTES = 8, 2**30


@dataclass(frozen=True)
class Effect:
    """What one feature does to a score.

    Attributes:
        change: Change of the mean score when the feature is set to its mean: negative where it helps.
        error: Standard error of the change, over samples; NaN for a single sample.
        p_value: Probability of a change at least as large by chance, if the feature did as much good as harm; an upper
            bound, see `lib_lightning.interventions.sign_flip_p_values`.
        significant: Whether the change is significant by the procedure of Benjamini and Hochberg over all features that
            were tested, which controls the false discovery rate.
    """

    change: float
    error: float
    p_value: float
    significant: bool


def feature_effects(
    model: nn.Module,
    batches: Iterable[Any],
    graph: InteractionGraph,
    score: Score | None = None,
    features: Iterable[FeatureName] | None = None,
    level: float = 0.05,
    process_group: ProcessGroup = SINGLE_PROCESS,
    **options: Any,
) -> dict[str, Effect]:
    """Measure how a score changes when each feature alone is set to its mean, at all positions.

    A copy of the model runs, in evaluation mode, on the same samples with and without the feature, so that only
    differences within each sample count. Differences of the size of rounding errors are zero in the test: those below
    ``eps^(2/3)`` of the largest score of a batch, 2e-5 in float32 and 4e-11 with ``dtype=torch.float64``.

    Args:
        model: The model that the graph was computed on, or one of the same shape; it is not changed.
        batches: Batches to score on. They should not be those that the graph was computed on. Samples are taken to be
            independent of each other.
        graph: An interaction graph in any basis.
        score: A function from the model's output and a batch to one score for each sample, shape ``(n,)``, higher is
            better; for example `lib_lightning.ablation.accuracy`. None for the mean log-likelihood of the batch's
            labels, in the distribution that the output stands for: labels are found in the loss that the step of a
            LightningModule, or the model, computes, or in the batch.
        features: Which features to test, by names as for `edit_features`; by default all, including those of the last
            node layer. The fewer there are, the smaller are the effects that can be told from chance.
        level: False discovery rate: the expected share of features without an effect among those that are significant.
        process_group: The processes, each with its own batches; effects are those on the samples of all of them.
        options: ``input_fn``, ``mask`` and ``dtype``, as for `lib_lightning.compute_interaction_graph`.

    Returns:
        The effects by feature id, in the order of the graph.

    Raises:
        LIBError: If a feature is not found, if there are no samples, if the score function does not return one number
            for each sample, or if there is no score and no labels are found.
        NodeLayerError: If the graph belongs to a model of a different shape.
        NotFiniteError: If a score is NaN or infinite.

    Example:
        >>> from lib_lightning import compute_interaction_graph
        >>> model, x = nn.Linear(4, 2, bias=False), torch.randn(50, 4)
        >>> graph = compute_interaction_graph(model, [x], ["input", "output"])
        >>> effects = feature_effects(model, [x], graph, lambda y, batch: -(y - model(batch))[:, 0].square())
        >>> {name: effect.significant for name, effect in effects.items() if name.startswith("output")}
        {'output/0': True, 'output/1': False}
    """
    check_number("level", level, lambda x: 0 < x < 1, "must be between 0 and 1")
    every = [(layer, j) for layer, basis in graph.bases.items() for j in range(basis.n_features)]
    chosen = set(every if features is None else find_features(graph, features))
    places = [place for place in every if place in chosen]
    instrumented = InstrumentedModel(model, graph.node_layer_specs(), ModelSpec(**options))
    # Of the differences: sums, sums of squares, and both again without those that are rounding.
    sums = torch.zeros(4, len(places), dtype=torch.float64, device="cpu")
    n = 0
    with process_group.sync_errors(), model_session(instrumented), torch.no_grad():
        nonempty = instrumented.parts(batch for batch in batches if not is_empty(batch))
        may_repeat: bool | None = None
        for seed, batch in enumerate(nonempty):
            instrumented.manual_seed(seed)
            own = score or likelihood_of_labels(instrumented, batch, known_output(graph))
            if may_repeat is None:
                may_repeat = _scores_of_repeated_samples_agree(instrumented, batch, own)
            d = _AblatedFeatures(instrumented, batch, graph, own, may_repeat).differences(places)
            sums += torch.stack([x.sum(1) for x in (d.all, d.all.square(), d.real, d.real.square())])
            n += d.all.shape[1]
    sums, count = process_group.sum([sums, torch.tensor(n, device="cpu")])
    if not count:
        raise LIBError("There are no samples to score: all batches are empty.")
    return _effects(graph, places, sums, int(count), level)


def likelihood_of_labels(instrumented: InstrumentedModel, batch: Any, output: OutputDistribution | None) -> Score:
    """The score that is the mean log-likelihood of the labels of one batch.

    Args:
        instrumented: The model. Call this within `model_session`.
        batch: The batch.
        output: What the output stands for; None if it is not known.

    Returns:
        A score function, for outputs on the samples of the batch, or on several copies of them one after the other.

    Raises:
        LIBError: If no labels are found.
    """
    labels = None if output is None else labels_of_batch(instrumented, batch, output)
    if labels is None:
        raise LIBError(
            "The labels of the batch are not known: neither does a step, or the model, pass its whole output to a loss "
            "function of torch.nn.functional, nor has the batch a tensor with their shape. Pass score=, a function of "
            "output and batch that returns one number for each sample."
        )
    return lambda output, batch: labels.log_likelihood(output)


def known_output(graph: InteractionGraph) -> OutputDistribution | None:
    """What the output of the model of a graph stands for; None if that is not known."""
    plain = graph.info.get(OUTPUT_DISTRIBUTION)
    return OutputDistribution(plain["kind"], plain["reason"]) if plain else None


def keep_effects(graph: InteractionGraph, effects: Mapping[str, Effect], **about: Any) -> None:
    """Keep effects of features on a score in a graph, and so in its file, where the tab and the film show them.

    Args:
        graph: The graph; ``graph.effects`` and ``graph.info["causal"]`` are replaced.
        effects: What `feature_effects` has returned. Features that are missing were not tried.
        about: What to note about them, plain values: ``score`` for its name, ``level``, ``samples``.

    Example:
        >>> from lib_lightning import compute_interaction_graph
        >>> model, x = nn.Linear(4, 2, bias=False), torch.randn(50, 4)
        >>> graph = compute_interaction_graph(model, [x], ["input", "output"])
        >>> effects = feature_effects(model, [(x, model(x).argmax(1))], graph)
        >>> keep_effects(graph, effects, score="log_likelihood", level=0.05, samples=50)
        >>> graph.effects["input"].significant.dtype, graph.info["causal"]["features"]
        (torch.bool, 4)
    """
    found = {}
    for layer in graph.bases:
        of_layer = [effects.get(name) for name in graph.feature_ids(layer)]
        if any(of_layer):
            changes, errors = (
                torch.tensor(
                    [math.nan if effect is None else getattr(effect, name) for effect in of_layer],
                    dtype=torch.float64,
                    device="cpu",
                )
                for name in ("change", "error")
            )
            significant = [effect is not None and effect.significant for effect in of_layer]
            found[layer] = FeatureEffects(changes, errors, torch.tensor(significant, device="cpu"))
    graph.effects = found
    graph.info[CAUSAL] = {**about, "features": len(effects)}


def _effects(graph: InteractionGraph, places: Sequence[Place], sums: Tensor, n: int, level: float) -> dict[str, Effect]:
    total, squares, real_total, real_squares = sums
    p_values = sign_flip_p_values(real_total, real_squares)
    significant = benjamini_hochberg(p_values, level)
    variance = (squares - total.square() / n).clamp(min=0) / (n - 1 if n > 1 else float("nan"))
    needed = samples_needed(len(places), level)
    if places and n < needed and not significant.any():
        log.warning(
            "With %s no one of %s alone can be told from chance at level %g: use %d samples, or fewer features.",
            counted(n, "sample"), counted(len(places), "feature"), level, needed,
        )  # fmt: skip
    ids = {layer: graph.feature_ids(layer) for layer, _ in places}
    columns = [(total / n).tolist(), (variance / n).sqrt().tolist(), p_values.tolist(), significant.tolist()]
    return {ids[layer][j]: Effect(*row) for (layer, j), row in zip(places, zip(*columns, strict=True), strict=True)}


@dataclass(frozen=True)
class _Differences:
    """Scores with a feature at its mean, less those without ablation, shape ``(m, n)``, float64.

    Attributes:
        all: The differences.
        real: The same with zero in place of those that are rounding errors.
    """

    all: Tensor
    real: Tensor


class _AblatedFeatures:
    """A model at one batch, with one feature at a time set to its mean.

    Args:
        instrumented: The model.
        batch: One batch.
        graph: The interaction graph.
        score: The score.
        may_repeat: Whether a batch may contain samples several times, so that several features are ablated at once.
    """

    def __init__(
        self, instrumented: InstrumentedModel, batch: Any, graph: InteractionGraph, score: Score, may_repeat: bool
    ) -> None:
        self._instrumented, self._batch, self._score = instrumented, batch, score
        self._n = instrumented.num_samples(batch)
        self._captured = dict(zip(graph.bases, instrumented.capture(batch), strict=True))
        self._bases = {name: graph.bases[name].to(layer.a.device) for name, layer in self._captured.items()}
        for name, layer in self._captured.items():
            check_width(self._bases[name], layer.a)
        output = instrumented.run(batch)
        self._unablated = _finite(sample_scores(score, output, batch, self._n))
        outputs = [t for t in tensors_in(output) if t.is_floating_point()]
        a = [layer.a for layer in self._captured.values()]
        self._eps = max(torch.finfo(t.dtype).eps for t in (*outputs, *a))
        self._bytes = max(t.numel() * t.element_size() for t in (*outputs, *a))
        self._may_repeat = may_repeat

    def differences(self, places: Sequence[Place]) -> _Differences:
        """The differences for some features, in the order of the node layers."""
        scores = [
            self._unablated.new_zeros(0, self._n),
            *(
                scores
                for name, group in itertools.groupby(places, lambda place: place[0])
                for scores in self._scores(name, [j for _, j in group])
            ),
        ]
        ablated = torch.cat(scores).cpu()
        unablated = self._unablated.cpu()
        d = ablated - unablated
        largest = max(float(x.abs().max()) if x.numel() else 0.0 for x in (ablated, unablated))
        return _Differences(d, torch.where(d.abs() > self._eps**ROUNDING * largest, d, 0.0))

    def _scores(self, name: str, indices: Sequence[int]) -> Iterator[Tensor]:
        """Scores with single features of a node layer at their means, ``(k, n)`` for some at a time."""
        layer, basis = self._captured[name], self._bases[name]
        place = list(self._captured).index(name)
        limit = _BYTES_CPU if layer.a.device.type == "cpu" else _BYTES
        width = max(1, limit // max(1, self._bytes)) if self._may_repeat else 1

        def after(a: Tensor) -> Any:
            return self._instrumented.output(self._batch, {place: a})

        # One feature at a time does not need what is before the node layer.
        rest: Callable[[Tensor], Any] = after
        if width == 1 and len(indices) >= _FEWEST_RECORDED:
            first, last = (at_means(layer, basis, [j]) for j in (indices[0], indices[-1]))
            rest = self._rest(after, first, last, layer.a)
        start = 0
        while start < len(indices):
            some = indices[start : start + width]
            batch, k = self._batch, len(some)
            if k > 1:
                index = torch.arange(self._n, device="cpu").repeat(k)
                batch = self._instrumented.select(batch, index)
            try:
                a = at_means(layer, basis, some)
                output = rest(a) if k == 1 else self._instrumented.output(batch, {place: a})
                scores = sample_scores(self._score, output, batch, k * self._n)
            except Exception as error:
                if (k == 1 and rest is after) or not is_out_of_memory(error):
                    raise
                width, rest = max(1, k // 2), after
                continue
            yield _finite(scores).reshape(k, self._n)
            start += k

    def _rest(self, after: Callable[[Tensor], Any], first: Tensor, last: Tensor, unablated: Tensor) -> ModelPart:
        """The model after a node layer, if its scores at two inputs are those of the model itself."""

        def score(output: Any) -> Tensor:
            return sample_scores(self._score, output, self._batch, self._n)

        known = [(unablated, self._unablated), (last, score(after(last)))]
        # The model itself runs at the first one after that.
        rest = ModelPart(self._instrumented, after, first, [(unablated, after(unablated))], _RECORDED_BYTES)
        rest.check_score(score, known)
        return rest


def at_means(layer: CapturedLayer, basis: Basis, indices: Sequence[int]) -> Tensor:
    """Activations with single features at their means, one after another.

    Args:
        layer: The node layer on ``n`` samples.
        basis: Its basis.
        indices: The features, ``k`` of them.

    Returns:
        Activations ``a - f_j C^+_j``, shape ``(k * n, S, d)``: all samples with the first one, then with the second.
        Of a dictionary they are ``a - decode(f) + decode(f without latent j)``.
    """
    wide = layer.a.to(product_dtype(layer.a.dtype))
    changes = apply_mask(basis.without(wide, torch.tensor(indices, device="cpu")), layer.mask)
    return (wide + changes).to(layer.a.dtype).flatten(0, 1)


def _finite(scores: Tensor) -> Tensor:
    if not torch.isfinite(scores).all():
        raise NotFiniteError("The score is NaN or infinite.")
    return scores


def _scores_of_repeated_samples_agree(instrumented: InstrumentedModel, batch: Any, score: Score) -> bool:
    """Whether the scores of a batch stay the same when it has all samples twice.

    They do not where the model draws random numbers, or the score function depends on more than its arguments.
    """
    n = instrumented.num_samples(batch)
    with contextlib.suppress(Exception):
        twice = instrumented.select(batch, torch.arange(n, device="cpu").repeat(2))
        if instrumented.num_samples(twice) != 2 * n:
            return False
        instrumented.manual_seed(0)
        once = sample_scores(score, instrumented.run(batch), batch, n)
        output = instrumented.run(twice)
        again = sample_scores(score, output, twice, 2 * n)
        eps = max(torch.finfo(t.dtype).eps for t in tensors_in(output) if t.is_floating_point())
        return same_scores(again, once.repeat(2), eps)
    return False
