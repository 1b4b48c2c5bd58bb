"""Node layers: which activations of a model to analyse, as arrays of samples, positions and features."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lib_lightning.errors import NodeLayerError, shortened
from lib_lightning.model.feature_axis import usual_axis
from lib_lightning.model.skip_positions import SkipPositions, kept_positions, plain_skip

INPUT, OUTPUT = "input", "output"


@dataclass(frozen=True)
class NodeLayer:
    """A cut through a model: all later computation depends on the model's input only through its activations.

    A string is enough for the common cases: ``"module.path"`` is the output of a module, ``"module.path:input"`` its
    input, and ``"module.path#1"`` the second call of a module that is called several times in one forward pass.
    ``"input"`` and ``"output"`` are those of the model; the output of a child with such a name is ``"input:output"``,
    and so is that of any other module if its path alone would mean something else. This class covers the other cases.

    Args:
        taps: Tensors to read, one string as above for each. Several are concatenated. A string with ``+`` between taps
            (``"left+right"``) is the node layer that concatenates their features, one with ``|`` between them
            (``"encoder|decoder.0"``) the one that concatenates their positions.
        name: Name of the node layer. By default its taps joined by ``+``, or by ``|``.
        positions: Positions (tokens, pixels) to select: an index or a list of indices into the flattened positions.
            Negative indices count from the end. By default all positions.
        feature_dim: Axis of the features. By default it is found from the operations that make and read the tensor:
            axis 1 at convolutions, the last one at linear maps. Where these do not tell, it is axis 1 for
            four-dimensional tensors (channels-first images) and the last axis for all others, and a note says so.
        join: Axis along which several taps are concatenated: ``"features"``, or ``"positions"`` for tensors with the
            same features at different positions, such as the two streams of an encoder-decoder.
        skip_positions: Positions whose activations flow on as ever but are left out of all features: 1 for the first
            one, -1 for the last one, a list of indices or a slice; as for `compute_interaction_graph`, whose setting
            None takes over. 0 leaves out none.

    Raises:
        NodeLayerError: If there is no tap, or a tap has an empty module path.
        SettingError: If ``skip_positions`` is neither a number, nor indices, nor a slice.

    Example:
        >>> NodeLayer(["left", "right"], positions=-1).name
        'left+right'
        >>> NodeLayer(["conv:input"], name="pixels").taps
        ('conv:input',)
    """

    taps: str | Sequence[str]
    name: str = ""
    positions: int | Sequence[int] | None = None
    feature_dim: int | None = None
    join: Literal["features", "positions"] = "features"
    skip_positions: SkipPositions | None = None

    def __post_init__(self) -> None:
        taps, positions = (self.taps,) if isinstance(self.taps, str) else tuple(self.taps), self.positions
        if not taps:
            raise NodeLayerError("A node layer needs at least one tap, such as 'module.path' or 'output'.")
        for tap in taps:
            split_tap(tap)
        object.__setattr__(self, "taps", taps)
        if self.positions is not None and not isinstance(self.positions, int):
            try:
                object.__setattr__(self, "positions", tuple(int(p) for p in self.positions))
            except (TypeError, ValueError):
                object.__setattr__(self, "positions", ())
            if not self.positions or isinstance(positions, str):
                raise NodeLayerError(
                    f"positions is an index or a list of at least one index, -1 for the last one; got {positions!r}. "
                    "Omit it for all positions."
                )
        if self.join not in ("features", "positions") or (self.join == "positions" and positions is not None):
            raise NodeLayerError(
                f"join is 'features', or 'positions' together with all positions; got {self.join!r}"
                + (f" and positions={positions!r}." if positions is not None else ".")
            )
        object.__setattr__(self, "skip_positions", plain_skip(self.skip_positions))
        object.__setattr__(self, "name", self.name or ("+" if self.join == "features" else "|").join(taps))

    def read(self, tensors: Sequence[Tensor]) -> Tensor:
        """Read the tapped tensors as one array of samples, positions and features.

        Args:
            tensors: One tensor for each tap, the batch on axis 0.

        Returns:
            Activations ``a`` of shape ``(n, S, d)``; differentiable with respect to ``tensors``.

        Raises:
            NodeLayerError: If the tensors have no such axes, or differ in samples or positions.

        Example:
            >>> NodeLayer(["conv"]).read([torch.zeros(2, 3, 5, 5)]).shape
            torch.Size([2, 25, 3])
        """
        rows = [self._to_rows(tensor) for tensor in tensors]
        if len({self._common(row) for row in rows}) > 1:
            shapes = ", ".join(f"{tap} {tuple(t.shape)}" for tap, t in zip(self.taps, tensors, strict=True))
            raise NodeLayerError(
                f"The taps of node layer '{self.name}' differ in samples or "
                f"{'positions' if self.join == 'features' else 'features'} and cannot be joined: {shapes}."
            )
        a = torch.cat(rows, dim=self._join_axis) if len(rows) > 1 else rows[0]
        return self.positions_of(a)

    def write(self, values: Tensor, into: Sequence[Tensor]) -> list[Tensor]:
        """Write activations in the layout of the tapped tensors: the inverse of `read`.

        Args:
            values: Activations of shape ``(n, S, d)``.
            into: One tensor for each tap, with the values of positions that are not selected. Not modified.

        Returns:
            New tensors with the shapes of ``into``.

        Example:
            >>> layer, tokens = NodeLayer(["block"], positions=-1), torch.zeros(1, 3, 2)
            >>> layer.write(torch.ones(1, 1, 2), [tokens])[0].sum(dim=(0, 2))
            tensor([0., 0., 2.])
        """
        rows = [self._to_rows(tensor) for tensor in into]
        parts = values.split([row.shape[self._join_axis] for row in rows], dim=self._join_axis)
        written = []
        for tensor, row, part in zip(into, rows, parts, strict=True):
            if self.positions is not None:
                index = self._position_index(row.shape[1], row.device)
                part = row.clone().index_copy(1, index, part.to(row.dtype))
            written.append(self._from_rows(part, tensor.shape))
        return written

    def position_shape(self, tensors: Sequence[Tensor]) -> tuple[int, ...]:
        """Shape of all positions of a sample, also of those that the node layer does not select.

        Args:
            tensors: One tensor for each tap.

        Returns:
            ``()`` for a single position, ``(T,)`` for a sequence, ``(H, W)`` for an image.

        Example:
            >>> NodeLayer(["conv"]).position_shape([torch.zeros(2, 3, 5, 4)]), NodeLayer("fc").position_shape(
            ...     [torch.zeros(2, 3)]
            ... )
            ((5, 4), ())
        """
        first = tensors[0]
        S = sum(map(self.width, tensors)) if self.join == "positions" else self._to_rows(first).shape[1]
        axes = list(first.shape)
        if first.ndim > 1:
            del axes[self.feature_axis(first.ndim)], axes[0]
            if math.prod(axes) == S:
                return tuple(axes)
        return (S,) if S > 1 else ()

    def only(self, tap: int) -> NodeLayer:
        """This node layer with only one of its taps."""
        return self if len(self.taps) == 1 else replace(self, taps=[self.taps[tap]])

    def width(self, tensor: Tensor) -> int:
        """Length of a tapped tensor along the axis on which taps are concatenated."""
        return self._to_rows(tensor).shape[self._join_axis]

    def part(self, values: Tensor, start: int, width: int) -> Tensor:
        """The part of activations ``(n, S, d)`` that belongs to a tap, along that axis."""
        return values.narrow(self._join_axis, start, width)

    @property
    def _join_axis(self) -> int:
        return 2 if self.join == "features" else 1

    def _common(self, rows: Tensor) -> tuple[int, int]:
        """What the taps of a node layer have in common: number of samples, and positions or features."""
        return rows.shape[0], rows.shape[1 if self.join == "features" else 2]

    def masks(self, mask: Tensor | None, tensors: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """Which of the activations that `read` returns are valid, and which of these are not left out.

        Args:
            mask: True at valid positions, shape ``(n, S)`` with the ``S`` positions of the batch; None if all are.
            tensors: One tensor for each tap.

        Returns:
            Two masks ``(n, S)``, of valid positions, and of those that features are made of; None for all positions.
            The single position per sample that is there after pooling is neither padding nor left out.

        Raises:
            NodeLayerError: If the node layer has another number of positions than the mask, more than one, or all of
                them are left out.
        """
        n, S, _ = self._to_rows(tensors[0]).shape
        widths = [S]
        if self.join == "positions":
            widths = list(map(self.width, tensors))
            S = sum(widths)
        if mask is not None and S == 1 and self.positions is None and mask.shape != (n, 1):
            mask = None
        if mask is not None and mask.shape != (n, S):
            raise NodeLayerError(
                f"The mask has shape {tuple(mask.shape)}, but node layer '{self.name}' has {n} samples and {S} "
                "positions: every node layer with more than one position needs a mask of its positions."
            )
        skip = plain_skip(self.skip_positions)
        if not skip or S == 1:  # 0, no indices, or nothing said
            valid = None if mask is None else self._at_positions(mask)
            return valid, valid
        # Without a mask all samples are alike, and one stands for all of them.
        all_valid = mask if mask is not None else torch.ones(1, S, dtype=torch.bool, device=tensors[0].device)
        # Tensors that are joined have their own first and last positions.
        kept = torch.cat([kept_positions(skip, part) for part in all_valid.split(widths, dim=1)], dim=1)
        kept = self._at_positions(kept)
        if mask is not None:
            return self._at_positions(mask), kept
        if not kept.any():
            raise NodeLayerError(
                f"skip_positions={self.skip_positions!r} leaves out all positions of node layer '{self.name}', which "
                f"has {S}. Leave out fewer, or give this node layer its own: NodeLayer(..., skip_positions=0)."
            )
        return None, None if kept.all() else kept.expand(n, -1)

    def _at_positions(self, mask: Tensor) -> Tensor:
        return mask if self.positions is None else mask[:, self._position_index(mask.shape[1], mask.device)]

    def feature_axis(self, ndim: int) -> int:
        """The axis of features of a tensor with so many axes."""
        return usual_axis(ndim) if self.feature_dim is None else self.feature_dim

    def _to_rows(self, tensor: Tensor) -> Tensor:
        if tensor.ndim == 0:
            raise NodeLayerError(
                f"Node layer '{self.name}' is a scalar without a batch axis. Tap it before the reduction."
            )
        if tensor.ndim == 1:
            return tensor.reshape(-1, 1, 1)
        axis = self.feature_axis(tensor.ndim)
        if not -tensor.ndim <= axis < tensor.ndim or axis in (0, -tensor.ndim):
            raise NodeLayerError(
                f"feature_dim={axis} of node layer '{self.name}' is not a feature axis of shape {tuple(tensor.shape)}."
            )
        moved = tensor.movedim(axis, -1)
        return moved.reshape(moved.shape[0], math.prod(moved.shape[1:-1]), moved.shape[-1])

    def _from_rows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        if len(shape) == 1:
            return rows.reshape(shape)
        axis = self.feature_axis(len(shape))
        moved_shape = torch.empty(shape, device="meta").movedim(axis, -1).shape
        return rows.reshape(moved_shape).movedim(-1, axis)

    def positions_of(self, rows: Tensor) -> Tensor:
        """Select the node layer's positions: ``(n, S_all, d)`` to ``(n, S, d)``."""
        return rows if self.positions is None else rows[:, self._position_index(rows.shape[1], rows.device)]

    def _position_index(self, size: int, device: torch.device) -> Tensor:
        assert self.positions is not None
        wanted = (self.positions,) if isinstance(self.positions, int) else self.positions
        if any(not -size <= p < size for p in wanted):
            raise NodeLayerError(
                f"Node layer '{self.name}' has {size} positions; positions={list(wanted)} is out of range."
            )
        return torch.tensor([p % size for p in wanted], device=device)


