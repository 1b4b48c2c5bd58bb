"""Proposing node layers: which of the places where a model can be cut to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

from torch import nn

from lib_lightning.errors import LIBError, NodeLayerError, SettingError, is_out_of_memory
from lib_lightning.model.discover import CutPoint, class_name, discover_cut_points
from lib_lightning.model.instrumented import InstrumentedModel
from lib_lightning.model.model_spec import ModelSpec
from lib_lightning.model.node_layer import INPUT, OUTPUT, as_node_layer
from lib_lightning.model.output_distribution import MANY_LOGITS, find_output_distribution
from lib_lightning.model.validate import on_few_samples, validate_node_layers

# Proposed node layers at most: as many as fit side by side in a figure, and as a snapshot can afford.
LIMIT = 6
# Features of a node layer at most. Their covariance takes 128 MiB; that of four times as many would take 2 GiB.
_MAX_FEATURES = 4096
# Numbers in one sample of the input at most. Photographs have more, features of networks mostly fewer.
_MAX_INPUT_SIZE = 2**16
# Aliases to try if a cut point is not valid.
_ALIASES = 4
# Cut points to try as the last node layer.
_LAST = 3
_DEFAULT = ModelSpec()


def find_cuts(model: nn.Module, batches: Sequence[Any], spec: ModelSpec = _DEFAULT) -> list[CutPoint]:
    """Find every place where a model can be cut with a single tensor.

    One forward pass finds the tensors that dominate all paths with gradients. `validate_node_layers` then excludes
    those that have a path without gradients around them. Call this within `preserve_model`.

    Args:
        model: Any module.
        batches: Batches, of which a few samples are used.
        spec: How to call the model on a batch.

    Returns:
        The cut points, in forward order.

    Raises:
        NodeLayerError: If there are fewer than two.
        ActivationError: If there would be at least two, but their activations are NaN or infinite.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [(cut.tap, cut.features, cut.aliases) for cut in find_cuts(model, [torch.randn(3, 4)])]
        [('input', 4, ('0:input',)), ('0', 8, ('1:input',)), ('1', 8, ('2:input',)), ('output', 2, ('2',))]
    """
    search = _Search(model, batches, spec)
    return search.validated(search.candidates())


def find_cuts_and_proposals(
    model: nn.Module, batches: Sequence[Any], spec: ModelSpec = _DEFAULT
) -> tuple[list[CutPoint], list[str]]:
    """`find_cuts`, and the taps of those that are proposed.

    Args:
        model: Any module.
        batches: Batches, of which a few samples are used.
        spec: How to call the model on a batch.

    Returns:
        The cut points, and the taps, in forward order.
    """
    search = _Search(model, batches, spec)
    cuts = search.validated(search.candidates())
    return cuts, propose(cuts, has_many_logits=search.has_many_logits(cuts[-1]))


def find_proposed(model: nn.Module, batches: Sequence[Any], spec: ModelSpec = _DEFAULT) -> list[CutPoint]:
    """Propose node layers for a model: `propose` of `find_cuts`, with fewer forward passes.

    Args:
        model: Any module.
        batches: Batches, of which a few samples are used.
        spec: How to call the model on a batch.

    Returns:
        The chosen cut points, in forward order.

    Raises:
        NodeLayerError: If there are fewer than two places to cut the model at.
        ActivationError: As for `find_cuts`.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> [cut.tap for cut in find_proposed(model, [torch.randn(3, 4)])]
        ['input', '1', 'output']
    """
    search = _Search(model, batches, spec)
    cuts = search.candidates()
    has_many_logits = search.has_many_logits(cuts[-1])
    chosen = _chosen(cuts, has_many_logits)
    return chosen if search.are_valid(chosen) else _chosen(search.validated(cuts), has_many_logits)


def sizes(cuts: Sequence[CutPoint]) -> str:
    """Positions and features of cut points, for messages.

    Example:
        >>> import torch
        >>> sizes(find_proposed(nn.Linear(4, 2), [torch.randn(3, 4)]))
        '1 x 4, 1 x 2 (positions x features)'
    """
    return ", ".join(f"{cut.positions} x {cut.features}" for cut in cuts) + " (positions x features)"


def _chosen(cuts: Sequence[CutPoint], has_many_logits: bool) -> list[CutPoint]:
    taps = propose(cuts, has_many_logits=has_many_logits)
    return [cut for cut in cuts if cut.tap in taps]


def propose(cuts: Sequence[CutPoint], limit: int = LIMIT, has_many_logits: bool = False) -> list[str]:
    """Choose the cut points to look at.

    Of several cut points without a mixing operation between them, one is chosen: the input of the next layer (after the
    elementwise nonlinearity, not before it), or the output of a block rather than what a norm or pooling makes of it.
    The first and the last one are always chosen. If more than ``limit`` remain, some at even distances are chosen, from
    the outputs of repeated blocks if there are any. Very wide node layers, and inputs of very many numbers, are chosen
    only if there is nothing else. Of a model with very many logits, the last one is the node layer before its head,
    such as the final residual stream, which the logits can measure.

    Args:
        cuts: Cut points, in forward order.
        limit: Number of cut points to choose at most.
        has_many_logits: Whether the output is logits of so many classes or tokens that it is not to be chosen.

    Returns:
        Their taps, in forward order.

    Raises:
        NodeLayerError: If there are fewer than two cut points.
        SettingError: If the limit is below 2.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> propose(find_cuts(model, [torch.randn(3, 4)]))
        ['input', '1', 'output']
    """
    if limit < 2:
        raise SettingError(f"limit is the largest number of node layers to propose, at least 2; got {limit}.")
    if len(cuts) < 2:
        raise NodeLayerError(_too_few([cut.tap for cut in cuts]))
    if has_many_logits and cuts[-1].tap == OUTPUT and len(cuts) > 2:
        cuts = cuts[:-1]
    narrow = [cut for cut in cuts if cut.features <= _MAX_FEATURES]
    for candidates in ([cut for cut in narrow if not _is_large_input(cut)], narrow):
        if len(candidates) > 1:
            cuts = candidates
            break
    chosen = [_choose_from(list(group)) for _, group in groupby(cuts, lambda cut: cut.mixing_depth)]
    if len(chosen) == 1:
        chosen = [cuts[0], cuts[-1]]
    if len(chosen) > limit:
        first, *others = chosen
        depths = sorted({cut.block_depth for cut in others if cut.block_depth >= 0})
        rows = [row for depth in depths if len(row := [cut for cut in others if cut.block_depth == depth]) > 1]
        full = [row for row in rows if len(row) >= limit - 2]
        row = full[0] if full else max(rows, key=len, default=others)
        last = [] if row[-1] is others[-1] else [others[-1]]
        chosen = [first, *_evenly_spaced(row, limit - 1 - len(last)), *last]
    return [cut.tap for cut in chosen]


def _is_large_input(cut: CutPoint) -> bool:
    return cut.tap == INPUT and cut.positions * cut.features > _MAX_INPUT_SIZE


def _choose_from(group: Sequence[CutPoint]) -> CutPoint:
    """One of several cut points without a mixing operation between them."""
    first, last = group[0], group[-1]
    if last.tap == OUTPUT:
        return last
    if first.tap == INPUT:
        # Pixels that are flattened for a linear layer are its features; as an image they would be positions.
        return last if last.positions == 1 else first
    blocks = [cut for cut in group if cut.block_depth >= 0]
    return blocks[-1] if blocks else next((cut for cut in reversed(group) if not cut.is_norm), last)


def _evenly_spaced(cuts: Sequence[CutPoint], count: int) -> list[CutPoint]:
    """Some cut points at even distances, the last one included."""
    count = min(count, len(cuts))
    return [cuts[(i + 1) * len(cuts) // count - 1] for i in range(count)]


def _too_few(taps: Sequence[str]) -> str:
    found = f"only '{taps[0]}'" if taps else "none"
    return (
        f"At least two node layers are needed, and of the inputs and outputs of modules, {found} is on every path from "
        "the model's input to its output. Choose node layers by hand: tensors on parallel paths can be joined in one "
        "NodeLayer(taps=[...])."
    )


class _Search:
    """A search for cut points of one model, on a few samples."""

    def __init__(self, model: nn.Module, batches: Sequence[Any], spec: ModelSpec) -> None:
        self.model, self.batches, self.spec = model, batches, replace(spec, dtype=None)
        self._error: Exception | None = None

    def candidates(self) -> list[CutPoint]:
        """Tensors that dominate all paths with gradients, from a single forward pass."""
        instrumented = InstrumentedModel(self.model, [], self.spec)
        self.batches = instrumented.parts(self.batches)
        cuts = on_few_samples(instrumented, partial(discover_cut_points, instrumented, self.batches), self.batches)
        self.spec = replace(instrumented.spec, dtype=None)
        if len(cuts) < 2:
            raise NodeLayerError(_too_few([cut.tap for cut in cuts]))
        return cuts

    def has_many_logits(self, last: CutPoint) -> bool:
        """Whether the last cut point is the output, and logits of very many classes or tokens."""
        if last.tap != OUTPUT or last.features <= MANY_LOGITS:
            return False
        instrumented = InstrumentedModel(self.model, [], self.spec)
        with instrumented.session():
            found = instrumented.run_on_few(partial(find_output_distribution, instrumented), self.batches[0], 2)
        return found is not None and found.has_many_logits

    def validated(self, cuts: list[CutPoint]) -> list[CutPoint]:
        """The cut points that `validate_node_layers` accepts; at least two."""
        if self.are_valid(cuts):
            return cuts
        # If no cut point is valid in combination with the last one, the last one itself is not valid.
        for end in range(len(cuts) - 1, max(0, len(cuts) - 1 - _LAST), -1):
            last = cuts[end]
            valid = [good for cut in cuts[:end] if (good := self._valid_alias(cut, last))]
            if valid:
                return [*valid, last]
        assert self._error is not None
        raise self._error

    def _valid_alias(self, cut: CutPoint, last: CutPoint) -> CutPoint | None:
        """A cut point, or another name of its tensor, that is valid in combination with the last one."""
        if self.are_valid([cut, last]):
            return cut
        for tap in cut.aliases[:_ALIASES]:
            other = replace(cut, tap=tap, aliases=(), module=class_name(self.model, tap))
            if self.are_valid([other, last]):
                return other
        return None

    def are_valid(self, cuts: Sequence[CutPoint]) -> bool:
        """Whether `validate_node_layers` accepts the cut points as node layers of one model."""
        instrumented = InstrumentedModel(self.model, [as_node_layer(cut.tap) for cut in cuts], self.spec)
        try:
            validate_node_layers(instrumented, self.batches)
        except (LIBError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            self._error = self._error or error
            return False
        finally:
            instrumented.release()
        return True
