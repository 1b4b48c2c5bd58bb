"""Finding the places where a model can be cut, from one forward pass.

A tensor cuts the computation if it is a dominator: every path from the model's input to its output goes through it.
Autograd records every path that carries gradients, so a single forward pass, hooked at every module, is enough to find
these tensors, whatever the modules are called.
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

from lib_lightning.errors import NodeLayerError
from lib_lightning.model.autograd_graph import Edge, PathNode, edge_of, path_nodes
from lib_lightning.model.batch import first_tensor, map_tensors, replace_first_tensor, tensors_in, why_not_dense
from lib_lightning.model.batch_layout import graph_sizes
from lib_lightning.model.exchange import Exchange, exchanges, first_samples
from lib_lightning.model.feature_axis import FeatureAxes, TensorRecord
from lib_lightning.model.instrumented import InstrumentedModel, fixed_tensors
from lib_lightning.model.module_paths import accepts_hooks, as_in_model, find_module, module_paths
from lib_lightning.model.node_layer import (
    INPUT,
    OUTPUT,
    NodeLayer,
    NodesAsPositions,
    Tap,
    as_node_layer,
    split_tap,
    tap_name,
)
from lib_lightning.model.sources import SampleSources, follow_use, in_model
from lib_lightning.model.steps import is_preparing

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
# Sources that are tried as the input of an encoder.
_MAX_STREAMS = 4


@dataclass(frozen=True)
class CutPoint:
    """A place where a model can be cut with a single tensor, or with the output of an encoder and another tensor.

    Attributes:
        tap: Its name, to be used as a node layer. ``"encoder|decoder.0"`` joins two tensors along their positions.
        shape: Shape of the tensor, without the batch axis.
        positions: Number of positions ``S``, as a `NodeLayer` reads them.
        features: Number of features ``d`` at each position.
        aliases: Other names of the same tensor: inputs and outputs of other modules.
        module: Class name of the module that ``tap`` names.
        proposed: Whether it is one of the proposed node layers.
        mixing_depth: Number of operations before it that mix features or positions. Cut points of the same depth differ
            by elementwise nonlinearities, norms, pooling, or layout.
        block_depth: For the output of a block that is repeated, its depth in the module tree; otherwise -1.
        is_norm: Whether it is the output of a norm that no skip connection bypasses.
    """

    tap: str
    shape: tuple[int, ...]
    positions: int
    features: int
    aliases: tuple[str, ...]
    module: str
    proposed: bool = False
    mixing_depth: int = field(default=0, repr=False)
    block_depth: int = field(default=-1, repr=False)
    is_norm: bool = field(default=False, repr=False)


@dataclass
class CallSite:
    """A module's input or output in one of its calls.

    Attributes:
        module: The module.
        side: ``"input"`` or ``"output"``.
        call: Index of the call among the module's calls in the forward pass.
        time: Index among all call sites of the forward pass.
        passthrough: Whether the module returns its input unchanged.
    """

    module: nn.Module
    side: str
    call: int
    time: int
    passthrough: bool = False


@dataclass
class TracedTensor:
    """A tensor of the forward pass that is the input or output of a module.

    Attributes:
        shape: Its shape, with the batch on axis 0.
        is_usable: Whether a node layer can hold it: floating point, and one entry for each sample.
        call_sites: Modules it is an input or output of, in the order of the forward pass.
        mixing_depth: Number of operations before it that mix features or positions.
        op_depth: Number of operations before it that change more than the layout.
        uses: Number of operations that use it.
        beside: A tensor that cuts the computation only together with this one, such as an encoder's output beside a
            decoder's stream; None if this one does so alone.
        record: The operations around it, which tell the axis of its features.
    """

    shape: torch.Size
    is_usable: bool
    call_sites: list[CallSite] = field(default_factory=list)
    mixing_depth: int = 0
    op_depth: int = 0
    uses: int = 0
    beside: TracedTensor | None = None
    record: TensorRecord | None = None


def discover_cut_points(instrumented: InstrumentedModel, batches: Sequence[Any], limit: int) -> list[CutPoint]:
    """Find the tensors that dominate all paths with gradients from the model's input to its output.

    Args:
        instrumented: The model; its node layers are ignored. Call this within `preserve_model`.
        batches: Batches; a few samples are enough.
        limit: Number of samples to use at most; 0 for whole batches.

    Returns:
        The cut points that are inputs or outputs of modules, in forward order. Paths without gradients are not checked.

    Raises:
        NodeLayerError: If there are none, because the model computes another number of rows than there are samples.
    """
    search = SampleSources(instrumented.model)
    exchange = _compared(instrumented, batches, limit, search)
    samples = first_samples(batches[0], instrumented.layout(batches[0]), limit) if exchange is None else exchange.batch
    try:
        # If no gradient reaches the sources (a frozen part under no_grad), they are looked for after it. If all samples
        # are the same, every tensor without history at a module's input or output may be a source.
        for again in (False, True):
            trace = _Trace(instrumented, samples, infer_inputs=exchange is None)
            with search.mark(again, hold_masks=True) as sources, trace.hooked(), trace.axes:
                instrumented.run(samples)
            dominators = trace.dominators(sources or trace.inferred)
            if dominators or exchange is None:
                break
    finally:
        search.release()
    if not dominators and len(trace.other_rows) == 1:
        raise NodeLayerError(
            f"The model computes {max(trace.other_rows)} rows of {trace.n} samples of a batch: a step may cut samples "
            "into several, such as windows of a series. Node layers need one row for each sample: give batches of what "
            "forward() receives, with LIBCallback(dataloader=batches, input_fn=lambda batch: (batch,))."
        )
    return [cut for tensor in dominators if (cut := trace.cut_point(tensor))]


def _compared(
    instrumented: InstrumentedModel, batches: Sequence[Any], limit: int, search: SampleSources
) -> Exchange | None:
    """Run a model on two sets of samples; returns them, or None if nothing in the model differs."""
    for exchange in exchanges(batches, instrumented.layout(batches[0]), limit):
        data = exchange.without_context() or exchange
        search.forget()
        for samples in (data.batch, data.other):
            with search.compare(hold_masks=True), _Trace(instrumented, samples).hooked():
                instrumented.run(samples)
        if search.changed:
            return data
    return None


def class_name(model: nn.Module, tap: str) -> str:
    """Class name of the module that a tap names."""
    last = as_in_model(model, as_node_layer(tap)).taps[-1]
    return type(find_module(model, split_tap(last).path)).__name__


class _Trace:
    """One forward pass with hooks at every module, and the tensors they recorded."""

    def __init__(self, instrumented: InstrumentedModel, batch: Any, infer_inputs: bool = False) -> None:
        self.model, self.infer_inputs = instrumented.model, infer_inputs
        self.n = instrumented.num_samples(batch)
        graphs = graph_sizes(batch)
        self._nodes = graphs.nodes or 1 if graphs else 1
        self.inferred: list[Tensor] = []
        # Numbers of rows of tensors that every path goes through and that have no row for each sample.
        self.other_rows: set[int] = set()
        self.axes = FeatureAxes(fixed_tensors(self.model))
        self._parameter_ids = {id(t) for t in (*self.model.parameters(), *self.model.buffers())}
        call = instrumented.find_call(batch)
        self._first, self._last = call.calls[0], call.calls[-1]
        self._entry, self._exit = (find_module(self.model, c.path) for c in (self._first, self._last))
        self._hookable: dict[int, nn.Module] = {}
        # Paths of each module, by id; several for a module that is registered in several places.
        self._paths: dict[int, list[str]] = defaultdict(list)
        for path in module_paths(self.model):
            module = find_module(self.model, path)
            if accepts_hooks(module):
                self._hookable[id(module)] = module
                self._paths[id(module)].append(path)
        self._n_calls: dict[int, int] = defaultdict(int)
        self._clock = itertools.count()
        self._traced: dict[Edge, TracedTensor] = {}
        self._output: Edge | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Register the hooks."""
        with ExitStack() as stack:
            for module in self._hookable.values():
                for handle in self._attach(module):
                    stack.callback(handle.remove)
            yield

    def dominators(self, sources: Sequence[Tensor]) -> list[TracedTensor]:
        """Tensors that every path from the sources to the output goes through; at least two, or none."""
        if len(sources) > 1 and (streams := self._encoder_and_decoder(sources)):
            return streams
        # If several inputs have separate paths to the end, the smaller ones are context: a mask, a time step.
        largest = max((t.numel() for t in sources), default=0)
        for chosen in (list(sources), [t for t in sources if t.numel() == largest]):
            nodes = path_nodes([edge_of(t) for t in chosen], self._output) if self._output else []
            dominators = self._merge_aliases(nodes)
            if len(dominators) > 1:
                return dominators
        return []

    def _encoder_and_decoder(self, sources: Sequence[Tensor]) -> list[TracedTensor]:
        """The dominators of an encoder's input, and each block of a decoder beside the encoder's output.

        Every path from the encoder's input goes through its output, and every path from the decoder's own input through
        each of its blocks, so that the two together cut the computation. Up to the encoder's output the decoder's input
        is context. Empty if there are no such blocks.
        """
        alone = [self._dominators_of(source) for source in sources[:_MAX_STREAMS]]
        best: list[TracedTensor] = []
        for one, two in itertools.permutations(range(len(alone)), 2):
            encoder = [t for t in alone[one] if not self._depends(t, sources[two])]
            if not encoder or len(encoder[-1].shape) < 3:  # a single vector is a condition rather than a stream
                continue
            known = {id(site) for tensor in alone[one] for site in tensor.call_sites}
            pairs = [
                replace(tensor, beside=encoder[-1])
                for tensor in alone[two]
                if self._is_block(tensor)
                and not any(id(site) in known for site in tensor.call_sites)
                and self._depends(tensor, sources[one])
            ]
            if pairs and len(encoder) + len(pairs) > len(best):
                best = [*encoder, *pairs, *alone[one][len(encoder) :]]
        return best

    def _dominators_of(self, source: Tensor) -> list[TracedTensor]:
        return self._merge_aliases(path_nodes([edge_of(source)], self._output)) if self._output else []

    def _is_block(self, tensor: TracedTensor) -> bool:
        return any(s.side == OUTPUT and not s.passthrough and self._block_depth(s) >= 0 for s in tensor.call_sites)

    def _depends(self, tensor: TracedTensor, source: Tensor) -> bool:
        edge = next(edge for edge, traced in self._traced.items() if traced.call_sites[0] in tensor.call_sites)
        return bool(path_nodes([edge_of(source)], edge))

    def cut_point(self, tensor: TracedTensor) -> CutPoint | None:
        """Name a traced tensor and describe it; None if it cannot be joined with the one beside it."""
        if tensor.beside is not None:
            first, second = self.cut_point(tensor.beside), self.cut_point(replace(tensor, beside=None))
            if first is None or second is None or first.features != second.features:
                return None
            return replace(
                second,
                tap=f"{first.tap}|{second.tap}",
                shape=(first.positions + second.positions, second.features),
                positions=first.positions + second.positions,
                aliases=tuple(f"{alias}|{second.tap}" for alias in first.aliases),
            )
        best = min(tensor.call_sites, key=self._rank)
        taps = [name for site in (best, *tensor.call_sites) for name in self._names(site)]
        tap, *aliases = dict.fromkeys(taps)
        axis = None if tensor.record is None else self.axes.axis_of(tensor.record).axis
        layer = NodeLayer([tap], feature_dim=axis)
        if tensor.shape[0] != self.n:
            layer = NodesAsPositions([tap], feature_dim=axis, nodes=self._nodes)
        a = layer.read([torch.empty(tensor.shape, device="meta")])
        made_by = [site for site in tensor.call_sites if site.side == OUTPUT and not site.passthrough]
        depths = [depth for site in made_by if (depth := self._block_depth(site)) >= 0]
        return CutPoint(
            tap,
            tuple(tensor.shape[1:]),
            a.shape[1],
            a.shape[2],
            tuple(aliases),
            class_name(self.model, tap),
            mixing_depth=tensor.mixing_depth,
            block_depth=min(depths, default=-1),
            is_norm=tensor.uses == 1 and any("norm" in type(site.module).__name__.lower() for site in made_by),
        )

    def _names(self, site: CallSite) -> list[str]:
        own = [site.side] if self._is_own(site) else []
        call = site.call if self._n_calls[id(site.module)] > 1 else None
        paths = [path for path in self._paths[id(site.module)] if path]
        return [*own, *(tap_name(Tap(path, site.side, call)) for path in paths)]

    def _is_own(self, site: CallSite) -> bool:
        """Whether it is the input or the output of the whole forward pass."""
        module, call = (self._entry, self._first) if site.side == INPUT else (self._exit, self._last)
        return site.module is module and site.call == call.index

    def _rank(self, site: CallSite) -> tuple[int, int]:
        """Sort key of the names of one tensor, the best name first."""
        depth = min(path.count(".") + 1 if path else 0 for path in self._paths[id(site.module)])
        if self._is_own(site):
            return 0, 0
        if site.passthrough:
            return 4, 0
        # The first of several inputs. Of several outputs that of a block, or else the one with the shortest path,
        # rather than that of the last module inside it.
        if site.side == INPUT:
            return 3, 0
        block = self._block_depth(site)
        return (1, block) if block >= 0 else (2, depth)

    def _block_depth(self, site: CallSite) -> int:
        """Depth of a block in the module tree; -1 for a module without children, or one that is not repeated."""
        path = self._paths[id(site.module)][0]
        if not path or not any(True for _ in site.module.children()):
            return -1
        is_in_row = isinstance(find_module(self.model, path.rpartition(".")[0]), _CONTAINERS)
        return path.count(".") if is_in_row or self._n_calls[id(site.module)] > 1 else -1

    def _attach(self, module: nn.Module) -> Sequence[torch.utils.hooks.RemovableHandle]:
        inputs: list[tuple[Edge | None, CallSite]] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if is_preparing():
                return args, kwargs
            site = CallSite(module, INPUT, len(inputs), next(self._clock))
            with in_model(False):
                found = tensors_in((args, kwargs))
            follow_use(found if self._is_own(site) else found[:1])
            with in_model(False):
                value = self._infer_input((args, kwargs), all_tensors=self._is_own(site))
                inputs.append((self._record(value, site), site))
            return value[0], value[1]

        def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if is_preparing():
                return output
            follow_use(tensors_in(output)[:1])
            with in_model(False):
                return record_output(output)

        def record_output(output: Any) -> Any:
            output = self._infer_input(output)
            call, self._n_calls[id(module)] = self._n_calls[id(module)], self._n_calls[id(module)] + 1
            site = CallSite(module, OUTPUT, call, next(self._clock))
            edge = self._record(output, site)
            if call < len(inputs) and inputs[call][0] == edge:
                site.passthrough = inputs[call][1].passthrough = True
            if self._is_own(site):
                self._output = edge
            return output

        return module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)

    def _record(self, value: Any, site: CallSite) -> Edge | None:
        t = first_tensor(value)
        if t is None or not t.requires_grad:
            return None
        edge = edge_of(t)
        if edge not in self._traced:
            has_rows = t.is_floating_point() and t.ndim > 0 and not why_not_dense(value)
            is_usable = has_rows and t.shape[0] in (self.n, self.n * self._nodes)
            self._traced[edge] = TracedTensor(t.shape, is_usable, record=self.axes.record(t))
        self._traced[edge].call_sites.append(site)
        return edge

    def _infer_input(self, value: Any, all_tensors: bool = False) -> Any:
        """Start a history at a tensor without one that could have one entry for each sample."""
        if not self.infer_inputs:
            return value

        def track(t: Tensor) -> Tensor:
            if why_not_dense(t):
                return t
            is_input = not (t.requires_grad or id(t) in self._parameter_ids or t.ndim == 0 or t.shape[0] != self.n)
            if not is_input or not t.is_floating_point() or (self.n > 1 and bool((t == t[:1]).all())):
                return t
            self.inferred.append(t.detach().clone().requires_grad_(True))
            return self.inferred[-1].clone()

        if all_tensors:
            return map_tensors(value, track)
        first = first_tensor(value)
        new = first if first is None else track(first)
        return value if new is None or new is first else replace_first_tensor(value, new)

    def _merge_aliases(self, nodes: Sequence[PathNode]) -> list[TracedTensor]:
        """The dominators among the nodes of all paths; those that differ only in layout become one."""
        dominators: list[TracedTensor] = []
        next_time = math.inf  # of the first call site of a tensor computed from the current one
        for node in reversed(nodes):
            traced = self._traced.get(node.edge)
            if traced is None:
                continue
            if node.is_dominator and not traced.is_usable and traced.shape:
                self.other_rows.add(traced.shape[0])
            if node.is_dominator and traced.is_usable:
                tensor = replace(
                    traced,
                    call_sites=[site for site in traced.call_sites if site.time < next_time],
                    mixing_depth=node.mixing_depth,
                    op_depth=node.op_depth,
                    uses=node.uses,
                )
                after = dominators[-1] if dominators else None
                if after is not None and (after.op_depth, after.shape) == (tensor.op_depth, tensor.shape):
                    dominators[-1] = replace(tensor, call_sites=tensor.call_sites + after.call_sites, uses=after.uses)
                elif tensor.call_sites:
                    dominators.append(tensor)
            next_time = min(next_time, traced.call_sites[0].time)
        return dominators[::-1]
