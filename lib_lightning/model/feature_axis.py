"""Which axis of a tensor holds features: found from the operations that make it and that read it.

A convolution, a batch norm or a pooling has channels on axis 1, a linear map or a layer norm has features on the last
axis. From one forward pass it is known which operations are around a tensor, through elementwise operations, slices,
transpositions and reshapes between them. Those that say where features are have one vote each; where they do not agree,
most votes decide, and where none says anything, the usual place.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lib_lightning.model.batch import tensors_in

# For each axis of a tensor the axis of another one that it corresponds to, or None.
_Axes = tuple[int | None, ...]

# Operations that have channels on axis 1 of what they read and make, by the beginning of their names.
_CHANNELS_FIRST = (
    "conv", "batch_norm", "instance_norm", "group_norm", "local_response_norm", "max_pool", "avg_pool", "lp_pool",
    "adaptive_max_pool", "adaptive_avg_pool", "fractional_max_pool", "max_unpool", "interpolate", "upsample",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold", "fold", "grid_sample", "native_group_norm",
    "native_batch_norm", "native_channel_shuffle", "dropout1d", "dropout2d", "dropout3d", "feature_dropout",
    "feature_alpha_dropout",
)  # fmt: skip
# Those that have features on the last axis.
_FEATURES_LAST = (
    "linear", "bilinear", "embedding", "lstm", "gru", "rnn", "multi_head_attention", "native_multi_head_attention",
    "transformer_encoder_layer", "layer_norm", "rms_norm", "native_layer_norm",
)  # fmt: skip
_LINEAR = ("linear", "bilinear", "lstm", "gru", "rnn")
# Methods of tensors that begin like one of these.
_OTHERS = ("unfold_copy", "convert", "conj")
# Elementwise operations that may have a vector of weights beside a tensor, one for each feature.
_WITH_VECTOR = {
    "add", "radd", "iadd", "sub", "subtract", "rsub", "isub", "mul", "multiply", "rmul", "imul", "div", "divide",
    "true_divide", "truediv", "rdiv", "rtruediv", "itruediv", "prelu",
}  # fmt: skip
_MATMUL = frozenset({"matmul", "rmatmul", "mm", "addmm"})
# Operations after which an axis is another thing.
_MIXING = {
    "matmul", "rmatmul", "imatmul", "mm", "bmm", "baddbmm", "addmm", "addbmm", "einsum", "tensordot", "dot", "outer",
    "kron", "cdist", "scaled_dot_product_attention",
}  # fmt: skip
_TRANSPOSED = frozenset({"transpose", "swapaxes", "swapdims"})
_MOVED = frozenset({"movedim", "moveaxis"})
_RESHAPED = frozenset({"view", "reshape", "view_as", "reshape_as", "flatten", "unflatten", "squeeze", "unsqueeze"})
# The attribute of tensors that holds their record.
_RECORD = "_lib_lightning_record"
# Operations that are followed at most, from one tensor.
_MAX_OPERATIONS = 300


@dataclass(eq=False)
class TensorRecord:
    """A tensor of a forward pass.

    Attributes:
        shape: Its shape.
        maker: The operation that made it; None for an input, or a tensor of unknown origin.
        readers: The operations that read it.
    """

    shape: torch.Size
    maker: _Operation | None = None
    readers: list[_Operation] = field(default_factory=list)


@dataclass(eq=False)
class _Operation:
    """An operation of a forward pass.

    Attributes:
        inputs: What it reads, with the axes of the result that axes of it correspond to.
        outputs: What it makes.
        input_axis: Axis of features of the first input, if the operation says it.
        output_axis: That of the results.
        is_linear: Whether it is a linear map of one axis, which could also be positions.
    """

    inputs: list[tuple[TensorRecord, _Axes]]
    outputs: list[TensorRecord]
    input_axis: int | None = None
    output_axis: int | None = None
    is_linear: bool = False


@dataclass(frozen=True)
class FeatureAxis:
    """The axis of features of a tensor.

    Attributes:
        axis: The axis; -1 for the last one. None for the one of `usual_axis`.
        is_guess: Whether nothing says it, or several operations say different things.
    """

    axis: int | None
    is_guess: bool


class FeatureAxes(TorchFunctionMode):
    """Follows the operations of one forward pass, which runs in this context.

    Args:
        fixed: Parameters and buffers, to which nothing is attached.

    Example:
        >>> conv, x = torch.nn.Conv1d(3, 4, 1), torch.randn(2, 3, 7)
        >>> with FeatureAxes() as axes:
        ...     h = conv(x).relu()
        ...     late = h.transpose(1, 2)
        >>> axes.axis_of(axes.record(h)), axes.axis_of(axes.record(late))
        (FeatureAxis(axis=1, is_guess=False), FeatureAxis(axis=None, is_guess=False))
    """

    def __init__(self, fixed: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._fixed = {id(t) for t in fixed}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        # What is not understood is not followed; it must not end the forward pass.
        with suppress(Exception):
            self._follow(_name(func), args, kwargs, out)
        return out

    def record(self, t: Tensor) -> TensorRecord:
        """The record of a tensor as it is now."""
        found = self._known(t)
        return self._add(t) if found is None else found

    def _known(self, t: Tensor) -> TensorRecord | None:
        owner, found = getattr(t, _RECORD, (None, None))
        return found if owner is self else None

    def _add(self, t: Tensor) -> TensorRecord:
        added = TensorRecord(t.shape)
        if id(t) not in self._fixed:
            # At the tensor itself, as long as that exists. A weak reference would keep it from being swapped.
            setattr(t, _RECORD, (self, added))
        return added

    def _follow(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        results = [t for t in _tensors((out,)) if t.is_floating_point() and t.ndim > 1]
        if not results:
            return
        tensors = [t for t in _tensors((*args, *kwargs.values())) if t.is_floating_point() and t.ndim > 0]
        read = [t for t in tensors if self._known(t) is not None or not (id(t) in self._fixed or _is_weight(t))]
        axis = _axis_of_operation(name, args, kwargs)
        if tensors and not read and axis is None:
            return
        operation = _Operation([], [], axis, axis, name.startswith(_LINEAR))
        weights = [t for t in tensors if not any(t is x for x in read)]
        if name == "einsum":
            operation.input_axis, operation.output_axis = _axes_of_einsum(args, weights)
            operation.is_linear = True
        elif name in _MATMUL and _has_matrix_on_the_right(tensors[1:] if name == "addmm" else tensors, weights):
            operation.input_axis = operation.output_axis = -1
            operation.is_linear = True
        elif name in _WITH_VECTOR and weights:
            operation.output_axis = _axis_of_vector(weights[0], results[0])
            operation.input_axis = operation.output_axis if read[0].ndim == results[0].ndim else None
        for t in read if axis is None else read[:1]:
            if operation.is_linear and operation.input_axis == -1 and t.ndim == results[0].ndim:
                mapped: _Axes = (*range(t.ndim - 1), None)
            elif axis is None and name not in _MIXING:
                mapped = _mapped(name, t.shape, results[0].shape, args, kwargs)
            else:
                mapped = (None,) * t.ndim
            record = self.record(t)
            operation.inputs.append((record, mapped))
            record.readers.append(operation)
        for t in results:
            known = self._known(t)
            made = self._add(t)
            made.maker = operation
            operation.outputs.append(made)
            if known is not None and not any(known is record for record, _ in operation.inputs):
                # An operation in place has read it, too.
                operation.inputs.append((known, tuple(range(t.ndim))))
                known.readers.append(operation)

    def axis_of(self, record: TensorRecord) -> FeatureAxis:
        """The axis of features of a tensor.

        Args:
            record: The tensor.

        Returns:
            The axis. Samples are on axis 0, so that a matrix has no other.
        """
        ndim = len(record.shape)
        if ndim < 3:
            return FeatureAxis(None, False)
        votes: Counter[int] = Counter()
        certain, beyond = set(), set()
        for vote in _votes(record):
            if vote.axis and vote.is_beyond:
                beyond.add(vote.axis)
            elif vote.axis:
                votes[vote.axis] += 1 if vote.is_linear else 2
                certain |= set() if vote.is_linear else {vote.axis}
        if not votes:
            return FeatureAxis(None, True)
        usual = usual_axis(ndim) % ndim
        most = max(votes.values())
        best = [axis for axis, count in votes.items() if count == most]
        if usual in best or (usual in beyond and not certain & set(best)):
            return FeatureAxis(None, usual not in best or 2 * most <= sum(votes.values()))
        return FeatureAxis(-1 if best[0] == ndim - 1 else best[0], 2 * most <= sum(votes.values()))


def usual_axis(ndim: int) -> int:
    """The axis of features where nothing says another: 1 for images, the last one for all others."""
    return 1 if ndim == 4 else -1


class _Vote(NamedTuple):
    """What an operation says about a tensor.

    Attributes:
        axis: Its axis of features; None if it is not among the axes of the tensor.
        is_linear: Whether the operation is a linear map.
        is_beyond: Whether another linear map is between the two.
    """

    axis: int | None
    is_linear: bool
    is_beyond: bool


def _votes(record: TensorRecord) -> Iterator[_Vote]:
    """What the operations around a tensor say about its features."""
    own: _Axes = tuple(range(len(record.shape)))
    for step in (_before, _after):
        seen, waiting = {id(record)}, [(record, own, False)]
        for _ in range(_MAX_OPERATIONS):
            if not waiting:
                break
            current, axes, is_beyond = waiting.pop(0)
            for operation, axis, other, mapped in step(current):
                if axis is not None:
                    yield _Vote(axes[axis], operation.is_linear, is_beyond)
                    if is_beyond or not operation.is_linear:
                        continue
                if id(other) not in seen:
                    seen.add(id(other))
                    here = tuple(None if k is None else axes[k] for k in mapped)
                    waiting.append((other, here, is_beyond or axis is not None))


# An operation beside a tensor, the axis that it says, and the tensor on its other side with the axes that correspond.
_Step = tuple[_Operation, int | None, TensorRecord, _Axes]


def _before(record: TensorRecord) -> Iterator[_Step]:
    """What made a tensor, and what it was made from."""
    if record.maker is not None:
        nothing = (TensorRecord(record.shape), (None,) * len(record.shape))
        for made_from, mapped in record.maker.inputs or [nothing]:
            yield record.maker, record.maker.output_axis, made_from, mapped
            if record.maker.output_axis is not None:
                break


def _after(record: TensorRecord) -> Iterator[_Step]:
    """What reads a tensor, and what is made of it."""
    for reader in record.readers:
        mapped = next(axes for read, axes in reader.inputs if read is record)
        # The other way round: for each axis of the result that of the tensor.
        back = {k: axis for axis, k in enumerate(mapped) if k is not None}
        for made in reader.outputs:
            yield reader, reader.input_axis, made, tuple(back.get(k) for k in range(len(made.shape)))
            if reader.input_axis is not None:
                break


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors in arguments of an operation, most of which are tensors and numbers."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif not (value is None or isinstance(value, (int, float, str))):
            found.extend(tensors_in(value))
    return found


def _name(func: Any) -> str:
    name = str(getattr(func, "__name__", ""))
    if name == "__get__":
        name = str(getattr(getattr(func, "__self__", None), "__name__", ""))
    return name.strip("_")


def _is_weight(t: Tensor) -> bool:
    """Whether a tensor of unknown origin could be weights of its operation."""
    return t.ndim <= 2 or sum(size > 1 for size in t.shape) <= 1


def _has_matrix_on_the_right(factors: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Whether a product is one with a matrix of weights, which maps the last axis."""
    return len(factors) == 2 and factors[1].ndim == 2 and any(factors[1] is t for t in weights)


