"""Mean scores of a model, unablated and with some features or edges ablated."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lib_lightning.ablation.interventions import AblatedLayer, AblatedSection, top_k_mask
from lib_lightning.algorithm.basis import Basis
from lib_lightning.algorithm.memory_plan import MEMORY_LIMIT
from lib_lightning.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from lib_lightning.errors import LIBError, NotFiniteError
from lib_lightning.graph import InteractionGraph
from lib_lightning.model.batch import is_empty
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
        self._memory = int(memory_limit * 2**30) // 4
        self._process_group = process_group
        self.unablated = self._mean_score(self._cache(lambda batch: _Unablated(instrumented, batch)), None)

    def with_features(self, node_layer: str) -> Callable[[int], float]:
        """The mean score as a function of the number of features kept in a node layer."""
        index, basis = self.graph.node_layers.index(node_layer), self._basis(node_layer)
        layers = self._cache(lambda batch: AblatedLayer(self._instrumented, batch, index, basis))
        return lambda m: self._mean_score(layers, m)

    def with_edges(self, before: str, after: str) -> Callable[[int], float]:
        """The mean score as a function of the number of edges kept in a section."""
        index, bases = self.graph.node_layers.index(before), (self._basis(before), self._basis(after))
        E = self.graph.edges[before, after]
        sections = self._cache(lambda batch: AblatedSection(self._instrumented, batch, index, *bases))
        return lambda k: self._mean_score(sections, top_k_mask(E, k))

    def _cache(self, make: Callable[[Any], _Ablated[_T]]) -> _AblationCache[_T]:
        return _AblationCache(self._instrumented, self._batches, make, self._memory)

    def _basis(self, name: str) -> Basis:
        """A basis on the device of the model."""
        model, basis = self._instrumented.model, self.graph.bases[name]
        parameter = next(itertools.chain(model.parameters(), model.buffers()), None)
        return basis if parameter is None else basis.to(parameter.device)

    def _mean_score(self, ablated: _AblationCache[_T], kept: _T) -> float:
        total, n = torch.zeros((), dtype=torch.float64, device="cpu"), 0
        for batch, model in zip(self._batches, ablated, strict=True):
            size = self._instrumented.num_samples(batch)
            total += sample_scores(self._score, model.output(kept), batch, size).sum().cpu()
            n += size
        total, count = self._process_group.sum([total, torch.tensor(n, device="cpu")])
        if not count:
            raise LIBError("There are no samples to score: all batches are empty.")
        if not torch.isfinite(total):
            raise NotFiniteError("The score is NaN or infinite.")
        return float(total / count)


_T = TypeVar("_T", contravariant=True)


class _Ablated(Protocol[_T]):
    """A model at one batch, of which some features or edges are kept."""

    nbytes: int

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
            ablated = self._kept.get(index)
            if ablated is None:
                ablated = self.make(batch)
                if ablated.nbytes <= self.memory:
                    self._kept[index] = ablated
                    self.memory -= ablated.nbytes
            yield ablated
