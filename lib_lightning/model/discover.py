"""Which tensors everything passes: one forward pass, watched at every module, and the graph that autograd made of it.

A tensor cuts the computation where every path from the model's input to its output leads through it. Autograd keeps all
paths that carry gradients, so one forward pass is enough to find these tensors, whatever the modules are called.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lib_lightning.model.autograd_graph import Edge, PathNode, edge_of, path_nodes
from lib_lightning.model.batch import batch_size, first_tensor, map_tensors, replace_first_tensor
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.module_paths import find_module, module_paths
from lib_lightning.model.node_layer import INPUT, OUTPUT
from lib_lightning.model.validate import watched_inputs


@dataclass
class CallSite:
    """Where a module takes or gives a tensor.

    Attributes:
        module: The module.
        side: ``"input"`` or ``"output"``.
        call: Which of the module's calls in the forward pass.
        time: Counts the places of the forward pass.
        given_on: Whether the module gives what it took, as it is.
    """

    module: nn.Module
    side: str
    call: int
    time: int
    given_on: bool = False


@dataclass
class TracedTensor:
    """One tensor of a forward pass.

    Attributes:
        shape: Its shape, the batch on axis 0.
        usable: Whether node layers can hold it: floating-point numbers, one entry for each sample.
        places: Where modules take or give it, in the order of time, before anything else is made of it.
        stage: How many operations that mix features or positions lie before it.
        step: How many operations lie before it that change more than a layout.
        uses: How many operations use it.
    """

    shape: torch.Size
    usable: bool
    places: list[CallSite] = field(default_factory=list)
    stage: int = 0
    step: int = 0
    uses: int = 0


@dataclass
class Trace:
    """What one forward pass shows.

    Attributes:
        passed: Tensors that everything passes, in forward order.
        calls: How often each module was called, by its ``id``.
        paths: Paths of each module, by its ``id``; several where it stands in several places.
    """

    passed: list[TracedTensor]
    calls: dict[int, int]
    paths: dict[int, list[str]]


def trace_forward(instrumented: InstrumentedModel, batch: Any) -> Trace:
    """Find the tensors that every path with gradients from the model's input to its output passes.

    Args:
        instrumented: The model; its node layers do not matter. Call it within `preserve_model`.
        batch: One batch; a few samples are enough.

    Returns:
        The tensors that some module takes or gives, and can be cut at.
    """
    recorder = _Recorder(instrumented, batch)
    with recorder.hooked(), watched_inputs(instrumented, recorder.n, lambda _, t: t.requires_grad_(True)) as inputs:
        instrumented.run(batch)
    passed = recorder.passed(list(inputs.values()))
    if not passed:
        # Nothing that varies was seen to enter, or no gradient comes from where it does (a frozen part under no_grad):
        # what varies and has no history, wherever a module takes or gives it, is an input then.
        recorder = _Recorder(instrumented, batch, adopts=True)
        with recorder.hooked():
            instrumented.run(batch)
        passed = recorder.passed(recorder.adopted)
    return Trace(passed, recorder.calls, recorder.paths)


class _Recorder:
    """The hooks of one forward pass and what they saw."""

    def __init__(self, instrumented: InstrumentedModel, batch: Any, adopts: bool = False) -> None:
        self.model, self.adopts = instrumented.model, adopts
        self.n = batch_size(batch) or batch_size(instrumented.spec.input_of(batch))
        self.owned = {id(t) for t in (*instrumented.model.parameters(), *instrumented.model.buffers())}
        self.adopted: list[Tensor] = []
        self.paths: dict[int, list[str]] = defaultdict(list)
        self.calls: dict[int, int] = defaultdict(int)
        self.root = find_module(instrumented.model, "")
        self._modules = {}
        for path in module_paths(instrumented.model):
            module = find_module(instrumented.model, path)
            if not isinstance(module, torch.jit.RecursiveScriptModule):  # type: ignore[attr-defined]  # takes no hooks
                self._modules[id(module)] = module
                self.paths[id(module)].append(path)
        self._clock = itertools.count()
        self._seen: dict[Edge, TracedTensor] = {}
        self._output: Edge | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self._modules.values():
                for handle in self._attach(module):
                    stack.callback(handle.remove)
            yield

    def _attach(self, module: nn.Module) -> Sequence[torch.utils.hooks.RemovableHandle]:
        taken: list[tuple[Edge | None, CallSite]] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            value = self._adopt((args, kwargs), everything=module is self.root)
            place = CallSite(module, INPUT, len(taken), next(self._clock))
            taken.append((self._note(value, place), place))
            return value[0], value[1]

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            output = self._adopt(output)
            call, self.calls[id(module)] = self.calls[id(module)], self.calls[id(module)] + 1
            place = CallSite(module, OUTPUT, call, next(self._clock))
            edge = self._note(output, place)
            if call < len(taken) and taken[call][0] == edge:
                place.given_on = taken[call][1].given_on = True
            if module is self.root:
                self._output = edge
            return output

        return module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)

    def _note(self, value: Any, place: CallSite) -> Edge | None:
        t = first_tensor(value)
        edge = edge_of(t) if t is not None and t.requires_grad else None
        if t is not None and edge is not None:
            if edge not in self._seen:
                usable = t.is_floating_point() and t.ndim > 0 and t.shape[0] == self.n
                self._seen[edge] = TracedTensor(t.shape, usable)
            self._seen[edge].places.append(place)
        return edge

    def _adopt(self, value: Any, everything: bool = False) -> Any:
        """Let a tensor without history that varies from sample to sample begin one."""
        if not self.adopts:
            return value

        def adopt(t: Tensor) -> Tensor:
            apart = t.requires_grad or id(t) in self.owned or t.ndim == 0 or t.shape[0] != self.n
            if apart or not t.is_floating_point() or (self.n > 1 and bool((t == t[:1]).all())):
                return t
            self.adopted.append(t.detach().clone().requires_grad_(True))
            return self.adopted[-1].clone()

        if everything:
            return map_tensors(value, adopt)
        first = first_tensor(value)
        new = first if first is None else adopt(first)
        return value if new is None or new is first else replace_first_tensor(value, new)

    def passed(self, sources: Sequence[Tensor]) -> list[TracedTensor]:
        """TracedTensor tensors that everything passes from the sources to the output; at least two, or none."""
        # Where each of several inputs goes its own way to the end, a smaller one is context: a mask, a time step.
        largest = max((t.numel() for t in sources), default=0)
        for chosen in (list(sources), [t for t in sources if t.numel() == largest]):
            passed = self._merged(path_nodes([edge_of(t) for t in chosen], self._output) if self._output else [])
            if len(passed) > 1:
                return passed
        return []

    def _merged(self, parts: Sequence[PathNode]) -> list[TracedTensor]:
        passed: list[TracedTensor] = []
        made = math.inf  # when the first tensor was seen that is made of the one at hand
        for part in reversed(parts):
            seen = self._seen.get(part.edge)
            if seen is None:
                continue
            if part.unavoidable and seen.usable:
                places = [place for place in seen.places if place.time < made]
                seen = replace(seen, places=places, stage=part.stage, step=part.step, uses=part.uses)
                after = passed[-1] if passed else None
                if after is not None and (after.step, after.shape) == (seen.step, seen.shape):
                    passed[-1] = replace(seen, places=places + after.places, uses=after.uses)
                elif places:
                    passed.append(seen)
            made = min(made, self._seen[part.edge].places[0].time)
        return passed[::-1]