@dataclass(frozen=True)
class NodesAsPositions(NodeLayer):
    """A node layer in a batch of graphs, whose tensors have the nodes of all graphs on axis 0: nodes are positions.

    Args:
        nodes: Number of nodes of each graph.

    Example:
        >>> NodesAsPositions(["conv"], nodes=3).read([torch.zeros(6, 2)]).shape
        torch.Size([2, 3, 2])
    """

    nodes: int = 1

    def _to_rows(self, tensor: Tensor) -> Tensor:
        rows = super()._to_rows(tensor)
        return rows.reshape(len(rows) // self.nodes, self.nodes * rows.shape[1], rows.shape[2])


def as_node_layers(specs: Sequence[str | NodeLayer]) -> list[NodeLayer]:
    """Convert a user's list of node layers to `NodeLayer` objects, with different names.

    Args:
        specs: Strings or node layers, in forward order.

    Returns:
        One node layer for each entry.

    Raises:
        NodeLayerError: If there are fewer than two, or two of them share a name.

    Example:
        >>> [layer.name for layer in as_node_layers(["fc1:input", "output"])]
        ['fc1:input', 'output']
    """
    if isinstance(specs, str) or not isinstance(specs, Sequence) or len(specs) < 2:
        raise NodeLayerError(
            f"At least two node layers are needed; got {shortened(repr(specs), 80)}. Write a list such as "
            "['input', 'output']."
        )
    layers = [spec if isinstance(spec, NodeLayer) else as_node_layer(spec) for spec in specs]
    names = [layer.name for layer in layers]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise NodeLayerError(f"Node layers have different names; {', '.join(repeated)} occurs more than once.")
    return layers


def as_node_layer(spec: object) -> NodeLayer:
    """Convert a string or a list of taps to a `NodeLayer`.

    Args:
        spec: A tap, taps joined by ``+`` or ``|``, or a list of taps.

    Returns:
        The node layer.

    Raises:
        NodeLayerError: If it is anything else.

    Example:
        >>> as_node_layer("left+right").taps, as_node_layer("encoder|decoder.0").join
        (('left', 'right'), 'positions')
    """
    if isinstance(spec, str):
        return _from_string(spec)
    taps = spec
    if not isinstance(taps, (list, tuple)) or not all(isinstance(tap, str) for tap in taps):
        raise NodeLayerError(
            f"{shortened(repr(spec), 80)} is not a node layer, which is a string such as 'module.path', a list of "
            "these, or a NodeLayer."
        )
    return NodeLayer(taps)


def _from_string(spec: str) -> NodeLayer:
    sign = "|" if "|" in spec else "+"
    taps = spec.split(sign)
    is_joined = len(taps) > 1 and all(map(_is_tap, taps))  # "a+" can only be the name of a module
    layer = _joined(taps, sign) if is_joined else NodeLayer(spec)
    object.__setattr__(layer, "_is_string", True)
    return layer


def _joined(taps: Sequence[str], sign: str) -> NodeLayer:
    return NodeLayer(taps, join="positions" if sign == "|" and len(taps) > 1 else "features")


def readings(layer: NodeLayer) -> Iterator[list[NodeLayer]]:
    """What the string of a node layer could mean in models with modules that have ``+`` or ``|`` in their names.

    Args:
        layer: The node layer that `as_node_layer` made of it.

    Yields:
        Node layers of one tap, then of two, and so on. Nothing if the node layer was not given as such a string.

    Example:
        >>> [[part.taps for part in parts] for parts in readings(as_node_layer("a+b+c"))]
        [[('a+b+c',)], [('a', 'b+c'), ('a+b', 'c')], [('a', 'b', 'c')]]
        >>> list(readings(as_node_layer(["a", "b"])))
        []
    """
    if not getattr(layer, "_is_string", False):
        return
    divided = {sign: layer.name.split(sign) for sign in "+|"}
    for count in range(1, 1 + max(map(len, divided.values()))):
        found = []
        for sign, words in divided.items():
            if count > 1 or sign == "+":  # a single tap is not joined
                for cuts in itertools.combinations(range(1, len(words)), count - 1):
                    ends = itertools.pairwise([0, *cuts, len(words)])
                    taps = [sign.join(words[start:end]) for start, end in ends]
                    if all(map(_is_tap, taps)):
                        found.append(_joined(taps, sign))
        yield found


def with_known_axis(layer: NodeLayer) -> NodeLayer:
    """The same node layer, as it was in an earlier computation: without ``feature_dim`` its axis is the usual one.

    Args:
        layer: The node layer, newly made.

    Returns:
        The node layer, whose axis of features is not looked for.

    Example:
        >>> has_known_axis(with_known_axis(NodeLayer("conv"))), has_known_axis(NodeLayer("conv"))
        (True, False)
    """
    object.__setattr__(layer, "_has_known_axis", True)
    return layer


def has_known_axis(layer: NodeLayer) -> bool:
    """Whether the axis of features of a node layer is known, and not to be looked for."""
    return layer.feature_dim is not None or getattr(layer, "_has_known_axis", False)


@dataclass(frozen=True)
class Tap:
    """The parts of a tap's name.

    Attributes:
        path: Path of the module; empty for the model itself.
        side: ``"input"`` or ``"output"``.
        call: Index of the call in one forward pass, from 0. None requires that the module is called only once.
    """

    path: str
    side: str
    call: int | None


def split_tap(tap: str) -> Tap:
    """Parse the name of a tap.

    Args:
        tap: ``"module.path"``, ``"module.path:input"``, ``"module.path:output"``, ``"input"`` or ``"output"``. The
            index of a call may follow the path, ``"module.path#1:input"``. A path that has ``:`` or ``#`` in it is
            followed by ``:input`` or ``:output``, and by ``#`` ahead of that if it ends like the index of a call.

    Returns:
        Its parts.

    Raises:
        NodeLayerError: If the tap is not of that form.

    Example:
        >>> split_tap("fc1:input"), split_tap("fc1#2"), split_tap("output"), split_tap("output:output")
        (Tap(path='fc1', side='input', call=None),
         Tap(path='fc1', side='output', call=2),
         Tap(path='', side='output', call=None),
         Tap(path='output', side='output', call=None))
    """
    if tap in (INPUT, OUTPUT):
        return Tap("", tap, None)
    if isinstance(tap, str):
        before, _, last = tap.rpartition(":")
        place, side = (before, last) if last in (INPUT, OUTPUT) else (tap, "")
        path, number, call = place.rpartition("#")
        if number and call.isascii() and call.isdecimal():
            parsed = Tap(path, side or OUTPUT, int(call))
        else:
            parsed = Tap(path if number and side and not call else place, side or OUTPUT, None)
        if parsed.path and (side or set(parsed.path).isdisjoint(":#")):
            return parsed
    near = difflib.get_close_matches(tap.rpartition(":")[2], (INPUT, OUTPUT), n=1) if ":" in str(tap) else []
    meant = f" (Did you mean '{tap.rpartition(':')[0]}:{near[0]}'?)" if near else ""
    raise NodeLayerError(
        f"{tap!r} is not a tap: write 'module.path' for a module's output, 'module.path:input' for its input, "
        f"'module.path#1' for the second of several calls, or 'input' or 'output' for the model's own.{meant}"
    )


def tap_name(tap: Tap) -> str:
    """Write a tap in the shortest way that `split_tap` reads as this one.

    Args:
        tap: The parts.

    Returns:
        Its name.

    Example:
        >>> tap_name(Tap("fc1", "output", 2)), tap_name(Tap("output", "output", None)), tap_name(Tap("a:b", "input", 1))
        ('fc1#2', 'output:output', 'a:b#1:input')
    """
    if not tap.path:
        return tap.side
    place = tap.path if tap.call is None else f"{tap.path}#{tap.call}"
    names = [*([place] if tap.side == OUTPUT else []), f"{place}:{tap.side}", f"{tap.path}#:{tap.side}"]
    return next(name for name in names if _means(name, tap))


def _is_tap(name: str) -> bool:
    try:
        split_tap(name)
    except NodeLayerError:
        return False
    return True


def _means(name: str, tap: Tap) -> bool:
    try:
        return split_tap(name) == tap
    except NodeLayerError:
        return False
