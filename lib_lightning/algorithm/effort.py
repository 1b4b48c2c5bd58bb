"""How much a graph computes: samples, probes and features pushed forward, from counts of operations.

Exact metrics and edges take a product with a section's Jacobian for each output position and feature, or for each
input feature. With many positions (images, tokens), that often takes more operations than the whole training. Random
probes and a random choice of features have the same expectation, at a cost that can be chosen. The choice follows from
shapes and from operations that are counted on a few samples, not from a clock, so that two machines compute the same
numbers.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lib_lightning.algorithm.basis_kinds import WITH_METRIC
from lib_lightning.algorithm.config import LIBConfig
from lib_lightning.algorithm.dictionary_layers import LatentCounts, try_dictionaries
from lib_lightning.algorithm.jackknife import GROUPS
from lib_lightning.algorithm.low_rank_gram import DENSE_WIDTH
from lib_lightning.algorithm.memory_plan import saved_by_autograd
from lib_lightning.algorithm.output_gradients import EXACT_OUTPUTS, SAMPLED, importance_vectors, num_vectors
from lib_lightning.algorithm.shortcuts import FAST
from lib_lightning.distributed.process_group import ProcessGroup, first_given
from lib_lightning.errors import LIBError, counted
from lib_lightning.jacobian.closed_form import BLOCK, ROWS, ClosedForm
from lib_lightning.jacobian.integrated_gradients import sections_between
from lib_lightning.jacobian.section import STACK_ELEMENTS
from lib_lightning.model.capture import CapturedLayer
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.torch_internals import operations_observed

Effort = Literal["auto", "exact"]

# Channels that kernels of convolutions compute at a time.
_CHANNELS = 16
# Kernel calls that each step of a fused recurrent layer counts as.
_CALLS_PER_STEP = 3


def _flops_of_rnn(x: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    """Operations of a fused recurrent layer: its matrices at every step."""
    weights = [t for t in args[:4] if isinstance(t, Tensor) and t.ndim == 2]
    rows = x.numel() // max(1, x.shape[-1])
    return int(2 * rows * sum(w.numel() for w in weights[:2]))


def _flops_of_rnn_backward(x: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 3 * _flops_of_rnn(x, *args)  # forward again, gradients of states and of weights


# Formulas for the floating-point operations of matrix products, convolutions and recurrent layers, by operator.
FLOP_FORMULAS = dict(FlopCounterMode(display=False).flop_registry)
_FUSED = {"mkldnn_rnn_layer": _flops_of_rnn, "mkldnn_rnn_layer_backward": _flops_of_rnn_backward}
FLOP_FORMULAS |= {getattr(torch.ops.aten, name): f for name, f in _FUSED.items() if hasattr(torch.ops.aten, name)}

# Probes, and features pushed forward, of the smallest effort; both are doubled as long as that fits.
_PROBES, _PUSHED = 4, 8
# Rows of activations that fix the leading directions of a basis, at least; and per direction.
_MIN_ROWS, _ROWS_PER_DIRECTION = 128, 8
_MIN_SAMPLES = 24
# Samples with Jacobians, at least. Means and covariances use up to so many times as many samples, or more if they need
# them.
_MIN_JACOBIANS, _MOST_WITHOUT = 64, 8
# Time of a graph relative to training steps with as many operations: 0.9 to 1.9 on eight models.
SLOWER = 1.4
# What a number in a result, and the call of a kernel, cost in floating-point operations of matrix products.
PER_NUMBER, PER_CALL = 5, 3e5
_EIGENPROBLEM = 30
# Forward passes of a graph for checks and plans, and whatever is run again.
_CHECKS = 3
# Kernels that no count of products includes: of searches and sums in the first pass; of eigenproblem and sums of a
# basis, with a metric or without; of features, checks and sums of the edges of a section at a chunk of samples; of
# importances for the output; and of errors.
_CALLS_FOR_MOMENTS, _CALLS_FOR_BASIS, _CALLS_FOR_PLAIN_BASIS, _CALLS_FOR_EDGES = 600, 300, 20, 450
_CALLS_FOR_IMPORTANCE, _CALLS_FOR_ERRORS = 300, 200
# Samples on which operations are counted, and vectors that are multiplied at once.
_COUNTED, _VECTORS = 2, 4
# Numbers in the largest tensor of a chunk of samples, at most.
_CHUNK = 2**22
# Kernels for each group of samples in each call of a product: sums are kept by group.
_CALLS_PER_GROUP = 5
# Moving features may take this share of the operations of the rest of the graph, and so many in any case.
_EFFECT_SHARE, _EFFECT_OPERATIONS = 0.1, 1.5e9
# Samples with which effects on the output are measured: at least by moving features, at least by derivatives, and at
# most. And output positions, at least.
_EFFECT_SAMPLES, _EFFECT_ROWS = (8, 4, 64), 32
# Operations that derivatives may take, as a multiple of those of the rest of the graph: in a graph of a run, and in a
# single one, there with the fewest samples (more samples may take as many as the rest). And numbers that are kept of
# derivatives, at most.
_SHARE_IN_RUN, _MOST_DERIVATIVES, _EFFECT_DERIVATIVES = 0.25, 3.0, 2**25
# About how many samples are taken of a batch; sums over samples that are kept, at most; kernels in addition to those of
# the model, in all and in each pass.
_EFFECT_BATCH, _EFFECT_NUMBERS, _CALLS_FOR_EFFECTS, _CALLS_PER_PASS = 32, 2**23, 200, 60
# Samples with which single features are ablated, at least: fewer could not tell the effect of one of many from chance.
_ABLATED_SAMPLES = 32
# Products with all output features are kept from the metric for the edges, up to this many numbers.
_KEPT = 2.5e8


@dataclass(frozen=True)
class Operations:
    """Operations of some computation on a few samples.

    Attributes:
        per_sample: Operations for each sample (and vector): floating-point operations, and `PER_NUMBER` for each
            number in a result.
        calls: Number of kernels that are called, whatever the number of samples.
        calls_per_vector: How many more are called for each vector that is multiplied in the same call.
    """

    per_sample: float
    calls: float
    calls_per_vector: float = 0.0

    def of(self, num_samples: float, vectors: float = 1, at_once: float = 1) -> float:
        """Operations for a number of samples and vectors, of which some are multiplied at once."""
        calls = vectors / at_once * self.calls + vectors * self.calls_per_vector
        return self.per_sample * num_samples * vectors + calls * PER_CALL


@dataclass(frozen=True)
class SectionCost:
    """What determines the cost of a section.

    Attributes:
        reverse: A product with the Jacobian from the output side.
        forward: A product from the input side; None if it does not work here, as it takes a second derivative.
        shape_in: Positions and width of the node layer before.
        shape_out: Positions and width of the node layer after.
        hidden: Number of hidden units of its closed form, with which sums need no products: 0 for an affine section.
            None without a closed form.
        sequential: Whether vectors are multiplied one by one, as an operation cannot be batched over vectors.
    """

    reverse: Operations
    forward: Operations | None
    shape_in: tuple[int, int]
    shape_out: tuple[int, int]
    hidden: int | None = None
    sequential: bool = False

    @property
    def has_closed_form(self) -> bool:
        """Whether sums are computed in closed form, without products."""
        return self.hidden is not None


@dataclass(frozen=True)
class GraphCost:
    """Operations of each step of a graph.

    Attributes:
        checks: Forward passes before the first sums.
        moments: The pass with the first sums.
        metrics: Products for the metric of each node layer but the last.
        bases: Eigenproblem of each node layer, and the sums for it.
        edges: Products for the edges of each section.
        output_metric: Gradients of the output for metrics.
        output_importance: Gradients of the output for the importances of all features.
        output_effects: Passes for the effects of features on the output.
        features: Features of all samples, where Jacobians are computed on fewer.
        errors: Standard errors.
    """

    checks: float
    moments: float
    metrics: Sequence[float]
    bases: Sequence[float]
    edges: Sequence[float]
    output_metric: float = 0.0
    output_importance: float = 0.0
    output_effects: float = 0.0
    features: float = 0.0
    errors: float = 0.0

    @property
    def total(self) -> float:
        """Their sum, as operations of training steps that take the same time."""
        sums = sum(self.metrics) + sum(self.bases) + sum(self.edges)
        of_output = self.output_metric + self.output_importance + self.output_effects
        return SLOWER * (self.checks + self.moments + sums + self.features + of_output + self.errors)


@dataclass(frozen=True)
class ModelCost:
    """What determines the cost of a graph.

    Attributes:
        forward: One forward pass.
        sections: The sections.
        readout: The section from the last node layer to the model's output; None if that is the output, or has no
            gradient.
        stack_elements: About how many numbers a batch of vectors has; fewer where a tensor between node layers is
            larger than they are.
        inference: One forward pass without gradients; None if that takes as much.
        latents: How many latents are active at node layers with a dictionary, by index.
    """

    forward: Operations
    sections: Sequence[SectionCost]
    readout: SectionCost | None = None
    stack_elements: int = STACK_ELEMENTS
    inference: Operations | None = None
    latents: Mapping[int, LatentCounts] = field(default_factory=dict)

    def of_graph(self, config: LIBConfig, num_samples: int) -> float:
        """Operations of a graph; see `steps`."""
        return self.steps(config, num_samples).total

    def steps(
        self, config: LIBConfig, num_samples: int, calls: float = math.inf, largest_chunk: float = math.inf
    ) -> GraphCost:
        """Operations of each step of a graph.

        Args:
            config: What to compute; its ``n_probes`` and ``n_pushed`` are taken literally, None as exact.
            num_samples: Number of samples.
            calls: Number of calls after which each loop over products is left.
            largest_chunk: Number of samples in the largest batch.

        Returns:
            The numbers of operations.
        """
        shapes = [section.shape_in for section in self.sections] + [self.sections[-1].shape_out]
        bases = []
        for i, (S, d) in enumerate(shapes):
            if i in self.latents:  # no eigenproblem: latents are computed
                bases.append(2.0 * num_samples * S * d * self.latents[i].n_latents + _CALLS_FOR_PLAIN_BASIS * PER_CALL)
                continue
            has_metric = config.basis in WITH_METRIC and (i < len(self.sections) or config.final_metric is not None)
            rank = min(d, DENSE_WIDTH) if has_metric else d
            own = _CALLS_FOR_BASIS if has_metric else _CALLS_FOR_PLAIN_BASIS
            bases.append(num_samples * S * d * rank * 4 + _EIGENPROBLEM * rank**3 + own * PER_CALL)
        points = max(1, config.integration_steps)
        # Samples on which Jacobians are computed.
        m = min(num_samples, config.jacobian_samples or num_samples)
        # Of latents only the active ones are pushed and read, and there is no metric at a node layer that has some.
        read = [self.latents[i].per_sample if i in self.latents else r for i, r in enumerate(self.ranks())]
        without = replace(config, basis="neuron", metric="next")
        sections = [
            self._of_section(
                replace(section, hidden=None) if {i, i + 1} & self.latents.keys() else section, *pair,
                without if i in self.latents else config, m, calls, largest_chunk,
            )
            for i, (section, pair) in enumerate(zip(self.sections, itertools.pairwise(read), strict=True))
        ]  # fmt: skip
        by_output = config.metric == "output"
        output_metric, importance = 0.0, 0.0
        if by_output or (config.final_metric and self.readout):
            # Gradients for the metric of the last node layer stop there.
            first = 0 if by_output else len(self.sections)
            output_metric = self._of_output(config.n_probes, EXACT_OUTPUTS, m, calls, first)
        if config.output_distribution != "none":
            vectors = importance_vectors(config, m * shapes[0][0])
            importance = self._of_output(vectors, 0, m, calls) + _CALLS_FOR_IMPORTANCE * PER_CALL
        return GraphCost(
            _CHECKS * self.forward.of(num_samples),
            self.forward.of(num_samples) + _CALLS_FOR_MOMENTS * PER_CALL,
            [0.0 if by_output else points * metric for metric, _ in sections],
            bases,
            [points * edges + _CALLS_FOR_EDGES * PER_CALL * self._chunks(m, largest_chunk) for _, edges in sections],
            output_metric,
            importance,
            self.of_effects(config, calls),
            self._of_features(num_samples, m) if m < num_samples else 0.0,
            _CALLS_FOR_ERRORS * PER_CALL,
        )

    def _of_features(self, num_samples: int, m: int) -> float:
        """Forward passes of the ``m`` samples on which Jacobians are computed, and the features of all samples."""
        shapes = [section.shape_in for section in self.sections] + [self.sections[-1].shape_out]
        features = sum(2.0 * num_samples * S * d * r for (S, d), r in zip(shapes, self.ranks(), strict=True))
        return self.forward.of(m) + (self.inference or self.forward).of(num_samples) + features

    def with_effects(self, config: LIBConfig, num_samples: int, in_run: bool = False) -> LIBConfig:
        """Choose how effects on the output are measured, with how many samples and features.

        Args:
            config: What to compute; numbers that are given are kept.
            num_samples: Number of samples.
            in_run: Whether the graph is one of many in a training, of which the last one may take longer.

        Returns:
            The configuration with the numbers. Effects are measured by moving every feature, where that takes few
            operations, or no more than a tenth of those of the rest of the graph; else by derivatives along the
            directions in which the output moves, if they fit; each with as many samples as fit, up to 64. Else a graph
            of a run has no effects, and any other has those of the most important features, at least one of each node
            layer, moved on the fewest samples.
        """
        if config.effect_samples is not None:
            return config
        layers = self._layers_with_effects()
        if config.output_distribution == "none" or not layers:
            return replace(config, effect_samples=0, effect_features=0)
        S_out, d_out = (self.readout or self.sections[-1]).shape_out
        of_rest = self.of_graph(config, num_samples) / SLOWER
        allowed = max(_EFFECT_OPERATIONS, _EFFECT_SHARE * of_rest)
        rows = -(-_EFFECT_ROWS // S_out)
        fewest, fewest_derivatives = (min(num_samples, max(few, rows)) for few in _EFFECT_SAMPLES[:2])
        most = min(num_samples, _EFFECT_SAMPLES[-1])
        every = max(rank for _, rank in layers)
        # Other bases of the same samples, such as that of single neurons, have more features than the LIB.
        widest = max(every, *(section.shape_in[1] for section in self.sections))
        if self._of_steps(fewest, every, math.inf) <= allowed:
            n = _largest(lambda n: self._of_steps(n, every, math.inf) <= allowed, fewest, most)
            return replace(config, effect_samples=n, effect_features=widest)
        share = _SHARE_IN_RUN if in_run else _MOST_DERIVATIVES
        by_derivatives = self._with_derivatives(config, (fewest_derivatives, most), widest, share, of_rest)
        if by_derivatives is not None:
            return by_derivatives
        if in_run:
            return replace(config, effect_samples=0, effect_features=0)
        most_features = max(1, min(every, _EFFECT_NUMBERS // (d_out * len(layers))))
        m = _largest(lambda m: self._of_steps(fewest, m, math.inf) <= allowed, 1, most_features)
        return replace(config, effect_samples=fewest, effect_features=m)

    def _with_derivatives(
        self, config: LIBConfig, samples: tuple[int, int], widest: int, share: float, of_rest: float
    ) -> LIBConfig | None:
        """The configuration with effects by derivatives of as many samples as fit; None if not even the fewest fit."""
        fewest, most = samples
        _, d_out = (self.readout or self.sections[-1]).shape_out
        # An output that is a linear map moves in no more directions than the map has inputs: taken to be the width of
        # the node layer before it.
        directions = min(d_out, (self.readout or self.sections[-1]).shape_in[1])
        # Of each sample, derivatives along all directions and features are kept.
        kept = _EFFECT_DERIVATIVES // ((directions + 1) * len(self._layers_with_effects()))
        features = min(widest, kept // fewest)

        def chosen(n: int) -> LIBConfig:
            return replace(config, effect_samples=n, effect_features=features, effect_directions=directions)

        def fits(n: int, share: float) -> bool:
            return n * features <= kept and self.of_effects(chosen(n)) <= share * of_rest

        if not features or not fits(fewest, share):
            return None
        return chosen(_largest(lambda n: fits(n, min(1.0, share)), fewest, most))

    def features_to_ablate(self, operations: float, available: int) -> tuple[int, int]:
        """Choose what can be ablated with a number of operations: one feature after another, on some samples.

        Args:
            operations: Operations that it may take, such as those of a graph.
            available: Number of samples to ablate on.

        Returns:
            Number of samples, and largest number of features of each node layer: all features with as many samples as
            fit, or a few samples with as many features as fit.
        """
        allowed = max(_EFFECT_OPERATIONS, operations / SLOWER)
        every = self._most_features()
        fewest = min(available, _ABLATED_SAMPLES)

        def fits(n: int, m: int) -> bool:
            return self._of_steps(n, m, math.inf) / 2 <= allowed

        if fits(fewest, every):
            return _largest(lambda n: fits(n, every), fewest, available), every
        return fewest, _largest(lambda m: fits(fewest, m), 1, every)

    def of_ablations(self, num_samples: int) -> float:
        """Operations, in those of training steps, of ablating each feature alone on a number of samples."""
        return SLOWER * self._of_steps(num_samples, self._most_features(), math.inf) / 2

    def _most_features(self) -> int:
        """Largest number of features of a node layer."""
        return max(r for _, r in [*self._layers_with_effects(), (0, self.ranks()[-1])])

    def effect_vectors(self, config: LIBConfig, num_samples: int, n_batches: int) -> int:
        """Number of vectors that are counted while effects on the output are measured, for progress.

        Args:
            config: How they are measured.
            num_samples: Number of samples of the graph.
            n_batches: Number of its batches.
        """
        n, count = config.effect_samples or 0, config.effect_features or 0
        if config.effect_directions is not None:
            batches = min(n_batches, -(-n * n_batches // max(1, num_samples)))
            return (config.effect_directions + 1) * batches * (len(self.sections) + (self.readout is not None))
        return 2 * n * sum(min(rank, count) for _, rank in self._layers_with_effects())

    def _layers_with_effects(self) -> list[tuple[int, int]]:
        """Numbers in a sample, and largest number of features, of each node layer but the output."""
        # Any latent may be active in some sample.
        ranks = [self.latents[i].n_latents + 1 if i in self.latents else r for i, r in enumerate(self.ranks())]
        shapes = [section.shape_in for section in self.sections]
        if self.readout is not None:
            shapes.append(self.readout.shape_in)
        return [(S * d, r) for (S, d), r in zip(shapes, ranks, strict=False)]

    def of_effects(self, config: LIBConfig, calls: float = math.inf) -> float:
        """Operations of the effects on the output.

        Args:
            config: How they are measured.
            calls: Number of calls after which each loop is left.

        Returns:
            The number of operations, in products.
        """
        n, count = config.effect_samples or 0, config.effect_features or 0
        if config.effect_directions is None or not n:
            return self._of_steps(n, count, calls)
        _, d_out = (self.readout or self.sections[-1]).shape_out
        vectors = config.effect_directions + 1
        to_features = sum(
            2.0 * min(rank, count) * (n * vectors * section.shape_in[1] + config.effect_directions * d_out)
            for (_, rank), section in zip(self._layers_with_effects(), [*self.sections, self.readout], strict=False)
            if section is not None
        )
        return self._of_gradients(vectors, n, calls, has_sums=False) + to_features + _CALLS_FOR_EFFECTS * PER_CALL

    def _of_steps(self, n: int, count: int, calls: float) -> float:
        """Operations of the effects on the output of up to ``count`` features of each node layer, on ``n`` samples."""
        if not n or not count:
            return 0.0
        S_out, d_out = (self.readout or self.sections[-1]).shape_out
        layers = self._layers_with_effects()
        size = max(S_out * d_out, *(numbers for numbers, _ in layers))
        at_once = max(2 * min(n, _EFFECT_BATCH), self.stack_elements // size)
        forward = self.inference or self.forward
        total = forward.of(n) + _CALLS_FOR_EFFECTS * PER_CALL
        for numbers, rank in layers:
            rows = 2.0 * n * min(rank, count)
            passes = math.ceil(rows / at_once)
            rows *= min(1.0, calls / passes)
            per_row = forward.per_sample + PER_NUMBER * (4 * numbers + 3 * S_out * d_out)
            total += rows * per_row + min(calls, passes) * (forward.calls + _CALLS_PER_PASS) * PER_CALL
        return total

    def _of_output(self, n_probes: int | None, exact_outputs: int, n: int, calls: float, first: int = 0) -> float:
        """Operations of gradients of the output with respect to the node layers from ``first`` on."""
        S_out, d_out = (self.readout or self.sections[-1]).shape_out
        vectors = num_vectors(S_out * d_out, n_probes, exact_outputs, SAMPLED) or S_out * d_out
        return self._of_gradients(vectors, n, calls, first)

    def _of_gradients(self, vectors: int, n: int, calls: float, first: int = 0, has_sums: bool = True) -> float:
        """Operations of gradients along vectors at the output.

        Args:
            vectors: Number of vectors for each sample.
            n: Number of samples.
            calls: Number of calls after which the loop is left.
            first: Index of the first node layer with respect to which there are gradients.
            has_sums: Whether their products are summed, by group of samples.
        """
        sections = [*self.sections, self.readout] if self.readout else list(self.sections)
        S_out, d_out = sections[-1].shape_out
        size = max(S * d for S, d in [*(section.shape_in for section in sections), (S_out, d_out)])
        chunk = min(n, max(1, _CHUNK // size))
        stack = min(vectors, max(1, self.stack_elements // (chunk * size)))
        stack = 1 if any(section.sequential for section in sections) else stack
        count = min(vectors, calls * stack)
        products = 0.0
        for section in sections[first:]:
            S, d = section.shape_in
            products += section.reverse.of(chunk, count, stack)
            if has_sums:
                groups = count / stack * GROUPS * _CALLS_PER_GROUP * PER_CALL
                products += groups + 4.0 * count * chunk * S * d * min(d, DENSE_WIDTH)
        return self.forward.of(n) + products * n / chunk

    def _chunks(self, num_samples: int, largest_chunk: float) -> int:
        """About the number of chunks of samples, on a CPU."""
        largest = max(S * d for section in self.sections for S, d in (section.shape_in, section.shape_out))
        return math.ceil(num_samples / min(largest_chunk, max(1, _CHUNK // largest)))

    def ranks(self) -> list[int]:
        """The largest number of features that each node layer can have; of latents, those that were active."""
        last = len(self.sections)
        ranks = [self.latents[last].anywhere if last in self.latents else self.sections[-1].shape_out[1]]
        for i, section in reversed(list(enumerate(self.sections))):
            read = math.inf if section.hidden is None else section.hidden or ranks[0]
            rank = self.latents[i].anywhere if i in self.latents else min(section.shape_in[1], read)
            ranks.insert(0, int(rank))
        return ranks

    def _of_section(
        self, section: SectionCost, r: int, r_out: int, config: LIBConfig, n: int, calls: float, largest_chunk: float
    ) -> tuple[float, float]:
        """Operations of metric and edges, between ``r`` and ``r_out`` features."""
        if section.hidden is not None:
            return _of_closed_form(section, r, r_out, n, calls)
        (S, d), (S_out, d_out) = section.shape_in, section.shape_out
        # Chunks of samples, and stacks of vectors.
        size = max(S * d, S_out * d_out)
        chunk = int(min(n, largest_chunk, max(1, _CHUNK // size)))
        stack = 1 if section.sequential else max(1, self.stack_elements // (chunk * size))

        def products(count: float, of_one: Operations, sums: float) -> float:
            at_once = min(count, stack)
            count = min(count, calls * stack)
            groups = count / at_once * GROUPS * _CALLS_PER_GROUP * PER_CALL
            return (of_one.of(chunk, count, at_once) + groups + count * chunk * sums) * n / chunk

        n_outputs = S_out * r_out
        metric = 0.0
        if config.basis in WITH_METRIC and config.metric == "next":
            metric = products(config.n_probes or n_outputs, section.reverse, 4.0 * S * d * min(d, DENSE_WIDTH))
        reading = 2.0 * S * d * r
        edges = products(n_outputs, section.reverse, reading)
        if section.forward is not None:
            pushed = min(r, config.n_pushed or r)
            edges = min(edges, products(pushed, section.forward, 2.0 * S_out * d_out * r_out))
        if metric and config.n_probes is None and config.basis == "lib":
            kept = products(n_outputs, Operations(3.0 * PER_NUMBER * S * d, 0.0), reading)
            share = min(1.0, _KEPT // (chunk * S * d * n_outputs) * chunk / n)  # of all samples of a chunk, or of none
            edges = share * kept + (1 - share) * edges
        return metric, edges

    @property
    def min_samples(self) -> int:
        """The smallest number of samples that determines the leading directions of every basis but the last."""
        shapes = [section.shape_in for section in self.sections]
        needed = [
            max(_MIN_ROWS, (i not in self.latents) * _ROWS_PER_DIRECTION * min(d, DENSE_WIDTH)) / S
            for i, (S, d) in enumerate(shapes)
        ]
        return max(_MIN_SAMPLES, math.ceil(max(needed)))

    @property
    def min_jacobians(self) -> int:
        """The smallest number of samples with Jacobians: their gradients have to fix the directions of every metric."""
        needed = [0.0]
        for i, (section, rank) in enumerate(zip(self.sections, self.ranks(), strict=False)):
            # The metric in front of an affine section is exact with any sample.
            if section.hidden != 0 and i not in self.latents:
                rows = max(_MIN_ROWS, _ROWS_PER_DIRECTION * min(rank, DENSE_WIDTH))
                needed.append(rows / (_PROBES * section.shape_in[0]))
        return min(self.min_samples, max(_MIN_JACOBIANS, math.ceil(max(needed))))


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number up to ``high`` that fits, and at least ``low``, if all numbers below one that fits do."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _of_closed_form(section: SectionCost, r: int, r_out: int, n: int, calls: float) -> tuple[float, float]:
    """Operations of metric and edges in closed form, between ``r`` and ``r_out`` features."""
    (S, d), (_, d_out), hidden = section.shape_in, section.shape_out, section.hidden or 0
    # The metric is a product of factors with as many rows as there are hidden units, or features after an affine one.
    rows = hidden or r_out
    is_small = d > DENSE_WIDTH and 2 * rows <= d
    factors = 4.0 * rows**3 if is_small else 2.0 * rows * d * (rows + d)
    metric = 4.0 * n * S * hidden**2 + GROUPS * factors + 2.0 * rows**2 * d_out
    if not hidden:
        return metric, 2.0 * r_out * d * r + PER_NUMBER * n * S * r
    # Some features of the next node layer at a time.
    at_once = max(1, BLOCK // (max(ROWS, hidden) * r))
    share = min(1.0, calls * at_once / r_out)
    return metric, share * n * S * r * r_out * (2.0 * hidden + 3 * PER_NUMBER)


@dataclass(frozen=True)
class EffortPlan:
    """What every graph of a run computes.

    Attributes:
        num_samples: Number of samples.
        n_probes: As for `lib_lightning.compute_interaction_graph`; None is exact.
        n_pushed: As for `lib_lightning.compute_interaction_graph`; None is exact.
        operations: Predicted operations of one graph.
        allowed: Operations that it may take; fewer than ``operations`` if even the smallest effort takes more.
        effect_samples: Number of samples with which effects on the output are measured; None if not chosen.
        effect_features: Largest number of features of each node layer that have them; None if not chosen.
        effect_directions: Largest number of directions of the output, if effects are derivatives; None if they are not.
        jacobian_samples: Number of samples for metric, edges and importances for the output; None for all.
    """

    num_samples: int
    n_probes: int | None
    n_pushed: int | None
    operations: float
    allowed: float
    effect_samples: int | None = None
    effect_features: int | None = None
    effect_directions: int | None = None
    jacobian_samples: int | None = None

    @classmethod
    def of(
        cls, cost: ModelCost, config: LIBConfig, num_samples: int, allowed: float, in_run: bool = False
    ) -> EffortPlan:
        """The plan of a configuration, whose ``n_probes`` and ``n_pushed`` are taken literally, None as exact."""
        config = cost.with_effects(config, num_samples, in_run)
        operations = cost.of_graph(config, num_samples)
        return cls(
            num_samples, config.n_probes, config.n_pushed, operations, allowed, config.effect_samples,
            config.effect_features, config.effect_directions, config.jacobian_samples,
        )  # fmt: skip

    def applied_to(self, config: LIBConfig) -> LIBConfig:
        """The configuration with the chosen numbers."""
        names = ("n_probes", "n_pushed", "effect_samples", "effect_features", "effect_directions", "jacobian_samples")
        return replace(config, **{name: getattr(self, name) for name in names})

    @property
    def numbers(self) -> list[float]:
        """All of it as numbers, for other processes: 0 or -1 for None."""
        chosen = (self.effect_samples, self.effect_features, self.effect_directions, self.jacobian_samples)
        others = [-1 if x is None else x for x in chosen]
        return [self.num_samples, self.n_probes or 0, self.n_pushed or 0, self.operations, self.allowed, *others]

    @classmethod
    def from_numbers(cls, numbers: Sequence[float]) -> EffortPlan:
        """From `numbers`."""
        n, probes, pushed, operations, allowed, *others = numbers
        chosen = [None if x < 0 else int(x) for x in others]
        return cls(int(n), int(probes) or None, int(pushed) or None, operations, allowed, *chosen)

    @property
    def text(self) -> str:
        """What is computed, in words."""
        metric = "the exact metric"
        if self.n_probes is not None:
            metric = f"{counted(self.n_probes, 'probe')} per sample for the metric"
        edges = "exact edges"
        if self.n_pushed is not None:
            edges = f"edges from {counted(self.n_pushed, 'feature')} per sample"
        few = ""
        if self.jacobian_samples is not None:
            few = f" ({self.jacobian_samples:,} of them for metric and edges)"
        return f"{counted(self.num_samples, 'sample')}{few}, {metric}, {edges}"

    def __str__(self) -> str:
        return f"{self.text} ({self.operations:.1e} operations)"


def measure_cost(
    instrumented: InstrumentedModel, batch: Any, dictionaries: Mapping[str, Any] = MappingProxyType({})
) -> ModelCost:
    """Count the operations of a model and its sections, and active latents of dictionaries, on a few samples.

    Args:
        instrumented: The model and its node layers. Call this within `model_session`.
        batch: One batch, of which a few samples are run.
        dictionaries: Dictionaries of node layers, by name.

    Returns:
        The costs.
    """
    cost: ModelCost = instrumented.run_on_few(partial(_measure, instrumented), batch, _COUNTED)
    return replace(cost, latents=try_dictionaries(instrumented, [batch], dictionaries)[1])


def _measure(instrumented: InstrumentedModel, batch: Any) -> ModelCost:
    n = max(1, instrumented.num_samples(batch))
    instrumented.manual_seed(0)
    captured: list[CapturedLayer] = []
    try:
        forward = counted_operations(lambda: captured.extend(instrumented.capture_to_output(batch)), n)
    except LIBError:  # the output is no activations
        captured.clear()
        forward = counted_operations(lambda: captured.extend(instrumented.capture(batch)), n)
    with torch.no_grad():
        inference = counted_operations(lambda: instrumented.run(batch), n)
    outputs = max(layer.a.numel() for layer in captured[: len(instrumented.layers)])
    _, _, largest = saved_by_autograd(instrumented, batch)
    closed_forms = FAST.closed_forms.fit(instrumented, [batch])
    sections = sections_between(captured, STACK_ELEMENTS)
    between = sections[: len(instrumented.layers) - 1]
    costs = []
    for i, section in enumerate(sections):
        is_readout = i == len(between)
        reverse = _products(section.vjp, section.a_out, n)
        costs.append(
            SectionCost(
                reverse,
                _products(section.jvp, section.a, n) if not is_readout and section.has_jvp() else None,
                (section.S_in, section.d_in),
                (section.S_out, section.d_out),
                None if is_readout else _hidden(closed_forms.closed_form_of(i, section)),
                section.sequential_only,
            )
        )
    readout = costs[-1] if len(costs) > len(between) else None
    stack_elements = STACK_ELEMENTS * outputs // max(outputs, largest)
    return ModelCost(forward, costs[: len(between)], readout, stack_elements, inference)


def _hidden(form: ClosedForm | None) -> int | None:
    return None if form is None else 0 if form.factors.affine else form.factors.hidden


def _products(product: Callable[[Tensor], Tensor], like: Tensor, n: int) -> Operations:
    """Operations of a product with a Jacobian, from one with a single vector and one with several."""
    product(torch.ones_like(like)[None])  # some graphs are made by the first product
    vectors = [torch.ones_like(like).expand(k, *like.shape) for k in (1, _VECTORS)]
    one, several = (counted_operations(partial(product, v), n) for v in vectors)
    extra = max(0.0, (several.calls - one.calls) / (_VECTORS - 1))
    return Operations(several.per_sample / _VECTORS, max(0.0, one.calls - extra), extra)


def counted_operations(run: Callable[[], object], n: int) -> Operations:
    """Run a function and count its operations.

    Args:
        run: The function.
        n: Number of samples (times vectors) that it computes on.

    Returns:
        The operations, divided by that number, and the number of calls.

    Example:
        >>> x = torch.ones(10, 4)
        >>> counted_operations(lambda: x @ torch.ones(4, 2), 10).per_sample  # and the result of torch.ones
        30.0
    """
    count = OperationCount()
    with operations_observed(count.add):
        run()
    return Operations((sum(count.flops.values()) + count.padding + PER_NUMBER * count.numbers) / n, count.calls)


def _padding(operator: Any, args: tuple[Any, ...]) -> float:
    """How many times the operations of a convolution its kernel makes, as few channels take as long as more."""
    aten = torch.ops.aten
    if operator is aten.convolution_backward:
        weight, groups, both = args[2], args[9], True
    elif operator in (aten.convolution, aten._convolution):
        weight, groups, both = args[1], args[8], False
    else:
        return 1.0
    if groups != 1:
        return 1.0
    sizes = weight.shape[:2] if both else [weight.shape[1 if args[6] else 0]]
    return math.prod(-(-int(size) // _CHANNELS) * _CHANNELS / max(1, int(size)) for size in sizes)


class OperationCount:
    """Counts floating-point operations, numbers in results, and calls of kernels.

    `FlopCounterMode` does not distinguish dtypes, and registers hooks on all modules.

    Attributes:
        flops: Floating-point operations of matrix products and convolutions, by dtype.
        padding: Operations that kernels of convolutions with few channels make on top.
        numbers: Numbers in the results of all operators.
        calls: Number of operators that were called.
    """

    def __init__(self) -> None:
        self.flops: dict[torch.dtype, int] = defaultdict(int)
        self.padding = 0.0
        self.numbers, self.calls = 0, 0

    def add(self, operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """Count one operator, for `operations_observed`."""
        formula = FLOP_FORMULAS.get(operator.overloadpacket)
        if formula is not None:
            dtype = next((arg.dtype for arg in args if isinstance(arg, Tensor)), torch.float32)
            flops = formula(*args, **kwargs, out_val=out)
            self.flops[dtype] += flops
            self.padding += (_padding(operator.overloadpacket, args) - 1) * flops
        self.calls += 1
        if operator.overloadpacket.__name__ in _FUSED:
            self.calls += _CALLS_PER_STEP * args[0].shape[0]
        if isinstance(out, Tensor):
            self.numbers += out.numel()


def choose_effort(
    cost: ModelCost,
    config: LIBConfig,
    num_samples: int,
    allowed: float,
    all_samples: bool,
    in_run: bool = False,
) -> EffortPlan:
    """Choose the most accurate computation that takes no more than a number of operations.

    Exact sums if they fit; else all samples, with as many probes and pushed features as fit; else the smallest numbers
    of these, with Jacobians of fewer samples, and then with fewer samples, but no fewer than determine the leading
    features.

    Args:
        cost: Cost of the model.
        config: What to compute; ``n_probes`` and ``n_pushed`` that are not None are kept.
        num_samples: Number of samples that there are.
        allowed: Operations that one graph may take.
        all_samples: Whether all of them are used for everything in any case.
        in_run: As for `ModelCost.with_effects`.

    Returns:
        The plan.

    Example:
        >>> product = Operations(per_sample=1e5, calls=20)
        >>> cost = ModelCost(product, [SectionCost(product, product, (16, 64), (16, 64))])
        >>> str(choose_effort(cost, LIBConfig(), 2048, 1e13, all_samples=False))
        '2,048 samples, the exact metric, exact edges (1.1e+12 operations)'
        >>> str(choose_effort(cost, LIBConfig(), 2048, 3e10, all_samples=False))
        '2,048 samples, 8 probes per sample for the metric, edges from 16 features per sample (2.8e+10 operations)'
    """
    widths = {i: section.shape_in[1] for i, section in enumerate(cost.sections)}
    widest = max({**widths, **{i: of.per_sample for i, of in cost.latents.items() if i in widths}}.values())
    has_metric = not cost.latents.keys() >= widths.keys()

    def plan(n: int, level: int | None, m: int | None = None) -> EffortPlan:
        probes = config.n_probes or (None if level is None or not has_metric else _PROBES << level)
        pushed = config.n_pushed or (None if level is None or _PUSHED << level >= widest else _PUSHED << level)
        chosen = replace(config, n_probes=probes, n_pushed=pushed, jacobian_samples=None if m == n else m)
        return EffortPlan.of(cost, chosen, n, allowed, in_run)

    exact = plan(num_samples, None)
    if exact.operations <= allowed:
        return exact
    best = plan(num_samples, 0)
    level = 1
    while (more := plan(num_samples, level)).operations <= min(allowed, exact.operations):
        best, level = more, level + 1
    for n, m in () if all_samples else _fewer_samples(cost, num_samples):
        if best.operations <= allowed:
            break
        best = plan(n, 0, m)
    return best if best.operations < exact.operations else exact


def _fewer_samples(cost: ModelCost, num_samples: int) -> Iterator[tuple[int, int]]:
    """Fewer and fewer samples, and how many of them have Jacobians."""
    n = m = num_samples
    fewest, fewest_jacobians = min(n, cost.min_samples), min(n, cost.min_jacobians)
    while n > fewest or m > fewest_jacobians:
        if m > max(fewest_jacobians, n // _MOST_WITHOUT) or n == fewest:
            m = max(fewest_jacobians, m // 2)
        else:
            n = max(fewest, n // 2)
        yield n, m


def affordable_effects(
    model: nn.Module,
    shapes: Sequence[Sequence[int]],
    config: LIBConfig,
    num_samples: int,
    latents: Mapping[int, LatentCounts],
) -> EffortPlan | None:
    """A plan in which all features have effects on the output, if the model is so small that these cost little.

    That is seen from the number of its weights, in less time than it takes to count operations.

    Args:
        model: The model.
        shapes: Positions and width of each node layer.
        config: What to compute.
        num_samples: Number of samples.
        latents: Numbers of latents of node layers with a dictionary, by index.

    Returns:
        The plan; None for a model that may be too large.
    """
    n = min(num_samples, _EFFECT_SAMPLES[-1])
    operations = 2.0 * sum(p.numel() for p in model.parameters()) * max(S for S, _ in shapes)
    features = [latents[i].n_latents + 1 if i in latents else d for i, (_, d) in enumerate(shapes)]
    if 2 * n * sum(features) * operations > _EFFECT_OPERATIONS / 4:
        return None
    return EffortPlan(num_samples, config.n_probes, config.n_pushed, 0.0, 0.0, n, max(features))


def agree(plan: EffortPlan | None, process_group: ProcessGroup) -> EffortPlan | None:
    """The plan of the first process that has one, on all processes; None if no process has one."""
    found = first_given([] if plan is None else plan.numbers, process_group)
    return EffortPlan.from_numbers(found) if found else None
