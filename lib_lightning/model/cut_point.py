"""A place where a model can be cut: what it is called, and what lies there."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from lib_lightning.model.discover import CallSite, Trace, TracedTensor
from lib_lightning.model.module_paths import find_module
from lib_lightning.model.node_layer import INPUT, OUTPUT, NodeLayer, split_tap

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True)
class CutPoint:
    """A place where a model can be cut with a single tensor.

    Attributes:
        tap: Its name, to be used as a node layer.
        shape: Shape of the tensor, without the batch axis.
        positions: Number of positions ``S``, read as a `NodeLayer` reads it.
        features: Number of features ``d`` at each of them.
        aliases: Other names under which modules take or give the same tensor.
        module: Class of the module that ``tap`` names.
        proposed: Whether it is one of those that are worth looking at.
        stage: How many operations that mix features or positions lie before it: places of one stage differ by
            activation functions, norms, pooling, or their layout.
        block: Where it is the output of one of several blocks in a row, how deep these lie in the model; else -1.
        norm: Whether a norm has made it that nothing goes past.
    """

    tap: str
    shape: tuple[int, ...]
    positions: int
    features: int
    aliases: tuple[str, ...]
    module: str
    proposed: bool = False
    stage: int = field(default=0, repr=False)
    block: int = field(default=-1, repr=False)
    norm: bool = field(default=False, repr=False)


def cut_point(model: nn.Module, seen: TracedTensor, found: Trace) -> CutPoint:
    """Name a tensor that everything passes, and say what it is.

    Args:
        model: The model.
        seen: The tensor.
        found: The forward pass it was seen in.

    Returns:
        The place to cut at.
    """

    def names(place: CallSite) -> list[str]:
        number = f"#{place.call}" if found.calls[id(place.module)] > 1 else ""
        side = ":input" if place.side == INPUT else ""
        return [f"{path}{number}{side}" if path else place.side for path in found.paths[id(place.module)]]

    def rank(place: CallSite) -> tuple[int, int]:
        depth = min(path.count(".") + 1 if path else 0 for path in found.paths[id(place.module)])
        if depth == 0:
            return 0, 0
        if place.given_on:
            return 4, 0
        # Of inputs the earliest. Of outputs a block's, or else the shortest: not that of the last module in it.
        if place.side == INPUT:
            return 3, 0
        block = _block_depth(model, place, found)
        return (1, block) if block >= 0 else (2, depth)

    best = min(seen.places, key=rank)
    taps = [name for place in (best, *seen.places) for name in names(place)]
    tap, *aliases = dict.fromkeys(taps)
    a = NodeLayer([tap]).read([torch.empty(seen.shape, device="meta")])
    makers = [place for place in seen.places if place.side == OUTPUT and not place.given_on]
    return CutPoint(
        tap,
        tuple(seen.shape[1:]),
        a.shape[1],
        a.shape[2],
        tuple(aliases),
        class_of(model, tap),
        stage=seen.stage,
        block=min((depth for place in makers if (depth := _block_depth(model, place, found)) >= 0), default=-1),
        norm=seen.uses == 1 and any("norm" in type(place.module).__name__.lower() for place in makers),
    )


def class_of(model: nn.Module, tap: str) -> str:
    """Name of the class of the module that a tap names."""
    return type(find_module(model, split_tap(tap).path)).__name__


def _block_depth(model: nn.Module, place: CallSite, found: Trace) -> int:
    """How deep a block lies in the model; -1 for what is no block: no children, or not one of several in a row."""
    path = found.paths[id(place.module)][0]
    if not path or not any(True for _ in place.module.children()):
        return -1
    in_a_row = isinstance(find_module(model, path.rpartition(".")[0]), _CONTAINERS)
    return path.count(".") if in_a_row or found.calls[id(place.module)] > 1 else -1
