"""A progress bar whose steps have the length of their operations, so that the remaining time is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.algorithm.effort import ModelCost
from lib_lightning.algorithm.output_changes import OUTPUT_EFFECTS
from lib_lightning.algorithm.output_gradients import OUTPUT_IMPORTANCE, OUTPUT_METRIC
from lib_lightning.algorithm.progress import on_phase
from lib_lightning.algorithm.section_cache import FEATURES
from lib_lightning.model.safe_points import on_vectors

# Percentage, bar, time so far and remaining time; counts of operations would mean nothing to a reader.
BAR_FORMAT = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
# Part of a step that the products in it make up; the rest is its sums.
_PRODUCTS = 0.95


@dataclass(frozen=True)
class Step:
    """One step of a graph.

    Attributes:
        phase: The phase whose report ends it.
        length: Its share of the whole, in any unit.
        vectors: About how many vectors are multiplied with Jacobians in it.
    """

    phase: str
    length: float = 1.0
    vectors: float = 0.0


def steps_of(phases: Mapping[str, int], cost: ModelCost | None, config: LIBConfig, num_samples: int) -> list[Step]:
    """The steps of a graph in their order.

    Args:
        phases: How often each phase is reported, of `lib_lightning.algorithm.build.phases`.
        cost: Counts of operations; None for steps of equal lengths.
        config: What is computed.
        num_samples: Number of samples.

    Returns:
        The steps.
    """
    moments, *others = phases.items()
    bases = [item for item in others if item[0].startswith("basis of ")]
    edges = [item for item in others if item[0].startswith("edges from ")]
    output_metric = [item for item in others if item[0] == OUTPUT_METRIC]
    last = others[len(output_metric) + len(bases) + len(edges) :]
    n, with_jacobians = max(1, moments[1] - 1), max([count for _, count in edges], default=1)
    if cost is None or len(edges) != len(cost.sections):
        found = [Step(name) for name, count in (moments, *output_metric, *bases) for _ in range(count)]
        found += [Step(name) for _ in range(with_jacobians) for name, _ in edges]
        return found + [Step(name) for name, count in last for _ in range(count)]
    jacobian_samples = min(num_samples, config.jacobian_samples or num_samples)
    largest_chunk = -(-jacobian_samples // max(1, with_jacobians))
    of_graph = cost.steps(config, num_samples, largest_chunk=largest_chunk)
    ranks = cost.ranks()
    found = [Step(moments[0], of_graph.moments / n)] * n + [Step(moments[0], 0.0)]
    found += [Step(name, of_graph.output_metric / count) for name, count in output_metric for _ in range(count)]
    for i, (name, count) in zip(reversed(range(len(bases))), bases, strict=True):
        if count > 1 and i < len(cost.sections):
            vectors = float(config.n_probes or cost.sections[i].shape_out[0] * ranks[i + 1])
            found += [Step(name, of_graph.metrics[i] / (count - 1), vectors)] * (count - 1)
        elif count > 1:
            found += [Step(name, of_graph.moments / n)] * (count - 1)
        found.append(Step(name, of_graph.bases[i]))
    for _ in range(with_jacobians):
        for (name, _), section, r, r_out, length in zip(
            edges, cost.sections, ranks, ranks[1:], of_graph.edges, strict=False
        ):
            pushed = min(r, config.n_pushed or r, section.shape_out[0] * r_out)
            found.append(Step(name, length / with_jacobians, float(pushed)))
    lengths = {
        FEATURES: of_graph.features / n,
        OUTPUT_IMPORTANCE: of_graph.output_importance / max(1, with_jacobians),
        OUTPUT_EFFECTS: of_graph.output_effects,
        "standard errors": of_graph.errors,
    }
    vectors = float(cost.effect_vectors(config, num_samples, n))
    return found + [
        Step(name, lengths.get(name, 0.0), vectors * (name == OUTPUT_EFFECTS))
        for name, count in last
        for _ in range(count)
    ]


class ProgressDisplay:
    """Shows the progress of graphs in bars.

    Args:
        make_bar: Makes a bar: `tqdm.tqdm`, or anything with its arguments and methods.
        prefix: Text in front of the name of the present phase.

    Attributes:
        cost: Counts of operations of the model, once they are known.
    """

    def __init__(self, make_bar: Callable[..., Any], prefix: str = "") -> None:
        self._make_bar, self._prefix = make_bar, prefix
        self.cost: ModelCost | None = None

    @contextmanager
    def following(self, steps: Sequence[Step]) -> Iterator[None]:
        """Show the progress of a computation that has these steps.

        Args:
            steps: The steps, in their order.

        Yields:
            Nothing.
        """
        total = sum(step.length for step in steps) or 1.0
        with self._make_bar(total=1.0, bar_format=BAR_FORMAT, smoothing=0) as bar:
            place = _Place(steps, total, bar, self._prefix)
            with on_phase(place.end), on_vectors(place.add):
                yield


class _Place:
    """How far a computation is."""

    def __init__(self, steps: Sequence[Step], total: float, bar: Any, prefix: str) -> None:
        self._left = list(steps)
        self._total, self._bar = total, bar
        self._vectors, self._prefix = 0, prefix
        self._describe()

    def end(self, phase: str) -> None:
        """A phase is reported; some go over the batches more often than expected."""
        index = next((k for k, step in enumerate(self._left) if step.phase == phase), None)
        if index is not None:
            del self._left[index]
            self._vectors = 0
            self._describe()
            self._show(0.0)

    def _describe(self) -> None:
        if self._left:
            self._bar.set_description(f"{self._prefix}{self._left[0].phase}", refresh=False)

    def add(self, vectors: int) -> None:
        """Some vectors have been multiplied."""
        self._vectors += vectors
        if self._left and self._left[0].vectors:
            share = min(1.0, self._vectors / self._left[0].vectors)
            self._show(_PRODUCTS * share * self._left[0].length)

    def _show(self, within: float) -> None:
        left = sum(step.length for step in self._left) - within
        done = 1.0 if not self._left else min(1.0, 1.0 - left / self._total)
        if done > self._bar.n or not self._left:
            self._bar.update(done - self._bar.n)


_current: ContextVar[ProgressDisplay | None] = ContextVar("_current", default=None)


@contextmanager
def displayed_in(display: ProgressDisplay | None) -> Iterator[None]:
    """Show the progress of all graphs that are computed in a block.

    Args:
        display: Where; None for nowhere.

    Yields:
        Nothing.
    """
    token = _current.set(display)
    try:
        yield
    finally:
        _current.reset(token)


def current_display() -> ProgressDisplay | None:
    """Where the progress of graphs is shown; None for nowhere."""
    return _current.get()
