"""The mean score of a live model over samples, whatever is done to its activations."""

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
from lib_lightning.model.batch import batch_size, is_empty
from lib_lightning.model.instrumented import InstrumentedModel, model_session
from lib_lightning.model.model_spec import InputFn, MaskFn, ModelSpec

Score = Callable[[Any, Any], Tensor]


@contextmanager
def scored_model(
    model: nn.Module,
    batches: Iterable[Any],
    graph: InteractionGraph,
    score: Score,
    *,
    input_fn: InputFn | None = None,
    mask: str | int | MaskFn | None = None,
    dtype: torch.dtype | None = None,
    memory_limit: float = MEMORY_LIMIT,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> Iterator[ScoredModel]:
    """A block in which a model can be scored with parts of it taken away; it is left exactly as it was found.

    Args:
        model: Any module.
        batches: Batches to score on.
        graph: The graph that says what the parts are.
        score: From the model's output and a batch to one score for each sample, shape ``(n,)``.
        input_fn: As for `lib_lightning.compute_interaction_graph`.
        mask: As for `lib_lightning.compute_interaction_graph`.
        dtype: As for `lib_lightning.compute_interaction_graph`.
        memory_limit: Memory to use beside model and batches, in GiB: what is needed again and does not fit is computed
            again.
        process_group: As for `lib_lightning.compute_interaction_graph`.

    Yields:
        The scored model.
    """
    instrumented = InstrumentedModel(model, graph.node_layer_specs(), ModelSpec(input_fn, mask, dtype))
    with process_group.sync_errors(), model_session(instrumented), torch.no_grad():
        parts = [batch for batch in batches if not is_empty(batch)]
        yield ScoredModel(instrumented, parts, graph, score, memory_limit, process_group)


class ScoredModel:
    """A live model, samples, and the mean score over them of whatever is done to it.

    Args:
        instrumented: The model and its node layers.
        parts: Samples, in batches.
        graph: The graph that says what can be taken away.
        score: From the model's output and a batch to one score for each sample.
        memory_limit: In GiB; a quarter of it is for what is kept between scores.
        process_group: The processes whose samples count as one set.

    Attributes:
        unablated: Mean score of the model as it is.
    """

    def __init__(
        self,
        instrumented: InstrumentedModel,
        parts: Sequence[Any],
        graph: InteractionGraph,
        score: Score,
        memory_limit: float = MEMORY_LIMIT,
        process_group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        self.instrumented, self.parts, self.graph, self.score, self.process_group = (
            instrumented,
            parts,
            graph,
            score,
            process_group,
        )
        self._memory = int(memory_limit * 2**30) // 4
        self.unablated = self._mean(
            _AblationCache(instrumented, parts, lambda part: _AsItIs(instrumented, part), 0), None
        )

    def with_features(self, node_layer: str) -> Callable[[int], float]:
        """The mean score as a function of the number of features kept in a node layer."""
        index, basis = self.graph.node_layers.index(node_layer), self._basis(node_layer)
        layers = _AblationCache(
            self.instrumented,
            self.parts,
            lambda part: AblatedLayer(self.instrumented, part, index, basis),
            self._memory,
        )
        return lambda m: self._mean(layers, m)

    def with_edges(self, before: str, after: str) -> Callable[[int], float]:
        """The mean score as a function of the number of edges kept between two neighbouring node layers."""
        index, bases = self.graph.node_layers.index(before), (self._basis(before), self._basis(after))
        E = self.graph.edges[before, after]
        sections = _AblationCache(
            self.instrumented,
            self.parts,
            lambda part: AblatedSection(self.instrumented, part, index, *bases),
            self._memory,
        )
        return lambda k: self._mean(sections, top_k_mask(E, k))

    def _basis(self, name: str) -> Basis:
        """A basis where the model is."""
        parameter = next(itertools.chain(self.instrumented.model.parameters(), self.instrumented.model.buffers()), None)
        basis = self.graph.bases[name]
        return basis if parameter is None else basis.to(parameter.device)

    def _mean(self, states: _AblationCache[_T], kept: _T) -> float:
        total, n = torch.zeros((), dtype=torch.float64), 0
        for part, state in zip(self.parts, states, strict=True):
            scores = self.score(state.output(kept), part)
            size = batch_size(part)
            if not isinstance(scores, Tensor) or scores.shape != (size,):
                got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
                raise LIBError(f"A score is one number for each of the {size} samples of a batch; got {got}.")
            total += scores.double().sum().cpu()
            n += size
        total, count = self.process_group.sum([total, torch.tensor(n)])
        if not count:
            raise LIBError("There are no samples to score.")
        if not torch.isfinite(total):
            raise NotFiniteError("The score is NaN or infinite.")
        return float(total / count)


_T = TypeVar("_T", contravariant=True)


class _Ablated(Protocol[_T]):
    """Something at one batch that gives the model's output with parts taken away."""

    nbytes: int

    def output(self, kept: _T, /) -> Any: ...


class _AsItIs:
    nbytes = 0

    def __init__(self, instrumented: InstrumentedModel, batch: Any) -> None:
        self.instrumented, self.batch = instrumented, batch

    def output(self, kept: None) -> Any:
        return self.instrumented.run(self.batch)


class _AblationCache(Generic[_T]):
    """Something made of each part of the samples: kept as far as memory allows, made anew beyond."""

    def __init__(
        self, instrumented: InstrumentedModel, parts: Sequence[Any], make: Callable[[Any], _Ablated[_T]], memory: int
    ) -> None:
        self.instrumented, self.parts, self.make, self.memory = instrumented, parts, make, memory
        self._kept: dict[int, _Ablated[_T]] = {}

    def __iter__(self) -> Iterator[_Ablated[_T]]:
        for index, part in enumerate(self.parts):
            self.instrumented.manual_seed(index)
            state = self._kept.get(index)
            if state is None:
                state = self.make(part)
                if state.nbytes <= self.memory:
                    self._kept[index] = state
                    self.memory -= state.nbytes
            yield state
