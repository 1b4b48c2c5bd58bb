"""Node layers by name: where a model can be cut, and which of these places are worth looking at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from torch import nn

from lib_lightning.errors import LIBError, NodeLayerError, is_out_of_memory
from lib_lightning.model.batch import slice_batch
from lib_lightning.model.cut_point import CutPoint, class_of, cut_point
from lib_lightning.model.discover import trace_forward
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.node_layer import INPUT, OUTPUT, NodeLayer
from lib_lightning.model.validate import validate_node_layers

# As many as are easily looked at together, and as one snapshot takes.
LIMIT = 6
# The covariance of this many features takes 128 MiB, of four times as many 2 GiB.
_WIDE = 4096
# Numbers in one sample: photographs have more, features of networks mostly fewer.
_ENORMOUS = 2**16
# Enough to see samples influence each other, as for the check.
_SAMPLES = 3
# How many other names are tried where one is no cut.
_NAMES = 4
# How many are tried as the last one.
_LAST = 3
_DEFAULT = ModelSpec()


def find_cuts(model: nn.Module, batch: Any, spec: ModelSpec = _DEFAULT) -> list[CutPoint]:
    """Find every place where a model can be cut with a single tensor.

    One forward pass shows where all paths with gradients lead through; `validate_node_layers` then
    removes what has a path without.
    To be called within `lib_lightning.model.preserve.preserve_model`.

    Args:
        model: Any module.
        batch: One batch, of which a few samples are used.
        spec: How to call the model on the batch.

    Returns:
        The places, in forward order.

    Raises:
        NodeLayerError: If there are fewer than two.
        ActivationError: If there would be more, but for activations that are NaN or infinite.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(cut.tap, cut.features, cut.aliases) for cut in find_cuts(model, torch.randn(3, 4))]
        [('input', 4, ('0:input',)), ('0', 8, ('1:input',)), ('1', 8, ('2:input',)), ('output', 2, ('2',))]
    """
    search = _Search(model, batch, spec)
    return search.verified(search.candidates())


def find_proposed(model: nn.Module, batch: Any, spec: ModelSpec = _DEFAULT) -> list[str]:
    """Choose node layers for a model: `propose` of `find_cuts`, in fewer passes through the model.

    Args:
        model: Any module.
        batch: One batch, of which a few samples are used.
        spec: How to call the model on the batch.

    Returns:
        Taps, in forward order.

    Raises:
        NodeLayerError: If there are fewer than two places to cut the model at.
        ActivationError: As for `find_cuts`.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> find_proposed(model, torch.randn(3, 4))
        ['input', '1', 'output']
    """
    search = _Search(model, batch, spec)
    cuts = search.candidates()
    taps = propose(cuts)
    if search.holds([cut for cut in cuts if cut.tap in taps]):
        return taps
    return propose(search.verified(cuts))


def propose(cuts: Sequence[CutPoint], limit: int = LIMIT) -> list[str]:
    """Choose those places that are worth looking at.

    Of several between which nothing is mixed, one: what goes into the next layer (after the activation function, not
    before it), or the output of a block rather than what a norm or pooling makes of it. The first and the last always.
    Of too many in between, some at even distances: ends of blocks, where there is a row of these. Very wide ones, and
    inputs of very many numbers, only if nothing else is there.

    Args:
        cuts: Places to choose from, in forward order.
        limit: Most places to choose.

    Returns:
        Their taps, in forward order.

    Raises:
        NodeLayerError: If there are fewer than two places.
        ValueError: If the limit is below 2.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> propose(find_cuts(model, torch.randn(3, 4)))
        ['input', '1', 'output']
    """
    if limit < 2:
        raise ValueError(f"limit is at least 2: two node layers have something between them; got {limit}.")
    if len(cuts) < 2:
        raise NodeLayerError(_too_few([cut.tap for cut in cuts]))
    modest = [cut for cut in cuts if cut.features <= _WIDE]
    for fitting in ([cut for cut in modest if not _is_enormous(cut)], modest):
        if len(fitting) > 1:
            cuts = fitting
            break
    chosen = [_of_stage(list(stage)) for _, stage in groupby(cuts, lambda cut: cut.stage)]
    if len(chosen) == 1:
        chosen = [cuts[0], cuts[-1]]
    if len(chosen) > limit:
        first, *others = chosen
        depths = sorted({cut.block for cut in others if cut.block >= 0})
        rows = [row for depth in depths if len(row := [cut for cut in others if cut.block == depth]) > 1]
        full = [row for row in rows if len(row) >= limit - 2]
        row = full[0] if full else max(rows, key=len, default=others)
        last = [] if row[-1] is others[-1] else [others[-1]]
        chosen = [first, *_spread(row, limit - 1 - len(last)), *last]
    return [cut.tap for cut in chosen]


def _is_enormous(cut: CutPoint) -> bool:
    return cut.tap == INPUT and cut.positions * cut.features > _ENORMOUS


def _of_stage(stage: Sequence[CutPoint]) -> CutPoint:
    """One of several places between which nothing is mixed."""
    first, last = stage[0], stage[-1]
    if last.tap == OUTPUT:
        return last
    if first.tap == INPUT:
        # Pixels flattened for a linear layer are its features; as an image they would be positions.
        return last if last.positions == 1 else first
    blocks = [cut for cut in stage if cut.block >= 0]
    return blocks[-1] if blocks else next((cut for cut in reversed(stage) if not cut.norm), last)


def _spread(cuts: Sequence[CutPoint], wanted: int) -> list[CutPoint]:
    """So many of them at even distances, with the last one."""
    wanted = min(wanted, len(cuts))
    return [cuts[(i + 1) * len(cuts) // wanted - 1] for i in range(wanted)]


def _too_few(taps: Sequence[str]) -> str:
    found = f"only '{taps[0]}'" if taps else "none"
    return (
        f"At least two node layers are needed, and of the tensors that modules take or give for each sample, {found} "
        "is passed by everything between the model's input and its output. Choose node layers by hand: tensors that "
        "run side by side can be joined in one NodeLayer(taps=[...])."
    )


class _Search:
    """A model and a few samples to look for cuts with."""

    def __init__(self, model: nn.Module, batch: Any, spec: ModelSpec) -> None:
        self.model, self.batch, self.spec = model, batch, spec
        self.problem: Exception | None = None

    def candidates(self) -> list[CutPoint]:
        """Places that all paths with gradients lead through, after a single forward pass."""
        instrumented = InstrumentedModel(self.model, [], replace(self.spec, mask=None, dtype=None))
        few = slice_batch(self.batch, 0, _SAMPLES)
        try:
            found = trace_forward(instrumented, few)
        except Exception:
            # Perhaps something in the batch is not one entry a sample, though it has that length.
            found = trace_forward(instrumented, self.batch)
        cuts = [cut_point(self.model, seen, found) for seen in found.passed]
        if len(cuts) < 2:
            raise NodeLayerError(_too_few([cut.tap for cut in cuts]))
        return cuts

    def verified(self, cuts: list[CutPoint]) -> list[CutPoint]:
        """Those that `validate_node_layers` finds no fault with; at least two."""
        if self.holds(cuts):
            return cuts
        # If none goes with the last one, it is the last one that is wrong.
        for end in range(len(cuts) - 1, max(0, len(cuts) - 1 - _LAST), -1):
            last = cuts[end]
            proper = [good for cut in cuts[:end] if (good := self._proper(cut, last))]
            if proper:
                return [*proper, last]
        assert self.problem is not None
        raise self.problem

    def _proper(self, cut: CutPoint, last: CutPoint) -> CutPoint | None:
        """One that goes with the last one, perhaps under another name: where another module takes the same tensor."""
        if self.holds([cut, last]):
            return cut
        for tap in cut.aliases[:_NAMES]:
            other = replace(cut, tap=tap, aliases=(), module=class_of(self.model, tap))
            if self.holds([other, last]):
                return other
        return None

    def holds(self, cuts: Sequence[CutPoint]) -> bool:
        """Whether `validate_node_layers` accepts these node layers together."""
        layers = [NodeLayer([cut.tap]) for cut in cuts]
        instrumented = InstrumentedModel(self.model, layers, replace(self.spec, dtype=None))
        try:
            validate_node_layers(instrumented, self.batch)
        except (LIBError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            self.problem = self.problem or error
            return False
        finally:
            instrumented.release()
        return True
