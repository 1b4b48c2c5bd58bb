"""Mean scores of a model, unablated and with some features or edges ablated."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lib_lightning.ablation.interventions import AblatedLayer, AblatedSection
from lib_lightning.ablation.scores import accuracy, log_likelihood
from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.memory_plan import MEMORY_LIMIT
from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from lib_lightning.errors import LIBError, NotFiniteError
from lib_lightning.graph import InteractionGraph
from lib_lightning.model.batch import first_tensor, is_empty
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.precision import to_float64

Score = Callable[[Any, Any], Tensor]


def sample_scores(score: Score, output: Any, batch: Any, size: int) -> Tensor:
    """The scores of the samples of a batch.

    Args:
        score: From the model's output and a batch to one score for each sample.
        output: The model's output.
        batch: The batch.
        size: Number of its samples.

    Returns:
        Shape ``(size,)``, float64.

    Raises:
        LIBError: If the function does not return one number for each sample.
    """
    scores = score(output, batch)
    if not isinstance(scores, Tensor) or scores.shape != (size,):
        got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise LIBError(f"A score function must return one number for each of the {size} samples of a batch; got {got}.")
    return to_float64(scores)


@contextmanager
def scored_model(
    model: nn.Module,
    batches: Iterable[Any],
    graph: InteractionGraph,
    score: Score,
    *,
    memory_limit: float = MEMORY_LIMIT,
    process_group: ProcessGroup = SINGLE_PROCESS,
    **spec: Any,
) -> Iterator[ScoredModel]:
    """Score a model with ablations inside a block. The model is restored afterwards.

    Args:
        model: Any module.
        batches: Batches to score on; empty ones are skipped.
        graph: The graph whose features and edges are ablated.
        score: From the model's output and a batch to one score for each sample, shape ``(n,)``.
        memory_limit: Memory to use in addition to model and batches, in GiB. Intermediate results that do not fit are
            computed again.
        process_group: The processes, each with its own batches; scores are means over all of them.
        spec: Arguments of `ModelSpec`: ``input_fn``, ``mask`` and ``dtype``.

    Yields:
        The scored model.
    """
    instrumented = InstrumentedModel(model, graph.node_layer_specs(), ModelSpec(**spec))
    with process_group.sync_errors(), model_session(instrumented), torch.no_grad():
        nonempty = instrumented.parts(batch for batch in batches if not is_empty(batch))
        yield ScoredModel(instrumented, nonempty, graph, score, memory_limit, process_group)


class ScoredModel:
    """A model, batches, and its mean score on them with and without ablations.

    Args:
        instrumented: The model and its node layers.
        batches: Batches to score on, none of them empty.
        graph: The graph whose features and edges are ablated.
        score: From the model's output and a batch to one score for each sample.
        memory_limit: In GiB. A quarter of it is for intermediate results that are kept between scores.
        process_group: The processes; scores are means over the samples of all of them.

    Attributes:
        unablated: Mean score without any ablation.
    """

    def __init__(
        self,
        instrumented: InstrumentedModel,
        batches: Sequence[Any],
        graph: InteractionGraph,
        score: Score,
        memory_limit: float = MEMORY_LIMIT,
        process_group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.graph = graph
        self._instrumented = instrumented
        self._batches = batches
        self._score = score
        self._memory = int(memory_limit * 2**30)
        self._process_group = process_group
        # Scores of the samples of each batch without ablation, on the CPU.
        self._own: list[Tensor] = []
        for _, output, batch in self._outputs(self._cache(lambda batch: _Unablated(instrumented, batch)), None):
            self._own.append(sample_scores(score, output, batch, self._instrumented.num_samples(batch)).cpu())
        self.unablated = self._mean_score(self._own).mean

    def with_features(self, node_layer: str) -> Callable[[int], float]:
        """The mean score as a function of the number of features kept in a node layer."""
        index, basis = self.graph.node_layers.index(node_layer), self._basis(node_layer)
        layers = self._cache(lambda batch: AblatedLayer(self._instrumented, batch, index, basis))
        return lambda m: self._mean_score(self._scores(layers, m)).mean

    def with_edges(self, before: str, after: str) -> ScoredSection:
        """The mean score as a function of the edges kept in a section."""
        index, bases = self.graph.node_layers.index(before), (self._basis(before), self._basis(after))

        def section(batch: Any) -> AblatedSection:
            def score(output: Any) -> Tensor:
                return sample_scores(self._score, output, batch, self._instrumented.num_samples(batch))

            return AblatedSection(self._instrumented, batch, index, *bases, self._memory, score)

        return ScoredSection(self, self._cache(section))

    def _cache(self, make: Callable[[Any], _Ablated[_T]]) -> _AblationCache[_T]:
        return _AblationCache(self._instrumented, self._batches, make, self._memory // 4)

    def _basis(self, name: str) -> Basis:
        """A basis on the device of the model."""
        model, basis = self._instrumented.model, self.graph.bases[name]
        parameter = next(itertools.chain(model.parameters(), model.buffers()), None)
        return basis if parameter is None else basis.to(parameter.device)

    def _outputs(self, ablated: _AblationCache[_T], kept: _T) -> Iterator[tuple[_Ablated[_T], Any, Any]]:
        for batch, model in zip(self._batches, ablated, strict=True):
            yield model, model.output(kept), batch

    def _scores(self, ablated: _AblationCache[_T], kept: _T) -> list[Tensor]:
        """Scores of the samples of each batch, on the CPU."""
        return [
            sample_scores(self._score, output, batch, len(own)).cpu()
            for own, (_, output, batch) in zip(self._own, self._outputs(ablated, kept), strict=True)
        ]

    def _gradient(self, sections: _AblationCache[Tensor], mask: Tensor) -> tuple[MeanScore, Tensor]:
        scores: list[Tensor] = []
        total = torch.zeros(mask.shape, dtype=torch.float64, device="cpu")
        for batch, own, section in zip(self._batches, self._own, sections, strict=True):
            assert isinstance(section, AblatedSection)

            def loss(output: Any, batch: Any = batch, size: int = len(own)) -> Tensor:
                found = sample_scores(self._score, output, batch, size)
                scores.append(found.detach().cpu())
                smooth = found
                if self._score is accuracy:
                    smooth = sample_scores(log_likelihood, output, batch, size)
                elif not found.requires_grad:
                    smooth = self._closeness(output, batch)
                return smooth.sum()

            total += section.gradient(mask, loss)[1]
        (total,) = self._process_group.sum([total])
        return self._mean_score(scores), total

    def _closeness(self, output: Any, batch: Any) -> Tensor:
        """Minus the squared distance of an output from that without ablation."""
        with torch.no_grad():
            own = first_tensor(self._instrumented.run(batch))
        found = first_tensor(output)
        assert own is not None
        assert found is not None
        return -(found - own).square()

    def _mean_score(self, scores: Sequence[Tensor]) -> MeanScore:
        changes = [score - own for score, own in zip(scores, self._own, strict=True)]
        sums = [
            sum((f(x) for x in xs), torch.zeros((), dtype=torch.float64, device="cpu"))
            for f, xs in (
                (Tensor.sum, scores),
                (Tensor.sum, changes),
                (lambda x: x.square().sum(), changes),
            )
        ]
        size = torch.tensor(sum(map(len, scores)), device="cpu")
        total, change, squares, n = self._process_group.sum([*sums, size])
        if not n:
            raise LIBError("There are no samples to score: all batches are empty.")
        if not torch.isfinite(total):
            raise NotFiniteError("The score is NaN or infinite.")
        variance = (squares - change.square() / n).clamp(min=0) / (n - 1)
        return MeanScore(float(total / n), float((variance / n).sqrt()) if n > 1 else float("nan"))


class MeanScore(NamedTuple):
    """A mean score.

    Attributes:
        mean: Mean over all samples.
        error: Standard error of its difference from the score without ablation, on the same samples; NaN for a single
            sample.
    """

    mean: float
    error: float


class ScoredSection:
    """The mean score of a model of which some edges of a section are kept, dropped or scaled.

    Args:
        scored: The model.
        sections: The section at each batch.
    """

    def __init__(self, scored: ScoredModel, sections: _AblationCache[Tensor]) -> None:
        self._scored, self._sections = scored, sections

    def __call__(self, mask: Tensor) -> MeanScore:
        """The score with each input feature multiplied, for each output feature, by an entry of a mask.

        Args:
            mask: True where an edge is kept, or a factor for each edge, shape ``(r_out, r_in)``.

        Returns:
            The score.
        """
        return self._scored._mean_score(self._scored._scores(self._sections, mask))

    @property
    def unablated(self) -> float:
        """The mean score without ablation."""
        return self._scored.unablated

    def gradient(self, mask: Tensor) -> tuple[MeanScore, Tensor]:
        """The score with edges that are scaled, and the direction in which the factors increase it.

        Args:
            mask: A factor for each edge, shape ``(r_out, r_in)``.

        Returns:
            The score, and the gradient ``(r_out, r_in)``, float64, on the CPU: of the score; of the log likelihood if
            the score is `accuracy`; and of minus the squared distance from the output without ablation if any other
            score has no gradient.
        """
        return self._scored._gradient(self._sections, mask)


_T = TypeVar("_T", contravariant=True)


class _Ablated(Protocol[_T]):
    """A model at one batch, of which some features or edges are kept."""

    @property
    def nbytes(self) -> int: ...

    def output(self, kept: _T, /) -> Any: ...


class _Unablated:
    nbytes = 0

    def __init__(self, instrumented: InstrumentedModel, batch: Any) -> None:
        self.instrumented, self.batch = instrumented, batch

    def output(self, kept: None) -> Any:
        return self.instrumented.run(self.batch)


class _AblationCache(Generic[_T]):
    """The ablated model at each batch: kept as far as memory allows, and otherwise made again in each pass."""

    def __init__(
        self, instrumented: InstrumentedModel, batches: Sequence[Any], make: Callable[[Any], _Ablated[_T]], memory: int
    ) -> None:
        self.instrumented, self.batches, self.make, self.memory = instrumented, batches, make, memory
        self._kept: dict[int, _Ablated[_T]] = {}

    def __iter__(self) -> Iterator[_Ablated[_T]]:
        for index, batch in enumerate(self.batches):
            self.instrumented.manual_seed(index)
            ablated = self._kept.pop(index, None) or self.make(batch)
            yield ablated
            # Its size is known after its use.
            if sum(kept.nbytes for kept in self._kept.values()) + ablated.nbytes <= self.memory:
                self._kept[index] = ablated