def _axis_of_operation(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> int | None:
    if name.startswith(_OTHERS) or "tbc" in name:
        return None
    if name.startswith(("layer_norm", "rms_norm", "native_layer_norm")):
        shape = args[1] if len(args) > 1 else kwargs.get("normalized_shape", ())
        return -1 if isinstance(shape, int) or len(shape) == 1 else None  # over all axes it says nothing
    if name == "unfold" and isinstance(args[0], Tensor) and len(args) == 4:
        return None  # the method of tensors, which has windows of one axis
    if name.startswith(_CHANNELS_FIRST):
        return 1
    return -1 if name.startswith(_FEATURES_LAST) else None


def _axis_of_vector(weights: Tensor, result: Tensor) -> int | None:
    """The axis along which a vector of weights differs, of a tensor that it is added to or multiplied with."""
    long = [k - weights.ndim for k, size in enumerate(weights.shape) if size > 1]
    if len(long) != 1 or result.shape[long[0]] != weights.shape[long[0]]:
        return None
    return long[0] % result.ndim or None  # axis 0 has samples


def _axes_of_einsum(args: Sequence[Any], weights: Sequence[Tensor]) -> tuple[int | None, int | None]:
    """Axes of the features that are read and made by a product with weights."""
    equation = args[0].replace(" ", "") if isinstance(args[0], str) else ""
    operands, _, result = equation.partition("->")
    words = operands.split(",")
    tensors = args[1:] if not isinstance(args[1], (list, tuple)) else args[1]
    if len(words) != 2 or len(tensors) != 2 or len(weights) != 1:
        return None, None
    own = words[1] if tensors[1] is weights[0] else words[0]
    other = words[0] if own is words[1] else words[1]
    letters = own.replace(".", "")
    read = [_place(x, other) for x in letters if x in other and x not in result]
    made = [_place(x, result) for x in letters if x in result and x not in other]
    return (read[0] if len(read) == 1 else None), (made[0] if len(made) == 1 else None)


def _place(letter: str, word: str) -> int:
    """The axis of a letter in one of the words of an equation; after an ellipsis, counted from the end."""
    before, _, after = word.partition("...")
    return before.index(letter) if letter in before else after.index(letter) - len(after)


def _mapped(
    name: str, shape: Sequence[int], result: Sequence[int], args: Sequence[Any], kwargs: dict[str, Any]
) -> _Axes:
    """For each axis of an operand the axis of the result that it becomes."""
    ndim, unknown = len(shape), (None,) * len(shape)
    if name == "permute":
        dims = _flat(args[1:] or kwargs["dims"])
        return tuple([d % ndim for d in dims].index(axis) for axis in range(ndim))
    if name in _TRANSPOSED or name in _MOVED:
        first, second = ([d % ndim for d in _flat(given)] for given in [*args[1:], *kwargs.values()][:2])
        if name in _TRANSPOSED:
            first, second = first + second, second + first
        kept = [axis for axis in range(ndim) if axis not in first]
        free = [place for place in range(ndim) if place not in second]
        return tuple(dict(zip([*first, *kept], [*second, *free], strict=True))[axis] for axis in range(ndim))
    if name in ("t", "T", "mT", "H", "mH", "adjoint"):
        swapped = list(range(ndim))
        if name == "T":
            return tuple(reversed(swapped))
        swapped[-2:] = swapped[:-3:-1]
        return tuple(swapped)
    if name in _RESHAPED:
        return _reshaped(shape, result)
    if len(result) == ndim:
        return tuple(range(ndim))
    if name == "getitem":
        return _indexed(shape, args[1])
    if len(result) > ndim:
        if name == "stack":
            new = (_dim(args, kwargs, 0)) % len(result)
            return tuple(axis + (axis >= new) for axis in range(ndim))
        return tuple(axis + len(result) - ndim for axis in range(ndim))  # broadcast
    removed = _dim(args, kwargs, None)
    if removed is None:
        return unknown
    gone = {d % ndim for d in _flat(removed)}
    if len(result) != ndim - len(gone):
        return unknown
    kept = [axis for axis in range(ndim) if axis not in gone]
    return tuple(kept.index(axis) if axis in kept else None for axis in range(ndim))


def _reshaped(shape: Sequence[int], result: Sequence[int]) -> _Axes:
    """Axes with as many entries before them and of the same size are the same."""
    places = {(math.prod(result[:k]), size): k for k, size in enumerate(result) if size > 1}
    return tuple(places.get((math.prod(shape[:k]), size)) for k, size in enumerate(shape))


def _indexed(shape: Sequence[int], index: Any) -> _Axes:
    """Axes after an index of integers, slices, None and an ellipsis."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(part, (Tensor, list)) for part in parts):
        return (None,) * len(shape)
    used = sum(part is not None and part is not Ellipsis for part in parts)
    if Ellipsis not in parts:
        parts.append(Ellipsis)
    at = parts.index(Ellipsis)
    parts[at : at + 1] = [slice(None)] * (len(shape) - used)
    mapped: list[int | None] = []
    k = 0
    for part in parts:
        if part is None:
            k += 1
        elif isinstance(part, slice):
            mapped.append(k)
            k += 1
        else:
            mapped.append(None)
    return tuple(mapped)


def _dim(args: Sequence[Any], kwargs: dict[str, Any], usual: Any) -> Any:
    for key in ("dim", "axis"):
        if kwargs.get(key) is not None:
            return kwargs[key]
    return args[1] if len(args) > 1 and not isinstance(args[1], Tensor) else usual


def _flat(dims: Any) -> list[int]:
    if isinstance(dims, int):
        return [dims]
    return [d for part in dims for d in _flat(part)]


@contextmanager
def following(axes: FeatureAxes | None) -> Iterator[None]:
    """A block in which the operations of a forward pass are followed; None to follow none."""
    if axes is None:
        yield
        return
    with axes:
        yield
